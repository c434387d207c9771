"""The names and files that examples in docstrings use without making them."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import sne_fast
from helpers.lazy_names import LazyNames
from helpers.published_folders import write_all


def _net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))


@pytest.fixture(scope="session")
def example_files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Make a folder with zoos of every published form and of this package, and the data to verify them with."""
    folder = tmp_path_factory.mktemp("published")
    data = write_all(folder)
    if all(importlib.util.find_spec(name) for name in ("pyarrow", "sklearn")):
        from sne_fast.zoo import make_digits_zoo

        make_digits_zoo(folder / "zoo", 18, max_steps=5)
        (folder / "demo").mkdir()
        (folder / "demo" / "zoo").symlink_to(folder / "zoo", target_is_directory=True)
    return folder, data


@pytest.fixture
def docstring_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, example_files: tuple[Path, dict[str, Any]]
) -> LazyNames:
    """Make the namespace of docstring examples; they run from one seed in a folder of links to `example_files`."""
    folder, data = example_files
    for entry in folder.iterdir():
        (tmp_path / entry.name).symlink_to(entry, target_is_directory=entry.is_dir())
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    net, siren, encoder = _net(), nn.Sequential(nn.Linear(1, 8), nn.Linear(8, 1)), sne_fast.SNE(hidden_dim=32)
    names = LazyNames(
        {
            "batch": lambda: encoder.pack([net, _net()]).detach(),
            "predictor": lambda: sne_fast.Predictor(encoder, target_names=["accuracy"]),
            "zoo": lambda: importlib.import_module("sne_fast.zoo").Zoo.open("zoo"),
        }
    )
    names.update(data, sne_fast=sne_fast, torch=torch, nn=nn, copy=copy, net=net, siren=siren, encoder=encoder)
    return names

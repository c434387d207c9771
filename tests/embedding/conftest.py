"""A tree of networks for tests of manifests, results and processes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from helpers.many_networks import network


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Files, a folder of several, a folder of one with its configuration, a damaged file, and a larger network."""
    root = tmp_path / "tree"
    (root / "several").mkdir(parents=True)
    (root / "one").mkdir()
    for i in range(5):
        save_file(network(i), root / "several" / f"net{i}.safetensors")
    save_file(network(7), root / "one" / "model.safetensors")
    (root / "one" / "config.json").write_text("{}")
    torch.save(network(8, width=40, depth=6), root / "large.pt")
    (root / "damaged.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{broken}")
    return root


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Give this process one thread, as workers have: the last bits of vectors depend on their number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)

"""The scripts in examples/ run: short in the inner loop, and as they stand where slow tests run."""

from __future__ import annotations

import math
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from helpers.paths import ROOT

EXAMPLES = ROOT / "examples"


def load(name: str) -> dict[str, Any]:
    return runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name=name)


def run_script(name: str, folder: Path) -> str:
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / f"{name}.py")], cwd=folder, env={**os.environ, "PYTHONPATH": paths},
        capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_every_example_is_tested() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {
        "own_checkpoints", "lightning_module", "transformers_trainer", "encode_folder",
    }  # fmt: skip


def test_own_checkpoints(tmp_path: Path) -> None:
    example = load("own_checkpoints")
    example["make_checkpoints"](tmp_path, 20)
    assert math.isfinite(example["train"](tmp_path, epochs=1))
    assert (tmp_path / "predictor" / "config.json").is_file()


def test_encode_folder(tmp_path: Path) -> None:
    example = load("encode_folder")
    example["make_checkpoints"](tmp_path)
    names, z = example["encode"](tmp_path)
    assert names == ["cnn", "deep", "mlp-noisy", "mlp"] and z.shape == (4, 64) and bool(z.isfinite().all())
    assert example["nearest"](names, z)["mlp"] == "mlp-noisy"


def test_lightning_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lightning", reason="lightning is not installed")
    monkeypatch.chdir(tmp_path)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False}
    module, losses = load("lightning_module")["run"](epochs=2, networks=8, accelerator="cpu", **quiet)
    assert len(losses) == 2 and all(map(math.isfinite, losses))
    assert type(module).__name__ == "SneModule"


def test_transformers_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for library in ("transformers", "accelerate"):
        pytest.importorskip(library, reason=f"{library} is not installed")
    monkeypatch.chdir(tmp_path)
    trainer, losses = load("transformers_trainer")["run"](epochs=2, networks=8, use_cpu=True, disable_tqdm=True)
    assert len(losses) == 2 and all(map(math.isfinite, losses))
    assert type(trainer.model).__name__ == "PredictorWithLoss"


@pytest.mark.slow
def test_own_checkpoints_script_learns_its_label(tmp_path: Path) -> None:
    first, *_ = run_script("own_checkpoints", tmp_path).splitlines()
    assert float(first.rpartition(" ")[2]) > 0.5


@pytest.mark.slow
def test_encode_folder_script(tmp_path: Path) -> None:
    assert "mlp: nearest is mlp-noisy" in run_script("encode_folder", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "libraries"), [("lightning_module", "lightning"), ("transformers_trainer", "transformers accelerate")]
)
def test_script_of_a_training_library_learns_its_label(script: str, libraries: str, tmp_path: Path) -> None:
    for library in libraries.split():
        pytest.importorskip(library, reason=f"{library} is not installed")
    said = re.search(r"loss ([\d.]+) in the first epoch, ([\d.]+) in the last", run_script(script, tmp_path))
    assert said is not None and float(said[1]) > 2 * float(said[2])

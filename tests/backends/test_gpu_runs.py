"""Package and README say of runs on GPUs what the committed results say."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from helpers.paths import ROOT
from sne_fast.backends import gpu_runs
from sne_fast.backends.gpu_runs import Run
from sne_fast.cli import installation


def result(**changes: Any) -> dict[str, Any]:
    environment = {"device": "NVIDIA H200", "capability": [9, 0], "commit": "0123456789abcdef"}
    rows = [
        {"op": "chunk_encode", "backend": "cuda", "forward_seconds": 1.0},
        {"op": "chunk_encode", "backend": "cuda", "forward_seconds": 2.0},
        {"op": "segment_pool", "backend": "cuda", "forward_seconds": 1.0},
        {"op": "segment_pool", "backend": "triton", "forward_seconds": 1.0},
        {"op": "set_attention", "by": "FlexAttention", "forward_seconds": 1.0},
        {"op": "set_attention", "backend": "triton", "skipped": "..."},
    ]
    return {"errors": {}, "parts": {"environment": environment, "ops": rows}, "part_seconds": {}, **changes}


def test_runs_of_a_result() -> None:
    shape = ("NVIDIA H200", "9.0")
    assert gpu_runs.runs_of(result(), "gpu.json") == [
        Run("cuda", *shape, ("chunk_encode", "segment_pool"), (), "0123456789", "gpu.json"),
        Run("triton", *shape, ("segment_pool",), (), "0123456789", "gpu.json"),
    ]
    assert not gpu_runs.runs_of({"parts": {"environment": {}}}, "cpu.json"), "tried on a CPU"


def test_what_failed_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "gpu_runs.json"
    gpu_runs.write(gpu_runs.runs_of(result(errors={"tests": "..."}), "gpu.json")[:1], file)
    monkeypatch.setattr(gpu_runs, "read", lambda read=gpu_runs.read: read(file))
    said = gpu_runs.sentence("cuda", "emulated")
    assert said == ("has run chunk_encode, segment_pool on NVIDIA H200 (compute 9.0, gpu.json), where failed: tests")
    assert gpu_runs.sentence("triton", "emulated") == "has not run on a GPU yet: emulated only"
    lines = dict(installation.backends())
    assert lines["backend cuda"].endswith(f"; {said}") and "has not run on a GPU yet" in lines["backend triton"]


def test_the_package_says_what_the_committed_results_say() -> None:
    contents = {file.name: json.loads(file.read_text()) for file in sorted((ROOT / "bench" / "results").glob("*.json"))}
    runs = [
        run for name, found in contents.items() if gpu_runs.is_result(found) for run in gpu_runs.runs_of(found, name)
    ]
    assert list(gpu_runs.read()) == runs, "python -m sne_fast.backends.gpu_runs bench/results/*.json"


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_the_readme_says_the_same(backend: str) -> None:
    row = re.search(rf"^\| `{backend}` \|.*$", (ROOT / "README.md").read_text(), re.M)
    assert row is not None
    devices = {run.device for run in gpu_runs.read() if run.backend == backend}
    assert all(device in row[0] for device in devices)
    assert ("**Has not run on a GPU yet**" in row[0]) == (not devices)

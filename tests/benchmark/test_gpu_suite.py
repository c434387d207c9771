"""`bench/gpu_suite.py` tried on the CPU: its parts, its partial results, what it says without a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gpu_suite
import pytest
import torch

from helpers.paths import ROOT
from sne_fast.backends.cuda import winners
from sne_fast.benchmark import gpu_limits, gpu_ops
from sne_fast.benchmark.gpu_ops import shape_of
from sne_fast.ops.schema import FORWARD_OPS


def run_suite(out: Path, *arguments: str) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    command = [sys.executable, str(ROOT / "bench" / "gpu_suite.py"), "--out", str(out), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, cwd=out.parent)
    return done, json.loads(out.read_text()) if out.exists() else {}


@pytest.mark.slow
def test_every_part_but_the_tests_runs_on_a_cpu(tmp_path: Path) -> None:
    parts = ["environment", "sanitizer", "ceilings", "ops", "cases"]
    done, found = run_suite(
        tmp_path / "gpu.json", "--device", "cpu", "--size", "tiny", "--only", *parts,
        "--cases", "zoo", "resnet50", "--baselines", "eager",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert set(found["parts"]) == set(parts) and not found["errors"]
    environment = found["parts"]["environment"]
    assert environment["torch"] == torch.__version__ and "chunk_encode" in environment["backends"]
    ops = found["parts"]["ops"]
    assert {row["op"] for row in ops} == set(FORWARD_OPS)
    assert all(row["forward_seconds"] > 0 and row["error"] < 2e-2 and row["backend"] == "auto" for row in ops)
    cases = {(row["case"], row["dtype"]): row for row in found["parts"]["cases"]}
    assert set(cases) == {(c, d) for c in ("zoo", "resnet50") for d in ("bfloat16", "float32")}
    for row in cases.values():
        assert row["check"]["output_error"] <= row["check"]["output_allowed"]
        for mode in ("forward", "training"):
            ratio = row[f"eager {mode}"]["seconds"] / row[f"sne_fast {mode}"]["seconds"]
            assert row[f"ratios {mode}"] == {"eager": pytest.approx(ratio)}
    assert "resnet50" in done.stdout and "segment_pool" in done.stdout  # the tables at the end


@pytest.mark.slow
def test_two_backends_are_measured_on_the_same_work(tmp_path: Path) -> None:
    """As they are on a GPU, where one is cuda and the other triton."""
    done, found = run_suite(
        tmp_path / "gpu.json", "--device", "cpu", "--size", "tiny", "--backend", "cpu", "reference",
        "--only", "environment", "ops", "cases", "--cases", "zoo", "--baselines",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    rows = found["parts"]["ops"]
    shapes = {e: [shape_of(row) for row in rows if row["backend"] == e] for e in ("cpu", "reference")}
    assert shapes["cpu"] == shapes["reference"] and len(set(shapes["cpu"])) == len(shapes["cpu"]) >= 10
    for case in found["parts"]["cases"]:
        assert case["backend"] == "cpu" and set(case["checks"]) == {"reference"}
        ratio = case["reference forward"]["seconds"] / case["sne_fast forward"]["seconds"]
        assert case["ratios forward"] == {"reference": pytest.approx(ratio)}
    # The dispatcher's table is made of these measurements. Who won here is left to chance: times are set.
    for row in rows:
        row["backend"] = {"cpu": "cuda", "reference": "triton"}[row["backend"]]
        for key in row.keys() & {"forward_seconds", "step_seconds"}:
            row[key] = (1.0 if row["backend"] == "cuda" else 2.0) * (3 if key == "step_seconds" else 1)
    found["parts"]["environment"] |= {"capability": [9, 0], "dirty": False}
    named = {rule.when.op for rule in winners.rules_from(found, "gpu.json")}
    assert {"chunk_encode", "set_attention_backward"} <= named


@pytest.mark.slow
def test_what_was_measured_before_time_ran_out_is_kept(tmp_path: Path) -> None:
    done, found = run_suite(tmp_path / "gpu.json", "--device", "cpu", "--size", "tiny", "--seconds", "0",
                            "--only", "environment", "ceilings", "ops")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert set(found["parts"]) == {"environment", "ops"} and found["parts"]["ops"] == []
    assert found["skipped"]["ceilings"].startswith("out of time") and "skipped: ceilings" in done.stdout


@pytest.mark.slow
def test_a_part_that_fails_is_recorded_and_does_not_stop_the_others(tmp_path: Path) -> None:
    done, found = run_suite(tmp_path / "gpu.json", "--device", "cpu", "--size", "tiny", "--backend", "cuda",
                            "--only", "ops", "environment", "--cases", "zoo")  # fmt: skip
    assert done.returncode == 1
    assert "backend 'cuda' cannot run it" in found["errors"]["ops"] and "environment" in found["parts"]
    tried = [op for op in ("chunk_encode", "set_attention", "segment_pool", "gather_chunks")
             if f"{op}: backend 'cuda' cannot run it" in found["errors"]["ops"]]  # fmt: skip
    assert len(tried) == 4, "one backend's failure does not stop the other ops"


def make_suite(out: Path, *arguments: str) -> gpu_suite.Suite:
    tiny = ["--device", "cpu", "--size", "tiny", "--out", str(out), *arguments]
    return gpu_suite.Suite(gpu_suite.parser().parse_args(tiny))


def test_a_ceiling_that_cannot_be_measured_costs_no_other_and_no_op(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: Any) -> float:
        raise RuntimeError("no copies today")

    def measures(device: torch.device, *args: Any) -> Iterator[dict[str, Any]]:
        yield {"limits": [arg for arg in args if arg is None or isinstance(arg, float)]}

    monkeypatch.setattr(gpu_limits, "copy_bandwidth", fails)
    for name in FORWARD_OPS:
        monkeypatch.setattr(gpu_ops, name, measures)
    suite = make_suite(tmp_path / "gpu.json")
    suite.part("ceilings", suite.ceilings)
    suite.part("ops", suite.ops)
    found = json.loads((tmp_path / "gpu.json").read_text())
    ceilings = found["parts"]["ceilings"]
    assert ceilings["copy_bytes_per_second"] is None and ceilings["products_per_second"]["bfloat16"] > 0
    assert list(found["errors"]) == ["ceilings copy_bytes_per_second"]
    assert "RuntimeError: no copies today" in found["errors"]["ceilings copy_bytes_per_second"]
    limits = [row["limits"] for row in found["parts"]["ops"]]
    assert limits.count([ceilings["products_per_second"]["float16"]]) == 1 and limits.count([None]) == 8


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    done, found = run_suite(tmp_path / "gpu.json")
    assert done.returncode == 2 and "torch sees no GPU here" in done.stderr and not found

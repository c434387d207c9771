"""`bench/gpu_suite.py` tried on the CPU: its parts, its partial results, what it says without a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gpu_cases
import gpu_suite
import pytest
import torch

from helpers.paths import ROOT
from sne_fast.backends.cuda import winners
from sne_fast.benchmark import Check, CheckFailed, Contender, contender, gpu_limits, gpu_ops, run_check
from sne_fast.benchmark.gpu_ops import shape_of
from sne_fast.ops.schema import OPTIONAL_OPS


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
    assert {row["op"] for row in ops} == set(gpu_ops.MEASURED_OPS)
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
    rows = [row for row in found["parts"]["ops"] if row["op"] not in OPTIONAL_OPS]  # which the reference does not fuse
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
    for name in gpu_ops.MEASURED_OPS:
        monkeypatch.setattr(gpu_ops, name, measures)
    suite = make_suite(tmp_path / "gpu.json", "--no-rivals")
    suite.part("ceilings", suite.ceilings)
    suite.part("ops", suite.ops)
    found = json.loads((tmp_path / "gpu.json").read_text())
    ceilings = found["parts"]["ceilings"]
    assert ceilings["copy_bytes_per_second"] is None and ceilings["products_per_second"]["bfloat16"] > 0
    assert list(found["errors"]) == ["ceilings copy_bytes_per_second"]
    assert "RuntimeError: no copies today" in found["errors"]["ceilings copy_bytes_per_second"]
    limits = [row["limits"] for row in found["parts"]["ops"]]
    assert limits.count([ceilings["products_per_second"]["float16"]]) == 1 and limits.count([None]) == 8


def test_every_row_is_written_before_the_next_is_measured(tmp_path: Path) -> None:
    suite = make_suite(tmp_path / "gpu.json")
    written: list[int] = []

    def rows() -> Iterator[dict[str, Any]]:
        for number in range(3):
            if number:
                written.append(len(json.loads((tmp_path / "gpu.json").read_text())["parts"]["ops"]))
            yield {"row": number}

    suite.part("ops", rows)
    assert written == [1, 2] and len(suite.results["parts"]["ops"]) == 3


def test_parts_share_the_time_and_leave_to_others_what_they_do_not_need(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite = make_suite(tmp_path / "gpu.json", "--seconds", "1000")
    left: dict[str, float] = {}
    for name in gpu_suite.PARTS:
        monkeypatch.setattr(suite, name, lambda name=name: left.update({name: suite.left()}))
    suite.run()
    assert list(left) == ["build", "environment", "ceilings", "tests", "cases", "ops", "sanitizer"]
    share = {"tests": 4 / 12, "cases": 2 / 8, "ops": 3 / 6}
    for name, seconds in left.items():
        assert 1000 * share.get(name, 1.0) == pytest.approx(seconds, abs=20)
    alone = make_suite(tmp_path / "gpu.json", "--seconds", "1000", "--only", "cases")
    monkeypatch.setattr(alone, "cases", lambda: left.update(alone=alone.left()))
    alone.run()
    assert left["alone"] == pytest.approx(1000, abs=20)


def test_a_backend_that_is_wrong_costs_a_case_that_backend_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def checked(case: Any, backend: str, *args: Any, **options: Any) -> Check:
        if backend == "cpu" or case.name == "mixed":
            raise CheckFailed(f"{case.name}: {backend} is off")
        return run_check(case, backend, *args, **options)

    monkeypatch.setattr(gpu_cases, "run_check", checked)
    monkeypatch.setattr(gpu_cases, "DTYPES", {"bfloat16": torch.bfloat16})
    monkeypatch.setattr(gpu_cases, "MEASURED_SECONDS", 0.01)
    suite = make_suite(tmp_path / "gpu.json", "--only", "cases", "--cases", "mixed", "zoo", "--backend", "cpu",
                       "reference", "--baselines")  # fmt: skip
    suite.run()
    found = json.loads((tmp_path / "gpu.json").read_text())
    [row] = found["parts"]["cases"]
    assert row["case"] == "zoo" and row["backend"] == "reference" and row["sne_fast training"]["seconds"] > 0
    assert list(found["errors"]) == [
        "cases mixed bfloat16 cpu", "cases mixed bfloat16 reference", "cases zoo bfloat16 cpu",
    ]  # fmt: skip
    assert "CheckFailed: zoo: cpu is off" in found["errors"]["cases zoo bfloat16 cpu"]


def test_a_case_that_fails_does_not_stop_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def disagree(case: Any, *args: Any) -> float:
        if case.name == "mixed":
            raise CheckFailed("the full case differs")
        return 0.0

    def breaks(name: str, *args: Any, training: bool, **options: Any) -> Contender:
        if name == "eager" and training:
            raise RuntimeError("eager does not train")
        return contender(name, *args, training=training, **options)

    monkeypatch.setattr(gpu_cases, "check_agreement", disagree)
    monkeypatch.setattr(gpu_cases, "contender", breaks)
    monkeypatch.setattr(gpu_cases, "DTYPES", {"bfloat16": torch.bfloat16})
    monkeypatch.setattr(gpu_cases, "MEASURED_SECONDS", 0.01)
    suite = make_suite(tmp_path / "gpu.json", "--only", "cases", "--cases", "mixed", "zoo")
    suite.run()
    [row] = suite.results["parts"]["cases"]
    assert row["case"] == "zoo" and list(row["ratios forward"]) == ["eager"] and row["ratios training"] == {}
    assert list(suite.results["errors"]) == ["cases mixed bfloat16", "cases zoo bfloat16 eager training"]


def test_what_rivals_the_ops_is_measured_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measures(*args: Any) -> Iterator[dict[str, Any]]:
        yield {"rivals": args[-1] is True}

    for name in gpu_ops.MEASURED_OPS:
        monkeypatch.setattr(gpu_ops, name, measures)
    for backends, count in (([], 2 * (1 + 3)), (["--backend", "cpu", "reference"], 2 * 3)):  # these do not fuse
        suite = make_suite(tmp_path / "gpu.json", *backends)
        suite.part("ops", suite.ops)
        rivals = [row["rivals"] for row in suite.results["parts"]["ops"]]
        assert not suite.results["errors"] and rivals == sorted(rivals) and rivals.count(True) == count
        assert rivals.count(False) > count


def test_a_launch_rule_can_be_tried(tmp_path: Path) -> None:
    launches = pytest.importorskip("sne_fast.backends.triton.launches", exc_type=ImportError)
    rules = [["chunk_encode", json.dumps({"num_warps": warps, "num_stages": 1, "maxnreg": 128})] for warps in (2, 16)]
    suite = make_suite(tmp_path / "gpu.json", *(word for rule in rules for word in ("--trial", *rule)))
    with gpu_suite.trials(suite.options.trial):
        tried = launches.launch("chunk_encode", h=64, heads=4, length="32", dtype=torch.bfloat16, arch=90)
    after = launches.launch("chunk_encode", h=64, heads=4, length="32", dtype=torch.bfloat16, arch=90)
    assert (tried.num_warps, tried.maxnreg) == (2, 128) and after.maxnreg is None
    environment = suite.environment()
    assert environment["trial"] == rules and environment["dirty"], "no table is made from this result"
    with pytest.raises(FileNotFoundError), gpu_suite.trials([["chunk_decode", "{}"]]):
        pass


def test_only_the_ops_asked_for_are_measured(tmp_path: Path) -> None:
    suite = make_suite(tmp_path / "gpu.json", "--only", "ops", "--ops", "gather_chunks", "--no-rivals")
    suite.run()
    assert not suite.results["errors"] and {row["op"] for row in suite.results["parts"]["ops"]} == {"gather_chunks"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    done, found = run_suite(tmp_path / "gpu.json")
    assert done.returncode == 2 and "torch sees no GPU here" in done.stderr and not found

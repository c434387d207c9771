"""Captured steps in `bench/gpu_suite.py`, on the CPU: with a recorder in place of CUDA graphs, and as it runs them."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

import gpu_captured
import gpu_cases
import gpu_commands
import gpu_suite
import gpu_tables
import pytest
import torch
from rich.console import Console

from helpers.recorded_graphs import Recorder
from sne_fast.training.capture import CapturedSteps


def make_suite(out: Path, *arguments: str) -> gpu_suite.Suite:
    return gpu_suite.Suite(
        gpu_suite.parser().parse_args(["--device", "cpu", "--size", "tiny", "--out", str(out), *arguments])
    )


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """Record steps in place of a GPU, and take little time."""
    found = Recorder()
    monkeypatch.setattr(gpu_captured, "check_capture", lambda *_: found)
    monkeypatch.setattr(gpu_cases, "MEASURED_SECONDS", 0.01)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zoo", "mixed"])
def test_captured_steps_are_compared_and_timed(name: str, tmp_path: Path, recorder: Recorder) -> None:
    suite = make_suite(tmp_path / "gpu.json", "--captured", name)
    suite.part("captured", lambda: gpu_captured.measure(suite))
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert not found["errors"] and not found["skipped"]
    rows = found["parts"]["captured"]
    assert [(row["case"], row["dtype"], row["mode"]) for row in rows] == [
        (name, kind, "captured steps") for kind in ("bfloat16", "float32")
    ]
    for row in rows:
        assert row["networks"] >= 8 and row["steps_per_epoch"] >= 2
        assert 1 < row["graphs"] <= recorder.recorded and 0 < row["replays"] < row["steps"]
        assert row["steps"] >= 3 * int(row["steps_per_epoch"])
        assert row["checks"]["captured"] == {"loss_error": 0, "parameter_error": 0, "same_bits": True}
        assert row["checks"]["plain"]["loss_error"] < (1e-5 if row["dtype"] == "float32" else 2e-2)
        for way in gpu_captured.WAYS:
            times = row[way]
            assert 0 < times["host_milliseconds"] <= times["milliseconds"]
            steps = 1e3 / times["milliseconds"]
            assert times["networks_per_second"] == pytest.approx(steps * row["networks"] / row["steps_per_epoch"])
        assert row["ratios"]["plain"] == pytest.approx(row["plain"]["milliseconds"] / row["captured"]["milliseconds"])
    console = Console(record=True, width=140)
    gpu_tables.show(found, ("cuda", "triton"), ("eager",), console)
    text = console.export_text()
    assert f"{rows[0]['replays']} of {rows[0]['steps']}" in text and "captured training steps" in text


def test_steps_that_train_otherwise_are_not_timed(
    tmp_path: Path, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a graph reads inputs that were not copied into its buffers."""

    def forgets(self: CapturedSteps, inputs: Any) -> Any:
        kept = recorded(self, inputs)
        return dataclasses.replace(kept[0], goals=kept[0].goals.clone()), kept[1]

    recorded = CapturedSteps._recorded
    monkeypatch.setattr(CapturedSteps, "_recorded", forgets)
    suite = make_suite(tmp_path / "gpu.json", "--captured", "inr")
    suite.part("captured", lambda: gpu_captured.measure(suite))
    assert suite.results["parts"]["captured"] == []
    [(name, error)] = suite.results["errors"].items()
    assert name == "captured bfloat16" and "CheckFailed: captured steps in bfloat16: losses are off by" in error


def test_time_that_the_host_waits_is_not_its_own() -> None:
    class Event:
        def synchronize(self) -> None:
            time.sleep(0.05)

    waits = gpu_captured.Waits()
    Event.synchronize = waits._timed(Event.synchronize)  # type: ignore[method-assign]
    with waits.counted():
        Event().synchronize()
        assert torch.ones(3).tolist() == [1.0] * 3 and torch.ones(()).item() == 1
    assert 0.04 < waits.seconds < 5 and "tolist" not in vars(torch.Tensor)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_what_cannot_be_captured_is_an_error_of_its_process(tmp_path: Path) -> None:
    suite = make_suite(tmp_path / "gpu.json")
    command = gpu_commands.captured_command(suite.options, "zoo", "auto", 300, tmp_path / "captured.json")
    done = gpu_commands.finished(command, 300)
    found = json.loads((tmp_path / "captured.json").read_text())
    assert done["status"] == 1 and found["parts"]["captured"] == []
    assert set(found["errors"]) == {"captured bfloat16", "captured float32"}
    assert all("the predictor is on cpu" in error for error in found["errors"].values())


CHILDREN = {
    "rows": ("write([{'row': 1}, {'row': 2}], {'captured float32': 'CheckFailed: off'}); sys.exit(1)", 2,
             {"cases zoo captured float32": "CheckFailed: off"}, {}),
    "breaks": ("write([{'row': 1}], {}); print('CUDA error'); os._exit(7)", 1,
               {"cases zoo captured": "CUDA error\n"}, {}),
    "hangs": ("write([{'row': 1}], {}); time.sleep(600)", 1,
              {}, {"cases zoo captured": "out of time: ran past 1 s"}),
    "writes nothing": ("print('no such case'); sys.exit(2)", 0, {"cases zoo captured": "no such case\n"}, {}),
}  # fmt: skip


@pytest.mark.parametrize("child", CHILDREN)
def test_rows_of_the_process_are_kept_and_its_errors_are_recorded(
    child: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, rows, errors, skipped = CHILDREN[child]

    def command(options: Any, case: str, backend: str, limit: float, out: Path) -> list[str]:
        assert (case, backend) == ("zoo", "triton") and 0 < limit <= gpu_cases.CAPTURED_SECONDS
        script = (
            "import json, os, sys, time\n"
            "def write(rows, errors):\n"
            "    found = {'parts': {'captured': rows}, 'errors': errors}\n"
            f"    open({str(out)!r}, 'w').write(json.dumps(found))\n"
        )
        return [sys.executable, "-c", script + work]

    monkeypatch.setattr(gpu_commands, "captured_command", command)
    if child == "hangs":
        monkeypatch.setattr(gpu_commands, "GRACE", 0.5)
        monkeypatch.setattr(gpu_cases, "CAPTURED_SECONDS", 1.0)
    suite = make_suite(tmp_path / "gpu.json")
    suite.device = torch.device("cuda")
    found = list(gpu_cases.captured(suite, "zoo", "triton"))
    assert len(found) == rows
    written = json.loads((tmp_path / "gpu.json").read_text())
    assert written["errors"] == errors and written["skipped"] == skipped


def test_trial_rules_and_sizes_reach_the_process(tmp_path: Path) -> None:
    rule = '{"num_warps": 2}'
    suite = make_suite(tmp_path / "gpu.json", "--trial", "set_block", rule)
    command = gpu_commands.captured_command(suite.options, "zoo", "cuda", 60, tmp_path / "out.json")
    options = gpu_suite.parser().parse_args(command[2:])
    assert (options.captured, options.backend, options.trial) == ("zoo", ["cuda"], [["set_block", rule]])
    assert (options.device, options.size, options.out) == ("cpu", "tiny", str(tmp_path / "out.json"))
    assert options.seconds == 40


def test_captured_steps_come_after_all_cases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def row(suite: Any, name: str, kind: str, autocast: Any) -> dict[str, Any] | None:
        if name == "mixed":
            return None  # no backend is right
        return {"case": name, "dtype": kind, "backend": "triton"}

    monkeypatch.setattr(gpu_cases, "_row", row)
    monkeypatch.setattr(gpu_cases, "captured", lambda suite, name, backend: iter([{"captured": name, "by": backend}]))
    suite = make_suite(tmp_path / "gpu.json", "--cases", "zoo", "mixed", "resnet", "inr")
    found = [row.get("captured") or (row["case"], row["dtype"]) for row in gpu_cases.measure(suite)]
    both = ("bfloat16", "float32")
    assert found == [
        *(("zoo", kind) for kind in both), *(("resnet", kind) for kind in both), ("inr", "bfloat16"), "zoo", "inr",
    ]  # fmt: skip

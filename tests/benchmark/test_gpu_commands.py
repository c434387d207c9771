"""The commands that `bench/gpu_suite.py` runs beside itself: their time, environment, and files."""

from __future__ import annotations

import importlib.util
import json
import os
import stat
import sys
import time
from pathlib import Path

import gpu_commands
import gpu_suite
import pytest

from helpers.paths import ROOT


def python(script: str) -> list[str]:
    return [sys.executable, "-c", script]


def test_status_output_and_environment_of_a_command() -> None:
    script = "import os, sys; print(os.environ['SOME_NAME']); sys.exit(3)"
    assert gpu_commands.finished(python(script), 60, SOME_NAME="here") == {"status": 3, "tail": "here\n"}


def test_past_its_time_a_command_is_interrupted_and_nothing_of_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_commands, "GRACE", 1.0)
    child = tmp_path / "child"
    script = (
        "import subprocess, sys, time\n"
        f"child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"open({str(child)!r}, 'w').write(str(child.pid))\n"
        "try: time.sleep(600)\n"
        "except KeyboardInterrupt: print('1 failed', flush=True); time.sleep(600)\n"
    )
    begin = time.monotonic()
    found = gpu_commands.finished(python(script), 5)
    assert time.monotonic() - begin < 60
    assert found == {"status": gpu_commands.OUT_OF_TIME, "tail": "1 failed\n"}
    state = Path(f"/proc/{child.read_text()}/stat")
    if Path("/proc/self/stat").exists():
        until = time.monotonic() + 10
        while state.exists() and state.read_text().rsplit(")", 1)[1].split()[0] != "Z" and time.monotonic() < until:
            time.sleep(0.05)
        assert not state.exists() or state.read_text().rsplit(")", 1)[1].split()[0] == "Z"


@pytest.mark.parametrize(
    "status, tail, late",
    [(124, "....", True), (124, "3 passed in 2 s", True), (124, "ERROR SUMMARY: 0 errors", True), (1, "", False),
     (124, "2 failed, 3 passed", False), (124, "10 errors in 2 s", False), (124, "ERROR SUMMARY: 1 error", False)],
)  # fmt: skip
def test_a_command_is_only_late_where_nothing_was_wrong_until_then(status: int, tail: str, late: bool) -> None:
    assert gpu_commands.only_late({"status": status, "tail": tail}) is late


def test_tests_that_compile_nothing_come_first_then_those_of_triton_in_many_processes() -> None:
    others, triton, large = gpu_commands.TEST_RUNS
    assert others.command()[others.command().index("-k") + 1] == "not triton"
    assert triton.command()[triton.command().index("-k") + 1] == "triton" and triton.processes == 12
    assert others.files == triton.files == gpu_commands.GPU_TESTS
    assert ("-n" in triton.command()) == (importlib.util.find_spec("xdist") is not None)
    assert large.files == gpu_commands.LARGE_TESTS and "-n" not in large.command() and "-k" not in large.command()
    assert others.share + (1 - others.share) * triton.share < 1 == large.share, "each has a time of its own"


def test_every_file_with_a_test_of_a_gpu_is_run() -> None:
    named = {ROOT / name for run in gpu_commands.TEST_RUNS for name in run.files}
    marked = [path for path in (ROOT / "tests").rglob("test_*.py") if "pytest.mark.gpu" in path.read_text("utf-8")]
    assert named == set(marked) - {Path(__file__)}


def test_memcheck_sees_the_ends_of_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's allocator is switched off under it, and under no other check."""
    tool = tmp_path / "compute-sanitizer"
    tool.write_text('#!/bin/sh\necho "$2 ${PYTORCH_NO_CUDA_MEMORY_CACHING:-unset} $*"\n', encoding="utf-8")
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", os.pathsep.join([str(tmp_path), os.environ["PATH"]]))
    monkeypatch.delenv("PYTORCH_NO_CUDA_MEMORY_CACHING", raising=False)
    out = tmp_path / "gpu.json"
    arguments = ["--device", "cpu", "--only", "sanitizer", "--backend", "cuda", "triton", "--out", str(out)]
    gpu_suite.Suite(gpu_suite.parser().parse_args(arguments)).run()
    found = json.loads(out.read_text())["parts"]["sanitizer"]
    assert list(found) == ["cuda memcheck", "cuda racecheck", "cuda synccheck", "triton memcheck", "triton racecheck"]
    for name, said in found.items():
        backend, check = name.split()
        caching = "1" if check == "memcheck" else "unset"
        assert said["status"] == 0 and said["tail"].startswith(f"{check} {caching} --tool {check}")
        assert said["tail"].rstrip().endswith(f"gpu_suite.py --exercise --device cpu --backend {backend}")

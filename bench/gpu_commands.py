"""Commands that `bench/gpu_suite.py` runs beside itself, each in a limited time: pytest and compute-sanitizer."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import re
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SUITE = Path(__file__).with_name("gpu_suite.py")
GPU_TESTS = (
    "tests/backends/test_gpu.py",
    "tests/data/test_batch.py",
    "tests/data/test_packing.py",
    "tests/training/test_capture_gpu.py",
)
LARGE_TESTS = ("tests/backends/test_gpu_large.py",)
OUT_OF_TIME = 124  # the status that timeout(1) gives too
TAIL = 8000
GRACE = 10.0  # seconds in which pytest, interrupted, reports what has failed until then
# racecheck and synccheck find missing and wrong barriers, which Triton places by itself.
SANITIZERS = {"cuda": ("memcheck", "racecheck", "synccheck"), "other": ("memcheck", "racecheck")}
# Inside the blocks that torch's allocator keeps, memcheck does not see a read past the end of a tensor.
SANITIZER_ENVIRONMENT = {"memcheck": {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}}


@dataclass(frozen=True)
class TestRun:
    """One call of pytest: its files, the tests among them, the processes, and its share of the time that is left."""

    name: str
    files: tuple[str, ...]
    keyword: str
    processes: int
    share: float

    def command(self) -> list[str]:
        spread: list[str] = []
        if self.processes > 1 and importlib.util.find_spec("xdist") is not None:
            spread = ["-n", str(min(self.processes, os.cpu_count() or 1))]
        return [
            sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", "-rsfE", "-m", "gpu",
            *(["-k", self.keyword] if self.keyword else []), *spread, *(str(ROOT / file) for file in self.files),
        ]  # fmt: skip


# Triton compiles hundreds of kernels for its tests, so all that compiles nothing comes first. Large tensors fill the
# device: one process.
TEST_RUNS = (
    TestRun("not triton", GPU_TESTS, "not triton", 4, 1 / 3),
    TestRun("triton", GPU_TESTS, "triton", 12, 0.85),
    TestRun("large", LARGE_TESTS, "", 1, 1.0),
)


def sanitizer_command(tool: str, check: str, backend: str, device: str) -> list[str]:
    """Return the command that exercises a backend under one check of compute-sanitizer."""
    return [tool, "--tool", check, "--error-exitcode", "9", sys.executable, str(SUITE), "--exercise",
            "--device", device, "--backend", backend]  # fmt: skip


def captured_command(options: argparse.Namespace, case: str, backend: str, limit: float, out: Path) -> list[str]:
    """Return the command that measures captured steps of a case, in less than a limit with what it takes to begin."""
    trials = [word for trial in options.trial for word in ("--trial", *trial)]
    return [sys.executable, str(SUITE), "--captured", case, "--device", options.device, "--size", options.size,
            "--backend", backend, "--seconds", str(limit * 2 / 3), "--out", str(out), *trials]  # fmt: skip


def _hear_interrupts() -> None:
    # What a shell starts in the background ignores SIGINT, and so would its children.
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def finished(command: list[str], limit: float, **environment: str) -> dict[str, Any]:
    """Return the status and the end of the output of a command; past its limit it is interrupted, then killed."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    with tempfile.TemporaryFile() as output:
        # A session of its own, so that none of its processes goes on, and on the GPU, after it.
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
            env={**os.environ, "PYTHONPATH": path, **environment}, preexec_fn=_hear_interrupts,
        )  # fmt: skip
        try:
            status = process.wait(max(1.0, limit - GRACE))
        except subprocess.TimeoutExpired:
            status = OUT_OF_TIME
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output.seek(0)
        text = output.read().decode(errors="replace")
    return {"status": status, "tail": text[-TAIL:]}


def only_late(found: dict[str, Any]) -> bool:
    """Return whether a command ran past its limit and, until then, reported nothing wrong."""
    return found["status"] == OUT_OF_TIME and not re.search(r"\b[1-9]\d* (failed|errors?)\b", found["tail"])

"""The count of launches, in a process of its own: Triton reads its interpreter's switch when it is imported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.build


def test_launches_are_counted(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    script = Path(__file__).parents[2] / "bench" / "launches.py"
    out = tmp_path / "launches.json"
    command = [sys.executable, str(script), "--size", "tiny", "--rounds", "1", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads(out.read_text())["rows"]
    assert rows["forward"]["triton kernels"]["chunk_encode_kernel"] == 2, "short chunks and full ones"
    step = rows["training step"]
    assert step["triton kernels"]["block_backward_kernel"] == 6
    assert step["triton"] == sum(step["triton kernels"].values()) > rows["forward"]["triton"]
    assert step["torch"] == sum(step["torch operations"].values()) and step["host_ms"] > 0
    assert rows["forward"]["torch"] <= 18 and rows["forward"]["whole numbers"] == 0
    assert step["torch"] <= 55 and step["whole numbers"] == 0
    # Two slabs of chunks, one of short ones and one of full ones, take ten launches each.
    assert rows["forward"]["triton"] <= 14 and step["triton"] <= 66

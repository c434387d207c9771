"""A zoo ten times larger than the memory of a process may grow trains."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.paths import ROOT, environment_of_tests


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="RLIMIT_DATA bounds mappings on Linux alone")
def test_a_zoo_ten_times_larger_than_the_memory_limit_trains(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    command = [sys.executable, str(ROOT / "bench" / "large_zoo.py"), str(tmp_path / "zoo"), "--size", "40M"]
    options = ["--shard", "1M", "--epochs", "1", "--out", str(tmp_path / "found.json")]
    environment = environment_of_tests(OMP_NUM_THREADS="1")
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["limit_bytes"] * 9.9 < found["zoo_bytes"]
    assert found["peak_bytes"] - found["loaded_bytes"] < 2 * found["limit_bytes"], "mapped pages of files come on top"
    assert found["validation_loss"][0] < 0.5, "one epoch is enough to see the spread"
    assert found["all at once"] != "fits"

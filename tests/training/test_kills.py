"""Jobs that are killed at random moments leave whole files only, and end with the same bits when begun again."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.paths import ROOT, environment_of_tests

ROUNDS = max(1, int(os.environ.get("SNE_FAST_FUZZ", "25")) // 25)
"""Rounds of three kills each."""


@pytest.mark.slow
@pytest.mark.parametrize("job", ["fit", "train", "zoo", "save", "encode"])
def test_a_killed_job_leaves_whole_files_and_resumes_to_the_same_bits(job: str, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    command = [sys.executable, str(ROOT / "tests" / "helpers" / "kill_rounds.py"), job, str(tmp_path), str(ROUNDS), "0"]
    environment = environment_of_tests(OMP_NUM_THREADS="1")
    done = subprocess.run(command, capture_output=True, text=True, timeout=120 + 60 * ROUNDS, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.endswith("kills\n")

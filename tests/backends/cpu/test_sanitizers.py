"""The C++ tests of the CPU backend under AddressSanitizer and UBSan: `python csrc/tests/sanitize.py`."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest

from helpers.paths import ROOT


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_the_backend_is_clean_under_the_sanitizers():
    command = [sys.executable, str(ROOT / "csrc" / "tests" / "sanitize.py")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert result.stdout.rstrip().endswith("all good")

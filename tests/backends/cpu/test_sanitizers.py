"""The C++ tests of the CPU library under AddressSanitizer and UBSan, as `python csrc/tests/sanitize.py` runs them."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import native_build
import pytest
import sanitize

from helpers import artefacts

pytestmark = [pytest.mark.build, pytest.mark.slow]


@pytest.mark.skipif(shutil.which(native_build.host_compiler()[0]) is None, reason="needs a C++ compiler")
def test_the_backend_is_clean_under_the_sanitizers():
    def make(folder: Path) -> None:
        sanitize.build(folder / "library_test", native_build.BUILD_FOLDER / "sanitized", sanitize.SANITIZE)

    parts = [*sanitize.SANITIZE, artefacts.version(native_build.host_compiler()[0])]
    key = artefacts.digest(parts, artefacts.native_sources("cpu", "include", "tests"))
    program = artefacts.kept("sanitized", key, make) / "library_test"
    command, environment = [str(program)], sanitize.environment()
    result = subprocess.run(command, capture_output=True, text=True, timeout=1200, env=environment)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert result.stdout.rstrip().endswith("all good")

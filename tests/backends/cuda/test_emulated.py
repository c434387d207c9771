"""Builds the CUDA kernels for the host and runs the tests in emulated/ on them, each file in a process of its own."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import emulate
import native_build
import pytest

from helpers import artefacts

pytestmark = pytest.mark.build

FOLDER = Path(__file__).with_name("emulated")


@pytest.fixture(scope="session")
def library() -> Path:
    """Build the emulated kernels, once for all sessions with the same sources."""
    parts = [*emulate.FLAGS, artefacts.version(native_build.host_compiler()[0])]
    key = artefacts.digest(parts, artefacts.native_sources("cuda", "include", "tests"))
    return artefacts.kept("emulated", key, lambda folder: emulate.build(folder / "kernels.so")) / "kernels.so"


@pytest.mark.skipif(shutil.which(native_build.host_compiler()[0]) is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("file", sorted(path.name for path in FOLDER.glob("test_*.py")))
def test_kernels_in_the_emulator(file: str, library: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(FOLDER / file)]
    environment = {**os.environ, "SNE_FAST_CUDA_EMULATED": str(library)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=FOLDER.parent)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-6000:]}\n{done.stderr[-2000:]}"
    assert re.search(r"[1-9]\d* passed", done.stdout), done.stdout[-2000:]

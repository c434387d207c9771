"""Compiles the CPU library with its C++ tests under AddressSanitizer and UBSan, and runs them.

python csrc/tests/sanitize.py            # a minute or two; exit status 0 and "all good" when clean
python csrc/tests/sanitize.py --plain    # the same tests without sanitizers
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import cpu_build
import native_build
from native_build import CSRC, Unit

SANITIZE = [
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=undefined",
    "-fno-omit-frame-pointer",
    "-g1",
    "-O0",
    "-DSNE_EMULATED_AMX",
]  # tiles in memory: few machines have them


def build(program: Path, folder: Path, extra: Sequence[str]) -> None:
    """Compile the library and its tests into ``program``, with objects in ``folder`` and ``extra`` flags."""
    test = Unit(CSRC / "tests" / "library_test.cpp", "library_test.o", cpu_build.compiler(extra))
    link = [*native_build.host_compiler(), "-fopenmp", *(flag for flag in extra if flag.startswith("-fsanitize"))]
    native_build.build(program, folder, [*cpu_build.units(extra), test], link)


def environment() -> dict[str, str]:
    """Return the environment in which the tests run."""
    return {**os.environ, "ASAN_OPTIONS": "detect_leaks=1", "OMP_NUM_THREADS": "2"}


if __name__ == "__main__":
    kind, flags = ("plain", []) if "--plain" in sys.argv else ("sanitized", SANITIZE)
    objects = native_build.BUILD_FOLDER / kind
    build(objects / "bin" / "library_test", objects, flags)
    sys.exit(subprocess.run([str(objects / "bin" / "library_test")], env=environment()).returncode)

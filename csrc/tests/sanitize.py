"""Compiles the CPU engine with its C++ tests under AddressSanitizer and UBSan, and runs them.

python csrc/tests/sanitize.py            # a minute or two; exit status 0 and "all good" when clean
python csrc/tests/sanitize.py --plain    # the same tests without sanitizers
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import setup as build  # noqa: E402  (the package's own setup.py)


def main() -> int:
    sanitize = [
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover=undefined",
        "-fno-omit-frame-pointer",
        "-g1",
        "-O1",
    ]
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "engine_test"
        build.compile_library(
            program,
            Path(folder) / "objects",
            extra=[] if "--plain" in sys.argv else sanitize,
            sources=[str(ROOT / "csrc" / "tests" / "engine_test.cpp")],
        )
        environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=1", "OMP_NUM_THREADS": "2"}
        return subprocess.run([str(program)], env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())

"""Build the CUDA kernels for the host, every CUDA thread a fiber.

Used by tests, and alone: python csrc/tests/emulate.py OUT.so

``SNE_FAST_CUDA_EMULATED=OUT.so python -m pytest tests/backends/cuda/emulated`` runs the kernels' tests on it.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import cuda_build
import native_build
from native_build import CSRC, INCLUDES, Unit

FLAGS = ["-std=c++17", "-O1", "-g1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-DSNE_EMULATED", "-Wall",
         "-Wextra", *INCLUDES]  # fmt: skip


def build(target: Path, folder: Path = native_build.BUILD_FOLDER / "emulated") -> None:
    """Compile all kernels into ``target``, with objects in ``folder``."""
    cxx = native_build.host_compiler()
    command = [*cxx, *FLAGS, "-x", "c++"]  # .cu is not a suffix that g++ knows
    files = [*cuda_build.sources(), CSRC / "cuda" / "emulator" / "emulator.cpp"]
    units = [Unit(file, f"{cuda_build.name_of(file)}.o", command) for file in files]
    native_build.build(target, folder, units, [*cxx, "-shared"])


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    build(Path(sys.argv[1]))

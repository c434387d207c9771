"""Build the CPU library from csrc/cpu with g++.

Used by setup.py, and alone: python csrc/cpu_build.py [OUT.so]

Environment:

- ``CXX``: the compiler, by default g++; ``MAX_JOBS``.
- ``SNE_FAST_WERROR=1`` (developers): warnings are errors.
"""

from __future__ import annotations

import functools
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import native_build
from native_build import CSRC, INCLUDES, Unit

# One source per op, compiled once per instruction set; the rest is compiled once.
PER_ISA = ["isa_kernels", "chunk_encode_forward", "chunk_encode_backward", "set_attention_forward",
           "set_attention_backward", "segment_pool", "set_block_forward", "set_block_backward",
           "tensor_statistics"]  # fmt: skip
ONCE = ["abi", "interrupt", "tile_plan", "gather_chunks"]
ISA_FLAGS = {
    "portable": [],
    "avx2": ["-mavx2", "-mfma"],
    "avx512": ["-mavx2", "-mfma", "-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl",
               "-mprefer-vector-width=512", "-Wno-uninitialized", "-Wno-maybe-uninitialized"],  # gcc 12: PR105593
}  # fmt: skip
# Instruction sets that add only products of bfloat16 to avx512, and the sources that are compiled for them.
BF16_FLAGS = {
    "avx512_bf16": [*ISA_FLAGS["avx512"], "-mavx512bf16"],
    "amx_bf16": [*ISA_FLAGS["avx512"], "-mavx512bf16", "-mamx-tile", "-mamx-bf16"],
}
AMX_SOURCES = ["isa_kernels", "chunk_encode_forward", "chunk_encode_backward", "set_block_forward",
               "set_block_backward"]  # fmt: skip
BF16_SOURCES = {
    "avx512_bf16": [*AMX_SOURCES, "set_attention_forward", "set_attention_backward", "segment_pool"],
    "amx_bf16": AMX_SOURCES,
}
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math",
         "-ffp-contract=fast", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Wno-psabi", *INCLUDES]  # fmt: skip


@functools.cache
def _knows_bf16(cxx: tuple[str, ...]) -> bool:
    """Return whether the compiler takes the flags of the instruction sets with bfloat16 (g++ 11, clang 12)."""
    flags = sorted({flag for flags in BF16_FLAGS.values() for flag in flags if flag.startswith("-m")})
    command = [*cxx, *flags, "-fsyntax-only", "-x", "c++", os.devnull]
    return subprocess.run(command, capture_output=True).returncode == 0


def instruction_sets() -> list[str]:
    """Return the instruction sets that the library is compiled for."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return ["portable"]
    return [*ISA_FLAGS, *(BF16_FLAGS if _knows_bf16(tuple(native_build.host_compiler())) else [])]


def compiler(extra: Sequence[str] = ()) -> list[str]:
    """Return the C++ compiler with all flags that do not depend on the file.

    Raises:
        RuntimeError: if there is no compiler.
    """
    cxx = native_build.host_compiler()
    if shutil.which(cxx[0]) is None:
        raise RuntimeError(f"there is no C++ compiler: {cxx[0]} was not found (install g++, or set CXX)")
    strict = ["-Werror"] if os.environ.get("SNE_FAST_WERROR") else []
    return [*cxx, *FLAGS, *extra, *strict]


def units(extra: Sequence[str] = ()) -> list[Unit]:
    """Return the files to compile, each with its command; ``extra`` flags are added to all."""
    command, folder = compiler(extra), CSRC / "cpu"
    isas = instruction_sets()
    command.append(f"-DSNE_BF16_KERNELS={int('amx_bf16' in isas)}")
    flags = {**ISA_FLAGS, **BF16_FLAGS}
    per_isa = [
        Unit(folder / f"{name}.cpp", f"{name}_{isa}.o", [*command, f"-DSNE_ISA_{isa}", *flags[isa]])
        for isa in isas
        for name in BF16_SOURCES.get(isa, PER_ISA)
    ]
    once = [Unit(folder / f"{name}.cpp", f"{name}.o", command) for name in ONCE]
    # The longest compilations first, so that they do not run alone at the end.
    return sorted(per_isa, key=lambda unit: "chunk_encode" not in unit.object) + once


def build(target: Path, folder: Path = native_build.BUILD_FOLDER / "cpu") -> None:
    """Compile csrc/cpu into ``target``, with objects in ``folder``.

    Raises:
        RuntimeError: saying what is missing, or what the compiler said.
    """
    native_build.build(target, folder, units(), [*native_build.host_compiler(), "-shared", "-fopenmp"])


if __name__ == "__main__":
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else native_build.ROOT / native_build.CPU_LIBRARY
    try:
        build(out)
    except RuntimeError as error:
        sys.exit(f"cpu_build: {error}")
    print(f"{out}: {' '.join(instruction_sets())}")

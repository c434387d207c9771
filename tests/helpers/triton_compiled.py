"""Compiles a kernel for a GPU that is not there, and reads its resources and machine code."""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton

from sne_fast.benchmark.instructions.triton_kernels import compile_kernel as compile_for

# Largest shared memory of one block, in bytes (CUDA programming guide, compute capabilities).
SHARED_LIMIT = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
ARCHITECTURES = (80, 90, 100)
ALL_ARCHITECTURES = (80, 86, 90, 100, 120)


def unordered_sums(ttir: str) -> list[str]:
    """Return loads of a kernel's partial sums in a loop without a barrier behind the last store to any.

    Threads need not load the elements that they have stored, and loads may be put ahead of stores where no barrier is.
    """
    sums = set(re.findall(r"(%\w+): !tt\.ptr<[^>]*>[^,]*?loc\(\"\w+_part\"", ttir))
    loops, ordered, found = [], False, []
    for line in ttir.splitlines():
        depth = len(line) - len(line.lstrip())
        if "scf.for" in line:
            loops.append(depth)
            ordered = False
        elif loops and line.lstrip().startswith("}") and depth == loops[-1]:
            loops.pop()
        elif "barrier" in line:
            ordered = True
        made = re.match(r"\s*(%\w+) = (.*)", line)
        operands = sums & set(re.findall(r"%\w+", made[2] if made else line))
        if not operands or "tt.func" in line:
            continue
        if "tt.load" not in line:
            sums |= {made[1]} if made else set()
            ordered &= "tt.store" not in line
        elif loops and not ordered:
            found.append(line.strip())
    return found


@dataclass(frozen=True)
class Compiled:
    """``local_bytes``: spills, local arrays per thread; ``shared_bytes``: per block, with what is sized at launch."""

    registers: int
    local_bytes: int
    shared_bytes: int
    sass: str
    kernel: Any

    def count(self, instruction: str) -> int:
        """Return how often an instruction (``HGMMA``, ``HMMA``, ``LDL``, ...) stands in the machine code."""
        return len(re.findall(rf"\b{instruction}\b", self.sass))

    @property
    def matrix_instruction(self) -> str:
        """The widest kind of matrix instruction in the machine code, "" for none."""
        kinds = ("HGMMA", "UTCHMMA", "UTCQMMA", "HMMA", "DMMA")
        return next((kind for kind in kinds if self.count(kind)), "")


@functools.cache
def _cuobjdump() -> str:
    return triton.knobs.nvidia.cuobjdump.path


def _dump(option: str, path: Path) -> str:
    return subprocess.run([_cuobjdump(), option, str(path)], capture_output=True, text=True, check=True).stdout


def compile_kernel(
    fn: Any,
    signature: Mapping[str, str],
    constexprs: Mapping[str, Any],
    arch: int,
    num_warps: int = 4,
    num_stages: int = 2,
    divisible: tuple[str, ...] | None = None,
    maxnreg: int | None = None,
) -> Compiled:
    """Compile ``@triton.jit`` function ``fn`` for ``sm_{arch}``.

    Args:
        fn: the kernel.
        signature: Triton types ("*fp32", "i32", ...) of the arguments that are not constexpr.
        constexprs: values of the others.
        arch: 80, 90, 100, 120.
        divisible: names of arguments known to be multiples of 16, as torch's pointers are; None for all pointers.
        maxnreg: the most registers of a thread; None for as many as the compiler takes.

    Raises:
        AssertionError: the kernel adds to memory atomically, in an order that differs from run to run, or to its own
            partial sums without a barrier.
    """
    kernel = compile_for(
        fn, signature, constexprs, arch, divisible=divisible, num_warps=num_warps, num_stages=num_stages,
        maxnreg=maxnreg,
    )  # fmt: skip
    assert "tt.atomic" not in kernel.asm["ttir"], fn.__name__
    assert unordered_sums(kernel.asm["ttir"]) == [], fn.__name__
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(kernel.asm["cubin"])
        usage, sass = _dump("-res-usage", path), _dump("-sass", path)
    found = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    return Compiled(
        found["REG"], max(found["STACK"], found["LOCAL"]), max(found["SHARED"], kernel.metadata.shared), sass, kernel
    )

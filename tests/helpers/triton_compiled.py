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

import torch
import triton

from helpers.op_cases import products
from sne_fast.backends.gpu_plans.lengths import Lengths
from sne_fast.benchmark.instructions.triton_kernels import compile_kernel as compile_for

# Largest shared memory of one block, in bytes (CUDA programming guide, compute capabilities).
SHARED_LIMIT = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
ARCHITECTURES = (80, 90, 100)
ALL_ARCHITECTURES = (80, 86, 90, 100, 120)
TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
# float32 has the products of full precision ("highest") or tf32 ("high"), by torch's setting.
KINDS = [(torch.bfloat16, "highest"), (torch.float16, "highest"), (torch.float32, "high"), (torch.float32, "highest")]


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


def check_resources(result: Compiled, arch: int, spill: int = 0, matrix: bool = True) -> None:
    """Print what a kernel takes, and check its spill, shared memory and use of the matrix units."""
    print(f"sm_{arch}: {result.registers} registers, {result.local_bytes} local bytes, {result.shared_bytes} shared "
          f"bytes, {result.matrix_instruction}")  # fmt: skip
    assert result.registers <= 255 and result.local_bytes <= spill
    assert result.shared_bytes <= SHARED_LIMIT[arch]
    assert bool(result.matrix_instruction) == matrix


def compile_block(fn: Any, plan: Any, dtype: torch.dtype, arch: int) -> Compiled:
    """Compile a kernel of whole blocks, with the sizes of its plan."""
    signature = {name: TYPES[dtype] for name in fn.arg_names if name not in plan.constants}
    signature |= {name: "*fp32" for name in signature if name == "stats" or name.endswith("_part")}
    signature |= {name: "*i64" for name in ("ptr", "owner") if name in signature}
    signature |= {name: "i32" for name in ("rows", "sets", "tiles") if name in signature}
    sizes = plan.sizes
    return compile_kernel(fn, signature, plan.constants, arch, sizes.num_warps, sizes.num_stages, maxnreg=sizes.maxnreg)


def compile_planned_block(
    plan: Any, kernels: Any, kernel: str, arch: int, h: int = 64, heads: int = 4, dtype: torch.dtype = torch.bfloat16,
    precision: str = "highest", layer_norm: bool = True, typical: int = 20,
) -> Compiled:  # fmt: skip
    """Compile a kernel of the module ``kernels``, as the class ``plan`` launches it for sets of typical length."""
    with products(precision):
        rows = torch.empty(1, h, dtype=dtype, device="meta")
        made = plan.make(kernel, rows, heads, layer_norm, Lengths(100, typical, typical), arch)
    return compile_block(getattr(kernels, f"{kernel}_kernel"), made, dtype, arch)


def spill_of_block(kernel: str, heads: int, on_matrix_units: bool) -> int:
    """Return the bytes that a kernel of whole blocks may spill in any of its variants."""
    if kernel == "forward":
        return 64 if heads == 8 else 0
    return 512 if on_matrix_units else 2048

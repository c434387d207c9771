"""The Triton kernels of a training step of ``chunk_encode``, compiled for a GPU that is not there, and their counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ...extras import require
from .counting import Chip, Count, float_atomics, totals
from .flow import Flow, Loop
from .kernels import Config
from .machine_code import read_kernels

DTYPES = ("bfloat16", "float16", "float32", "tf32")
_RESERVED = 1024  # bytes of shared memory that the system takes of each block
_TENSOR_COLUMNS = 512  # of tensor memory in a multiprocessor
_TILES = "for i_tile in "


@dataclass(frozen=True)
class TritonKernel:
    """A kernel by its table of launches, and how often a training step launches it."""

    title: str
    table: str
    launches: int = 1
    save: bool = False

    @property
    def per_unit(self) -> str:
        """The loop over tiles; "" for a kernel whose programs take one tile each."""
        return "" if self.table == "chunk_encode" else _TILES


KERNELS = (
    TritonKernel("forward", "chunk_encode"),
    TritonKernel("forward of the backward", "chunk_encode", save=True),
    TritonKernel("pool backward", "chunk_encode_pool_backward"),
    TritonKernel("block backward", "chunk_encode_block_backward", 3),
    TritonKernel("weight gradients", "chunk_encode_weight_grad", 13),
    TritonKernel("sums of codes", "chunk_encode_codes_backward"),
    TritonKernel("scalar backward", "chunk_encode_scalar_backward"),
)
"""The first one is the forward pass."""


def functions() -> dict[str, Any]:
    """Return the chunk kernels by their tables of launches."""
    from ...backends.triton import chunk_encode_backward_kernels as backward
    from ...backends.triton import chunk_encode_kernels as forward
    from ...backends.triton import chunk_encode_scalar_kernels as scalar

    return {
        "chunk_encode": forward.chunk_encode_kernel,
        "chunk_encode_pool_backward": backward.pool_backward_kernel,
        "chunk_encode_weight_grad": backward.weight_grad_kernel,
        "chunk_encode_block_backward": backward.block_backward_kernel,
        "chunk_encode_codes_backward": backward.codes_backward_kernel,
        "chunk_encode_scalar_backward": scalar.scalar_backward_kernel,
    }


_INDICES = {"chunk_ptr", "order", "owner", "table", "ptr"}
_SUMS = {"rows_grad", "chunk_grad", "values_grad_sum", "means", "means_grad", "rows", "partial"}
_COUNTS = {"first_bin": "i64", "slab_rows": "i32", "tiles": "i32", "codes": "i32", "sets": "i32", "chunks": "i32"}


def signature(fn: Any, operand: str, constants: Mapping[str, Any]) -> dict[str, str]:
    """Return Triton's types of the arguments of a chunk kernel that are not constants."""

    def kind(name: str) -> str:
        if name in _COUNTS or name in _INDICES:
            return _COUNTS.get(name, "*i64")
        return "*fp32" if name in _SUMS or name.endswith("_part") else f"*{operand}"

    return {name: kind(name) for name in fn.arg_names if name not in constants}


def compile_kernel(
    fn: Any,
    types: Mapping[str, str],
    constants: Mapping[str, Any],
    architecture: int,
    *,
    divisible: tuple[str, ...] | None = None,
    **options: Any,
) -> Any:
    """Compile a ``@triton.jit`` function, without a GPU.

    Args:
        fn: the kernel.
        types: Triton types ("*fp32", "i32", ...) of the arguments that are not constexpr.
        constants: values of the others.
        architecture: 80, 90, 100, 120.
        divisible: names of arguments known to be multiples of 16, as torch's pointers are; None for all pointers.
        options: of the launch: ``num_warps``, ``num_stages``, ``maxnreg``.

    Raises:
        ValueError: an argument of the kernel is left out, or one is unknown.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = fn.arg_names
    if unknown := (set(types) | set(constants)) ^ set(names):
        raise ValueError(f"{fn.__name__}: arguments left out or unknown: {sorted(unknown)}")
    kinds = {name: "constexpr" if name in constants else types[name] for name in names}
    if divisible is None:
        divisible = tuple(name for name, kind in kinds.items() if kind.startswith("*"))
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in divisible}
    source = ASTSource(fn, kinds, {(names.index(name),): value for name, value in constants.items()}, attributes)
    options = {"enable_fp_fusion": True} | {name: value for name, value in options.items() if value is not None}
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


def loops(config: Config) -> dict[str, Loop]:
    """Return loops by the beginning of their source."""
    return {
        _TILES: Loop(2),
        "for full in range(3):": Loop(3),
        "for i_head in range(HEADS):": Loop(config.heads),
    }


BRANCHES = {
    # Machine code asks it ahead of the end of its loop, so for 0 to 3, of which the last one leaves.
    "if full == 1:": 1 / 3,
    "if MULTI_CHUNK:": 0,
}
"""How often statements behind a branch run, by the beginning of their source."""


def count_kernel(kernel: TritonKernel, config: Config, dtype: str, architecture: int, chip: Chip) -> Count:
    """Compile and count one kernel for chunks that fill bins of 32 slots.

    Raises:
        RuntimeError: Triton or a tool that it brings is missing, or a loop has no trip count.
    """
    require("triton", extra="triton", why="counting instructions of Triton kernels")
    import torch
    import triton.language as tl

    from ...backends.triton.chunk_launches import FUSED_CLASSES, class_constants, length_class, padded_heads
    from ...backends.triton.launches import launch

    operand = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(dtype, torch.float32)
    precision = "tf32" if dtype == "tf32" else "ieee"
    slots = next(c for c in FUSED_CLASSES if c.min_length <= config.chunk_size <= c.longest)
    fn = functions()[kernel.table]
    length = length_class(slots, precision if operand == torch.float32 else "")
    sizes = launch(kernel.table, h=config.hidden, heads=config.heads, length=length, dtype=operand, arch=architecture)
    constants = {
        "WIDTH": config.hidden, "HEADS": config.heads, "PADDED_HEADS": padded_heads(config.heads), "LAYER_NORM": True,
        "SAVE": kernel.save, "ACC": tl.float32, "PRECISION": precision, **class_constants(slots),
        **sizes.blocks,
    }  # fmt: skip
    constants = {name: value for name, value in constants.items() if name in fn.arg_names}
    types = signature(fn, {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(operand, "fp32"), constants)
    made = compile_kernel(fn, types, constants, architecture, **sizes.options)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(made.asm["cubin"])
        (function,) = read_kernels(path, str(architecture))
    runs = Flow(function, loops(config), BRANCHES, sizes.num_warps).per_run_of(kernel.per_unit)
    rows = sizes.blocks["ROWS"] if "ROWS" in sizes.blocks else sizes.blocks["BINS"] * slots.slots
    classes, operations, shared = totals(function, runs, sizes.num_warps * 32 / rows)
    taken = max(function.shared_bytes, made.metadata.shared)
    blocks = min(
        chip.registers // (-(-function.registers // 8) * 8 * 32 * sizes.num_warps),
        chip.shared_memory // (taken + _RESERVED),
        chip.warps // sizes.num_warps,
        _TENSOR_COLUMNS // max(1, made.metadata.tmem_size),
    )
    return Count(kernel.title, kernel.launches, sum(classes.values()), classes, operations, shared,
                 function.registers, function.stack_bytes, function.spills, taken, sizes.num_warps * blocks,
                 float_atomics(function))  # fmt: skip


def count_triton(config: Config, dtype: str, architecture: int, chip: Chip, only: Sequence[str] = ()) -> list[Count]:
    """Compile and count the kernels of a training step; the first one is the forward pass."""
    return [count_kernel(kernel, config, dtype, architecture, chip)
            for kernel in KERNELS if not only or kernel.title in only]  # fmt: skip

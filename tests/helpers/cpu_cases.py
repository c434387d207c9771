"""Inputs of the four ops for the tests of the CPU backend: random, ragged, float64 to be cast."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from helpers.op_cases import pointer
from sne_fast.backends.cpu import library

NEEDS_BACKEND = "needs the native library: " + "; ".join(library.reasons())
ISAS = [] if library.reasons() else [isa for isa in library.supported_isas() if not isa.endswith("_bf16")]
"""Instruction sets of this machine with kernels of float32 and float64 of their own."""


def chunk_encode_case(
    h: int, heads: int, lengths: Sequence[int], layer_norm: bool = True, tensors: int = 3, rows: int | None = None
) -> tuple[Tensor, ...]:
    """Make the 15 arguments of the op in float64; ``rows`` of element_code may exceed the longest chunk."""
    g = torch.Generator().manual_seed(h * 1000 + heads * 10 + len(lengths))

    def normal(*shape: int, gain: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64) * gain

    count = len(lengths)
    ptr = pointer(lengths)
    tensor_ptr = torch.tensor(sorted({0, count, *(count * i // tensors for i in range(1, tensors))}))
    norm = normal(4, 4, h, gain=0.3) + torch.tensor([1.0, 0.0, 1.0, 0.0])[:, None]
    return (
        normal(int(ptr[-1])), ptr, tensor_ptr, ptr, tensor_ptr, normal(len(tensor_ptr) - 1, h),
        normal(rows or max(lengths, default=1), h), normal(2, heads), normal(3, h),
        normal(3, 3 * h, h, gain=h**-0.5), normal(3, 3 * h, gain=0.1), normal(4, h, h, gain=h**-0.5),
        normal(4, h, gain=0.1), norm if layer_norm else normal(0, 4, h), normal(heads, h, gain=0.3),
    )  # fmt: skip


def cast(args: Sequence[object], dtype: torch.dtype) -> tuple[object, ...]:
    return tuple(a.to(dtype) if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)

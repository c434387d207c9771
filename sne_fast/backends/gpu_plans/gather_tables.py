"""What a launch of gather_chunks is told of its tensors: checks, contiguous sources, and the table of the matrices."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

CODES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
"""Types that kernels read and write; others are converted first."""


def check(op: str, tensors: Sequence[Tensor], scale: Tensor, plan: Tensor) -> None:
    """Nothing has looked at the inputs of a compiled call, and wrong sizes would write anywhere."""
    if plan.shape != (len(tensors), 2) or scale.shape != (len(tensors),) or plan.device.type != "cpu":
        raise ValueError(
            f"{op}: scale and plan must have shapes ({len(tensors)},) and ({len(tensors)}, 2), plan on the CPU, got "
            f"{tuple(scale.shape)} and {tuple(plan.shape)} on {plan.device}"
        )
    for t, (tensor, (rows, positions)) in enumerate(zip(tensors, plan.tolist(), strict=True)):
        if min(rows, positions) < 0 or tensor.numel() != rows * positions or tensor.device != scale.device:
            raise ValueError(
                f"{op}: tensors[{t}] must have shape {(rows, positions)} by plan[{t}] and be on {scale.device}, got "
                f"{tuple(tensor.shape)} on {tensor.device}"
            )


def check_backward(grad: Tensor, values: Tensor, tensors: Sequence[Tensor], scale: Tensor, plan: Tensor) -> None:
    check("gather_chunks_backward", tensors, scale, plan)
    if grad.shape != values.shape or values.shape != (sum(t.numel() for t in tensors),):
        raise ValueError(f"gather_chunks_backward: grad and values must have the shape of all tensors' values, got "
                         f"{tuple(grad.shape)} and {tuple(values.shape)}")  # fmt: skip


def sources(tensors: Sequence[Tensor], computed: torch.dtype) -> list[Tensor]:
    """The tensors as contiguous arrays of a type that kernels read; float8 and the like as ``computed``."""
    return [(t if t.dtype in CODES else t.to(computed)).contiguous() for t in tensors]


def empty_gradients(tensors: Sequence[Tensor], computed: torch.dtype) -> list[Tensor]:
    """Uninitialised, in the tensors' types where kernels write them."""
    types = [t.dtype if t.dtype in CODES else computed for t in tensors]
    return [torch.empty(t.shape, dtype=dtype, device=t.device) for t, dtype in zip(tensors, types, strict=True)]


def shapes(plan: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Rows R and positions K of the matrices, int64."""
    rows, positions = plan.numpy().T.astype(np.int64).reshape(2, -1)
    return rows, positions


def table(
    tensors: Sequence[Tensor], rows: np.ndarray, positions: np.ndarray, tiles: np.ndarray, *more: np.ndarray
) -> tuple[np.ndarray, int]:
    """Int64 ``(7 + len(more), matrices that are not empty)``, and how many tiles they have.

    Fields: first tile, address, code of the type, rows, positions, where it starts in the result, place in ``scale``;
    then ``more``. All arrays are per tensor, empty ones included.
    """
    counts = rows * positions
    fields = [
        np.cumsum(tiles) - tiles, np.array([t.data_ptr() for t in tensors], np.int64),
        np.array([CODES[t.dtype] for t in tensors], np.int64),
        rows, positions, np.cumsum(counts) - counts, np.arange(len(tensors)), *more,
    ]  # fmt: skip
    used = counts > 0
    return np.ascontiguousarray(np.stack(fields)[:, used]), int(tiles[used].sum())


def why_not(op: str, dtype: torch.dtype) -> list[str]:
    return [] if dtype in CODES else [f"dtype must be one of {', '.join(map(str, CODES))}, got {dtype}"]

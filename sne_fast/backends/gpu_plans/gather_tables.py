"""Table of matrices for a launch of ``gather_chunks``, and the arrays that its kernels read and write."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ...ops.backend import Arguments
from ...ops.schema import named

CODES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
"""Code of each dtype that kernels read and write; tensors of other dtypes are converted first."""


def sources(tensors: Sequence[Tensor], computed: torch.dtype) -> list[Tensor]:
    """Return the tensors as contiguous arrays of a dtype that kernels read: float8 and the like as ``computed``."""
    return [(t if t.dtype in CODES else t.to(computed)).contiguous() for t in tensors]


def empty_gradients(tensors: Sequence[Tensor], computed: torch.dtype) -> list[Tensor]:
    """Return uninitialised gradients, in the tensors' dtypes where kernels write them, else ``computed``."""
    types = [t.dtype if t.dtype in CODES else computed for t in tensors]
    return [torch.empty(t.shape, dtype=dtype, device=t.device) for t, dtype in zip(tensors, types, strict=True)]


def shapes(plan: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows R and positions K of the matrices, int64."""
    rows, positions = plan.numpy().T.astype(np.int64).reshape(2, -1)
    return rows, positions


def table(
    tensors: Sequence[Tensor], rows: np.ndarray, positions: np.ndarray, tiles: np.ndarray, *more: np.ndarray
) -> tuple[np.ndarray, int]:
    """Return the table, int64 ``(7 + len(more), matrices that are not empty)``, and the number of their tiles.

    Fields: first tile, address, code of the dtype, rows, positions, first value in the result, index in ``scale``; then
    ``more``. All arguments have one entry per tensor, empty ones included.
    """
    counts = rows * positions
    fields = [
        np.cumsum(tiles) - tiles, np.array([t.data_ptr() for t in tensors], np.int64),
        np.array([CODES[t.dtype] for t in tensors], np.int64),
        rows, positions, np.cumsum(counts) - counts, np.arange(len(tensors)), *more,
    ]  # fmt: skip
    used = counts > 0
    return np.ascontiguousarray(np.stack(fields)[:, used]), int(tiles[used].sum())


def why_not(op: str, args: Arguments) -> list[str]:
    """Return why the kernels of a GPU cannot run a call; empty if they can."""
    given = named(op, args)
    dtype = given["dtype"] if "dtype" in given else given["grad"].dtype
    return [] if dtype in CODES else [f"dtype must be one of {', '.join(map(str, CODES))}, got {dtype}"]

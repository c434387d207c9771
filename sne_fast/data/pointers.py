"""Arithmetic of CSR pointers on the host."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def ragged_gather(pointer: np.ndarray, rows: np.ndarray, with_rows: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return the pointers of the chosen rows, and (if wanted) the rows of the next level that they hold."""
    starts = pointer[rows]
    lengths = pointer[rows + 1] - starts
    gathered = np.zeros(len(rows) + 1, np.int64)
    np.cumsum(lengths, out=gathered[1:])
    if not with_rows:
        return gathered, rows
    return gathered, np.repeat(starts - gathered[:-1], lengths) + np.arange(gathered[-1])


def join_pointers(pointers: list[Tensor]) -> Tensor:
    """Concatenate pointers: one pointer of all sets, in order."""
    ends = np.cumsum([0] + [int(p[-1]) for p in pointers]).tolist()
    return torch.cat([pointers[0][:1]] + [p[1:] + end for p, end in zip(pointers, ends[:-1], strict=True)])

"""Arithmetic of CSR pointers on the host."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from .batch import WeightBatch


def network_starts(batch: WeightBatch) -> Tensor:
    """Place of each network's first weight, and of the end: `(B+1,)` int64 on the CPU."""
    return batch.chunk_ptr_host[batch.tensor_ptr_host[batch.layer_ptr_host[batch.network_ptr_host]]]


def ragged_gather(pointer: np.ndarray, rows: np.ndarray, with_rows: bool) -> tuple[np.ndarray, np.ndarray]:
    """Pointers of the chosen rows, and (if wanted) which rows of the next level they hold."""
    starts = pointer[rows]
    lengths = pointer[rows + 1] - starts
    gathered = np.zeros(len(rows) + 1, np.int64)
    np.cumsum(lengths, out=gathered[1:])
    if not with_rows:
        return gathered, rows
    return gathered, np.repeat(starts - gathered[:-1], lengths) + np.arange(gathered[-1])


def join_pointers(pointers: list[Tensor]) -> Tensor:
    """One pointer of all sets, those of each pointer after those of the one before."""
    ends = np.cumsum([0] + [int(p[-1]) for p in pointers]).tolist()
    return torch.cat([pointers[0][:1]] + [p[1:] + end for p, end in zip(pointers, ends[:-1], strict=True)])

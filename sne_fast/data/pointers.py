"""Arithmetic of CSR pointers on the host."""

from __future__ import annotations

from collections.abc import Sequence

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


def chunk_pointers(rows: Sequence[int], lengths: Sequence[int], chunk_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return chunk and tensor pointers: each row is cut every `chunk_size`, and its last piece may be shorter."""
    row, length = np.array(rows, np.int64), np.array(lengths, np.int64)
    per_row = -(-length // chunk_size)
    tensor_ptr = np.zeros(len(rows) + 1, np.int64)
    np.cumsum(row * per_row, out=tensor_ptr[1:])
    firsts = np.zeros(len(rows) + 1, np.int64)
    np.cumsum(row * length, out=firsts[1:])
    # The pointers of a large network are a sixteenth of its size: written in place, with nothing of size N besides.
    chunk_ptr = np.empty(tensor_ptr[-1] + 1, np.int64)
    chunk_ptr[-1] = firsts[-1]
    ends = tensor_ptr.tolist()
    for s, (r, n, m, first) in enumerate(zip(rows, lengths, per_row.tolist(), firsts.tolist(), strict=False)):
        out = chunk_ptr[ends[s] : ends[s + 1]]
        if r == 1:
            out[:] = np.arange(first, first + n, chunk_size)
        else:
            starts, steps = np.arange(first, first + r * n, n), np.arange(0, n, chunk_size)
            np.add(starts[:, None], steps, out=out.reshape(r, m))
    return chunk_ptr, tensor_ptr


def pointer_of(counts: Sequence[int] | np.ndarray) -> Tensor:
    """Return the pointer of sets that hold so many each."""
    pointer = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=pointer[1:])
    return torch.from_numpy(pointer)

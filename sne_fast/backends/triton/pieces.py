"""Cutting ragged sets into pieces of ``BLOCK`` rows without a map, a prefix sum or a host synchronisation.

Set s owns the pieces ``ptr[s] // BLOCK + s`` up to, not including, ``ptr[s+1] // BLOCK + s + 1``: always enough for its
rows, at most one more. There are ``rows // BLOCK + sets`` pieces in all, which the host knows, and a search in ``ptr``
finds the set of a piece. Sums over the pieces of a set run in their order, so that two runs give the same bits.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from .launches import next_power_of_2, on_device, triton_dtype
from .pieces_kernels import sum_pieces_kernel, sum_rows_kernel

SUM_BLOCK, SUM_STEP = 512, 32
ONE_PROGRAM = 2048
"""Rows of the longest set that one program sums."""


def piece_count(rows: int, sets: int, block: int) -> int:
    """Return the number of pieces that ``sets`` sets of ``rows`` rows own, with and without rows."""
    return rows // block + sets


def sum_pieces(partial: Tensor, out: Tensor, ptr: Tensor, row_ptr: Tensor | None, block: int) -> None:
    """Fill the rows of ``out`` by :func:`sum_pieces_kernel`; ``partial`` is ``(pieces, max_rows of a set, width)``.

    Without ``row_ptr``, ``out`` has one row per set.
    """
    width = out.shape[1]
    size = partial.shape[1] * width
    sets = ptr.shape[0] - 1
    if not sets or not size:
        return
    columns = min(1024, next_power_of_2(size))
    with on_device(out):
        sum_pieces_kernel[(sets, triton.cdiv(size, columns))](
            partial, out, ptr, ptr if row_ptr is None else row_ptr, size, width, ONE_ROW=row_ptr is None, BLOCK=block,
            COLUMNS=columns, ACC=triton_dtype(partial.dtype), num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip


def sum_over_sets(rows: Tensor, ptr: Tensor, longest: int, dtype: torch.dtype) -> Tensor:
    """Sum the packed rows ``(R, h)`` of each set, ``(S, h)`` in ``dtype``, in a fixed order.

    ``longest`` is the number of rows of the longest set.
    """
    sets, (count, width) = ptr.shape[0] - 1, rows.shape
    if not sets or not count:
        return rows.new_zeros((sets, width), dtype=dtype)
    out = rows.new_empty((sets, width), dtype=dtype)
    whole = longest <= ONE_PROGRAM
    pieces = sets if whole else piece_count(count, sets, SUM_BLOCK)
    partial = out if whole else rows.new_empty((pieces, 1, width))
    sum_rows_kernel[(pieces,)](
        rows, ptr, partial, sets, WHOLE=whole, BLOCK=SUM_BLOCK, STEP=SUM_STEP, WIDTH=width,
        ACC=triton_dtype(rows.dtype), num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    if not whole:
        sum_pieces(partial, out, ptr, None, SUM_BLOCK)
    return out

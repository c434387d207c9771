"""Kernels on pieces of ragged sets, as :mod:`sne_fast.backends.triton.pieces` cuts them."""

from __future__ import annotations

import triton
import triton.language as tl

WAYS = tl.constexpr(64)


@triton.jit
def find_set(
    ptr,
    sets,
    i_piece,
    BLOCK: tl.constexpr,
):
    """Return the set of a piece, by a search that compares 64 pointers at a time, as every step waits for memory."""
    i_low = i_piece * 0  # int64
    size = sets + i_low
    while size > 1:
        step = (size + WAYS - 1) // WAYS
        i_set = i_low + tl.arange(0, WAYS) * step
        m_set = i_set < i_low + size
        b_first = tl.load(ptr + i_set, mask=m_set, other=0) // BLOCK + i_set  # [WAYS]
        below = tl.sum((m_set & (b_first <= i_piece)).to(tl.int64), 0) - 1
        end = i_low + size
        i_low += below * step
        size = tl.minimum(step, end - i_low)
    return i_low


@triton.jit
def piece_range(
    ptr,
    sets,
    i_piece,
    BLOCK: tl.constexpr,
):
    """Return the set of a piece, the piece's first row and the end of its set: no rows where they meet."""
    i_set = find_set(ptr, sets, i_piece, BLOCK)
    begin = tl.load(ptr + i_set)
    end = tl.load(ptr + i_set + 1)
    start = begin + (i_piece - (begin // BLOCK + i_set)) * BLOCK
    return i_set, start, end


@triton.jit
def pieces_of_set(
    ptr,
    i_set,
    BLOCK: tl.constexpr,
):
    """Return the first piece of a set, and the number of its pieces that hold rows."""
    begin = tl.load(ptr + i_set)
    end = tl.load(ptr + i_set + 1)
    return begin // BLOCK + i_set, (end - begin + BLOCK - 1) // BLOCK


@triton.jit(do_not_specialize=["stride"])
def sum_pieces_kernel(
    partial,
    out,
    ptr,
    row_ptr,
    stride,
    width,
    ONE_ROW: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    ACC: tl.constexpr,
):
    """Compute ``out[row_ptr[s] + i]``, ``width`` values: the sum over the pieces of set s of ``partial[piece, i]``."""
    i_set = tl.program_id(0).to(tl.int64)
    i_column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    if ONE_ROW:
        i_row = i_set
        size = width + i_set * 0
    else:
        i_row = tl.load(row_ptr + i_set)
        size = (tl.load(row_ptr + i_set + 1) - i_row) * width
    m_column = i_column < size
    first, count = pieces_of_set(ptr, i_set, BLOCK)
    b_sum = tl.zeros([COLUMNS], ACC)
    for i_piece in range(first, first + count):
        b_sum += tl.load(partial + i_piece * stride + i_column, mask=m_column, other=0)  # [COLUMNS]
    tl.store(out + i_row * width + i_column, b_sum.to(out.dtype.element_ty), mask=m_column)


@triton.jit(do_not_specialize=["sets"])
def sum_rows_kernel(
    rows,
    ptr,
    partial,
    sets,
    WHOLE: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    WIDTH: tl.constexpr,
    ACC: tl.constexpr,
):
    """Sum the rows ``(N, h)`` of one piece, at most BLOCK of one set, or of a WHOLE set: ``partial (pieces, h)``."""
    i_piece = tl.program_id(0).to(tl.int64)
    if WHOLE:
        start, end = tl.load(ptr + i_piece), tl.load(ptr + i_piece + 1)
    else:
        i_set, start, end = piece_range(ptr, sets, i_piece, BLOCK)
        end = tl.minimum(end, start + BLOCK)
    i_column = tl.arange(0, WIDTH)
    b_sum = tl.zeros((WIDTH,), ACC)
    for first in range(start, end, STEP):
        i_row = first + tl.arange(0, STEP)
        i_value = i_row[:, None] * WIDTH + i_column[None, :]
        b_sum += tl.sum(tl.load(rows + i_value, mask=(i_row < end)[:, None], other=0), 0)  # [STEP, WIDTH] -> [WIDTH]
    tl.store(partial + i_piece * WIDTH + i_column, b_sum.to(partial.dtype.element_ty))

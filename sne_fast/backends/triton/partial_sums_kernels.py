"""Kernel of the sums of partial sums, as :mod:`sne_fast.backends.triton.partial_sums` lays them out."""

from __future__ import annotations

import triton
import triton.language as tl

FIELDS = tl.constexpr(6)


@triton.jit
def sum_parts_kernel(
    parts,
    table,
    out0,
    out1,
    out2,
    out3,
    out4,
    out5,
    out6,
    out7,
    out8,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    ACC: tl.constexpr,
):
    """Sum ``count`` rows of one part, in their order, for some of its columns, into one of the results.

    ``table (programs, 6)``: first value in ``parts``, values from row to row, rows, the result, first value in it, and
    columns.
    """
    p_entry = table + tl.program_id(0).to(tl.int64) * FIELDS
    first, stride, count = tl.load(p_entry), tl.load(p_entry + 1), tl.load(p_entry + 2)
    which, target, columns = tl.load(p_entry + 3), tl.load(p_entry + 4), tl.load(p_entry + 5)
    p_out = out0
    if which == 1:
        p_out = out1
    if which == 2:
        p_out = out2
    if which == 3:
        p_out = out3
    if which == 4:
        p_out = out4
    if which == 5:
        p_out = out5
    if which == 6:
        p_out = out6
    if which == 7:
        p_out = out7
    if which == 8:
        p_out = out8
    i_column = tl.arange(0, COLUMNS)
    m_column = i_column < columns
    b_sum = tl.zeros((COLUMNS,), ACC)
    for row in range(0, count, ROWS):
        i_row = row + tl.arange(0, ROWS)
        i_value = first + i_row[:, None] * stride + i_column[None, :]
        m_value = (i_row < count)[:, None] & m_column[None, :]
        b_sum += tl.sum(tl.load(parts + i_value, mask=m_value, other=0), 0)  # [ROWS, COLUMNS] -> [COLUMNS]
    tl.store(p_out + target + i_column, b_sum.to(out0.dtype.element_ty), mask=m_column)

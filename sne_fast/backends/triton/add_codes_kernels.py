"""Kernels of ``add_codes``: the code of each row is put together where it is needed, and never stored."""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import vector


@triton.jit
def codes_of(
    owner,
    place,
    level,
    table,
    scale,
    magnitude,
    i_row,
    m_row,
    BY_SET: tl.constexpr,
    WITH_TABLE: tl.constexpr,
    WITH_SCALE: tl.constexpr,
    WIDTH: tl.constexpr,
    ACC: tl.constexpr,
):
    """Return the codes of rows before the gain [M, h], and logarithms of the scales of their sets [M], 0 without."""
    i_column = tl.arange(0, WIDTH)
    i_level = tl.load(owner + i_row, mask=m_row, other=0) if BY_SET else i_row
    b_code = tl.load(level + i_level[:, None] * WIDTH + i_column[None, :], mask=m_row[:, None], other=0).to(ACC)
    if WITH_TABLE:
        i_place = tl.load(place + i_row, mask=m_row, other=0)
        b_code += tl.load(table + i_place[:, None] * WIDTH + i_column[None, :], mask=m_row[:, None], other=0).to(ACC)
    b_scale = tl.zeros(i_row.shape, ACC)
    if WITH_SCALE:
        b_scale = tl.log(tl.load(scale + i_level, mask=m_row, other=1).to(ACC))  # [M]
        b_code += b_scale[:, None] * vector(magnitude, WIDTH, ACC)[None, :]
    return b_code, b_scale


@triton.jit(do_not_specialize=["rows"])
def forward_kernel(
    x,
    owner,
    place,
    level,
    table,
    scale,
    magnitude,
    gain,
    out,
    rows,
    BY_SET: tl.constexpr,
    WITH_TABLE: tl.constexpr,
    WITH_SCALE: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    ACC: tl.constexpr,
):
    """Compute ``out (rows, h)``, x and the gain times the codes."""
    i_row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    m_row = i_row < rows
    b_code, b_scale = codes_of(
        owner, place, level, table, scale, magnitude, i_row, m_row, BY_SET, WITH_TABLE, WITH_SCALE, WIDTH, ACC
    )
    i_value = i_row[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    b_x = tl.load(x + i_value, mask=m_row[:, None], other=0).to(ACC)  # [M, h]
    tl.store(out + i_value, (b_x + tl.load(gain).to(ACC) * b_code).to(out.dtype.element_ty), mask=m_row[:, None])


@triton.jit(do_not_specialize=["rows", "tiles"])
def backward_kernel(
    grad,
    owner,
    place,
    level,
    table,
    scale,
    magnitude,
    gain,
    magnitude_part,
    gain_part,
    rows,
    tiles,
    BY_SET: tl.constexpr,
    WITH_TABLE: tl.constexpr,
    WITH_SCALE: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    ACC: tl.constexpr,
):
    """Sum the gradients of ``magnitude (programs, h)`` and ``gain (programs,)`` over this program's rows."""
    i_program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    i_column = tl.arange(0, WIDTH)
    b_magnitude_sum, b_gain_sum = tl.zeros((WIDTH,), ACC), tl.zeros((WIDTH,), ACC)
    for i_tile in range(i_program, tiles, programs):
        i_row = i_tile * ROWS + tl.arange(0, ROWS)
        m_row = i_row < rows
        b_code, b_scale = codes_of(
            owner, place, level, table, scale, magnitude, i_row, m_row, BY_SET, WITH_TABLE, WITH_SCALE, WIDTH, ACC
        )
        i_value = i_row[:, None] * WIDTH + i_column[None, :]
        b_grad = tl.load(grad + i_value, mask=m_row[:, None], other=0).to(ACC)  # [M, h]
        b_gain_sum += tl.sum(b_grad * b_code, 0)
        b_magnitude_sum += tl.sum(b_grad * b_scale[:, None], 0)
    tl.store(magnitude_part + i_program * WIDTH + i_column, b_magnitude_sum * tl.load(gain).to(ACC))
    tl.store(gain_part + i_program, tl.sum(b_gain_sum, 0))

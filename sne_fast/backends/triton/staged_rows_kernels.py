"""Kernels of the staged form, which every wide block shares: residual add and LayerNorm of packed rows, and back.

The backward adds up its parameters' gradients over the rows of one program, ``(programs, h)``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import add_to, normed, normed_backward, vector


@triton.jit
def _tile_at(
    i_tile,
    rows,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Return the values [M, h] of a tile of packed rows, and the mask of its rows."""
    i_row = i_tile * ROWS + tl.arange(0, ROWS)
    return i_row[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :], (i_row < rows)[:, None]


@triton.jit(do_not_specialize=["rows"])
def add_normed_kernel(
    a,
    b,
    gain,
    bias,
    out,
    rows,
    RELU: tl.constexpr,
    LAYER_NORM: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    ACC: tl.constexpr,
):
    """Add rows ``(R, h)`` and normalise: ``ln(a + b)``, with RELU ``ln(a + relu(b))``; without layer norm the sum."""
    i_value, m_row = _tile_at(tl.program_id(0).to(tl.int64), rows, ROWS, WIDTH)
    b_sum = tl.load(a + i_value, mask=m_row, other=0).to(ACC)  # [M, h]
    b_z = tl.load(b + i_value, mask=m_row, other=0).to(ACC)  # [M, h]
    if RELU:
        b_z = tl.where(b_z <= 0, 0.0, b_z)
    b_sum += b_z
    if LAYER_NORM:
        b_sum, b_rstd = normed(b_sum, WIDTH)
        b_sum = b_sum * vector(gain, WIDTH, ACC)[None, :] + vector(bias, WIDTH, ACC)[None, :]
    tl.store(out + i_value, b_sum.to(out.dtype.element_ty), mask=m_row)


@triton.jit(do_not_specialize=["rows", "tiles"])
def add_normed_backward_kernel(
    a,
    b,
    gain,
    grad,
    relu_grad,
    gain_part,
    bias_part,
    relu_part,
    rows,
    tiles,
    RELU: tl.constexpr,
    LAYER_NORM: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    ACC: tl.constexpr,
):
    """Turn ``grad (R, h)`` of the result into that of the sum, in place.

    With RELU, b's gradient goes to ``relu_grad``, in the operands' dtype, and its sum over the rows to ``relu_part``.
    """
    i_program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    b_gain_sum, b_bias_sum, b_relu_sum = tl.zeros((WIDTH,), ACC), tl.zeros((WIDTH,), ACC), tl.zeros((WIDTH,), ACC)
    for i_tile in range(i_program, tiles, programs):
        i_value, m_row = _tile_at(i_tile, rows, ROWS, WIDTH)
        b_z = tl.load(b + i_value, mask=m_row, other=0).to(ACC)  # [M, h]
        b_grad = tl.load(grad + i_value, mask=m_row, other=0)  # [M, h]
        if LAYER_NORM:
            b_a = tl.load(a + i_value, mask=m_row, other=0).to(ACC)  # [M, h]
            if RELU:
                b_unit, b_rstd = normed(b_a + tl.where(b_z <= 0, 0.0, b_z), WIDTH)
            else:
                b_unit, b_rstd = normed(b_a + b_z, WIDTH)
            b_gain_sum += tl.sum(b_grad * b_unit, 0)
            b_bias_sum += tl.sum(b_grad, 0)
            b_grad = normed_backward(b_grad * vector(gain, WIDTH, ACC)[None, :], b_unit, b_rstd, WIDTH)
        if RELU:
            b_z_grad = tl.where(b_z <= 0, 0.0, b_grad)
            b_relu_sum += tl.sum(b_z_grad, 0)
            tl.store(relu_grad + i_value, b_z_grad.to(relu_grad.dtype.element_ty), mask=m_row)
        tl.store(grad + i_value, b_grad, mask=m_row)
    if LAYER_NORM:
        add_to(gain_part + i_program * 4 * WIDTH, b_gain_sum, WIDTH)
        add_to(bias_part + i_program * 4 * WIDTH, b_bias_sum, WIDTH)
    if RELU:
        add_to(relu_part + i_program * WIDTH, b_relu_sum, WIDTH)

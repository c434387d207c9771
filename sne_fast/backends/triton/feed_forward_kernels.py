"""Kernels of ``feed_forward``: tiles of ROWS rows through ln0, fc_o, ReLU and ln1 without leaving the registers.

Programs take tiles in turn, so that fc_o's matrix is loaded once where it fits a program (INNER = WIDTH), else in
blocks of INNER of its columns for every tile. ONE_QUERY: ``q`` is one row, the residual of every row of ``attended``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import add_relu, layer_norm, layer_norm_backward, matrix, normed, transposed, vector


@triton.jit
def residual(
    q,
    attended,
    i_row,
    i_column,
    m_row,
    ONE_QUERY: tl.constexpr,
    WIDTH: tl.constexpr,
    ACC: tl.constexpr,
):
    """Load q + attended in the given columns: [M, columns]."""
    i_tile = i_row[:, None] * WIDTH + i_column[None, :]
    b_attended = tl.load(attended + i_tile, mask=m_row[:, None], other=0).to(ACC)  # [M, columns]
    if ONE_QUERY:
        return tl.load(q + i_column).to(ACC)[None, :] + b_attended
    else:
        return tl.load(q + i_tile, mask=m_row[:, None], other=0).to(ACC) + b_attended


@triton.jit(do_not_specialize=["rows", "tiles"])
def forward_kernel(
    q,
    attended,
    w_o,
    b_o,
    norm,
    out,
    rows,
    tiles,
    ONE_QUERY: tl.constexpr,
    LAYER_NORM: tl.constexpr,
    ROWS: tl.constexpr,
    INNER: tl.constexpr,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Compute ``out (rows, h)``, the tiles of one program."""
    operand = w_o.dtype.element_ty
    i_program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    i_column, i_inner = tl.arange(0, WIDTH), tl.arange(0, INNER)
    if INNER == WIDTH:
        b_w = transposed(w_o, WIDTH)  # [h, h]
    for i_tile in tl.range(i_program, tiles, programs, num_stages=STAGES):
        i_row = i_tile * ROWS + tl.arange(0, ROWS)
        m_row = i_row < rows
        b_sum = residual(q, attended, i_row, i_column, m_row, ONE_QUERY, WIDTH, ACC)  # [M, h]
        b_o_in = layer_norm(b_sum, norm, LAYER_NORM, WIDTH, ACC)
        if INNER == WIDTH:
            b_z = tl.dot(b_o_in.to(operand), b_w, input_precision=PRECISION, out_dtype=ACC)
        else:
            # Registers cannot be cut into columns: each block of them is computed again, from rows in the cache.
            _, b_rstd = normed(b_sum, WIDTH)
            b_mean = tl.sum(b_sum, 1) * (1 / WIDTH)
            b_z = tl.zeros((ROWS, WIDTH), ACC)
            for first in range(0, WIDTH, INNER):
                i_block = first + i_inner
                b_part = residual(q, attended, i_row, i_block, m_row, ONE_QUERY, WIDTH, ACC)  # [M, INNER]
                if LAYER_NORM:
                    b_gain = tl.load(norm + i_block).to(ACC)  # [INNER]
                    b_bias = tl.load(norm + WIDTH + i_block).to(ACC)  # [INNER]
                    b_part = (b_part - b_mean[:, None]) * b_rstd[:, None] * b_gain[None, :] + b_bias[None, :]
                b_w = tl.load(w_o + i_column[None, :] * WIDTH + i_block[:, None])  # [INNER, h]
                b_z = tl.dot(b_part.to(operand), b_w, b_z, input_precision=PRECISION, out_dtype=ACC)
        b_z += vector(b_o, WIDTH, ACC)[None, :]
        b_out = layer_norm(add_relu(b_o_in, b_z), norm + 2 * WIDTH, LAYER_NORM, WIDTH, ACC)
        i_value = i_row[:, None] * WIDTH + i_column[None, :]
        tl.store(out + i_value, b_out.to(out.dtype.element_ty), mask=m_row[:, None])


@triton.jit(do_not_specialize=["rows", "tiles"])
def backward_kernel(
    grad,
    q,
    attended,
    w_o,
    b_o,
    norm,
    sum_grad,
    w_part,
    b_part,
    norm_part,
    rows,
    tiles,
    ONE_QUERY: tl.constexpr,
    LAYER_NORM: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Turn ``grad (rows, h)`` of the result into that of q + attended, and sum up the parameters' gradients.

    The forward is computed again on the way. Sums over the rows of a program go to its own ``w_part (programs, h, h)``,
    ``b_part (programs, h)`` and ``norm_part (programs, 4, h)``.
    """
    operand = w_o.dtype.element_ty
    i_program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    i_column = tl.arange(0, WIDTH)
    b_w = matrix(w_o, WIDTH)  # [h, h]
    b_w_sum, b_b_sum = tl.zeros((WIDTH, WIDTH), ACC), tl.zeros((WIDTH,), ACC)
    b_gain0_sum, b_bias0_sum, b_gain1_sum, b_bias1_sum = b_b_sum, b_b_sum, b_b_sum, b_b_sum
    for i_tile in tl.range(i_program, tiles, programs, num_stages=STAGES):
        i_row = i_tile * ROWS + tl.arange(0, ROWS)
        m_row = i_row < rows
        i_value = i_row[:, None] * WIDTH + i_column[None, :]
        b_o_in = residual(q, attended, i_row, i_column, m_row, ONE_QUERY, WIDTH, ACC)  # [M, h]
        if LAYER_NORM:
            b_unit0, b_rstd0 = normed(b_o_in, WIDTH)
            b_o_in = b_unit0 * vector(norm, WIDTH, ACC)[None, :] + vector(norm + WIDTH, WIDTH, ACC)[None, :]
        b_seen = b_o_in.to(operand)
        b_z = tl.dot(b_seen, tl.trans(b_w), input_precision=PRECISION, out_dtype=ACC) + vector(b_o, WIDTH, ACC)[None, :]
        b_grad = tl.load(grad + i_value, mask=m_row[:, None], other=0).to(ACC)  # [M, h]
        if LAYER_NORM:
            b_unit1, b_rstd1 = normed(add_relu(b_o_in, b_z), WIDTH)
            b_grad, b_gain_grad, b_bias_grad = layer_norm_backward(
                b_grad, b_unit1, b_rstd1, norm + 2 * WIDTH, WIDTH, ACC
            )
            b_gain1_sum += b_gain_grad
            b_bias1_sum += b_bias_grad
        b_z_grad = tl.where(b_z <= 0, 0.0, b_grad)
        b_b_sum += tl.sum(b_z_grad, 0)
        b_z_grad = b_z_grad.to(operand)
        b_w_sum = tl.dot(tl.trans(b_z_grad), b_seen, b_w_sum, input_precision=PRECISION, out_dtype=ACC)
        b_grad = tl.dot(b_z_grad, b_w, b_grad, input_precision=PRECISION, out_dtype=ACC)
        if LAYER_NORM:
            b_grad, b_gain_grad, b_bias_grad = layer_norm_backward(b_grad, b_unit0, b_rstd0, norm, WIDTH, ACC)
            b_gain0_sum += b_gain_grad
            b_bias0_sum += b_bias_grad
        tl.store(sum_grad + i_value, b_grad.to(sum_grad.dtype.element_ty), mask=m_row[:, None])
    p_w_part = w_part + i_program * WIDTH * WIDTH + i_column[:, None] * WIDTH + i_column[None, :]
    tl.store(p_w_part, b_w_sum)
    tl.store(b_part + i_program * WIDTH + i_column, b_b_sum)
    if LAYER_NORM:
        p_norm_part = norm_part + i_program * 4 * WIDTH + i_column
        tl.store(p_norm_part, b_gain0_sum)
        tl.store(p_norm_part + WIDTH, b_bias0_sum)
        tl.store(p_norm_part + 2 * WIDTH, b_gain1_sum)
        tl.store(p_norm_part + 3 * WIDTH, b_bias1_sum)

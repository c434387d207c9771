"""Backward kernel of block 0 of ``chunk_encode``, the last stage of a slab: see ``chunk_encode_backward_kernels``."""

from __future__ import annotations

import triton
import triton.language as tl

from .chunk_encode_backward_kernels import feed_forward_backward
from .chunk_tiles import LOG2E, row_slots
from .scalar_tiles import by_slot, halves, load_basis, scalar_factors, scalar_rows, scalar_softmax, tile_values
from .tiles import add_to


@triton.jit
def column(
    b_t,
    i_column,
    i_which,
):
    """Return one column of a matrix [M, C], [M]."""
    return tl.sum(tl.where((i_column == i_which)[None, :], b_t, 0.0), 1)


@triton.jit(do_not_specialize=["first_bin", "slab_rows", "tiles"])
def scalar_backward_kernel(
    values,
    chunk_ptr,
    order,
    table,
    logit,
    basis,
    w_o,
    b_o,
    norm,
    rows_grad,
    values_grad,
    products,
    logit_part,
    basis_part,
    norm_part,
    first_bin,
    slab_rows,
    tiles,
    WIDTH: tl.constexpr,
    HEADS: tl.constexpr,
    LAYER_NORM: tl.constexpr,
    SLOTS: tl.constexpr,
    MIN_LENGTH: tl.constexpr,
    MAX_LENGTH: tl.constexpr,
    MULTI_CHUNK: tl.constexpr,
    BINS: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    """Go back through block 0: turn the gradient of its rows into that of the values themselves.

    With slopes s_i = a x_i + c, weights p_ij and means m_i = sum_j p_ij x_j, of gradients g_i: s_i has the gradient
    g_i (sum_j p_ij x_j^2 - m_i^2), and x_j has, besides that of its own slope, sum_i p_ij g_i (1 - s_i m_i + s_i x_j).
    """
    ROWS: tl.constexpr = BINS * SLOTS
    UNMASKED: tl.constexpr = MIN_LENGTH == SLOTS
    COLUMNS: tl.constexpr = 16 if HEADS <= 14 else 32
    operand = basis.dtype.element_ty
    i_program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    norm_part += i_program * 4 * WIDTH
    basis_part += i_program * 3 * WIDTH
    i_heads, i_factor = tl.arange(0, HEADS), tl.arange(0, COLUMNS)
    b_slope_sum, b_offset_sum = tl.zeros((HEADS,), ACC), tl.zeros((HEADS,), ACC)
    b_basis_sum = tl.zeros((COLUMNS, WIDTH), ACC)
    b_basis = load_basis(basis, HEADS, WIDTH, COLUMNS)
    i_row_bin, i_slot = row_slots(BINS, SLOTS)
    for i_tile in tl.range(i_program, tiles, programs, disable_licm=True):  # addresses ahead of it would be spilled
        i_row = i_tile * ROWS + i_row_bin * SLOTS + i_slot
        b_x, b_keys, m_keys, i_value, i_chunk, i_element, m_element, m_own = tile_values(
            values, chunk_ptr, order, table, first_bin + i_tile * BINS, MIN_LENGTH, MAX_LENGTH, SLOTS, MULTI_CHUNK,
            BINS, ACC,
        )  # fmt: skip
        b_factors = scalar_factors(b_x, b_keys, m_keys, logit, HEADS, UNMASKED, ACC)  # [M, C]
        b_res = scalar_rows(b_factors, b_basis, ACC)  # [M, h]
        b_grad = feed_forward_backward(
            rows_grad, b_res, w_o, b_o, norm, norm_part, products, slab_rows, i_row,
            LAYER_NORM, WIDTH, PRECISION, ACC,
        )  # fmt: skip
        b_grad = b_grad.to(operand)
        if operand.primitive_bitwidth == 16:
            b_first, b_second = halves(b_factors, operand)
            b_basis_sum = tl.dot(tl.trans(b_first), b_grad, b_basis_sum, out_dtype=ACC)
            b_basis_sum = tl.dot(tl.trans(b_second), b_grad, b_basis_sum, out_dtype=ACC)
            b_factors_grad = tl.dot(b_grad, tl.trans(b_basis), out_dtype=ACC)  # [M, C]
        else:
            b_basis_sum += tl.dot(tl.trans(b_factors), b_grad, input_precision="ieee", out_dtype=ACC)
            b_factors_grad = tl.dot(b_grad, tl.trans(b_basis), input_precision="ieee", out_dtype=ACC)
        b_x_grad = column(b_factors_grad, i_factor, HEADS)  # [M]
        for i_head in range(HEADS):
            slope, offset = tl.load(logit + i_head).to(ACC), tl.load(logit + HEADS + i_head).to(ACC)
            b_e, b_slope, b_top, b_inverse = scalar_softmax(b_x, b_keys, m_keys, slope, offset, UNMASKED)
            b_mean = column(b_factors, i_factor, i_head)
            b_square = tl.sum(b_e * (b_keys * b_keys), 0) * b_inverse
            b_mean_grad = column(b_factors_grad, i_factor, i_head)
            b_slope_grad = b_mean_grad * (b_square - b_mean * b_mean)
            b_by_value = b_mean_grad * b_slope * b_inverse
            b_constant = b_mean_grad * b_inverse - b_by_value * b_mean
            # The same weights once more, of all queries of a bin to the key that a row is.
            b_e = tl.exp2(by_slot(b_slope * LOG2E, BINS, SLOTS) * b_x[None, :] - by_slot(b_top, BINS, SLOTS))  # [S, M]
            b_by_value, b_constant = by_slot(b_by_value, BINS, SLOTS), by_slot(b_constant, BINS, SLOTS)
            b_key_grad = b_e * (b_by_value * b_x[None, :] + b_constant)
            if not UNMASKED:
                b_key_grad = tl.where(m_keys, b_key_grad, 0.0)
            b_x_grad += tl.sum(b_key_grad, 0) + b_slope_grad * slope
            m_head = i_heads == i_head
            b_slope_sum += tl.where(m_head, tl.sum(b_slope_grad * b_x, 0), 0.0)
            b_offset_sum += tl.where(m_head, tl.sum(b_slope_grad, 0), 0.0)
        tl.store(values_grad + i_value, b_x_grad.to(values_grad.dtype.element_ty), mask=m_own)
    add_to(logit_part + i_program * 2 * HEADS, b_slope_sum, HEADS)
    add_to(logit_part + i_program * 2 * HEADS + HEADS, b_offset_sum, HEADS)
    i_head_of = tl.arange(0, WIDTH) // (WIDTH // HEADS)
    m_mean = i_factor[:, None] == i_head_of[None, :]
    add_to(basis_part, tl.sum(tl.where((i_factor == HEADS)[:, None], b_basis_sum, 0.0), 0), WIDTH)
    add_to(basis_part + WIDTH, tl.sum(tl.where(m_mean, b_basis_sum, 0.0), 0), WIDTH)
    add_to(basis_part + 2 * WIDTH, tl.sum(tl.where((i_factor == HEADS + 1)[:, None], b_basis_sum, 0.0), 0), WIDTH)

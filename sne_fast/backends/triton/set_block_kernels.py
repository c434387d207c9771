"""Kernels of ``set_block`` on rows that attend to each other: a whole block of a tile of packed rows in one program.

A program owns ROWS rows, of as many sets as they belong to, and walks through the rows of all these sets, INNER at a
time; ``owner`` tells the set of each row, and weights between rows of two sets are zero. Queries, keys and values are
computed again where they are needed and never stored, so sets must be short. A NaN of one set must not reach another:
rows that are not finite enter products as zeros, and turn the weights of their own set into NaN.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .chunk_tiles import feed_forward, finite_rows, kept, row_products
from .set_block_tiles import (
    add_matrix,
    add_vector,
    attend,
    feed_forward_backward,
    from_heads,
    inner_rows,
    keys_and_values,
    own_rows,
    rows_at,
    to_heads,
    weights_of,
)
from .tiles import linear, matrix, vector


@triton.jit(do_not_specialize=["rows"])
def forward_kernel(
    x,
    ptr,
    owner,
    w_q,
    b_q,
    w_k,
    b_k,
    w_v,
    b_v,
    w_o,
    b_o,
    norm,
    out,
    rows,
    HEADS: tl.constexpr,
    LAYER_NORM: tl.constexpr,
    ROWS: tl.constexpr,
    INNER: tl.constexpr,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    """Compute ``out (rows, h)``, one tile."""
    operand = x.dtype.element_ty
    i_row, m_row, b_set, begin, end = own_rows(ptr, owner, tl.program_id(0).to(tl.int64), rows, ROWS)
    b_query = linear(rows_at(x, i_row, m_row, WIDTH), w_q, b_q, WIDTH, PRECISION, ACC)  # [M, h]
    b_attended, b_top, b_inverse = attend(
        to_heads(b_query.to(operand), HEADS), b_set, x, owner, begin, end, w_k, w_v,
        INNER, HEADS, WIDTH, PRECISION, ACC,
    )  # fmt: skip
    b_in = b_query + from_heads(b_attended) + vector(b_v, WIDTH, ACC)[None, :]
    b_out = feed_forward(b_in, w_o, b_o, norm, LAYER_NORM, WIDTH, PRECISION, ACC)
    i_value = i_row[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    tl.store(out + i_value, b_out.to(operand), mask=m_row[:, None])


@triton.jit
def weighted_keys(
    b_heads,
    b_set,
    b_top,
    b_inverse,
    x,
    owner,
    first,
    end,
    w_k,
    w_v,
    INNER: tl.constexpr,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    """Return keys and values of INNER rows [H, N, d], and their weights for queries [H, M, d]: [H, M, N]."""
    _i_inner, _m_inner, b_x, b_inner_set = inner_rows(x, owner, first, end, INNER, WIDTH)
    b_keys, b_values, b_flag = keys_and_values(b_x, w_k, w_v, HEADS, WIDTH, PRECISION, ACC)
    m_seen = (b_set[:, None] == b_inner_set[None, :])[None, :, :]
    b_logits = row_products(b_heads, b_keys, PRECISION, ACC) + b_flag[:, None, :]
    return b_keys, b_values, weights_of(b_logits, m_seen, b_top[:, :, None], b_inverse[:, :, None], WIDTH)


@triton.jit(do_not_specialize=["rows", "tiles"])
def query_backward_kernel(
    grad,
    x,
    ptr,
    owner,
    w_q,
    b_q,
    w_k,
    b_k,
    w_v,
    b_v,
    w_o,
    b_o,
    norm,
    sum_grad,
    query_grad,
    stats,
    w_part,
    b_part,
    norm_part,
    rows,
    tiles,
    HEADS: tl.constexpr,
    LAYER_NORM: tl.constexpr,
    ROWS: tl.constexpr,
    INNER: tl.constexpr,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    """Compute the gradients of the residual sum and of the queries, ``(rows, h)`` each, of this program's tiles.

    And of their softmax the largest logit, 1 / the sum and the mean of the weights' gradients, ``stats (3, rows, H)``;
    sums over the rows go to ``w_part (programs, h, h)`` of fc_o, ``b_part (programs, h)`` and
    ``norm_part (programs, 4, h)``.
    """
    operand = x.dtype.element_ty
    SCALE: tl.constexpr = 1 / WIDTH**0.5
    i_program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    i_column, i_head = tl.arange(0, WIDTH), tl.arange(0, HEADS)
    w_part += i_program * WIDTH * WIDTH
    b_part += i_program * WIDTH
    norm_part += i_program * 4 * WIDTH
    for i_tile in tl.range(i_program, tiles, programs, disable_licm=True):
        done = i_tile - i_program
        i_row, m_row, b_set, begin, end = own_rows(ptr, owner, i_tile, rows, ROWS)
        b_query = linear(rows_at(x, i_row, m_row, WIDTH), w_q, b_q, WIDTH, PRECISION, ACC)  # [M, h]
        b_heads = to_heads(b_query.to(operand), HEADS)  # [H, M, d]
        b_attended, b_top, b_inverse = attend(
            b_heads, b_set, x, owner, begin, end, w_k, w_v, INNER, HEADS, WIDTH, PRECISION, ACC
        )
        b_in = b_query + from_heads(b_attended) + vector(b_v, WIDTH, ACC)[None, :]
        b_grad = feed_forward_backward(
            grad, i_row, m_row, b_in, w_o, b_o, norm, w_part, b_part, norm_part, done,
            LAYER_NORM, WIDTH, PRECISION, ACC,
        )  # fmt: skip
        i_value = i_row[:, None] * WIDTH + i_column[None, :]
        tl.store(sum_grad + i_value, b_grad.to(operand), mask=m_row[:, None])

        b_out_grad = to_heads(b_grad.to(operand), HEADS)  # [H, M, d]
        # The mean by the very products that it is subtracted from: the difference nearly cancels.
        b_mean = tl.zeros((HEADS, ROWS), ACC)
        for first in range(begin, end, INNER):
            b_keys, b_values, b_p = weighted_keys(
                b_heads, b_set, b_top, b_inverse, x, owner, first, end, w_k, w_v, INNER, HEADS, WIDTH, PRECISION, ACC
            )
            b_mean += tl.sum(b_p * row_products(b_out_grad, b_values, PRECISION, ACC), 2)
        b_query_grad = tl.zeros(b_heads.shape, ACC)
        for first in range(begin, end, INNER):
            b_keys, b_values, b_p = weighted_keys(
                b_heads, b_set, b_top, b_inverse, x, owner, first, end, w_k, w_v, INNER, HEADS, WIDTH, PRECISION, ACC
            )
            b_p_grad = row_products(b_out_grad, b_values, PRECISION, ACC)  # [H, M, N]
            b_logits_grad = (b_p * (b_p_grad - b_mean[:, :, None]) * SCALE).to(operand)
            b_query_grad += tl.dot(b_logits_grad, b_keys, input_precision=PRECISION, out_dtype=ACC)
        b_grad += from_heads(b_query_grad)
        tl.store(query_grad + i_value, b_grad.to(operand), mask=m_row[:, None])
        i_stat = i_row[None, :] * HEADS + i_head[:, None]
        tl.store(stats + i_stat, b_top, mask=m_row[None, :])
        tl.store(stats + rows * HEADS + i_stat, b_inverse, mask=m_row[None, :])
        tl.store(stats + 2 * rows * HEADS + i_stat, b_mean, mask=m_row[None, :])


@triton.jit
def add_product(
    w_part,
    b_grad,
    b_x,
    done,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    """Add the gradient of the matrix of a linear layer, of result gradients [M, h] and inputs [M, h], to its sum."""
    b_w_grad = tl.dot(tl.trans(b_grad), b_x, input_precision=PRECISION, out_dtype=ACC)
    add_matrix(w_part, b_w_grad, done, WIDTH)


@triton.jit(do_not_specialize=["rows", "tiles"])
def key_backward_kernel(
    x,
    ptr,
    owner,
    w_q,
    b_q,
    w_k,
    w_v,
    sum_grad,
    query_grad,
    stats,
    x_grad,
    w_q_part,
    b_q_part,
    w_k_part,
    b_k_part,
    w_v_part,
    b_v_part,
    rows,
    tiles,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    INNER: tl.constexpr,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    """Compute the gradient of the rows of this program's tiles, and of all projections.

    Sums over the rows go to the partial sums of weights ``(programs, h, h)`` and biases ``(programs, h)``.
    """
    operand = x.dtype.element_ty
    SCALE: tl.constexpr = 1 / WIDTH**0.5
    i_program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    i_column, i_head = tl.arange(0, WIDTH), tl.arange(0, HEADS)
    i_matrix, i_vector = i_program * WIDTH * WIDTH, i_program * WIDTH
    for i_tile in tl.range(i_program, tiles, programs, disable_licm=True):
        done = i_tile - i_program
        i_row, m_row, b_set, begin, end = own_rows(ptr, owner, i_tile, rows, ROWS)
        b_x = rows_at(x, i_row, m_row, WIDTH)  # [N, h]
        b_k, b_v, b_flag = keys_and_values(b_x, w_k, w_v, HEADS, WIDTH, PRECISION, ACC)  # [H, N, d]
        b_k_grad, b_v_grad = tl.zeros(b_k.shape, ACC), tl.zeros(b_k.shape, ACC)
        for first in range(begin, end, INNER):
            i_inner, m_inner, b_inner, b_inner_set = inner_rows(x, owner, first, end, INNER, WIDTH)
            b_q_rows = to_heads(linear(b_inner, w_q, b_q, WIDTH, PRECISION, ACC).to(operand), HEADS)  # [H, M, d]
            b_out_grad = to_heads(rows_at(sum_grad, i_inner, m_inner, WIDTH), HEADS)
            b_inner_flag = finite_rows(b_q_rows, ACC) + finite_rows(b_out_grad, ACC)  # [H, M]
            b_q_rows, b_out_grad = kept(b_q_rows, b_inner_flag), kept(b_out_grad, b_inner_flag)
            i_stat = i_inner[None, :] * HEADS + i_head[:, None]
            b_top = tl.load(stats + i_stat, mask=m_inner[None, :], other=0)[:, None, :]
            b_inverse = tl.load(stats + rows * HEADS + i_stat, mask=m_inner[None, :], other=0)[:, None, :]
            b_mean = tl.load(stats + 2 * rows * HEADS + i_stat, mask=m_inner[None, :], other=0)[:, None, :]
            m_seen = (b_set[:, None] == b_inner_set[None, :])[None, :, :]  # [1, N, M]
            b_logits = row_products(b_k, b_q_rows, PRECISION, ACC) + b_flag[:, :, None] + b_inner_flag[:, None, :]
            b_p = weights_of(b_logits, m_seen, b_top, b_inverse, WIDTH)  # [H, N, M]
            b_v_grad += tl.dot(b_p.to(operand), b_out_grad, input_precision=PRECISION, out_dtype=ACC)
            b_p_grad = row_products(b_v, b_out_grad, PRECISION, ACC)  # [H, N, M]
            b_logits_grad = tl.where(m_seen, b_p * (b_p_grad - b_mean) * SCALE, 0.0).to(operand)
            b_k_grad += tl.dot(b_logits_grad, b_q_rows, input_precision=PRECISION, out_dtype=ACC)

        i_value = i_row[:, None] * WIDTH + i_column[None, :]
        b_dq = rows_at(query_grad, i_row, m_row, WIDTH)  # [N, h]
        b_x_grad = tl.dot(b_dq, matrix(w_q, WIDTH), input_precision=PRECISION, out_dtype=ACC)
        add_product(w_q_part + i_matrix, b_dq, b_x, done, WIDTH, PRECISION, ACC)
        add_vector(b_q_part + i_vector, tl.sum(b_dq.to(ACC), 0), done, WIDTH)
        b_dk = from_heads(b_k_grad).to(operand)
        b_x_grad += tl.dot(b_dk, matrix(w_k, WIDTH), input_precision=PRECISION, out_dtype=ACC)
        add_product(w_k_part + i_matrix, b_dk, b_x, done, WIDTH, PRECISION, ACC)
        b_dv = from_heads(b_v_grad).to(operand)
        b_x_grad += tl.dot(b_dv, matrix(w_v, WIDTH), input_precision=PRECISION, out_dtype=ACC)
        tl.store(x_grad + i_value, b_x_grad.to(operand), mask=m_row[:, None])
        add_product(w_v_part + i_matrix, b_dv, b_x, done, WIDTH, PRECISION, ACC)
        add_vector(b_v_part + i_vector, tl.sum(b_dv.to(ACC), 0), done, WIDTH)
    tl.store(b_k_part + i_vector + i_column, tl.zeros((WIDTH,), ACC))  # constant in the softmax

"""Kernels of ``pool_block``: pooling, projection of the pooled rows and feed-forward of some sets in one program.

With POOLED, x holds the pooled rows ``(S, H, h)`` themselves, and there are no pointers.

A program owns SETS sets, the first of 16 lanes, and walks through all of their rows, INNER at a time; ``owner`` tells
the set of each row, and no row has a weight in the pool of another set. A NaN of one set must not reach another: rows
that are not finite enter products as zeros, and turn the weights of their own set into NaN.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .chunk_tiles import LOG2E, feed_forward, finite_rows, kept, row_products
from .set_block_tiles import (
    add_values,
    add_vector,
    feed_forward_backward,
    from_heads,
    inner_rows,
    softmax_step,
    to_heads,
)
from .tiles import vector

LANES = tl.constexpr(16)


@triton.jit
def own_sets(
    ptr,
    i_tile,
    sets,
    SETS: tl.constexpr,
    POOLED: tl.constexpr,
):
    """Return the sets of a tile [M], which lanes have one, which of these sets are empty, and where their rows lie."""
    i_lane = tl.arange(0, LANES)
    i_set = i_tile * SETS + i_lane
    m_set = (i_lane < SETS) & (i_set < sets)
    if POOLED:
        return i_set, m_set, i_lane < 0, i_tile, i_tile
    b_begin = tl.load(ptr + i_set, mask=m_set, other=0)
    b_end = tl.load(ptr + i_set + 1, mask=m_set, other=1)
    begin = tl.load(ptr + i_tile * SETS)
    end = tl.load(ptr + tl.minimum(i_tile * SETS + SETS, sets))
    return tl.where(m_set, i_set, -1), m_set, b_begin == b_end, begin, end


@triton.jit
def seeds(
    logits,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Load the pool's vector of each head for every lane: [H, M, h]."""
    i_value = tl.arange(0, HEADS)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    return tl.broadcast_to(tl.load(logits + i_value)[:, None, :], (HEADS, LANES, WIDTH))


@triton.jit
def of_heads(
    x,
    i_set,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Return where pooled rows ``(S, H, h)`` lie: [H, M, h]."""
    i_head = tl.arange(0, HEADS)
    i_value = (i_set[None, :] * HEADS + i_head[:, None]) * WIDTH
    return x + i_value[:, :, None] + tl.arange(0, WIDTH)[None, None, :]


@triton.jit
def by_heads(
    w,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Return where fc_v, ``(H, d, h)``, lies: its transposes [H, h, d]."""
    DIM: tl.constexpr = WIDTH // HEADS
    i_head, i_row, i_column = tl.arange(0, HEADS), tl.arange(0, WIDTH), tl.arange(0, DIM)
    return w + i_head[:, None, None] * (DIM * WIDTH) + i_column[None, None, :] * WIDTH + i_row[None, :, None]


@triton.jit
def shared_rows(
    b_x,
    HEADS: tl.constexpr,
    ACC: tl.constexpr,
):
    """Return rows [N, h] for every head [H, N, h], zeros where they are not finite, and NaN for those [N]."""
    b_flag = tl.sum(b_x.to(ACC) * 0.0, 1)
    b_x = tl.where((b_flag == 0)[:, None], b_x, 0.0).to(b_x.dtype)
    return tl.broadcast_to(b_x[None, :, :], (HEADS, b_x.shape[0], b_x.shape[1])), b_flag


@triton.jit
def pooled_rows(
    b_seed,
    b_set,
    x,
    owner,
    begin,
    end,
    INNER: tl.constexpr,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    """Pool the rows of each set per head by a softmax whose maximum runs along.

    Returns the pooled rows [H, M, h], the largest logit and 1 / the sum, [H, M].
    """
    b_top = tl.full((HEADS, LANES), float("-inf"), ACC)
    b_sum = tl.zeros((HEADS, LANES), ACC)
    b_out = tl.zeros((HEADS, LANES, WIDTH), ACC)
    for first in range(begin, end, INNER):
        _i_inner, _m_inner, b_x, b_inner_set = inner_rows(x, owner, first, end, INNER, WIDTH)
        b_rows, b_flag = shared_rows(b_x, HEADS, ACC)
        m_own = (b_set[:, None] == b_inner_set[None, :])[None, :, :]
        b_logits = row_products(b_seed, b_rows, PRECISION, ACC) + b_flag[None, None, :]
        b_logits = tl.where(m_own, b_logits, float("-inf"))  # [H, M, N]
        b_top, b_sum, b_out = softmax_step(b_logits, b_rows, b_top, b_sum, b_out, LOG2E, PRECISION, ACC)
    b_inverse = 1 / tl.where(b_sum == 0.0, 1.0, b_sum)
    return b_out * b_inverse[:, :, None], b_top, b_inverse


@triton.jit
def weighted_rows(
    b_seed,
    b_set,
    b_top,
    b_inverse,
    x,
    owner,
    first,
    end,
    INNER: tl.constexpr,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    """Return INNER rows and their weights in the pools of their sets, 0 elsewhere.

    Rows for every head [H, N, h], where they lie and which of them there are [N], which are of which set [1, M, N], and
    weights [H, M, N].
    """
    i_inner, m_inner, b_x, b_inner_set = inner_rows(x, owner, first, end, INNER, WIDTH)
    b_rows, b_flag = shared_rows(b_x, HEADS, ACC)
    m_own = (b_set[:, None] == b_inner_set[None, :])[None, :, :]
    b_logits = row_products(b_seed, b_rows, PRECISION, ACC) + b_flag[None, None, :]
    b_p = tl.where(m_own, tl.exp2((b_logits - b_top[:, :, None]) * LOG2E) * b_inverse[:, :, None], 0.0)
    return b_rows, i_inner, m_inner, m_own, b_p


@triton.jit
def residual_of(
    b_pooled,
    b_w,
    query,
    b_v,
    b_empty,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    """Return the residual sum of the block [M, h], of pooled rows [H, M, h]. A set without rows has no bias of fc_v."""
    b_attended = from_heads(tl.dot(b_pooled, b_w, input_precision=PRECISION, out_dtype=ACC))
    b_bias = tl.where(b_empty[:, None], 0.0, vector(b_v, WIDTH, ACC)[None, :])
    return vector(query, WIDTH, ACC)[None, :] + b_bias + b_attended


@triton.jit(do_not_specialize=["sets"])
def forward_kernel(
    x,
    ptr,
    owner,
    logits,
    query,
    w_v,
    b_v,
    w_o,
    b_o,
    norm,
    out,
    sets,
    HEADS: tl.constexpr,
    LAYER_NORM: tl.constexpr,
    POOLED: tl.constexpr,
    SETS: tl.constexpr,
    INNER: tl.constexpr,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    """Compute ``out (S, h)`` of the sets of one tile."""
    operand = x.dtype.element_ty
    i_set, m_set, b_empty, begin, end = own_sets(ptr, tl.program_id(0).to(tl.int64), sets, SETS, POOLED)
    if POOLED:
        b_pooled = tl.load(of_heads(x, i_set, HEADS, WIDTH), mask=m_set[None, :, None], other=0)  # [H, M, h]
    else:
        b_pooled, b_top, b_inverse = pooled_rows(
            seeds(logits, HEADS, WIDTH), i_set, x, owner, begin, end, INNER, HEADS, WIDTH, PRECISION, ACC
        )
    b_w = tl.load(by_heads(w_v, HEADS, WIDTH))  # [H, h, d]
    b_in = residual_of(b_pooled.to(operand), b_w, query, b_v, b_empty, WIDTH, PRECISION, ACC)  # [M, h]
    b_out = feed_forward(b_in, w_o, b_o, norm, LAYER_NORM, WIDTH, PRECISION, ACC)
    i_value = i_set[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    tl.store(out + i_value, b_out.to(operand), mask=m_set[:, None])


@triton.jit(do_not_specialize=["sets", "tiles"])
def backward_kernel(
    grad,
    x,
    ptr,
    owner,
    logits,
    query,
    w_v,
    b_v,
    w_o,
    b_o,
    norm,
    x_grad,
    logits_part,
    query_part,
    w_v_part,
    b_v_part,
    w_o_part,
    b_o_part,
    norm_part,
    sets,
    tiles,
    HEADS: tl.constexpr,
    LAYER_NORM: tl.constexpr,
    POOLED: tl.constexpr,
    SETS: tl.constexpr,
    INNER: tl.constexpr,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    """Compute the gradient of the rows ``(rows, h)`` of this program's sets, and sum up those of the parameters.

    Sums go to the program's own row of ``*_part (programs, ...)``.
    """
    operand = x.dtype.element_ty
    i_program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    i_row, i_head = tl.arange(0, WIDTH), tl.arange(0, HEADS)
    logits_part += i_program * HEADS * WIDTH
    w_v_part += i_program * WIDTH * WIDTH
    w_o_part += i_program * WIDTH * WIDTH
    norm_part += i_program * 4 * WIDTH
    query_part += i_program * WIDTH
    b_v_part += i_program * WIDTH
    b_o_part += i_program * WIDTH
    for i_tile in tl.range(i_program, tiles, programs, disable_licm=True):
        done = i_tile - i_program
        i_set, m_set, b_empty, begin, end = own_sets(ptr, i_tile, sets, SETS, POOLED)
        b_seed = seeds(logits, HEADS, WIDTH)
        if POOLED:
            b_pooled = tl.load(of_heads(x, i_set, HEADS, WIDTH), mask=m_set[None, :, None], other=0)  # [H, M, h]
        else:
            b_rows_pooled, b_top, b_inverse = pooled_rows(
                b_seed, i_set, x, owner, begin, end, INNER, HEADS, WIDTH, PRECISION, ACC
            )
            b_pooled = b_rows_pooled.to(operand)
        b_w = tl.load(by_heads(w_v, HEADS, WIDTH))  # [H, h, d]
        b_in = residual_of(b_pooled, b_w, query, b_v, b_empty, WIDTH, PRECISION, ACC)  # [M, h]
        b_grad = feed_forward_backward(
            grad, i_set, m_set, b_in, w_o, b_o, norm, w_o_part, b_o_part, norm_part, done,
            LAYER_NORM, WIDTH, PRECISION, ACC,
        )  # fmt: skip
        add_vector(query_part, tl.sum(b_grad, 0), done, WIDTH)
        add_vector(b_v_part, tl.sum(tl.where(b_empty[:, None], 0.0, b_grad), 0), done, WIDTH)

        b_heads_grad = to_heads(b_grad.to(operand), HEADS)  # [H, M, d]
        b_w_grad = tl.dot(
            tl.permute(b_pooled, (0, 2, 1)), b_heads_grad, input_precision=PRECISION, out_dtype=ACC
        )  # [H, h, d]
        add_values(by_heads(w_v_part, HEADS, WIDTH), b_w_grad, done)
        b_pooled_grad = row_products(b_heads_grad, b_w, PRECISION, ACC).to(operand)  # [H, M, h]
        b_seed_grad = tl.zeros((HEADS, LANES, WIDTH), ACC)
        if POOLED:
            tl.store(of_heads(x_grad, i_set, HEADS, WIDTH), b_pooled_grad, mask=m_set[None, :, None])
        else:
            b_grad_flag = finite_rows(b_pooled_grad, ACC)  # [H, M]
            b_pooled_grad = kept(b_pooled_grad, b_grad_flag)

            # The mean by the very products that it is subtracted from: the difference nearly cancels.
            b_mean = tl.zeros((HEADS, LANES), ACC)
            for first in range(begin, end, INNER):
                b_rows, i_inner, m_inner, m_own, b_p = weighted_rows(
                    b_seed, i_set, b_top, b_inverse, x, owner, first, end, INNER, HEADS, WIDTH, PRECISION, ACC
                )
                b_mean += tl.sum(b_p * row_products(b_pooled_grad, b_rows, PRECISION, ACC), 2)
            for first in range(begin, end, INNER):
                b_rows, i_inner, m_inner, m_own, b_p = weighted_rows(
                    b_seed, i_set, b_top, b_inverse, x, owner, first, end, INNER, HEADS, WIDTH, PRECISION, ACC
                )
                b_p = tl.where(m_own, b_p + b_grad_flag[:, :, None], 0.0)  # [H, M, N]
                b_p_grad = row_products(b_pooled_grad, b_rows, PRECISION, ACC)
                b_logits_grad = tl.where(m_own, b_p * (b_p_grad - b_mean[:, :, None]), 0.0).to(operand)
                b_seed_grad += tl.dot(b_logits_grad, b_rows, input_precision=PRECISION, out_dtype=ACC)
                b_turned = tl.permute(b_p.to(operand), (0, 2, 1))  # [H, N, M]
                b_x_grad = tl.dot(b_turned, b_pooled_grad, input_precision=PRECISION, out_dtype=ACC)
                b_turned = tl.permute(b_logits_grad, (0, 2, 1))
                b_x_grad += tl.dot(b_turned, b_seed, input_precision=PRECISION, out_dtype=ACC)  # [H, N, h]
                i_value = i_inner[:, None] * WIDTH + i_row[None, :]
                tl.store(x_grad + i_value, tl.sum(b_x_grad, 0).to(operand), mask=m_inner[:, None])
        p_logits = logits_part + i_head[:, None] * WIDTH + i_row[None, :]
        add_values(p_logits, tl.sum(b_seed_grad, 1), done)

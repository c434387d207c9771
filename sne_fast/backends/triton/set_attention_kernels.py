"""Kernels of ``set_attention``. "Own" rows are the tile that a program computes, "inner" rows those it loops over.

With SPLIT = 0 a program owns a piece of BLOCK rows (with ONE_TILE a whole set, if none has more rows) and loops over
all inner rows of their set. Where sets have few own rows and many inner ones, a program takes SPLIT inner rows instead
and writes a partial result, which a second kernel adds up in a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .pieces_kernels import piece_range, pieces_of_set

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def locate(
    own_ptr,
    inner_ptr,
    sets,
    max_own_rows,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLIT: tl.constexpr,
    ONE_TILE: tl.constexpr,
):
    """Return first own row and the end of its set, first inner row and the end, and the row of the result."""
    i_item = (tl.program_id(0) // HEADS).to(tl.int64)
    if SPLIT == 0:
        if ONE_TILE:
            i_set = i_item
            own = tl.load(own_ptr + i_set)
            own_end = tl.load(own_ptr + i_set + 1)
        else:
            i_set, own, own_end = piece_range(own_ptr, sets, i_item, BLOCK)
        begin = tl.load(inner_ptr + i_set)
        end = tl.load(inner_ptr + i_set + 1)
        target = own
    else:
        i_set, begin, end = piece_range(inner_ptr, sets, i_item, SPLIT)
        end = tl.minimum(end, begin + SPLIT)
        own = tl.load(own_ptr + i_set) + tl.program_id(1) * BLOCK
        own_end = tl.load(own_ptr + i_set + 1)
        target = i_item * max_own_rows + tl.program_id(1) * BLOCK
        if begin >= end:
            own_end = own  # a piece without rows: nothing to do
    return own, own_end, begin, end, target


@triton.jit
def load_tile(
    base,
    first,
    end,
    WIDTH: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Load rows ``first`` to ``end`` of one head, zero outside: [ROWS, COLUMNS]."""
    i_row, i_column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    m_tile = (first + i_row < end)[:, None] & (i_column < D)[None, :]
    return tl.load(base + first * WIDTH + i_row[:, None] * WIDTH + i_column[None, :], mask=m_tile, other=0)


@triton.jit
def store_tile(
    base,
    target,
    count,
    b_tile,
    WIDTH: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Store ``count`` rows of one head, [ROWS, COLUMNS], from row ``target`` on."""
    i_row, i_column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    m_tile = (i_row < count)[:, None] & (i_column < D)[None, :]
    p_tile = base + target * WIDTH + i_row[:, None] * WIDTH + i_column[None, :]
    tl.store(p_tile, b_tile.to(base.dtype.element_ty), mask=m_tile)


@triton.jit
def load_rows(
    base,
    first,
    end,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Load one number per row, such as lse of one head: [ROWS]."""
    i_row = tl.arange(0, ROWS)
    return tl.load(base + (first + i_row) * HEADS, mask=first + i_row < end, other=0)


@triton.jit
def base2_shift(b_lse):
    """Return lse in base 2, to shift logits by: 0 for a row without keys, so that exp2(-inf - 0) = 0."""
    return tl.where(b_lse == float("-inf"), 0.0, b_lse) * LOG2E


@triton.jit(do_not_specialize=["sets", "max_own_rows"])
def forward_kernel(
    q,
    k,
    v,
    out,
    lse,
    q_ptr,
    k_ptr,
    sets,
    max_own_rows,
    WIDTH: tl.constexpr,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCK: tl.constexpr,
    INNER: tl.constexpr,
    SPLIT: tl.constexpr,
    ONE_TILE: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Attend from a tile of queries to the keys of their set, by a softmax whose maximum runs along."""
    i_head = tl.program_id(0) % HEADS
    own, own_end, begin, end, target = locate(q_ptr, k_ptr, sets, max_own_rows, HEADS, BLOCK, SPLIT, ONE_TILE)
    if own >= own_end:
        return
    b_q = load_tile(q + i_head * D, own, own_end, WIDTH, D, BLOCK, COLUMNS)  # [BLOCK, COLUMNS]
    b_max = tl.full([BLOCK], float("-inf"), ACC)
    b_sum = tl.zeros([BLOCK], ACC)
    b_out = tl.zeros([BLOCK, COLUMNS], ACC)
    for first in range(begin, end, INNER):
        b_k = load_tile(k + i_head * D, first, end, WIDTH, D, INNER, COLUMNS)  # [INNER, COLUMNS]
        b_logits = tl.dot(b_q, b_k.T, input_precision=PRECISION, out_dtype=ACC)  # scaled once the maximum is off
        m_k = first + tl.arange(0, INNER) < end
        b_logits = tl.where(m_k[None, :], b_logits, float("-inf"))  # [BLOCK, INNER]
        b_new_max = tl.maximum(b_max, tl.max(b_logits, 1))
        b_shift = tl.where(b_new_max == float("-inf"), 0.0, b_new_max)
        b_p = tl.exp2((b_logits - b_shift[:, None]) * (SCALE * LOG2E))  # [BLOCK, INNER]
        b_decay = tl.exp2((b_max - b_shift) * (SCALE * LOG2E))
        b_sum = b_sum * b_decay + tl.sum(b_p, 1)
        b_v = load_tile(v + i_head * D, first, end, WIDTH, D, INNER, COLUMNS)  # [INNER, COLUMNS]
        b_product = tl.dot(b_p.to(b_v.dtype), b_v, input_precision=PRECISION, out_dtype=ACC)
        b_out = b_out * b_decay[:, None] + b_product  # [BLOCK, COLUMNS]
        b_max = b_new_max
    b_out = b_out / tl.where(b_sum > 0, b_sum, 1.0)[:, None]
    store_tile(out + i_head * D, target, own_end - own, b_out, WIDTH, D, BLOCK, COLUMNS)
    i_row = tl.arange(0, BLOCK)
    b_lse = tl.where(b_max == float("-inf"), b_max, b_max * SCALE + tl.log2(b_sum) * LN2)
    tl.store(lse + (target + i_row) * HEADS + i_head, b_lse, mask=i_row < own_end - own)


@triton.jit(do_not_specialize=["max_own_rows"])
def combine_kernel(
    partial,
    partial_lse,
    out,
    lse,
    q_ptr,
    k_ptr,
    max_own_rows,
    WIDTH: tl.constexpr,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    SPLIT: tl.constexpr,
    ACC: tl.constexpr,
):
    """Combine the pieces of a set: softmax over their lse, mean of their results by it. COLUMNS >= WIDTH."""
    i_set = tl.program_id(0).to(tl.int64)
    i_local = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    row = tl.load(q_ptr + i_set)
    i_column = tl.arange(0, COLUMNS)
    m_tile = (i_local < tl.load(q_ptr + i_set + 1) - row)[:, None] & (i_column < WIDTH)[None, :]
    i_head = i_column // D
    first, count = pieces_of_set(k_ptr, i_set, SPLIT)
    b_max = tl.full([ROWS, COLUMNS], float("-inf"), ACC)
    for i_piece in range(first, first + count):
        p_lse = partial_lse + i_piece * max_own_rows * HEADS + i_local[:, None] * HEADS + i_head[None, :]
        b_max = tl.maximum(b_max, tl.load(p_lse, mask=m_tile, other=float("-inf")))  # [ROWS, COLUMNS]
    b_shift = tl.where(b_max == float("-inf"), 0.0, b_max)
    b_sum = tl.zeros([ROWS, COLUMNS], ACC)
    b_mean = tl.zeros([ROWS, COLUMNS], ACC)
    for i_piece in range(first, first + count):
        p_lse = partial_lse + i_piece * max_own_rows * HEADS + i_local[:, None] * HEADS + i_head[None, :]
        b_p = tl.exp2((tl.load(p_lse, mask=m_tile, other=float("-inf")) - b_shift) * LOG2E)  # [ROWS, COLUMNS]
        p_partial = partial + i_piece * max_own_rows * WIDTH + i_local[:, None] * WIDTH + i_column[None, :]
        b_partial = tl.load(p_partial, mask=m_tile, other=0)  # [ROWS, COLUMNS]
        b_sum += b_p
        b_mean += b_p * b_partial
    b_mean = b_mean / tl.where(b_sum > 0, b_sum, 1.0)
    p_out = out + ((row + i_local)[:, None] * WIDTH + i_column[None, :])
    tl.store(p_out, b_mean.to(out.dtype.element_ty), mask=m_tile)
    b_lse = tl.where(b_max == float("-inf"), b_max, b_max + tl.log2(b_sum) * LN2)
    i_lse = (row + i_local)[:, None] * HEADS + i_head[None, :]
    tl.store(lse + i_lse, b_lse, mask=m_tile & (i_column % D == 0)[None, :])


@triton.jit
def softmax_tile(
    b_q,
    b_k,
    b_lse2,
    m_seen,
    SCALE: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Recompute the weights from lse, [queries, keys]; 0 where not ``m_seen``, whatever the logits are."""
    b_logits = tl.dot(b_q, b_k.T, input_precision=PRECISION, out_dtype=ACC) * (SCALE * LOG2E)
    return tl.where(m_seen, tl.exp2(b_logits - b_lse2), 0.0)


@triton.jit
def mean_of_weights_grad(
    b_q,
    b_grad,
    b_lse2,
    k,
    v,
    begin,
    end,
    WIDTH: tl.constexpr,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCK: tl.constexpr,
    INNER: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute sum_j P_ij dP_ij from the very products that the backward subtracts it from: [BLOCK]."""
    b_mean = tl.zeros([BLOCK], ACC)
    for first in range(begin, end, INNER):
        b_k = load_tile(k, first, end, WIDTH, D, INNER, COLUMNS)  # [INNER, COLUMNS]
        b_v = load_tile(v, first, end, WIDTH, D, INNER, COLUMNS)  # [INNER, COLUMNS]
        m_seen = (first + tl.arange(0, INNER) < end)[None, :]
        b_p = softmax_tile(b_q, b_k, b_lse2[:, None], m_seen, SCALE, ACC, PRECISION)  # [BLOCK, INNER]
        b_p_grad = tl.dot(b_grad, b_v.T, input_precision=PRECISION, out_dtype=ACC)  # [BLOCK, INNER]
        b_mean += tl.sum(b_p * b_p_grad, 1)
    return b_mean


@triton.jit(do_not_specialize=["sets", "max_own_rows"])
def mean_kernel(
    grad,
    q,
    k,
    v,
    lse,
    mean,
    q_ptr,
    k_ptr,
    sets,
    max_own_rows,
    WIDTH: tl.constexpr,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCK: tl.constexpr,
    INNER: tl.constexpr,
    SPLIT: tl.constexpr,
    ONE_TILE: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute ``mean``, :func:`mean_of_weights_grad` of each row and head, over one piece of the keys."""
    i_head = tl.program_id(0) % HEADS
    own, own_end, begin, end, target = locate(q_ptr, k_ptr, sets, max_own_rows, HEADS, BLOCK, SPLIT, ONE_TILE)
    if own >= own_end:
        return
    b_q = load_tile(q + i_head * D, own, own_end, WIDTH, D, BLOCK, COLUMNS)  # [BLOCK, COLUMNS]
    b_grad = load_tile(grad + i_head * D, own, own_end, WIDTH, D, BLOCK, COLUMNS)  # [BLOCK, COLUMNS]
    b_lse2 = base2_shift(load_rows(lse + i_head, own, own_end, HEADS, BLOCK))  # [BLOCK]
    b_mean = mean_of_weights_grad(
        b_q, b_grad, b_lse2, k + i_head * D, v + i_head * D, begin, end,
        WIDTH, D, COLUMNS, SCALE, BLOCK, INNER, ACC, PRECISION,
    )  # fmt: skip
    i_row = tl.arange(0, BLOCK)
    tl.store(mean + (target + i_row) * HEADS + i_head, b_mean, mask=i_row < own_end - own)


@triton.jit(do_not_specialize=["sets", "max_own_rows"])
def query_grad_kernel(
    grad,
    q,
    k,
    v,
    out,
    lse,
    mean,
    grad_q,
    q_ptr,
    k_ptr,
    sets,
    max_own_rows,
    WIDTH: tl.constexpr,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCK: tl.constexpr,
    INNER: tl.constexpr,
    SPLIT: tl.constexpr,
    ONE_TILE: tl.constexpr,
    MEAN: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute dq, and ``mean`` on the way unless MEAN is "read": from ``out`` ("out") or from the keys ("keys")."""
    i_head = tl.program_id(0) % HEADS
    own, own_end, begin, end, target = locate(q_ptr, k_ptr, sets, max_own_rows, HEADS, BLOCK, SPLIT, ONE_TILE)
    if own >= own_end:
        return
    b_q = load_tile(q + i_head * D, own, own_end, WIDTH, D, BLOCK, COLUMNS)  # [BLOCK, COLUMNS]
    b_grad = load_tile(grad + i_head * D, own, own_end, WIDTH, D, BLOCK, COLUMNS)  # [BLOCK, COLUMNS]
    b_lse2 = base2_shift(load_rows(lse + i_head, own, own_end, HEADS, BLOCK))  # [BLOCK]
    i_row = tl.arange(0, BLOCK)
    if MEAN == "read":
        b_mean = load_rows(mean + i_head, own, own_end, HEADS, BLOCK)  # [BLOCK]
    else:
        if MEAN == "out":
            b_out = load_tile(out + i_head * D, own, own_end, WIDTH, D, BLOCK, COLUMNS)  # [BLOCK, COLUMNS]
            b_mean = tl.sum(b_out.to(ACC) * b_grad.to(ACC), 1)
        else:
            b_mean = mean_of_weights_grad(
                b_q, b_grad, b_lse2, k + i_head * D, v + i_head * D, begin, end,
                WIDTH, D, COLUMNS, SCALE, BLOCK, INNER, ACC, PRECISION,
            )  # fmt: skip
        tl.store(mean + (own + i_row) * HEADS + i_head, b_mean, mask=i_row < own_end - own)
    b_grad_q = tl.zeros([BLOCK, COLUMNS], ACC)
    for first in range(begin, end, INNER):
        b_k = load_tile(k + i_head * D, first, end, WIDTH, D, INNER, COLUMNS)  # [INNER, COLUMNS]
        b_v = load_tile(v + i_head * D, first, end, WIDTH, D, INNER, COLUMNS)  # [INNER, COLUMNS]
        m_seen = (first + tl.arange(0, INNER) < end)[None, :]
        b_p = softmax_tile(b_q, b_k, b_lse2[:, None], m_seen, SCALE, ACC, PRECISION)  # [BLOCK, INNER]
        b_p_grad = tl.dot(b_grad, b_v.T, input_precision=PRECISION, out_dtype=ACC)
        b_logits_grad = b_p * (b_p_grad - b_mean[:, None])  # [BLOCK, INNER]
        b_grad_q += tl.dot(b_logits_grad.to(b_k.dtype), b_k, input_precision=PRECISION, out_dtype=ACC)
    store_tile(grad_q + i_head * D, target, own_end - own, b_grad_q * SCALE, WIDTH, D, BLOCK, COLUMNS)


@triton.jit(do_not_specialize=["sets", "max_own_rows"])
def key_grad_kernel(
    grad,
    q,
    k,
    v,
    lse,
    mean,
    grad_k,
    grad_v,
    q_ptr,
    k_ptr,
    sets,
    max_own_rows,
    WIDTH: tl.constexpr,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCK: tl.constexpr,
    INNER: tl.constexpr,
    SPLIT: tl.constexpr,
    ONE_TILE: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute dk and dv of a tile of keys over the queries of their set; all tiles are transposed: [keys, queries]."""
    i_head = tl.program_id(0) % HEADS
    own, own_end, begin, end, target = locate(k_ptr, q_ptr, sets, max_own_rows, HEADS, BLOCK, SPLIT, ONE_TILE)
    if own >= own_end:
        return
    b_k = load_tile(k + i_head * D, own, own_end, WIDTH, D, BLOCK, COLUMNS)  # [BLOCK, COLUMNS]
    b_v = load_tile(v + i_head * D, own, own_end, WIDTH, D, BLOCK, COLUMNS)  # [BLOCK, COLUMNS]
    b_grad_k = tl.zeros([BLOCK, COLUMNS], ACC)
    b_grad_v = tl.zeros([BLOCK, COLUMNS], ACC)
    for first in range(begin, end, INNER):
        b_q = load_tile(q + i_head * D, first, end, WIDTH, D, INNER, COLUMNS)  # [INNER, COLUMNS]
        b_grad = load_tile(grad + i_head * D, first, end, WIDTH, D, INNER, COLUMNS)  # [INNER, COLUMNS]
        b_lse2 = base2_shift(load_rows(lse + i_head, first, end, HEADS, INNER))  # [INNER]
        b_mean = load_rows(mean + i_head, first, end, HEADS, INNER)  # [INNER]
        m_seen = (first + tl.arange(0, INNER) < end)[None, :]
        b_p = softmax_tile(b_k, b_q, b_lse2[None, :], m_seen, SCALE, ACC, PRECISION)  # [BLOCK, INNER]
        b_grad_v += tl.dot(b_p.to(b_grad.dtype), b_grad, input_precision=PRECISION, out_dtype=ACC)
        b_p_grad = tl.dot(b_v, b_grad.T, input_precision=PRECISION, out_dtype=ACC)
        b_logits_grad = b_p * (b_p_grad - b_mean[None, :])  # [BLOCK, INNER]
        b_grad_k += tl.dot(b_logits_grad.to(b_q.dtype), b_q, input_precision=PRECISION, out_dtype=ACC)
    store_tile(grad_k + i_head * D, target, own_end - own, b_grad_k * SCALE, WIDTH, D, BLOCK, COLUMNS)
    store_tile(grad_v + i_head * D, target, own_end - own, b_grad_v, WIDTH, D, BLOCK, COLUMNS)

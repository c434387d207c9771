"""Device code of set_attention. "Own" rows are the tile a program computes, "inner" rows those it loops over.

With SPLIT = 0 a program owns a slot of BLOCK rows (with SINGLE a set, if none has more rows) and loops over all inner
rows of their set. Where sets have few own rows and many inner ones, a program takes SPLIT inner rows instead and writes
a partial result, which a second kernel adds up in a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .pieces import set_slots, slot_range

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def locate(
    own_ptr, inner_ptr, sets, most,
    HEADS: tl.constexpr, BLOCK: tl.constexpr, SPLIT: tl.constexpr, SINGLE: tl.constexpr,
):  # fmt: skip
    """First own row and the end of its set, first inner row and the end, and the row of the result."""
    item = (tl.program_id(0) // HEADS).to(tl.int64)
    if SPLIT == 0:
        if SINGLE:
            own = item
            row = tl.load(own_ptr + own)
            row_end = tl.load(own_ptr + own + 1)
        else:
            own, row, row_end = slot_range(own_ptr, sets, item, BLOCK)
        begin = tl.load(inner_ptr + own)
        end = tl.load(inner_ptr + own + 1)
        place = row
    else:
        own, begin, end = slot_range(inner_ptr, sets, item, SPLIT)
        end = tl.minimum(end, begin + SPLIT)
        row = tl.load(own_ptr + own) + tl.program_id(1) * BLOCK
        row_end = tl.load(own_ptr + own + 1)
        place = item * most + tl.program_id(1) * BLOCK
        if begin >= end:
            row_end = row  # an unused slot: nothing to do
    return row, row_end, begin, end, place


@triton.jit
def load_tile(base, first, end, WIDTH: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows ``first`` to ``end`` of one head, zero outside: [ROWS, COLUMNS]."""
    rows, columns = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    mask = (first + rows < end)[:, None] & (columns < D)[None, :]
    return tl.load(base + first * WIDTH + rows[:, None] * WIDTH + columns[None, :], mask=mask, other=0)


@triton.jit
def store_tile(
    base, place, count, tile, WIDTH: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    rows, columns = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    mask = (rows < count)[:, None] & (columns < D)[None, :]
    at = base + place * WIDTH + rows[:, None] * WIDTH + columns[None, :]
    tl.store(at, tile.to(base.dtype.element_ty), mask=mask)


@triton.jit
def load_rows(base, first, end, HEADS: tl.constexpr, ROWS: tl.constexpr):
    """One number per row, e.g. lse of one head: [ROWS]."""
    rows = tl.arange(0, ROWS)
    return tl.load(base + (first + rows) * HEADS, mask=first + rows < end, other=0)


@triton.jit
def base2_shift(lse):
    """lse in base 2, as what logits are shifted by: 0 where a row saw nothing, so that exp2(-inf - 0) = 0."""
    return tl.where(lse == float("-inf"), 0.0, lse) * LOG2E


@triton.jit(do_not_specialize=["sets", "most"])
def forward_kernel(
    q, k, v, out, lse, q_ptr, k_ptr, sets, most,
    WIDTH: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, COLUMNS: tl.constexpr, SCALE: tl.constexpr,
    BLOCK: tl.constexpr, INNER: tl.constexpr, SPLIT: tl.constexpr, SINGLE: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0) % HEADS
    row, row_end, begin, end, place = locate(q_ptr, k_ptr, sets, most, HEADS, BLOCK, SPLIT, SINGLE)
    if row >= row_end:
        return
    queries = load_tile(q + head * D, row, row_end, WIDTH, D, BLOCK, COLUMNS)
    maximum = tl.full([BLOCK], float("-inf"), ACC)
    total = tl.zeros([BLOCK], ACC)
    attended = tl.zeros([BLOCK, COLUMNS], ACC)
    for first in range(begin, end, INNER):
        keys = load_tile(k + head * D, first, end, WIDTH, D, INNER, COLUMNS)
        logits = tl.dot(queries, keys.T, input_precision=PRECISION, out_dtype=ACC) * (SCALE * LOG2E)
        seen = first + tl.arange(0, INNER) < end
        logits = tl.where(seen[None, :], logits, float("-inf"))  # [BLOCK, INNER]
        higher = tl.maximum(maximum, tl.max(logits, 1))
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(logits - shift[:, None])
        decay = tl.exp2(maximum - shift)
        total = total * decay + tl.sum(weights, 1)
        values = load_tile(v + head * D, first, end, WIDTH, D, INNER, COLUMNS)
        product = tl.dot(weights.to(values.dtype), values, input_precision=PRECISION, out_dtype=ACC)
        attended = attended * decay[:, None] + product
        maximum = higher
    attended = attended / tl.where(total > 0, total, 1.0)[:, None]
    store_tile(out + head * D, place, row_end - row, attended, WIDTH, D, BLOCK, COLUMNS)
    rows = tl.arange(0, BLOCK)
    log_sum = tl.where(maximum == float("-inf"), maximum, (maximum + tl.log2(total)) * LN2)
    tl.store(lse + (place + rows) * HEADS + head, log_sum, mask=rows < row_end - row)


@triton.jit(do_not_specialize=["most"])
def combine_kernel(
    partial, partial_lse, out, lse, q_ptr, k_ptr, most,
    WIDTH: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
    SPLIT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Softmax over the slots of a set of their lse, and the mean of their results by it. COLUMNS >= WIDTH."""
    own = tl.program_id(0).to(tl.int64)
    local = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    row = tl.load(q_ptr + own)
    columns = tl.arange(0, COLUMNS)
    mask = (local < tl.load(q_ptr + own + 1) - row)[:, None] & (columns < WIDTH)[None, :]
    heads = columns // D
    first, count = set_slots(k_ptr, own, SPLIT)
    maximum = tl.full([ROWS, COLUMNS], float("-inf"), ACC)
    for slot in range(first, first + count):
        at = partial_lse + slot * most * HEADS + local[:, None] * HEADS + heads[None, :]
        maximum = tl.maximum(maximum, tl.load(at, mask=mask, other=float("-inf")))
    shift = tl.where(maximum == float("-inf"), 0.0, maximum)
    total = tl.zeros([ROWS, COLUMNS], ACC)
    mean = tl.zeros([ROWS, COLUMNS], ACC)
    for slot in range(first, first + count):
        at = partial_lse + slot * most * HEADS + local[:, None] * HEADS + heads[None, :]
        weight = tl.exp2((tl.load(at, mask=mask, other=float("-inf")) - shift) * LOG2E)
        part = tl.load(partial + slot * most * WIDTH + local[:, None] * WIDTH + columns[None, :], mask=mask, other=0)
        total += weight
        mean += weight * part
    mean = mean / tl.where(total > 0, total, 1.0)
    at = (row + local)[:, None] * WIDTH + columns[None, :]
    tl.store(out + at, mean.to(out.dtype.element_ty), mask=mask)
    log_sum = tl.where(maximum == float("-inf"), maximum, maximum + tl.log2(total) * LN2)
    at = (row + local)[:, None] * HEADS + heads[None, :]
    tl.store(lse + at, log_sum, mask=mask & (columns % D == 0)[None, :])


@triton.jit
def softmax_tile(queries, keys, lse2, seen, SCALE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr):
    """The weights again, from lse: [queries, keys]; 0 where not ``seen``, whatever the logits are."""
    logits = tl.dot(queries, keys.T, input_precision=PRECISION, out_dtype=ACC) * (SCALE * LOG2E)
    return tl.where(seen, tl.exp2(logits - lse2), 0.0)


@triton.jit
def mean_of_weights_grad(
    queries, grads, lse2, k, v, begin, end,
    WIDTH: tl.constexpr, D: tl.constexpr, COLUMNS: tl.constexpr, SCALE: tl.constexpr,
    BLOCK: tl.constexpr, INNER: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """sum_j P_ij dP_ij by the very products that backward subtracts it from: [BLOCK]."""
    mean = tl.zeros([BLOCK], ACC)
    for first in range(begin, end, INNER):
        keys = load_tile(k, first, end, WIDTH, D, INNER, COLUMNS)
        values = load_tile(v, first, end, WIDTH, D, INNER, COLUMNS)
        seen = (first + tl.arange(0, INNER) < end)[None, :]
        weights = softmax_tile(queries, keys, lse2[:, None], seen, SCALE, ACC, PRECISION)
        weights_grad = tl.dot(grads, values.T, input_precision=PRECISION, out_dtype=ACC)
        mean += tl.sum(weights * weights_grad, 1)
    return mean


@triton.jit(do_not_specialize=["sets", "most"])
def mean_kernel(
    grad, q, k, v, lse, mean, q_ptr, k_ptr, sets, most,
    WIDTH: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, COLUMNS: tl.constexpr, SCALE: tl.constexpr,
    BLOCK: tl.constexpr, INNER: tl.constexpr, SPLIT: tl.constexpr, SINGLE: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0) % HEADS
    row, row_end, begin, end, place = locate(q_ptr, k_ptr, sets, most, HEADS, BLOCK, SPLIT, SINGLE)
    if row >= row_end:
        return
    queries = load_tile(q + head * D, row, row_end, WIDTH, D, BLOCK, COLUMNS)
    grads = load_tile(grad + head * D, row, row_end, WIDTH, D, BLOCK, COLUMNS)
    lse2 = base2_shift(load_rows(lse + head, row, row_end, HEADS, BLOCK))
    part = mean_of_weights_grad(
        queries, grads, lse2, k + head * D, v + head * D, begin, end,
        WIDTH, D, COLUMNS, SCALE, BLOCK, INNER, ACC, PRECISION,
    )  # fmt: skip
    rows = tl.arange(0, BLOCK)
    tl.store(mean + (place + rows) * HEADS + head, part, mask=rows < row_end - row)


@triton.jit(do_not_specialize=["sets", "most"])
def query_grad_kernel(
    grad, q, k, v, out, lse, mean, grad_q, q_ptr, k_ptr, sets, most,
    WIDTH: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, COLUMNS: tl.constexpr, SCALE: tl.constexpr,
    BLOCK: tl.constexpr, INNER: tl.constexpr, SPLIT: tl.constexpr, SINGLE: tl.constexpr, MEAN: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq; and ``mean`` on the way: MEAN says whether it is read, or comes from ``out``, or from the keys."""
    head = tl.program_id(0) % HEADS
    row, row_end, begin, end, place = locate(q_ptr, k_ptr, sets, most, HEADS, BLOCK, SPLIT, SINGLE)
    if row >= row_end:
        return
    queries = load_tile(q + head * D, row, row_end, WIDTH, D, BLOCK, COLUMNS)
    grads = load_tile(grad + head * D, row, row_end, WIDTH, D, BLOCK, COLUMNS)
    lse2 = base2_shift(load_rows(lse + head, row, row_end, HEADS, BLOCK))
    rows = tl.arange(0, BLOCK)
    if MEAN == "read":
        means = load_rows(mean + head, row, row_end, HEADS, BLOCK)
    else:
        if MEAN == "out":
            results = load_tile(out + head * D, row, row_end, WIDTH, D, BLOCK, COLUMNS)
            means = tl.sum(results.to(ACC) * grads.to(ACC), 1)
        else:
            means = mean_of_weights_grad(
                queries, grads, lse2, k + head * D, v + head * D, begin, end,
                WIDTH, D, COLUMNS, SCALE, BLOCK, INNER, ACC, PRECISION,
            )  # fmt: skip
        tl.store(mean + (row + rows) * HEADS + head, means, mask=rows < row_end - row)
    total = tl.zeros([BLOCK, COLUMNS], ACC)
    for first in range(begin, end, INNER):
        keys = load_tile(k + head * D, first, end, WIDTH, D, INNER, COLUMNS)
        values = load_tile(v + head * D, first, end, WIDTH, D, INNER, COLUMNS)
        seen = (first + tl.arange(0, INNER) < end)[None, :]
        weights = softmax_tile(queries, keys, lse2[:, None], seen, SCALE, ACC, PRECISION)
        weights_grad = tl.dot(grads, values.T, input_precision=PRECISION, out_dtype=ACC)
        logits_grad = weights * (weights_grad - means[:, None])  # [BLOCK, INNER]
        total += tl.dot(logits_grad.to(keys.dtype), keys, input_precision=PRECISION, out_dtype=ACC)
    store_tile(grad_q + head * D, place, row_end - row, total * SCALE, WIDTH, D, BLOCK, COLUMNS)


@triton.jit(do_not_specialize=["sets", "most"])
def key_grad_kernel(
    grad, q, k, v, lse, mean, grad_k, grad_v, q_ptr, k_ptr, sets, most,
    WIDTH: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, COLUMNS: tl.constexpr, SCALE: tl.constexpr,
    BLOCK: tl.constexpr, INNER: tl.constexpr, SPLIT: tl.constexpr, SINGLE: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv of a tile of keys, over the queries of their set; all tiles are transposed: [keys, queries]."""
    head = tl.program_id(0) % HEADS
    row, row_end, begin, end, place = locate(k_ptr, q_ptr, sets, most, HEADS, BLOCK, SPLIT, SINGLE)
    if row >= row_end:
        return
    keys = load_tile(k + head * D, row, row_end, WIDTH, D, BLOCK, COLUMNS)
    values = load_tile(v + head * D, row, row_end, WIDTH, D, BLOCK, COLUMNS)
    total_k = tl.zeros([BLOCK, COLUMNS], ACC)
    total_v = tl.zeros([BLOCK, COLUMNS], ACC)
    for first in range(begin, end, INNER):
        queries = load_tile(q + head * D, first, end, WIDTH, D, INNER, COLUMNS)
        grads = load_tile(grad + head * D, first, end, WIDTH, D, INNER, COLUMNS)
        lse2 = base2_shift(load_rows(lse + head, first, end, HEADS, INNER))
        means = load_rows(mean + head, first, end, HEADS, INNER)
        seen = (first + tl.arange(0, INNER) < end)[None, :]
        weights = softmax_tile(keys, queries, lse2[None, :], seen, SCALE, ACC, PRECISION)
        total_v += tl.dot(weights.to(grads.dtype), grads, input_precision=PRECISION, out_dtype=ACC)
        weights_grad = tl.dot(values, grads.T, input_precision=PRECISION, out_dtype=ACC)
        logits_grad = weights * (weights_grad - means[None, :])  # [BLOCK, INNER]
        total_k += tl.dot(logits_grad.to(queries.dtype), queries, input_precision=PRECISION, out_dtype=ACC)
    store_tile(grad_k + head * D, place, row_end - row, total_k * SCALE, WIDTH, D, BLOCK, COLUMNS)
    store_tile(grad_v + head * D, place, row_end - row, total_v, WIDTH, D, BLOCK, COLUMNS)

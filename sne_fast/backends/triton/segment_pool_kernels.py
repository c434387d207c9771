"""Device code of segment_pool. Each of LANES lanes walks rows of one segment with sums of its own; lanes meet once.

With ONE = True the lanes share a segment (or, with SPLIT > 0, a piece of SPLIT rows of it), lane r taking its rows r,
r + LANES, ...; else every lane has a segment to itself, for short ones. Lanes of different segments never meet.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .pieces import set_slots, slot_range

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def lane_rows(ptr, sets, ONE: tl.constexpr, LANES: tl.constexpr, SPLIT: tl.constexpr):
    """Per lane: its segment, first row, end; of the program: row stride, number of rows of a lane, and its item."""
    item = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, LANES)
    if ONE:
        if SPLIT > 0:
            own, begin, end = slot_range(ptr, sets, item, SPLIT)
            end = tl.minimum(end, begin + SPLIT)
        else:
            own = item
            begin = tl.load(ptr + own)
            end = tl.load(ptr + own + 1)
        return own + lanes * 0, begin + lanes, end + lanes * 0, LANES, tl.cdiv(end - begin, LANES), item
    own = item * LANES + lanes
    begin = tl.load(ptr + own, mask=own < sets, other=0)
    end = tl.load(ptr + own + 1, mask=own < sets, other=0)
    return own, begin, end, 1, tl.max(end - begin, 0), item


@triton.jit
def load_logits(logits, row, end, columns, A: tl.constexpr):
    """[LANES, A_BLOCK], -inf outside."""
    mask = (row < end)[:, None] & (columns < A)[None, :]
    return tl.load(logits + row[:, None] * A + columns[None, :], mask=mask, other=float("-inf"))


@triton.jit
def load_x(x, row, end, columns, WIDTH: tl.constexpr):
    """[LANES, COLUMNS], 0 outside."""
    mask = (row < end)[:, None] & (columns < WIDTH)[None, :]
    return tl.load(x + row[:, None] * WIDTH + columns[None, :], mask=mask, other=0)


@triton.jit
def store_pooled(
    out, lse, place, inside, pooled, total, maximum, queries, columns, WIDTH: tl.constexpr, A: tl.constexpr
):
    """Rows ``place`` of the result: the mean of ``pooled [rows, A_BLOCK, COLUMNS]``, and lse."""
    mask = inside[:, None] & (queries < A)[None, :]
    pooled = pooled / tl.where(total > 0, total, 1.0)[:, :, None]
    at = (place[:, None] * A + queries[None, :])[:, :, None] * WIDTH + columns[None, None, :]
    tl.store(out + at, pooled.to(out.dtype.element_ty), mask=mask[:, :, None] & (columns < WIDTH)[None, None, :])
    if tl.program_id(2) == 0:
        log_sum = tl.where(maximum == float("-inf"), maximum, maximum + tl.log2(total) * LN2)
        tl.store(lse + place[:, None] * A + queries[None, :], log_sum, mask=mask)


@triton.jit(do_not_specialize=["sets"])
def forward_kernel(
    x, logits, out, lse, part, part_lse, ptr, sets,
    WIDTH: tl.constexpr, A: tl.constexpr, COLUMNS: tl.constexpr, A_BLOCK: tl.constexpr, LANES: tl.constexpr,
    ONE: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    own, begin, end, stride, steps, item = lane_rows(ptr, sets, ONE, LANES, SPLIT)
    queries = tl.program_id(1) * A_BLOCK + tl.arange(0, A_BLOCK)
    columns = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    count = item * 0
    if SPLIT > 0:
        first, count = set_slots(ptr, tl.max(own, 0), SPLIT)
        if item - first >= tl.maximum(count, 1):
            return  # a slot without rows
    if ONE:  # many rows at a time: the loop waits for memory at every turn
        WIDE: tl.constexpr = 2048 // A_BLOCK if 2048 // A_BLOCK > LANES else LANES
        highest = tl.full([WIDE, A_BLOCK], float("-inf"), ACC)
        last = tl.max(end, 0)
        for first_row in range(tl.min(begin, 0), last, WIDE):
            row = first_row + tl.arange(0, WIDE)
            highest = tl.maximum(highest, load_logits(logits, row, last, queries, A).to(ACC))
        maximum = tl.max(highest, 0)[None, :]
    else:
        maximum = tl.full([LANES, A_BLOCK], float("-inf"), ACC)
        for step in tl.range(0, steps, num_stages=STAGES):
            maximum = tl.maximum(maximum, load_logits(logits, begin + step * stride, end, queries, A).to(ACC))
    shift = tl.where(maximum == float("-inf"), 0.0, maximum)
    total = tl.zeros([LANES, A_BLOCK], ACC)
    pooled = tl.zeros([LANES, A_BLOCK, COLUMNS], ACC)
    for step in tl.range(0, steps, num_stages=STAGES):
        row = begin + step * stride
        weights = tl.exp2((load_logits(logits, row, end, queries, A).to(ACC) - shift) * LOG2E)
        total += weights
        pooled += weights[:, :, None] * load_x(x, row, end, columns, WIDTH).to(ACC)[:, None, :]
    if ONE:
        total = tl.sum(total, 0)[None, :]
        pooled = tl.sum(pooled, 0)[None, :, :]
        one = tl.zeros([1], tl.int64)
        if count > 1:
            store_pooled(part, part_lse, item + one, one == 0, pooled, total, maximum, queries, columns, WIDTH, A)
        else:
            place = tl.max(own, 0) + one
            store_pooled(out, lse, place, one == 0, pooled, total, maximum, queries, columns, WIDTH, A)
    else:
        store_pooled(out, lse, own, own < sets, pooled, total, maximum, queries, columns, WIDTH, A)


@triton.jit
def combine_kernel(
    part, part_lse, out, lse, ptr,
    WIDTH: tl.constexpr, A: tl.constexpr, COLUMNS: tl.constexpr, SPLIT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Segments of several pieces: softmax over their lse, and the mean of their results by it."""
    own = tl.program_id(0).to(tl.int64)
    first, count = set_slots(ptr, own, SPLIT)
    if count < 2:
        return
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)  # of A * WIDTH
    mask = columns < A * WIDTH
    queries = columns // WIDTH
    maximum = tl.full([COLUMNS], float("-inf"), ACC)
    for slot in range(first, first + count):
        maximum = tl.maximum(maximum, tl.load(part_lse + slot * A + queries, mask=mask, other=float("-inf")))
    shift = tl.where(maximum == float("-inf"), 0.0, maximum)
    total = tl.zeros([COLUMNS], ACC)
    mean = tl.zeros([COLUMNS], ACC)
    for slot in range(first, first + count):
        weight = tl.exp2((tl.load(part_lse + slot * A + queries, mask=mask, other=float("-inf")) - shift) * LOG2E)
        total += weight
        mean += weight * tl.load(part + slot * A * WIDTH + columns, mask=mask, other=0)
    mean = mean / tl.where(total > 0, total, 1.0)
    tl.store(out + own * A * WIDTH + columns, mean.to(out.dtype.element_ty), mask=mask)
    log_sum = tl.where(maximum == float("-inf"), maximum, maximum + tl.log2(total) * LN2)
    tl.store(lse + own * A + queries, log_sum, mask=mask & (columns % WIDTH == 0))


@triton.jit
def softmax_rows(logits, lse, own, row, end, queries, A: tl.constexpr, ACC: tl.constexpr):
    """The weights again, from lse: [LANES, A_BLOCK], 0 outside."""
    mask = (row < end)[:, None] & (queries < A)[None, :]
    log_sum = tl.load(lse + own[:, None] * A + queries[None, :], mask=mask, other=0)
    log_sum = tl.where(log_sum == float("-inf"), 0.0, log_sum)
    return tl.exp2((load_logits(logits, row, end, queries, A).to(ACC) - log_sum) * LOG2E)


@triton.jit(do_not_specialize=["sets", "first_query"])
def backward_kernel(
    grad, x, logits, lse, grad_x, weights_grad, mean, ptr, sets, first_query,
    WIDTH: tl.constexpr, A: tl.constexpr, COLUMNS: tl.constexpr, A_BLOCK: tl.constexpr, LANES: tl.constexpr,
    ONE: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr, ADD: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dx, the weights' gradient <x_i, grad_a>, and its mean over the lanes' rows (of a slot, with SPLIT > 0)."""
    own, begin, end, stride, steps, item = lane_rows(ptr, sets, ONE, LANES, SPLIT)
    queries = first_query + tl.arange(0, A_BLOCK)
    columns = tl.arange(0, COLUMNS)
    place = own
    inside = own < sets
    if ONE:
        owner = tl.max(own, 0) + tl.zeros([1], tl.int64)
        inside = owner >= 0
        place = owner
        if SPLIT > 0:
            place = item + owner * 0
            if steps <= 0:
                return
    else:
        owner = own
    mask = inside[:, None, None] & (queries < A)[None, :, None] & (columns < WIDTH)[None, None, :]
    at = (owner[:, None] * A + queries[None, :])[:, :, None] * WIDTH + columns[None, None, :]
    grads = tl.load(grad + at, mask=mask, other=0).to(ACC)  # [1 or LANES, A_BLOCK, COLUMNS]
    total = tl.zeros([LANES, A_BLOCK], ACC)
    for step in tl.range(0, steps, num_stages=STAGES):
        row = begin + step * stride
        weights = softmax_rows(logits, lse, own, row, end, queries, A, ACC)
        products = tl.sum(load_x(x, row, end, columns, WIDTH).to(ACC)[:, None, :] * grads, 2)
        total += weights * products
        at_rows = (row < end)[:, None] & (queries < A)[None, :]
        tl.store(weights_grad + row[:, None] * A + queries[None, :], products, mask=at_rows)
        result = tl.sum(weights[:, :, None] * grads, 1)  # [LANES, COLUMNS]
        to = grad_x + row[:, None] * WIDTH + columns[None, :]
        at_x = (row < end)[:, None] & (columns < WIDTH)[None, :]
        if ADD:
            result += tl.load(to, mask=at_x, other=0)
        tl.store(to, result.to(grad_x.dtype.element_ty), mask=at_x)
    if ONE:
        total = tl.sum(total, 0)[None, :]
    tl.store(mean + place[:, None] * A + queries[None, :], total, mask=inside[:, None] & (queries < A)[None, :])


@triton.jit(do_not_specialize=["sets"])
def logits_grad_kernel(
    logits, lse, weights_grad, mean, grad_logits, ptr, sets,
    A: tl.constexpr, A_BLOCK: tl.constexpr, LANES: tl.constexpr, ONE: tl.constexpr, SPLIT: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    own, begin, end, stride, steps, item = lane_rows(ptr, sets, ONE, LANES, SPLIT)
    queries = tl.program_id(1) * A_BLOCK + tl.arange(0, A_BLOCK)
    for step in range(0, steps):
        row = begin + step * stride
        weights = softmax_rows(logits, lse, own, row, end, queries, A, ACC)
        mask = (row < end)[:, None] & (queries < A)[None, :]
        at = row[:, None] * A + queries[None, :]
        difference = tl.load(weights_grad + at, mask=mask, other=0)
        difference -= tl.load(mean + own[:, None] * A + queries[None, :], mask=mask, other=0)
        tl.store(grad_logits + at, (weights * difference).to(grad_logits.dtype.element_ty), mask=mask)

"""Kernels of ``segment_pool``. Each of LANES lanes walks rows of one segment with sums of its own; lanes meet once.

With ONE = True the lanes share a segment (or, with SPLIT > 0, a piece of SPLIT rows of it), lane r taking its rows r,
r + LANES, ...; else every lane has a segment to itself, for short ones. Lanes of different segments never meet.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .pieces_kernels import piece_range, pieces_of_set

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def lane_rows(
    ptr,
    sets,
    ONE: tl.constexpr,
    LANES: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Return per lane its segment, first row and end; of the program the row stride, rows of a lane and work item."""
    i_item = tl.program_id(0).to(tl.int64)
    i_lane = tl.arange(0, LANES)
    if ONE:
        if SPLIT > 0:
            i_set, begin, end = piece_range(ptr, sets, i_item, SPLIT)
            end = tl.minimum(end, begin + SPLIT)
        else:
            i_set = i_item
            begin = tl.load(ptr + i_set)
            end = tl.load(ptr + i_set + 1)
        return i_set + i_lane * 0, begin + i_lane, end + i_lane * 0, LANES, tl.cdiv(end - begin, LANES), i_item
    i_set = i_item * LANES + i_lane
    begin = tl.load(ptr + i_set, mask=i_set < sets, other=0)
    end = tl.load(ptr + i_set + 1, mask=i_set < sets, other=0)
    return i_set, begin, end, 1, tl.max(end - begin, 0), i_item


@triton.jit
def load_logits(
    logits,
    i_row,
    end,
    i_query,
    A: tl.constexpr,
):
    """Load logits, -inf outside: [LANES, A_BLOCK]."""
    m_logits = (i_row < end)[:, None] & (i_query < A)[None, :]
    return tl.load(logits + i_row[:, None] * A + i_query[None, :], mask=m_logits, other=float("-inf"))


@triton.jit
def load_x(
    x,
    i_row,
    end,
    i_column,
    WIDTH: tl.constexpr,
):
    """Load rows of x, 0 outside: [LANES, COLUMNS]."""
    m_x = (i_row < end)[:, None] & (i_column < WIDTH)[None, :]
    return tl.load(x + i_row[:, None] * WIDTH + i_column[None, :], mask=m_x, other=0)


@triton.jit
def store_pooled(
    out,
    lse,
    i_out,
    m_out,
    b_pooled,
    b_sum,
    b_max,
    i_query,
    i_column,
    WIDTH: tl.constexpr,
    A: tl.constexpr,
):
    """Store rows ``i_out`` of the result, the mean of ``b_pooled`` [rows, A_BLOCK, COLUMNS], and lse."""
    m_lse = m_out[:, None] & (i_query < A)[None, :]
    b_pooled = b_pooled / tl.where(b_sum > 0, b_sum, 1.0)[:, :, None]
    i_pooled = (i_out[:, None] * A + i_query[None, :])[:, :, None] * WIDTH + i_column[None, None, :]
    m_pooled = m_lse[:, :, None] & (i_column < WIDTH)[None, None, :]
    tl.store(out + i_pooled, b_pooled.to(out.dtype.element_ty), mask=m_pooled)
    if tl.program_id(2) == 0:
        b_lse = tl.where(b_max == float("-inf"), b_max, b_max + tl.log2(b_sum) * LN2)
        tl.store(lse + i_out[:, None] * A + i_query[None, :], b_lse, mask=m_lse)


@triton.jit(do_not_specialize=["sets"])
def forward_kernel(
    x,
    logits,
    out,
    lse,
    part,
    part_lse,
    ptr,
    sets,
    WIDTH: tl.constexpr,
    A: tl.constexpr,
    COLUMNS: tl.constexpr,
    A_BLOCK: tl.constexpr,
    LANES: tl.constexpr,
    ONE: tl.constexpr,
    SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
    ACC: tl.constexpr,
):
    """Pool segments, or pieces of one into ``part`` and ``part_lse``."""
    i_set, begin, end, stride, steps, i_item = lane_rows(ptr, sets, ONE, LANES, SPLIT)
    i_query = tl.program_id(1) * A_BLOCK + tl.arange(0, A_BLOCK)
    i_column = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    count = i_item * 0
    if SPLIT > 0:
        first, count = pieces_of_set(ptr, tl.max(i_set, 0), SPLIT)
        if i_item - first >= tl.maximum(count, 1):
            return  # a piece without rows
    if ONE:  # many rows at a time, because the loop waits for memory at every step
        WIDE: tl.constexpr = 2048 // A_BLOCK if 2048 // A_BLOCK > LANES else LANES
        b_row_max = tl.full([WIDE, A_BLOCK], float("-inf"), ACC)
        last = tl.max(end, 0)
        for first_row in range(tl.min(begin, 0), last, WIDE):
            i_row = first_row + tl.arange(0, WIDE)
            b_row_max = tl.maximum(b_row_max, load_logits(logits, i_row, last, i_query, A).to(ACC))  # [WIDE, A_BLOCK]
        b_max = tl.max(b_row_max, 0)[None, :]  # [1, A_BLOCK]
    else:
        b_max = tl.full([LANES, A_BLOCK], float("-inf"), ACC)
        for step in tl.range(0, steps, num_stages=STAGES):
            b_max = tl.maximum(b_max, load_logits(logits, begin + step * stride, end, i_query, A).to(ACC))
    b_shift = tl.where(b_max == float("-inf"), 0.0, b_max)
    b_sum = tl.zeros([LANES, A_BLOCK], ACC)
    b_pooled = tl.zeros([LANES, A_BLOCK, COLUMNS], ACC)
    for step in tl.range(0, steps, num_stages=STAGES):
        i_row = begin + step * stride
        b_p = tl.exp2((load_logits(logits, i_row, end, i_query, A).to(ACC) - b_shift) * LOG2E)  # [LANES, A_BLOCK]
        b_sum += b_p
        b_pooled += b_p[:, :, None] * load_x(x, i_row, end, i_column, WIDTH).to(ACC)[:, None, :]
    if ONE:
        b_sum = tl.sum(b_sum, 0)[None, :]
        b_pooled = tl.sum(b_pooled, 0)[None, :, :]
        i_one = tl.zeros([1], tl.int64)
        if count > 1:
            store_pooled(
                part, part_lse, i_item + i_one, i_one == 0, b_pooled, b_sum, b_max, i_query, i_column, WIDTH, A
            )
        else:
            i_out = tl.max(i_set, 0) + i_one
            store_pooled(out, lse, i_out, i_one == 0, b_pooled, b_sum, b_max, i_query, i_column, WIDTH, A)
    else:
        store_pooled(out, lse, i_set, i_set < sets, b_pooled, b_sum, b_max, i_query, i_column, WIDTH, A)


@triton.jit
def combine_kernel(
    part,
    part_lse,
    out,
    lse,
    ptr,
    WIDTH: tl.constexpr,
    A: tl.constexpr,
    COLUMNS: tl.constexpr,
    SPLIT: tl.constexpr,
    ACC: tl.constexpr,
):
    """Combine segments of several pieces: softmax over their lse, mean of their results by it."""
    i_set = tl.program_id(0).to(tl.int64)
    first, count = pieces_of_set(ptr, i_set, SPLIT)
    if count < 2:
        return
    i_column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)  # of A * WIDTH
    m_column = i_column < A * WIDTH
    i_query = i_column // WIDTH
    b_max = tl.full([COLUMNS], float("-inf"), ACC)
    for i_piece in range(first, first + count):
        b_max = tl.maximum(b_max, tl.load(part_lse + i_piece * A + i_query, mask=m_column, other=float("-inf")))
    b_shift = tl.where(b_max == float("-inf"), 0.0, b_max)
    b_sum = tl.zeros([COLUMNS], ACC)
    b_mean = tl.zeros([COLUMNS], ACC)
    for i_piece in range(first, first + count):
        b_lse = tl.load(part_lse + i_piece * A + i_query, mask=m_column, other=float("-inf"))  # [COLUMNS]
        b_p = tl.exp2((b_lse - b_shift) * LOG2E)
        b_sum += b_p
        b_mean += b_p * tl.load(part + i_piece * A * WIDTH + i_column, mask=m_column, other=0)  # [COLUMNS]
    b_mean = b_mean / tl.where(b_sum > 0, b_sum, 1.0)
    tl.store(out + i_set * A * WIDTH + i_column, b_mean.to(out.dtype.element_ty), mask=m_column)
    b_lse = tl.where(b_max == float("-inf"), b_max, b_max + tl.log2(b_sum) * LN2)
    tl.store(lse + i_set * A + i_query, b_lse, mask=m_column & (i_column % WIDTH == 0))


@triton.jit
def softmax_rows(
    logits,
    lse,
    i_set,
    i_row,
    end,
    i_query,
    A: tl.constexpr,
    ACC: tl.constexpr,
):
    """Recompute the weights from lse, 0 outside: [LANES, A_BLOCK]."""
    m_lse = (i_row < end)[:, None] & (i_query < A)[None, :]
    b_lse = tl.load(lse + i_set[:, None] * A + i_query[None, :], mask=m_lse, other=0)  # [LANES, A_BLOCK]
    b_lse = tl.where(b_lse == float("-inf"), 0.0, b_lse)
    return tl.exp2((load_logits(logits, i_row, end, i_query, A).to(ACC) - b_lse) * LOG2E)


@triton.jit(do_not_specialize=["sets", "first_query"])
def backward_kernel(
    grad,
    x,
    logits,
    lse,
    grad_x,
    weights_grad,
    mean,
    ptr,
    sets,
    first_query,
    WIDTH: tl.constexpr,
    A: tl.constexpr,
    COLUMNS: tl.constexpr,
    A_BLOCK: tl.constexpr,
    LANES: tl.constexpr,
    ONE: tl.constexpr,
    SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
    ADD: tl.constexpr,
    ACC: tl.constexpr,
):
    """Compute dx, the weights' gradient <x_i, grad_a>, and its mean over the segment (over a piece, with SPLIT > 0)."""
    i_set, begin, end, stride, steps, i_item = lane_rows(ptr, sets, ONE, LANES, SPLIT)
    i_query = first_query + tl.arange(0, A_BLOCK)
    i_column = tl.arange(0, COLUMNS)
    i_mean = i_set
    m_set = i_set < sets
    if ONE:
        i_owner = tl.max(i_set, 0) + tl.zeros([1], tl.int64)
        m_set = i_owner >= 0
        i_mean = i_owner
        if SPLIT > 0:
            i_mean = i_item + i_owner * 0
            if steps <= 0:
                return
    else:
        i_owner = i_set
    m_grad = m_set[:, None, None] & (i_query < A)[None, :, None] & (i_column < WIDTH)[None, None, :]
    i_grad = (i_owner[:, None] * A + i_query[None, :])[:, :, None] * WIDTH + i_column[None, None, :]
    b_grad = tl.load(grad + i_grad, mask=m_grad, other=0).to(ACC)  # [1 or LANES, A_BLOCK, COLUMNS]
    b_mean = tl.zeros([LANES, A_BLOCK], ACC)
    for step in tl.range(0, steps, num_stages=STAGES):
        i_row = begin + step * stride
        b_p = softmax_rows(logits, lse, i_set, i_row, end, i_query, A, ACC)  # [LANES, A_BLOCK]
        b_p_grad = tl.sum(load_x(x, i_row, end, i_column, WIDTH).to(ACC)[:, None, :] * b_grad, 2)  # [LANES, A_BLOCK]
        b_mean += b_p * b_p_grad
        m_p = (i_row < end)[:, None] & (i_query < A)[None, :]
        tl.store(weights_grad + i_row[:, None] * A + i_query[None, :], b_p_grad, mask=m_p)
        b_grad_x = tl.sum(b_p[:, :, None] * b_grad, 1)  # [LANES, COLUMNS]
        p_grad_x = grad_x + i_row[:, None] * WIDTH + i_column[None, :]
        m_x = (i_row < end)[:, None] & (i_column < WIDTH)[None, :]
        if ADD:
            b_grad_x += tl.load(p_grad_x, mask=m_x, other=0)  # [LANES, COLUMNS]
        tl.store(p_grad_x, b_grad_x.to(grad_x.dtype.element_ty), mask=m_x)
    if ONE:
        b_mean = tl.sum(b_mean, 0)[None, :]
    tl.store(mean + i_mean[:, None] * A + i_query[None, :], b_mean, mask=m_set[:, None] & (i_query < A)[None, :])


@triton.jit(do_not_specialize=["sets"])
def logits_grad_kernel(
    logits,
    lse,
    weights_grad,
    mean,
    grad_logits,
    ptr,
    sets,
    A: tl.constexpr,
    A_BLOCK: tl.constexpr,
    LANES: tl.constexpr,
    ONE: tl.constexpr,
    SPLIT: tl.constexpr,
    ACC: tl.constexpr,
):
    """Compute dlogits from the weights' gradient and its mean over the segment."""
    i_set, begin, end, stride, steps, i_item = lane_rows(ptr, sets, ONE, LANES, SPLIT)
    i_query = tl.program_id(1) * A_BLOCK + tl.arange(0, A_BLOCK)
    for step in range(0, steps):
        i_row = begin + step * stride
        b_p = softmax_rows(logits, lse, i_set, i_row, end, i_query, A, ACC)  # [LANES, A_BLOCK]
        m_p = (i_row < end)[:, None] & (i_query < A)[None, :]
        i_p = i_row[:, None] * A + i_query[None, :]
        b_difference = tl.load(weights_grad + i_p, mask=m_p, other=0)  # [LANES, A_BLOCK]
        b_difference -= tl.load(mean + i_set[:, None] * A + i_query[None, :], mask=m_p, other=0)
        tl.store(grad_logits + i_p, (b_p * b_difference).to(grad_logits.dtype.element_ty), mask=m_p)

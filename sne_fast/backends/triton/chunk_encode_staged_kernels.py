"""Kernels of the staged ``chunk_encode`` that no other op has: block 0's means, and sums of the codes' gradient.

Rows are packed, those of a slab of whole chunks.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .chunk_tiles import LOG2E
from .tiles import add_to


@triton.jit
def scalar_means_kernel(
    values,
    ptr,
    logit,
    means,
    HEADS: tl.constexpr,
    SLOTS: tl.constexpr,
    QUERIES: tl.constexpr,
    ACC: tl.constexpr,
):
    """Compute the attention of block 0 in one chunk: ``means (R, H)``, the mean that each element attends to."""
    i_chunk = tl.program_id(0).to(tl.int64)
    start = tl.load(ptr + i_chunk)
    n = (tl.load(ptr + i_chunk + 1) - start).to(tl.int32)
    i_slot = tl.arange(0, SLOTS)
    m_keys = (i_slot < n)[None, :]
    b_x = tl.load(values + start + i_slot, mask=i_slot < n, other=0).to(ACC)[None, :]  # [1, S]
    for first in range(0, n, QUERIES):
        i_query = first + tl.arange(0, QUERIES)
        b_xq = tl.load(values + start + i_query, mask=i_query < n, other=0).to(ACC)[:, None]  # [Q, 1]
        for i_head in range(HEADS):
            b_slopes = tl.load(logit + i_head).to(ACC) * b_xq + tl.load(logit + HEADS + i_head).to(ACC)
            b_logits = tl.where(m_keys, b_slopes * b_x, float("-inf"))  # [Q, S]
            b_p = tl.exp2((b_logits - tl.max(b_logits, 1)[:, None]) * LOG2E)
            b_mean = tl.sum(b_p * b_x, 1) / tl.sum(b_p, 1)
            tl.store(means + (start + i_query) * HEADS + i_head, b_mean, mask=i_query < n)


@triton.jit(do_not_specialize=["chunks"])
def scalar_means_backward_kernel(
    values,
    ptr,
    logit,
    means,
    means_grad,
    values_grad,
    logit_part,
    chunks,
    HEADS: tl.constexpr,
    SLOTS: tl.constexpr,
    QUERIES: tl.constexpr,
    ACC: tl.constexpr,
):
    """Add to ``values_grad (R,)``, which holds the direct gradient of x_i, and to ``logit_part (programs, 2, H)``."""
    i_program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    i_slot, i_heads = tl.arange(0, SLOTS), tl.arange(0, HEADS)
    b_slope_sum, b_offset_sum = tl.zeros((HEADS,), ACC), tl.zeros((HEADS,), ACC)
    for i_chunk in range(i_program, chunks, programs):
        start = tl.load(ptr + i_chunk)
        n = (tl.load(ptr + i_chunk + 1) - start).to(tl.int32)
        m_slot = i_slot < n
        b_x = tl.load(values + start + i_slot, mask=m_slot, other=0).to(ACC)[None, :]  # [1, S]
        b_key_grad = tl.load(values_grad + start + i_slot, mask=m_slot, other=0)  # [S]
        for first in range(0, n, QUERIES):
            i_query = first + tl.arange(0, QUERIES)
            m_query = i_query < n
            b_xq = tl.load(values + start + i_query, mask=m_query, other=0).to(ACC)  # [Q]
            b_query_grad = tl.zeros((QUERIES,), ACC)
            for i_head in range(HEADS):
                slope, offset = tl.load(logit + i_head).to(ACC), tl.load(logit + HEADS + i_head).to(ACC)
                b_slopes = (slope * b_xq + offset)[:, None]
                b_logits = tl.where(m_slot[None, :], b_slopes * b_x, float("-inf"))  # [Q, S]
                b_p = tl.exp2((b_logits - tl.max(b_logits, 1)[:, None]) * LOG2E)
                b_p = b_p / tl.sum(b_p, 1)[:, None]
                i_mean = (start + i_query) * HEADS + i_head
                b_m = tl.load(means + i_mean, mask=m_query, other=0)  # [Q]
                b_m_grad = tl.load(means_grad + i_mean, mask=m_query, other=0)  # [Q]
                b_weighted = b_p * b_m_grad[:, None]
                b_logits_grad = b_weighted * (b_x - b_m[:, None])
                b_key_grad += tl.where(m_slot, tl.sum(b_weighted + b_logits_grad * b_slopes, 0), 0.0)
                b_slopes_grad = tl.sum(b_logits_grad * b_x, 1)  # [Q]
                b_query_grad += b_slopes_grad * slope
                b_slope_sum += tl.where(i_heads == i_head, tl.sum(b_slopes_grad * b_xq, 0), 0.0)
                b_offset_sum += tl.where(i_heads == i_head, tl.sum(b_slopes_grad, 0), 0.0)
            # Each query's gradient goes to its own slot: [S, Q] -> [S].
            b_key_grad += tl.sum(tl.where(i_slot[:, None] == i_query[None, :], b_query_grad[None, :], 0.0), 1)
        tl.store(values_grad + start + i_slot, b_key_grad, mask=m_slot)
    add_to(logit_part + i_program * 2 * HEADS, b_slope_sum, HEADS)
    add_to(logit_part + i_program * 2 * HEADS + HEADS, b_offset_sum, HEADS)


@triton.jit(do_not_specialize=["chunks", "codes"])
def element_sum_kernel(
    grad,
    ptr,
    element_part,
    chunks,
    codes,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
    ACC: tl.constexpr,
):
    """Sum the rows of one element index over a part of the chunks, in tiles: adds to ``element_part (parts, c, h)``."""
    i_element, i_part = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i_column = tl.arange(0, WIDTH)
    b_sum = tl.zeros((WIDTH,), ACC)
    for first in range(i_part * TILE, chunks, tl.num_programs(1) * TILE):
        i_chunk = first + tl.arange(0, TILE)
        b_start = tl.load(ptr + i_chunk, mask=i_chunk < chunks, other=0)  # [TILE]
        m_element = b_start + i_element < tl.load(ptr + i_chunk + 1, mask=i_chunk < chunks, other=0)
        i_value = (b_start + i_element)[:, None] * WIDTH + i_column[None, :]
        b_sum += tl.sum(tl.load(grad + i_value, mask=m_element[:, None], other=0), 0)  # [TILE, h] -> [h]
    p_element_part = element_part + (i_part * codes + i_element) * WIDTH + i_column
    tl.store(p_element_part, tl.load(p_element_part) + b_sum)

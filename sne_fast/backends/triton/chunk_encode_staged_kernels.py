"""Row kernels of the staged ``chunk_encode``: block 0's means, the norms around fc_o, and sums of the codes' gradient.

Rows are packed, those of a slab of whole chunks. The kernels with parameters add up their gradients over the rows of
one program, ``(programs, h)``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import add_to, normed, normed_backward, vector

_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def scalar_means_kernel(
    values, ptr, logit, means,
    HEADS: tl.constexpr, SLOTS: tl.constexpr, QUERIES: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Block 0 of one chunk: ``means (R, H)``, what each element attends to (SPEC 4.1)."""
    own = tl.program_id(0).to(tl.int64)
    start = tl.load(ptr + own)
    n = (tl.load(ptr + own + 1) - start).to(tl.int32)
    slot = tl.arange(0, SLOTS)
    keys = (slot < n)[None, :]
    x = tl.load(values + start + slot, mask=slot < n, other=0).to(ACC)[None, :]  # [1, S]
    for first in range(0, n, QUERIES):
        query = first + tl.arange(0, QUERIES)
        xq = tl.load(values + start + query, mask=query < n, other=0).to(ACC)[:, None]  # [Q, 1]
        for head in range(HEADS):
            slopes = tl.load(logit + head).to(ACC) * xq + tl.load(logit + HEADS + head).to(ACC)
            logits = tl.where(keys, slopes * x, float("-inf"))  # [Q, S]
            p = tl.exp2((logits - tl.max(logits, 1)[:, None]) * _LOG2E)
            mean = tl.sum(p * x, 1) / tl.sum(p, 1)
            tl.store(means + (start + query) * HEADS + head, mean, mask=query < n)


@triton.jit(do_not_specialize=["chunks"])
def scalar_means_backward_kernel(
    values, ptr, logit, means, means_grad, values_grad, logit_part, chunks,
    HEADS: tl.constexpr, SLOTS: tl.constexpr, QUERIES: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Adds to ``values_grad (R,)``, which holds what reached x_i directly, and to the slopes' ``(programs, 2, H)``."""
    program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    slot, head_index = tl.arange(0, SLOTS), tl.arange(0, HEADS)
    slope_sum, offset_sum = tl.zeros((HEADS,), ACC), tl.zeros((HEADS,), ACC)
    for own in range(program, chunks, programs):
        start = tl.load(ptr + own)
        n = (tl.load(ptr + own + 1) - start).to(tl.int32)
        inside = slot < n
        x = tl.load(values + start + slot, mask=inside, other=0).to(ACC)[None, :]  # [1, S]
        key_grad = tl.load(values_grad + start + slot, mask=inside, other=0)
        for first in range(0, n, QUERIES):
            query = first + tl.arange(0, QUERIES)
            there = query < n
            xq = tl.load(values + start + query, mask=there, other=0).to(ACC)  # [Q]
            query_grad = tl.zeros((QUERIES,), ACC)
            for head in range(HEADS):
                slope, offset = tl.load(logit + head).to(ACC), tl.load(logit + HEADS + head).to(ACC)
                slopes = (slope * xq + offset)[:, None]
                logits = tl.where(inside[None, :], slopes * x, float("-inf"))  # [Q, S]
                p = tl.exp2((logits - tl.max(logits, 1)[:, None]) * _LOG2E)
                p = p / tl.sum(p, 1)[:, None]
                at = (start + query) * HEADS + head
                m, m_grad = tl.load(means + at, mask=there, other=0), tl.load(means_grad + at, mask=there, other=0)
                weighted = p * m_grad[:, None]
                s_grad = weighted * (x - m[:, None])
                key_grad += tl.where(inside, tl.sum(weighted + s_grad * slopes, 0), 0.0)
                slopes_grad = tl.sum(s_grad * x, 1)  # [Q]
                query_grad += slopes_grad * slope
                slope_sum += tl.where(head_index == head, tl.sum(slopes_grad * xq, 0), 0.0)
                offset_sum += tl.where(head_index == head, tl.sum(slopes_grad, 0), 0.0)
            # [S, Q]: each query's own gradient to its slot.
            key_grad += tl.sum(tl.where(slot[:, None] == query[None, :], query_grad[None, :], 0.0), 1)
        tl.store(values_grad + start + slot, key_grad, mask=inside)
    add_to(logit_part + program * 2 * HEADS, slope_sum, HEADS)
    add_to(logit_part + program * 2 * HEADS + HEADS, offset_sum, HEADS)


@triton.jit
def _tile_at(tile, rows, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Addresses [M, h] of a tile of packed rows, and which exist."""
    row = tile * ROWS + tl.arange(0, ROWS)
    return row[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :], (row < rows)[:, None]


@triton.jit(do_not_specialize=["rows"])
def add_normed_kernel(
    a, b, gain, bias, out, rows,
    RELU: tl.constexpr, LAYER_NORM: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """out = ln(a + b), or with RELU ln(a + relu(b)); without layer norm the sum itself: all ``(R, h)``."""
    at, there = _tile_at(tl.program_id(0).to(tl.int64), rows, ROWS, WIDTH)
    o = tl.load(a + at, mask=there, other=0).to(ACC)
    z = tl.load(b + at, mask=there, other=0).to(ACC)
    if RELU:
        z = tl.where(z <= 0, 0.0, z)
    o += z
    if LAYER_NORM:
        o, rstd = normed(o, WIDTH)
        o = o * vector(gain, WIDTH, ACC)[None, :] + vector(bias, WIDTH, ACC)[None, :]
    tl.store(out + at, o.to(out.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["rows", "tiles"])
def add_normed_backward_kernel(
    a, b, gain, grad, relu_grad, gain_part, bias_part, relu_part, rows, tiles,
    RELU: tl.constexpr, LAYER_NORM: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """``grad (R, h)`` of the result -> of the sum, in place; with RELU also b's (``relu_grad``, operand type) and its
    sum over the rows."""
    program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    gain_sum, bias_sum, relu_sum = tl.zeros((WIDTH,), ACC), tl.zeros((WIDTH,), ACC), tl.zeros((WIDTH,), ACC)
    for tile in range(program, tiles, programs):
        at, there = _tile_at(tile, rows, ROWS, WIDTH)
        z = tl.load(b + at, mask=there, other=0).to(ACC)
        g = tl.load(grad + at, mask=there, other=0)
        if LAYER_NORM:
            o = tl.load(a + at, mask=there, other=0).to(ACC)
            if RELU:
                unit, rstd = normed(o + tl.where(z <= 0, 0.0, z), WIDTH)
            else:
                unit, rstd = normed(o + z, WIDTH)
            gain_sum += tl.sum(g * unit, 0)
            bias_sum += tl.sum(g, 0)
            g = normed_backward(g * vector(gain, WIDTH, ACC)[None, :], unit, rstd, WIDTH)
        if RELU:
            z_grad = tl.where(z <= 0, 0.0, g)
            relu_sum += tl.sum(z_grad, 0)
            tl.store(relu_grad + at, z_grad.to(relu_grad.dtype.element_ty), mask=there)
        tl.store(grad + at, g, mask=there)
    if LAYER_NORM:
        add_to(gain_part + program * 4 * WIDTH, gain_sum, WIDTH)
        add_to(bias_part + program * 4 * WIDTH, bias_sum, WIDTH)
    if RELU:
        add_to(relu_part + program * WIDTH, relu_sum, WIDTH)


@triton.jit(do_not_specialize=["chunks", "codes"])
def element_sum_kernel(
    grad, ptr, element_part, chunks, codes,
    TILE: tl.constexpr, WIDTH: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Sum of the rows of one element index over every few tiles of chunks: adds to ``element_part (parts, c, h)``."""
    element, part = tl.program_id(0), tl.program_id(1).to(tl.int64)
    column = tl.arange(0, WIDTH)
    total = tl.zeros((WIDTH,), ACC)
    for first in range(part * TILE, chunks, tl.num_programs(1) * TILE):
        own = first + tl.arange(0, TILE)
        start = tl.load(ptr + own, mask=own < chunks, other=0)
        there = start + element < tl.load(ptr + own + 1, mask=own < chunks, other=0)
        at = (start + element)[:, None] * WIDTH + column[None, :]
        total += tl.sum(tl.load(grad + at, mask=there[:, None], other=0), 0)
    to = element_part + (part * codes + element) * WIDTH + column
    tl.store(to, tl.load(to) + total)

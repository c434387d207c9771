"""Functions of the chunk kernels: which chunk stands in which slot, and the parts of a set-attention block.

A tile is NB bins of S slots, one row each. A bin holds chunks of one length n: one of them if n > 16 (MULTI_CHUNK off:
the number of the bin is its place in the order of lengths), else ``S // n`` (MULTI_CHUNK on). ``table`` (int64) says
where each length begins in that order (entries 0 to 257) and, from ``SHARED_STARTS`` on, at which bin each length up to
16 begins. Slots without an element are parked: they hold finite rows, attend to finite rows, and get no gradient. A NaN
of one chunk must not reach another: masks select, and no product meets another chunk's NaN.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..gpu_plans.chunks import LONGEST_SHARED, SHARED_STARTS
from .tiles import add_relu, layer_norm, linear, vector

_LONGEST_SHARED = tl.constexpr(LONGEST_SHARED)
_SHARED_STARTS = tl.constexpr(SHARED_STARTS)
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def bin_lengths(
    chunk_ptr,
    order,
    table,
    i_bin,
    MIN_LENGTH: tl.constexpr,
    SLOTS: tl.constexpr,
    MULTI_CHUNK: tl.constexpr,
):
    """Return length, first place and end of places (in the order of lengths) of the chunks in each bin: [B] int64."""
    if MULTI_CHUNK:
        b_starts = tl.load(table + _SHARED_STARTS + tl.arange(0, _LONGEST_SHARED))  # [16]
        # Lengths without bins start where the next length does.
        n = tl.sum((b_starts[None, :] <= i_bin[:, None]).to(tl.int64), 1)
        begin = tl.load(table + n) + (i_bin - tl.load(table + _SHARED_STARTS + n - 1)) * (SLOTS // n)
        end = tl.minimum(begin + SLOTS // n, tl.load(table + n + 1))
    else:
        begin = tl.load(table + MIN_LENGTH) + i_bin
        end = tl.minimum(begin + 1, tl.load(table + SLOTS + 1))
        i_chunk = tl.load(order + begin, mask=begin < end, other=0)  # [B]
        n = tl.load(chunk_ptr + i_chunk + 1) - tl.load(chunk_ptr + i_chunk)
    return n, begin, end


@triton.jit
def places(
    chunk_ptr,
    order,
    table,
    i_bin,
    MIN_LENGTH: tl.constexpr,
    SLOTS: tl.constexpr,
    MULTI_CHUNK: tl.constexpr,
):
    """Return chunk, element, number of the chunk within the bin, and whether there is an element: all [B, S]."""
    n, begin, end = bin_lengths(chunk_ptr, order, table, i_bin, MIN_LENGTH, SLOTS, MULTI_CHUNK)
    n = n.to(tl.int32)[:, None]
    i_slot = tl.arange(0, SLOTS)[None, :] + tl.zeros_like(n)
    if MULTI_CHUNK:
        i_group = i_slot // n
        i_element = i_slot - i_group * n
        m_element = begin[:, None] + i_group < end[:, None]
    else:
        i_group = tl.zeros_like(i_slot)
        i_element = i_slot
        m_element = (i_slot < n) & (begin < end)[:, None]
    i_chunk = tl.load(order + begin[:, None] + i_group, mask=m_element, other=0)  # [B, S]
    return i_chunk, i_element, i_group, m_element


@triton.jit
def attends(
    chunk_ptr,
    order,
    table,
    i_bin,
    MIN_LENGTH: tl.constexpr,
    SLOTS: tl.constexpr,
    MULTI_CHUNK: tl.constexpr,
):
    """Return whether slot i may attend to slot j, [B, S, S] (MULTI_CHUNK) or [B, 1, S]. Every row has a key."""
    n, _, _ = bin_lengths(chunk_ptr, order, table, i_bin, MIN_LENGTH, SLOTS, MULTI_CHUNK)
    n = n.to(tl.int32)[:, None]
    i_slot = tl.arange(0, SLOTS)[None, :] + tl.zeros_like(n)
    if MULTI_CHUNK:
        i_group = i_slot // n
        return i_group[:, :, None] == i_group[:, None, :]
    else:
        return (i_slot < n)[:, None, :]


@triton.jit
def feed_forward(
    b_o,
    w_o,
    b_o_bias,
    norm,
    LAYER_NORM: tl.constexpr,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    """Return ln1(o' + relu(fc_o(o'))) with o' = ln0(o): [M, h]."""
    b_o = layer_norm(b_o, norm, LAYER_NORM, WIDTH, ACC)
    b_z = linear(b_o.to(w_o.dtype.element_ty), w_o, b_o_bias, WIDTH, PRECISION, ACC)
    return layer_norm(add_relu(b_o, b_z), norm + 2 * WIDTH, LAYER_NORM, WIDTH, ACC)


@triton.jit
def scalar_weights(
    b_x,
    m_keys,
    slope,
    offset,
):
    """Return one head of block 0: softmax_j((slope x_i + offset) x_j) [B, S, S], its slopes and means [B, S]."""
    b_slopes = slope * b_x + offset
    b_logits = tl.where(m_keys, b_slopes[:, :, None] * b_x[:, None, :], float("-inf"))  # [B, S, S]
    b_p = tl.exp2((b_logits - tl.max(b_logits, 2)[:, :, None]) * LOG2E)
    b_p = b_p / tl.sum(b_p, 2)[:, :, None]
    b_mean = tl.sum(tl.where(m_keys, b_p * b_x[:, None, :], 0.0), 2)
    return b_p, b_slopes, b_mean


@triton.jit
def scalar_attention(
    b_x,
    m_keys,
    logit,
    basis,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    ACC: tl.constexpr,
):
    """Return block 0 up to its residual, x [B, S] -> o [M, h], and the attended mean of each column's head [M, h]."""
    i_head_of = tl.arange(0, WIDTH) // (WIDTH // HEADS)
    b_mean = tl.zeros((ROWS, WIDTH), ACC)
    for i_head in range(HEADS):
        slope, offset = tl.load(logit + i_head).to(ACC), tl.load(logit + HEADS + i_head).to(ACC)
        _, _, b_m = scalar_weights(b_x, m_keys, slope, offset)
        b_mean = tl.where((i_head_of == i_head)[None, :], tl.reshape(b_m, (ROWS,))[:, None], b_mean)
    b_by_x, b_by_mean = vector(basis, WIDTH, ACC), vector(basis + WIDTH, WIDTH, ACC)
    b_constant = vector(basis + 2 * WIDTH, WIDTH, ACC)
    b_o = tl.reshape(b_x, (ROWS,))[:, None] * b_by_x[None, :] + b_mean * b_by_mean[None, :] + b_constant[None, :]
    return b_o, b_mean


@triton.jit
def to_heads(
    b_t,
    BINS: tl.constexpr,
    SLOTS: tl.constexpr,
    HEADS: tl.constexpr,
):
    """Rearrange [M, h] -> [NB * H, S, d]."""
    DIM: tl.constexpr = b_t.shape[1] // HEADS
    b_t = tl.permute(tl.reshape(b_t, (BINS, SLOTS, HEADS, DIM)), (0, 2, 1, 3))
    return tl.reshape(b_t, (BINS * HEADS, SLOTS, DIM))


@triton.jit
def from_heads(
    b_t,
    BINS: tl.constexpr,
    SLOTS: tl.constexpr,
    HEADS: tl.constexpr,
):
    """Rearrange [NB * H, S, d] -> [M, h]."""
    DIM: tl.constexpr = b_t.shape[2]
    b_t = tl.permute(tl.reshape(b_t, (BINS, HEADS, SLOTS, DIM)), (0, 2, 1, 3))
    return tl.reshape(b_t, (BINS * SLOTS, HEADS * DIM))


@triton.jit
def widened(
    b_t,
):
    """Put zeros behind every column, [B, S, d] -> [B, S, 2d]: matrix units need 16 columns of half types."""
    return tl.reshape(tl.join(b_t, tl.zeros_like(b_t)), (b_t.shape[0], b_t.shape[1], 2 * b_t.shape[2]))


@triton.jit
def row_products(
    b_a,
    b_b,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    """Return a b^T of each batch entry: [B, S, d] x [B, S, d] -> [B, S, S]."""
    if b_a.shape[2] < 16 and b_a.dtype.primitive_bitwidth == 16:
        b_a, b_b = widened(b_a), widened(b_b)
    return tl.dot(b_a, tl.permute(b_b, (0, 2, 1)), input_precision=PRECISION, out_dtype=ACC)


@triton.jit
def finite_rows(
    b_t,
    ACC: tl.constexpr,
):
    """Return 0 for a row of finite numbers, else NaN: [B, S]."""
    return tl.sum(b_t.to(ACC) * 0.0, 2)


@triton.jit
def kept(
    b_t,
    b_flag,
):
    """Return t [B, S, d] with zeros in the rows that ``b_flag`` [B, S] marks by NaN."""
    return tl.where((b_flag == 0)[:, :, None], b_t, 0.0).to(b_t.dtype)


@triton.jit
def attention_weights(
    b_q,
    b_k,
    b_v,
    m_keys,
    WIDTH: tl.constexpr,
    MULTI_CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    """Return softmax(q k^T / sqrt(h)) [B, S, S] per batch entry, and q, k, v, made finite with MULTI_CHUNK."""
    if MULTI_CHUNK:
        # p v and its relatives in the backward add zero times another chunk's row, so that row must be finite.
        b_flag = finite_rows(b_q, ACC) + finite_rows(b_k, ACC) + finite_rows(b_v, ACC)
        b_q, b_k, b_v = kept(b_q, b_flag), kept(b_k, b_flag), kept(b_v, b_flag)
    b_logits = row_products(b_q, b_k, PRECISION, ACC)  # [B, S, S]
    if MULTI_CHUNK:
        b_logits += b_flag[:, None, :] + b_flag[:, :, None]
    b_logits = tl.where(m_keys, b_logits, float("-inf"))
    b_p = tl.exp2((b_logits - tl.max(b_logits, 2)[:, :, None]) * (LOG2E / WIDTH**0.5))
    return b_p / tl.sum(b_p, 2)[:, :, None], b_q, b_k, b_v

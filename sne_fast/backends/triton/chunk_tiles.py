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
from .tiles import add_relu, layer_norm, linear

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
    MAX_LENGTH: tl.constexpr,
    SLOTS: tl.constexpr,
    MULTI_CHUNK: tl.constexpr,
):
    """Return length, first place and end of places (in the order of lengths) of the chunks in each bin: [B]."""
    if MULTI_CHUNK:
        b_starts = tl.load(table + _SHARED_STARTS + tl.arange(0, _LONGEST_SHARED))  # [16]
        # Lengths without bins start where the next length does.
        n = tl.sum((b_starts[None, :] <= i_bin[:, None]).to(tl.int64), 1)
        begin = tl.load(table + n) + (i_bin - tl.load(table + _SHARED_STARTS + n - 1)) * (SLOTS // n)
        end = tl.minimum(begin + SLOTS // n, tl.load(table + n + 1))
    else:
        begin = tl.load(table + MIN_LENGTH) + i_bin
        end = tl.minimum(begin + 1, tl.load(table + MAX_LENGTH + 1))
        if MIN_LENGTH == SLOTS:
            n = tl.full(begin.shape, SLOTS, tl.int64)
        else:
            i_chunk = tl.load(order + begin, mask=begin < end, other=0)  # [B]
            n = tl.load(chunk_ptr + i_chunk + 1) - tl.load(chunk_ptr + i_chunk)
    return n.to(tl.int32), begin, end


@triton.jit
def places(
    order,
    n,
    begin,
    end,
    i_slot,
    MIN_LENGTH: tl.constexpr,
    SLOTS: tl.constexpr,
    MULTI_CHUNK: tl.constexpr,
):
    """Return chunk, element, number of the chunk within the bin, and whether there is an element, of slots of bins.

    All in the shape of ``n + i_slot``. Bins of full chunks (MIN_LENGTH is SLOTS) behind the last one repeat it: there
    is an element in each of their slots, and what they give is not stored.
    """
    i_slot = i_slot + tl.zeros_like(n)
    if MULTI_CHUNK:
        i_group = i_slot // n
        i_element = i_slot - i_group * n
        m_element = begin + i_group < end
        i_chunk = tl.load(order + begin + i_group, mask=m_element, other=0)
    else:
        i_group = tl.zeros_like(i_slot)
        i_element = i_slot
        if MIN_LENGTH == SLOTS:
            m_element = i_slot >= 0
            i_chunk = tl.load(order + tl.minimum(begin, end - 1) + i_group)
        else:
            m_element = (i_slot < n) & (begin < end)
            i_chunk = tl.load(order + begin + i_group, mask=m_element, other=0)
    return i_chunk, i_element, i_group, m_element


@triton.jit
def row_slots(
    BINS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Return bin and slot of each row of a tile, [M].

    The first 16 slots of every bin come first, then the next 16: so the fragments that a warp has of a product of
    4 x 32 rows are those of one bin, and nothing is exchanged between the projections and the attention of a bin.
    """
    i_row = tl.arange(0, BINS * SLOTS)
    return i_row // 16 % BINS, i_row // (16 * BINS) * 16 + i_row % 16


@triton.jit
def by_bin(
    b_t,
    BINS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Rearrange the rows of a tile, [M, h] -> [NB, S, h]."""
    b_t = tl.permute(tl.reshape(b_t, (SLOTS // 16, BINS, 16, b_t.shape[1])), (1, 0, 2, 3))
    return tl.reshape(b_t, (BINS, SLOTS, b_t.shape[3]))


@triton.jit
def attends(
    chunk_ptr,
    order,
    table,
    i_bin,
    MIN_LENGTH: tl.constexpr,
    MAX_LENGTH: tl.constexpr,
    SLOTS: tl.constexpr,
    MULTI_CHUNK: tl.constexpr,
):
    """Return whether slot i may attend to slot j, [B, S, S] (MULTI_CHUNK) or [B, 1, S]. Every row has a key."""
    n, _, _ = bin_lengths(chunk_ptr, order, table, i_bin, MIN_LENGTH, MAX_LENGTH, SLOTS, MULTI_CHUNK)
    n = n[:, None]
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
def to_heads(
    b_t,
    BINS: tl.constexpr,
    SLOTS: tl.constexpr,
    HEADS: tl.constexpr,
):
    """Rearrange [M, h] -> [H * NB, S, d]."""
    DIM: tl.constexpr = b_t.shape[1] // HEADS
    b_t = tl.permute(tl.reshape(b_t, (SLOTS // 16, BINS, 16, HEADS, DIM)), (3, 1, 0, 2, 4))
    return tl.reshape(b_t, (HEADS * BINS, SLOTS, DIM))


@triton.jit
def from_heads(
    b_t,
    BINS: tl.constexpr,
    SLOTS: tl.constexpr,
    HEADS: tl.constexpr,
):
    """Rearrange [H * NB, S, d] -> [M, h]."""
    DIM: tl.constexpr = b_t.shape[2]
    b_t = tl.permute(tl.reshape(b_t, (HEADS, BINS, SLOTS // 16, 16, DIM)), (2, 1, 3, 0, 4))
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
def attention_exponentials(
    b_q,
    b_k,
    b_v,
    m_keys,
    WIDTH: tl.constexpr,
    UNMASKED: tl.constexpr,
    MULTI_CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    """Return exponentials [B, S, S] whose rows, over their sums, are softmax(q k^T / sqrt(h)), and 1 / sum [B, S].

    And q, k, v, made finite with MULTI_CHUNK.
    """
    SCALE: tl.constexpr = LOG2E / WIDTH**0.5
    if MULTI_CHUNK:
        # p v and its relatives in the backward add zero times another chunk's row, so that row must be finite.
        b_flag = finite_rows(b_q, ACC) + finite_rows(b_k, ACC) + finite_rows(b_v, ACC)
        b_q, b_k, b_v = kept(b_q, b_flag), kept(b_k, b_flag), kept(b_v, b_flag)
    b_logits = row_products(b_q, b_k, PRECISION, ACC)  # [B, S, S]
    if MULTI_CHUNK:
        b_logits += b_flag[:, None, :] + b_flag[:, :, None]
    if not UNMASKED:
        b_logits = tl.where(m_keys, b_logits, float("-inf"))
    b_top = tl.max(b_logits, 2)
    if b_q.dtype.primitive_bitwidth == 16:  # one multiply-add; it loses what the products of such operands lose
        b_e = tl.exp2(b_logits * SCALE - (b_top * SCALE)[:, :, None])
    else:
        b_e = tl.exp2((b_logits - b_top[:, :, None]) * SCALE)
    return b_e, 1 / tl.sum(b_e, 2), b_q, b_k, b_v

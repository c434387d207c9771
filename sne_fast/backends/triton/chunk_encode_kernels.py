"""Fused forward kernel of ``chunk_encode``: four blocks and the pooling of a tile of chunks, kept on chip."""

from __future__ import annotations

import triton
import triton.language as tl

from .chunk_tiles import (
    LOG2E,
    attends,
    attention_exponentials,
    bin_lengths,
    by_bin,
    feed_forward,
    from_heads,
    places,
    row_slots,
    to_heads,
)
from .scalar_tiles import load_basis, scalar_factors, scalar_rows, tile_values
from .tiles import linear, save_rows, unbiased


@triton.jit
def pool_weights(
    b_x,
    b_query,
    m_element,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    """Return the softmax over the slots ``m_element`` [NB, S] of <pool_query_a, x>.

    x [NB, S, h], query [NB, P, h] -> [NB, S, P].
    """
    b_logits = tl.dot(b_x, tl.permute(b_query, (0, 2, 1)), input_precision=PRECISION, out_dtype=ACC)
    b_logits = tl.where(m_element[:, :, None], b_logits, float("-inf"))  # [NB, S, P]
    b_max = tl.max(b_logits, 1)
    b_max = tl.where(b_max == float("-inf"), 0.0, b_max)  # where there is no chunk: weights 0, not NaN
    b_p = tl.exp2((b_logits - b_max[:, None, :]) * LOG2E)
    b_sum = tl.sum(b_p, 1)
    return b_p * (1 / tl.where(b_sum == 0.0, 1.0, b_sum))[:, None, :]


@triton.jit
def load_queries(
    pool_query,
    BINS: tl.constexpr,
    HEADS: tl.constexpr,
    PADDED: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Load pool_query for each bin, with rows of zeros behind: [NB, P, h]."""
    i_head, i_column = tl.arange(0, PADDED), tl.arange(0, WIDTH)
    m_head = (i_head < HEADS)[:, None]
    b_query = tl.load(pool_query + i_head[:, None] * WIDTH + i_column[None, :], mask=m_head, other=0)  # [P, h]
    return tl.broadcast_to(b_query[None, :, :], (BINS, PADDED, WIDTH))


@triton.jit(do_not_specialize=["first_bin", "slab_rows"])
def chunk_encode_kernel(
    values,
    chunk_ptr,
    order,
    owner,
    table,
    row_code,
    element_code,
    logit,
    basis,
    w_qkv,
    b_qkv,
    w_o,
    b_o,
    norm,
    pool_query,
    out,
    saved,
    first_bin,
    slab_rows,
    WIDTH: tl.constexpr,
    HEADS: tl.constexpr,
    PADDED_HEADS: tl.constexpr,
    LAYER_NORM: tl.constexpr,
    SLOTS: tl.constexpr,
    MIN_LENGTH: tl.constexpr,
    MAX_LENGTH: tl.constexpr,
    MULTI_CHUNK: tl.constexpr,
    BINS: tl.constexpr,
    SAVE: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    """Encode a tile of chunks from bin ``first_bin`` on.

    Writes pooled rows into ``out (N, H, h)`` or, with SAVE, the inputs of blocks 1 to 3 and of the pool into
    ``saved (4, slab_rows, h)``.
    """
    ROWS: tl.constexpr = BINS * SLOTS
    UNMASKED: tl.constexpr = MIN_LENGTH == SLOTS
    operand = values.dtype.element_ty
    i_tile = tl.program_id(0).to(tl.int64)
    i_first = first_bin + i_tile * BINS
    b_x, b_keys, m_keys, i_value, i_chunk, i_element, m_element, m_first = tile_values(
        values, chunk_ptr, order, table, i_first, MIN_LENGTH, MAX_LENGTH, SLOTS, MULTI_CHUNK, BINS, ACC
    )
    b_factors = scalar_factors(b_x, b_keys, m_keys, logit, HEADS, UNMASKED, ACC)
    b_res = scalar_rows(b_factors, load_basis(basis, HEADS, WIDTH, b_factors.shape[1]), ACC)
    b_x = feed_forward(b_res, w_o, b_o, norm, LAYER_NORM, WIDTH, PRECISION, ACC).to(operand)  # [M, h]

    i_row_bin, i_slot = row_slots(BINS, SLOTS)
    i_saved = i_tile * ROWS + i_row_bin * SLOTS + i_slot
    i_column = tl.arange(0, WIDTH)
    i_heads_bin = i_first + tl.arange(0, BINS * HEADS) % BINS
    m_keys = attends(chunk_ptr, order, table, i_heads_bin, MIN_LENGTH, MAX_LENGTH, SLOTS, MULTI_CHUNK)
    for full in range(3):
        if full == 1:
            p_row_code = row_code + tl.load(owner + i_chunk)[:, None] * WIDTH + i_column[None, :]
            p_element_code = element_code + i_element[:, None] * WIDTH + i_column[None, :]
            if UNMASKED:
                b_code = tl.load(p_row_code).to(ACC) + tl.load(p_element_code).to(ACC)  # [M, h]
            else:
                b_code = tl.load(p_row_code, mask=m_element[:, None], other=0).to(ACC)  # [M, h]
                b_code += tl.load(p_element_code, mask=m_element[:, None], other=0).to(ACC)  # [M, h]
            b_x = (b_x.to(ACC) + b_code).to(operand)
        if SAVE:
            save_rows(saved + full * slab_rows * WIDTH, i_saved, b_x, WIDTH)
        w, b = w_qkv + full * 3 * WIDTH * WIDTH, b_qkv + full * 3 * WIDTH
        b_q = linear(b_x, w, b, WIDTH, PRECISION, ACC)  # [M, h]
        b_k = unbiased(b_x, w + WIDTH * WIDTH, WIDTH, PRECISION, ACC).to(operand)
        b_v = linear(b_x, w + 2 * WIDTH * WIDTH, b + 2 * WIDTH, WIDTH, PRECISION, ACC).to(operand)
        b_k, b_v = to_heads(b_k, BINS, SLOTS, HEADS), to_heads(b_v, BINS, SLOTS, HEADS)  # [H * NB, S, d]
        b_e, b_inverse, b_q_heads, b_k, b_v = attention_exponentials(
            to_heads(b_q.to(operand), BINS, SLOTS, HEADS),
            b_k,
            b_v,
            m_keys,
            WIDTH,
            UNMASKED,
            MULTI_CHUNK,
            PRECISION,
            ACC,
        )
        b_attended = tl.dot(b_e.to(operand), b_v, input_precision=PRECISION, out_dtype=ACC)  # [H * NB, S, d]
        b_res = b_q + from_heads(b_attended * b_inverse[:, :, None], BINS, SLOTS, HEADS)
        w, b, n = w_o + (full + 1) * WIDTH * WIDTH, b_o + (full + 1) * WIDTH, norm + (full + 1) * 4 * WIDTH
        b_x = feed_forward(b_res, w, b, n, LAYER_NORM, WIDTH, PRECISION, ACC).to(operand)  # [M, h]

    if SAVE:
        save_rows(saved + 3 * slab_rows * WIDTH, i_saved, b_x, WIDTH)
    else:
        b_x = by_bin(b_x, BINS, SLOTS)
        b_query = load_queries(pool_query, BINS, HEADS, PADDED_HEADS, WIDTH)
        i_bin = i_first + tl.arange(0, BINS)
        n, begin, end = bin_lengths(chunk_ptr, order, table, i_bin, MIN_LENGTH, MAX_LENGTH, SLOTS, MULTI_CHUNK)
        i_place, i_place_element, i_group, m_place = places(
            order,
            n[:, None],
            begin[:, None],
            end[:, None],
            tl.arange(0, SLOTS)[None, :],
            MIN_LENGTH,
            SLOTS,
            MULTI_CHUNK,
        )
        i_head = tl.arange(0, PADDED_HEADS)
        last = tl.max(end - begin, 0).to(tl.int32) if MULTI_CHUNK else 1
        for place in range(0, last):
            m_own = m_place & (i_group == place)
            if MULTI_CHUNK:
                b_rows = tl.where(m_own[:, :, None], b_x, 0.0).to(operand)
            else:
                b_rows = b_x
            b_p = pool_weights(b_rows, b_query, m_own, PRECISION, ACC).to(operand)  # [NB, S, P]
            b_pooled = tl.dot(tl.permute(b_p, (0, 2, 1)), b_rows, input_precision=PRECISION, out_dtype=ACC)
            m_chunk = begin + place < end
            i_target = tl.load(order + begin + place, mask=m_chunk, other=0)  # [NB]
            i_pooled = (i_target[:, None] * HEADS + i_head[None, :])[:, :, None] * WIDTH + i_column[None, None, :]
            m_pooled = (m_chunk[:, None] & (i_head < HEADS)[None, :])[:, :, None]
            tl.store(out + i_pooled, b_pooled.to(operand), mask=m_pooled)  # [NB, P, h]

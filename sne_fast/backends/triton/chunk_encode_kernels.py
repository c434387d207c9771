"""The fused forward kernel of ``chunk_encode``: four blocks and the pooling of a tile of chunks, kept on chip."""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import (
    attends,
    attention_weights,
    block_lengths,
    feed_forward,
    from_heads,
    linear,
    places,
    save_rows,
    scalar_attention,
    to_heads,
)

_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def pool_weights(x, query, there, PRECISION: tl.constexpr, ACC: tl.constexpr):
    """softmax over the slots ``there`` [NB, S] of <pool_query_a, x>: x [NB, S, h], query [NB, P, h] -> [NB, S, P]."""
    logits = tl.dot(x, tl.permute(query, (0, 2, 1)), input_precision=PRECISION, out_dtype=ACC)
    logits = tl.where(there[:, :, None], logits, float("-inf"))
    top = tl.max(logits, 1)
    top = tl.where(top == float("-inf"), 0.0, top)  # no such chunk: weights 0, not NaN
    p = tl.exp2((logits - top[:, None, :]) * _LOG2E)
    total = tl.sum(p, 1)
    return p / tl.where(total == 0.0, 1.0, total)[:, None, :]


@triton.jit
def load_queries(pool_query, BLOCKS: tl.constexpr, HEADS: tl.constexpr, PADDED: tl.constexpr, WIDTH: tl.constexpr):
    """pool_query for each block, with rows of zeros behind: [NB, P, h]."""
    head, column = tl.arange(0, PADDED), tl.arange(0, WIDTH)
    query = tl.load(pool_query + head[:, None] * WIDTH + column[None, :], mask=(head < HEADS)[:, None], other=0)
    return tl.broadcast_to(query[None, :, :], (BLOCKS, PADDED, WIDTH))


@triton.jit(do_not_specialize=["first_block", "slab_rows"])
def chunk_encode_kernel(
    values, chunk_ptr, order, owner, table, row_code, element_code, logit, basis, w_qkv, b_qkv, w_o, b_o, norm,
    pool_query, out, saved, first_block, slab_rows,
    WIDTH: tl.constexpr, HEADS: tl.constexpr, PADDED_HEADS: tl.constexpr, LAYER_NORM: tl.constexpr,
    SLOTS: tl.constexpr, LOWEST: tl.constexpr, SHARED: tl.constexpr, BLOCKS: tl.constexpr,
    SAVE: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """A tile of chunks: pooled rows into ``out (N, H, h)``, or (SAVE) what blocks 1 to 3 and the pool see into
    ``saved (4, slab_rows, h)``, from block ``first_block`` on."""
    ROWS: tl.constexpr = BLOCKS * SLOTS
    operand = values.dtype.element_ty
    tile = tl.program_id(0).to(tl.int64)
    block = first_block + tile * BLOCKS + tl.arange(0, BLOCKS)
    chunk, element, group, there = places(chunk_ptr, order, table, block, LOWEST, SLOTS, SHARED)
    keys = attends(chunk_ptr, order, table, block, LOWEST, SLOTS, SHARED)
    x = tl.load(values + tl.load(chunk_ptr + chunk) + element, mask=there, other=0).to(ACC)  # [NB, S]
    o, mean = scalar_attention(x, keys, logit, basis, HEADS, WIDTH, ROWS, ACC)
    x = feed_forward(o, w_o, b_o, norm, LAYER_NORM, WIDTH, PRECISION, ACC).to(operand)  # [M, h]

    column = tl.arange(0, WIDTH)
    heads_block = first_block + tile * BLOCKS + tl.arange(0, BLOCKS * HEADS) // HEADS
    keys = attends(chunk_ptr, order, table, heads_block, LOWEST, SLOTS, SHARED)
    for full in range(3):
        if full == 1:
            code_row = tl.reshape(tl.load(owner + chunk, mask=there, other=0), (ROWS,))
            code_element = tl.reshape(element, (ROWS,))
            has_code = tl.reshape(there, (ROWS,))[:, None]
            code = tl.load(row_code + code_row[:, None] * WIDTH + column[None, :], mask=has_code, other=0).to(ACC)
            at = code_element[:, None] * WIDTH + column[None, :]
            code += tl.load(element_code + at, mask=has_code, other=0).to(ACC)
            x = (x.to(ACC) + code).to(operand)
        if SAVE:
            save_rows(saved + full * slab_rows * WIDTH, tile * ROWS, x, ROWS, WIDTH)
        w, b = w_qkv + full * 3 * WIDTH * WIDTH, b_qkv + full * 3 * WIDTH
        q = linear(x, w, b, WIDTH, PRECISION, ACC)
        k = linear(x, w + WIDTH * WIDTH, b + WIDTH, WIDTH, PRECISION, ACC).to(operand)
        v = linear(x, w + 2 * WIDTH * WIDTH, b + 2 * WIDTH, WIDTH, PRECISION, ACC).to(operand)
        k, v = to_heads(k, BLOCKS, SLOTS, HEADS), to_heads(v, BLOCKS, SLOTS, HEADS)
        p, q_rows, k, v = attention_weights(
            to_heads(q.to(operand), BLOCKS, SLOTS, HEADS), k, v, keys, WIDTH, SHARED, PRECISION, ACC
        )
        attended = tl.dot(p.to(operand), v, input_precision=PRECISION, out_dtype=ACC)  # [NB * H, S, d]
        o = q + from_heads(attended, BLOCKS, SLOTS, HEADS)
        w, b, n = w_o + (full + 1) * WIDTH * WIDTH, b_o + (full + 1) * WIDTH, norm + (full + 1) * 4 * WIDTH
        x = feed_forward(o, w, b, n, LAYER_NORM, WIDTH, PRECISION, ACC).to(operand)

    if SAVE:
        save_rows(saved + 3 * slab_rows * WIDTH, tile * ROWS, x, ROWS, WIDTH)
    else:
        x = tl.reshape(x, (BLOCKS, SLOTS, WIDTH))
        query = load_queries(pool_query, BLOCKS, HEADS, PADDED_HEADS, WIDTH)
        n, begin, end = block_lengths(chunk_ptr, order, table, block, LOWEST, SLOTS, SHARED)
        head = tl.arange(0, PADDED_HEADS)
        last = tl.max(end - begin, 0).to(tl.int32) if SHARED else 1
        for place in range(0, last):
            mine = there & (group == place)
            if SHARED:
                rows = tl.where(mine[:, :, None], x, 0.0).to(operand)
            else:
                rows = x
            p = pool_weights(rows, query, mine, PRECISION, ACC).to(operand)  # [NB, S, P]
            pooled = tl.dot(tl.permute(p, (0, 2, 1)), rows, input_precision=PRECISION, out_dtype=ACC)  # [NB, P, h]
            exists = begin + place < end
            to = tl.load(order + begin + place, mask=exists, other=0)
            at = (to[:, None] * HEADS + head[None, :])[:, :, None] * WIDTH + column[None, None, :]
            store = (exists[:, None] & (head < HEADS)[None, :])[:, :, None]
            tl.store(out + at, pooled.to(operand), mask=store)

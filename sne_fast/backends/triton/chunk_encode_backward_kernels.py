"""The backward kernels of ``chunk_encode``, one per stage of a slab: pool, full blocks, codes, scalar block.

Each recomputes its stage from what the forward kernel saved for the slab, turns the gradient of its rows into that of
its input's in place, and sums its parameters' gradients over its own tiles, always in the same order: a program adds
them to its own row of a table ``(programs, ...)``, and nobody else's. Parked slots have gradient zero.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .chunk_encode_kernels import load_queries, pool_weights
from .pieces import slot_range
from .tiles import (
    add_matrix_to,
    add_relu,
    add_to,
    attends,
    attention_weights,
    block_lengths,
    finite_rows,
    from_heads,
    kept,
    layer_norm_backward,
    linear,
    load_rows,
    matrix,
    normed,
    places,
    row_products,
    save_rows,
    scalar_attention,
    scalar_weights,
    to_heads,
    vector,
)


@triton.jit(do_not_specialize=["first_block", "slab_rows", "tiles"])
def pool_backward_kernel(
    grad, chunk_ptr, order, table, pool_query, saved, rows_grad, query_part, first_block, slab_rows, tiles,
    WIDTH: tl.constexpr, HEADS: tl.constexpr, PADDED_HEADS: tl.constexpr, LAYER_NORM: tl.constexpr,
    SLOTS: tl.constexpr, LOWEST: tl.constexpr, SHARED: tl.constexpr, BLOCKS: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Gradient of the pooled rows ``(N, H, h)`` -> of the rows the pool saw, ``rows_grad (slab_rows, h)``."""
    ROWS: tl.constexpr = BLOCKS * SLOTS
    operand = saved.dtype.element_ty
    program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    head, column = tl.arange(0, PADDED_HEADS), tl.arange(0, WIDTH)
    query_sum = tl.zeros((PADDED_HEADS, WIDTH), ACC)
    query = load_queries(pool_query, BLOCKS, HEADS, PADDED_HEADS, WIDTH)
    for tile in range(program, tiles, programs):
        block = first_block + tile * BLOCKS + tl.arange(0, BLOCKS)
        n, begin, end = block_lengths(chunk_ptr, order, table, block, LOWEST, SLOTS, SHARED)
        chunk, element, group, there = places(chunk_ptr, order, table, block, LOWEST, SLOTS, SHARED)
        x = load_rows(saved + 3 * slab_rows * WIDTH, tile * ROWS, ROWS, WIDTH)
        x = tl.reshape(x, (BLOCKS, SLOTS, WIDTH))
        total = tl.zeros((BLOCKS, SLOTS, WIDTH), ACC)
        last = tl.max(end - begin, 0).to(tl.int32) if SHARED else 1
        for place in range(0, last):
            mine = there & (group == place)
            if SHARED:
                rows = tl.where(mine[:, :, None], x, 0.0).to(operand)
            else:
                rows = x
            p = pool_weights(rows, query, mine, PRECISION, ACC)  # [NB, S, P]
            exists = begin + place < end
            of = tl.load(order + begin + place, mask=exists, other=0)
            at = (of[:, None] * HEADS + head[None, :])[:, :, None] * WIDTH + column[None, None, :]
            given = (exists[:, None] & (head < HEADS)[None, :])[:, :, None]
            g = tl.load(grad + at, mask=given, other=0)  # [NB, P, h]
            p_grad = tl.dot(rows, tl.permute(g, (0, 2, 1)), input_precision=PRECISION, out_dtype=ACC)
            p_grad = tl.where(mine[:, :, None], p_grad, 0.0)
            mean = tl.sum(p * p_grad, 1)
            logit_grad = tl.where(mine[:, :, None], p * (p_grad - mean[:, None, :]), 0.0).to(operand)
            x_grad = tl.dot(p.to(operand), g, input_precision=PRECISION, out_dtype=ACC)
            x_grad += tl.dot(logit_grad, query, input_precision=PRECISION, out_dtype=ACC)
            total = tl.where(mine[:, :, None], x_grad, total)
            flat = tl.trans(tl.reshape(logit_grad, (ROWS, PADDED_HEADS)))
            query_sum += tl.dot(flat, tl.reshape(rows, (ROWS, WIDTH)), input_precision=PRECISION, out_dtype=ACC)
        save_rows(rows_grad, tile * ROWS, tl.reshape(total, (ROWS, WIDTH)), ROWS, WIDTH)
    to = query_part + program * HEADS * WIDTH + head[:, None] * WIDTH + column[None, :]
    real = (head < HEADS)[:, None]
    tl.store(to, tl.load(to, mask=real, other=0) + query_sum, mask=real)


@triton.jit
def feed_forward_backward(
    grad, o, w_o, b_o, norm, norm_part, products, slab_rows, first_row, ROWS: tl.constexpr,
    LAYER_NORM: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """``feed_forward`` again and back: gradient of its result [M, h] -> of o. Leaves the factors of fc_o's
    gradient in planes 3 and 4 of ``products``, for ``weight_grad_kernel``, and adds up those of the norms."""
    operand = w_o.dtype.element_ty
    if LAYER_NORM:
        unit0, rstd0 = normed(o, WIDTH)
        o = unit0 * vector(norm, WIDTH, ACC)[None, :] + vector(norm + WIDTH, WIDTH, ACC)[None, :]
    save_rows(products + 4 * slab_rows * WIDTH, first_row, o, ROWS, WIDTH)
    z = linear(o.to(operand), w_o, b_o, WIDTH, PRECISION, ACC)
    if LAYER_NORM:
        unit1, rstd1 = normed(add_relu(o, z), WIDTH)
        grad = layer_norm_backward(grad, unit1, rstd1, norm + 2 * WIDTH, norm_part + 2 * WIDTH, WIDTH, ACC)
    z_grad = tl.where(z <= 0, 0.0, grad)
    z_grad = z_grad.to(operand)
    save_rows(products + 3 * slab_rows * WIDTH, first_row, z_grad, ROWS, WIDTH)
    grad += tl.dot(z_grad, matrix(w_o, WIDTH), input_precision=PRECISION, out_dtype=ACC)
    if LAYER_NORM:
        grad = layer_norm_backward(grad, unit0, rstd0, norm, norm_part, WIDTH, ACC)
    return grad


@triton.jit(do_not_specialize=["first_block", "slab_rows", "tiles"])
def block_backward_kernel(
    chunk_ptr, order, table, w_qkv, b_qkv, w_o, b_o, norm, saved, rows_grad, products, norm_part,
    first_block, slab_rows, tiles,
    WIDTH: tl.constexpr, HEADS: tl.constexpr, LAYER_NORM: tl.constexpr,
    SLOTS: tl.constexpr, LOWEST: tl.constexpr, SHARED: tl.constexpr, BLOCKS: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One of blocks 1 to 3, whose parameters and saved input the pointers already stand at. ``products (5, slab_rows,
    h)`` gets the gradients of q, k, v and fc_o's result, and what fc_o saw."""
    ROWS: tl.constexpr = BLOCKS * SLOTS
    SQUARE: tl.constexpr = WIDTH * WIDTH
    operand = saved.dtype.element_ty
    program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    norm_part += program * 4 * WIDTH
    for tile in range(program, tiles, programs):
        heads_block = first_block + tile * BLOCKS + tl.arange(0, BLOCKS * HEADS) // HEADS
        keys = attends(chunk_ptr, order, table, heads_block, LOWEST, SLOTS, SHARED)
        x = load_rows(saved, tile * ROWS, ROWS, WIDTH)
        q_rows = linear(x, w_qkv, b_qkv, WIDTH, PRECISION, ACC)
        k_rows = linear(x, w_qkv + SQUARE, b_qkv + WIDTH, WIDTH, PRECISION, ACC).to(operand)
        v_rows = linear(x, w_qkv + 2 * SQUARE, b_qkv + 2 * WIDTH, WIDTH, PRECISION, ACC).to(operand)
        q, k = to_heads(q_rows.to(operand), BLOCKS, SLOTS, HEADS), to_heads(k_rows, BLOCKS, SLOTS, HEADS)
        v = to_heads(v_rows, BLOCKS, SLOTS, HEADS)
        p, q, k, v = attention_weights(q, k, v, keys, WIDTH, SHARED, PRECISION, ACC)
        p = p.to(operand)
        attended = tl.dot(p, v, input_precision=PRECISION, out_dtype=ACC)
        o = q_rows + from_heads(attended, BLOCKS, SLOTS, HEADS)

        grad = load_rows(rows_grad, tile * ROWS, ROWS, WIDTH)
        o_grad = feed_forward_backward(
            grad, o, w_o, b_o, norm, norm_part, products, slab_rows, tile * ROWS, ROWS, LAYER_NORM, WIDTH, PRECISION,
            ACC,
        )  # fmt: skip

        a_grad = to_heads(o_grad.to(operand), BLOCKS, SLOTS, HEADS)
        if SHARED:  # as in attention_weights: rows that are not finite turn their own chunk's weights into NaN
            flag = finite_rows(a_grad, ACC)
            a_grad = kept(a_grad, flag)
            p = tl.where(keys, p.to(ACC) + flag[:, :, None], 0.0).to(operand)
        v_grad = tl.dot(tl.permute(p, (0, 2, 1)), a_grad, input_precision=PRECISION, out_dtype=ACC)
        p_grad = row_products(a_grad, v, PRECISION, ACC)
        weights = p.to(ACC)
        mean = tl.sum(tl.where(keys, weights * p_grad, 0.0), 2)
        s_grad = tl.where(keys, weights * (p_grad - mean[:, :, None]) * (1 / WIDTH**0.5), 0.0).to(operand)
        q_grad = tl.dot(s_grad, k, input_precision=PRECISION, out_dtype=ACC)
        k_grad = tl.dot(tl.permute(s_grad, (0, 2, 1)), q, input_precision=PRECISION, out_dtype=ACC)

        dq = (o_grad + from_heads(q_grad, BLOCKS, SLOTS, HEADS)).to(operand)
        save_rows(products, tile * ROWS, dq, ROWS, WIDTH)
        x_grad = tl.dot(dq, matrix(w_qkv, WIDTH), input_precision=PRECISION, out_dtype=ACC)
        dk = from_heads(k_grad.to(operand), BLOCKS, SLOTS, HEADS)
        save_rows(products + slab_rows * WIDTH, tile * ROWS, dk, ROWS, WIDTH)
        x_grad += tl.dot(dk, matrix(w_qkv + SQUARE, WIDTH), input_precision=PRECISION, out_dtype=ACC)
        dv = from_heads(v_grad.to(operand), BLOCKS, SLOTS, HEADS)
        save_rows(products + 2 * slab_rows * WIDTH, tile * ROWS, dv, ROWS, WIDTH)
        x_grad += tl.dot(dv, matrix(w_qkv + 2 * SQUARE, WIDTH), input_precision=PRECISION, out_dtype=ACC)
        save_rows(rows_grad, tile * ROWS, x_grad, ROWS, WIDTH)


@triton.jit(do_not_specialize=["slab_rows", "tiles"])
def weight_grad_kernel(
    saved, products, w_qkv_part, b_qkv_part, w_o_part, b_o_part, slab_rows, tiles,
    FIRST: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Gradients of fc_q, fc_k, fc_v (parts 0 to 2, what they saw is ``saved``) and fc_o (part 3, plane 4 of
    ``products``), summed over this program's rows into its own partial sums."""
    SQUARE: tl.constexpr = WIDTH * WIDTH
    program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    part = FIRST + tl.program_id(1)
    if part == 3:
        inputs = products + 4 * slab_rows * WIDTH
        w_part, b_part = w_o_part + program * SQUARE, b_o_part + program * WIDTH
    else:
        inputs = saved
        w_part, b_part = w_qkv_part + (program * 3 + part) * SQUARE, b_qkv_part + (program * 3 + part) * WIDTH
    grads = products + part * slab_rows * WIDTH
    w_sum, b_sum = tl.zeros((WIDTH, WIDTH), ACC), tl.zeros((WIDTH,), ACC)
    for tile in range(program, tiles, programs):
        grad = load_rows(grads, tile * ROWS, ROWS, WIDTH)
        x = load_rows(inputs, tile * ROWS, ROWS, WIDTH)
        b_sum += tl.sum(grad.to(ACC), 0)
        w_sum += tl.dot(tl.trans(grad), x, input_precision=PRECISION, out_dtype=ACC)
    add_matrix_to(w_part, w_sum, WIDTH, WIDTH)
    add_to(b_part, b_sum, WIDTH)


@triton.jit(do_not_specialize=["first_block", "tiles", "codes"])
def codes_backward_kernel(
    chunk_ptr, order, table, rows_grad, chunk_grad, element_part, first_block, tiles, codes,
    WIDTH: tl.constexpr, SLOTS: tl.constexpr, LOWEST: tl.constexpr, SHARED: tl.constexpr, BLOCKS: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Sums of the codes' gradient: over each chunk into ``chunk_grad (N, h)``, over this program's chunks for each
    element index into its rows of ``element_part (programs, codes, h)``."""
    ELEMENTS: tl.constexpr = 16 if SHARED else SLOTS
    program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    column, index = tl.arange(0, WIDTH), tl.arange(0, ELEMENTS)
    element_sum = tl.zeros((ELEMENTS, WIDTH), ACC)
    for tile in range(program, tiles, programs):
        block = first_block + tile * BLOCKS + tl.arange(0, BLOCKS)
        n, begin, end = block_lengths(chunk_ptr, order, table, block, LOWEST, SLOTS, SHARED)
        chunk, element, group, there = places(chunk_ptr, order, table, block, LOWEST, SLOTS, SHARED)
        row = tile * BLOCKS * SLOTS + tl.arange(0, BLOCKS)[:, None] * SLOTS + tl.arange(0, SLOTS)[None, :]
        at = row[:, :, None] * WIDTH + column[None, None, :]
        grad = tl.load(rows_grad + at, mask=there[:, :, None], other=0)  # [NB, S, h]
        last = tl.max(end - begin, 0).to(tl.int32) if SHARED else 1
        for place in range(0, last):
            part = tl.sum(tl.where((group == place)[:, :, None], grad, 0.0), 1)
            exists = begin + place < end
            to = tl.load(order + begin + place, mask=exists, other=0)
            tl.store(chunk_grad + to[:, None] * WIDTH + column[None, :], part, mask=exists[:, None])
        if SHARED:
            for i in range(ELEMENTS):
                part = tl.sum(tl.sum(tl.where((element == i)[:, :, None], grad, 0.0), 1), 0)
                element_sum += tl.where((index == i)[:, None], part[None, :], 0.0)
        else:
            element_sum += tl.sum(grad, 0)
    to = element_part + program * codes * WIDTH + index[:, None] * WIDTH + column[None, :]
    real = (index < codes)[:, None]
    tl.store(to, tl.load(to, mask=real, other=0) + element_sum, mask=real)


@triton.jit(do_not_specialize=["first_block", "slab_rows", "tiles"])
def scalar_backward_kernel(
    values, chunk_ptr, order, table, logit, basis, w_o, b_o, norm, rows_grad, values_grad, products,
    logit_part, basis_part, norm_part, first_block, slab_rows, tiles,
    WIDTH: tl.constexpr, HEADS: tl.constexpr, LAYER_NORM: tl.constexpr,
    SLOTS: tl.constexpr, LOWEST: tl.constexpr, SHARED: tl.constexpr, BLOCKS: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Block 0: gradient of its rows -> of the values themselves."""
    ROWS: tl.constexpr = BLOCKS * SLOTS
    program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    norm_part += program * 4 * WIDTH
    basis_part += program * 3 * WIDTH
    head_index = tl.arange(0, HEADS)
    slope_sum, offset_sum = tl.zeros((HEADS,), ACC), tl.zeros((HEADS,), ACC)
    head_of = tl.arange(0, WIDTH) // (WIDTH // HEADS)
    for tile in range(program, tiles, programs):
        block = first_block + tile * BLOCKS + tl.arange(0, BLOCKS)
        chunk, element, group, there = places(chunk_ptr, order, table, block, LOWEST, SLOTS, SHARED)
        keys = attends(chunk_ptr, order, table, block, LOWEST, SLOTS, SHARED)
        at = tl.load(chunk_ptr + chunk) + element
        x = tl.load(values + at, mask=there, other=0).to(ACC)  # [NB, S]
        o, mean = scalar_attention(x, keys, logit, basis, HEADS, WIDTH, ROWS, ACC)
        grad = load_rows(rows_grad, tile * ROWS, ROWS, WIDTH)
        grad = feed_forward_backward(
            grad, o, w_o, b_o, norm, norm_part, products, slab_rows, tile * ROWS, ROWS, LAYER_NORM, WIDTH, PRECISION,
            ACC,
        )  # fmt: skip
        add_to(basis_part, tl.sum(grad * tl.reshape(x, (ROWS,))[:, None], 0), WIDTH)
        add_to(basis_part + WIDTH, tl.sum(grad * mean, 0), WIDTH)
        add_to(basis_part + 2 * WIDTH, tl.sum(grad, 0), WIDTH)
        x_grad = tl.reshape(tl.sum(grad * vector(basis, WIDTH, ACC)[None, :], 1), (BLOCKS, SLOTS))
        grad = grad * vector(basis + WIDTH, WIDTH, ACC)[None, :]
        for head in range(HEADS):
            slope, offset = tl.load(logit + head).to(ACC), tl.load(logit + HEADS + head).to(ACC)
            p, slopes, m = scalar_weights(x, keys, slope, offset)
            m_grad = tl.reshape(tl.sum(tl.where((head_of == head)[None, :], grad, 0.0), 1), (BLOCKS, SLOTS))
            weighted = p * m_grad[:, :, None]
            s_grad = weighted * (x[:, None, :] - m[:, :, None])  # of the logits
            x_grad += tl.sum(tl.where(keys, weighted + s_grad * slopes[:, :, None], 0.0), 1)
            slopes_grad = tl.sum(tl.where(keys, s_grad * x[:, None, :], 0.0), 2)
            x_grad += slopes_grad * slope
            this = head_index == head
            slope_sum += tl.where(this, tl.sum(tl.sum(slopes_grad * x, 1), 0), 0.0)
            offset_sum += tl.where(this, tl.sum(tl.sum(slopes_grad, 1), 0), 0.0)
        tl.store(values_grad + at, x_grad.to(values_grad.dtype.element_ty), mask=there)
    add_to(logit_part + program * 2 * HEADS, slope_sum, HEADS)
    add_to(logit_part + program * 2 * HEADS + HEADS, offset_sum, HEADS)


@triton.jit(do_not_specialize=["sets"])
def sum_rows_kernel(
    rows, ptr, partial, sets,
    BLOCK: tl.constexpr, STEP: tl.constexpr, WIDTH: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Sum of one slot's rows ``(N, h)``, at most BLOCK of one set, into ``partial (slots, h)``: see ``_slots``."""
    slot = tl.program_id(0).to(tl.int64)
    own, start, end = slot_range(ptr, sets, slot, BLOCK)
    end = tl.minimum(end, start + BLOCK)
    column = tl.arange(0, WIDTH)
    total = tl.zeros((WIDTH,), ACC)
    for first in range(start, end, STEP):
        row = first + tl.arange(0, STEP)
        at = row[:, None] * WIDTH + column[None, :]
        total += tl.sum(tl.load(rows + at, mask=(row < end)[:, None], other=0), 0)
    tl.store(partial + slot * WIDTH + column, total)

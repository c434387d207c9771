"""Backward kernels of ``chunk_encode``, one per stage of a slab but block 0: pool, full blocks, codes.

Each recomputes its stage from what the forward kernel saved for the slab, turns the gradient of its rows into that of
its input's in place, and sums its parameters' gradients over its own tiles, always in the same order: a program adds
them to its own row of a table ``(programs, ...)``, and nobody else's. Parked slots have gradient zero.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .chunk_encode_kernels import load_queries, pool_weights
from .chunk_tiles import (
    attends,
    attention_exponentials,
    bin_lengths,
    finite_rows,
    from_heads,
    kept,
    places,
    row_products,
    row_slots,
    to_heads,
)
from .tiles import (
    add_matrix_to,
    add_relu,
    add_to,
    layer_norm_backward,
    linear,
    load_rows,
    matrix,
    normed,
    save_rows,
    unbiased,
    vector,
)


@triton.jit(do_not_specialize=["first_bin", "slab_rows", "tiles"])
def pool_backward_kernel(
    grad,
    chunk_ptr,
    order,
    table,
    pool_query,
    saved,
    rows_grad,
    query_part,
    first_bin,
    slab_rows,
    tiles,
    WIDTH: tl.constexpr,
    HEADS: tl.constexpr,
    PADDED_HEADS: tl.constexpr,
    LAYER_NORM: tl.constexpr,
    SLOTS: tl.constexpr,
    MIN_LENGTH: tl.constexpr,
    MAX_LENGTH: tl.constexpr,
    MULTI_CHUNK: tl.constexpr,
    BINS: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    """Turn the gradient of pooled rows ``(N, H, h)`` into that of the pool's input, ``rows_grad (slab_rows, h)``."""
    ROWS: tl.constexpr = BINS * SLOTS
    operand = saved.dtype.element_ty
    i_program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    i_head, i_column = tl.arange(0, PADDED_HEADS), tl.arange(0, WIDTH)
    b_query_sum = tl.zeros((PADDED_HEADS, WIDTH), ACC)
    b_query = load_queries(pool_query, BINS, HEADS, PADDED_HEADS, WIDTH)  # [NB, P, h]
    for i_tile in range(i_program, tiles, programs):
        i_bin = first_bin + i_tile * BINS + tl.arange(0, BINS)
        n, begin, end = bin_lengths(chunk_ptr, order, table, i_bin, MIN_LENGTH, MAX_LENGTH, SLOTS, MULTI_CHUNK)
        i_chunk, i_element, i_group, m_element = places(
            order,
            n[:, None],
            begin[:, None],
            end[:, None],
            tl.arange(0, SLOTS)[None, :],
            MIN_LENGTH,
            SLOTS,
            MULTI_CHUNK,
        )  # [NB, S]
        i_row = i_tile * ROWS + tl.arange(0, ROWS)
        b_x = load_rows(saved + 3 * slab_rows * WIDTH, i_row, WIDTH)  # [M, h]
        b_x = tl.reshape(b_x, (BINS, SLOTS, WIDTH))
        b_total = tl.zeros((BINS, SLOTS, WIDTH), ACC)
        last = tl.max(end - begin, 0).to(tl.int32) if MULTI_CHUNK else 1
        for place in range(0, last):
            m_own = m_element & (i_group == place)
            if MULTI_CHUNK:
                b_rows = tl.where(m_own[:, :, None], b_x, 0.0).to(operand)
            else:
                b_rows = b_x
            b_p = pool_weights(b_rows, b_query, m_own, PRECISION, ACC)  # [NB, S, P]
            m_chunk = begin + place < end
            i_target = tl.load(order + begin + place, mask=m_chunk, other=0)  # [NB]
            i_grad = (i_target[:, None] * HEADS + i_head[None, :])[:, :, None] * WIDTH + i_column[None, None, :]
            m_grad = (m_chunk[:, None] & (i_head < HEADS)[None, :])[:, :, None]
            b_grad = tl.load(grad + i_grad, mask=m_grad, other=0)  # [NB, P, h]
            b_p_grad = tl.dot(b_rows, tl.permute(b_grad, (0, 2, 1)), input_precision=PRECISION, out_dtype=ACC)
            b_p_grad = tl.where(m_own[:, :, None], b_p_grad, 0.0)  # [NB, S, P]
            b_mean = tl.sum(b_p * b_p_grad, 1)
            b_logit_grad = tl.where(m_own[:, :, None], b_p * (b_p_grad - b_mean[:, None, :]), 0.0).to(operand)
            b_x_grad = tl.dot(b_p.to(operand), b_grad, input_precision=PRECISION, out_dtype=ACC)  # [NB, S, h]
            b_x_grad += tl.dot(b_logit_grad, b_query, input_precision=PRECISION, out_dtype=ACC)
            b_total = tl.where(m_own[:, :, None], b_x_grad, b_total)
            b_flat = tl.trans(tl.reshape(b_logit_grad, (ROWS, PADDED_HEADS)))  # [P, M]
            b_query_sum += tl.dot(b_flat, tl.reshape(b_rows, (ROWS, WIDTH)), input_precision=PRECISION, out_dtype=ACC)
        save_rows(rows_grad, i_row, tl.reshape(b_total, (ROWS, WIDTH)), WIDTH)
    p_query_part = query_part + i_program * HEADS * WIDTH + i_head[:, None] * WIDTH + i_column[None, :]
    m_head = (i_head < HEADS)[:, None]
    tl.store(p_query_part, tl.load(p_query_part, mask=m_head, other=0) + b_query_sum, mask=m_head)


@triton.jit
def feed_forward_backward(
    rows_grad,
    b_res,
    w_o,
    b_o,
    norm,
    norm_part,
    products,
    slab_rows,
    i_row,
    LAYER_NORM: tl.constexpr,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    """Compute ``feed_forward`` again and return the gradient of its input ``b_res`` [M, h].

    That of its result is read from ``rows_grad`` late, as registers are short before. Leaves the factors of fc_o's
    gradient in planes 3 and 4 of ``products``, for ``weight_grad_kernel``, and adds up the gradients of the norms.
    """
    operand = w_o.dtype.element_ty
    if LAYER_NORM:
        b_unit0, b_rstd0 = normed(b_res, WIDTH)
        b_res = b_unit0 * vector(norm, WIDTH, ACC)[None, :] + vector(norm + WIDTH, WIDTH, ACC)[None, :]
    save_rows(products + 4 * slab_rows * WIDTH, i_row, b_res, WIDTH)
    b_z = linear(b_res.to(operand), w_o, b_o, WIDTH, PRECISION, ACC)
    if LAYER_NORM:
        b_unit1, b_rstd1 = normed(add_relu(b_res, b_z), WIDTH)
    b_grad = load_rows(rows_grad, i_row, WIDTH)  # [M, h]
    if LAYER_NORM:
        b_grad, b_gain_grad, b_bias_grad = layer_norm_backward(b_grad, b_unit1, b_rstd1, norm + 2 * WIDTH, WIDTH, ACC)
        add_to(norm_part + 2 * WIDTH, b_gain_grad, WIDTH)
        add_to(norm_part + 3 * WIDTH, b_bias_grad, WIDTH)
    b_z_grad = tl.where(b_z <= 0, 0.0, b_grad)
    b_z_grad = b_z_grad.to(operand)
    save_rows(products + 3 * slab_rows * WIDTH, i_row, b_z_grad, WIDTH)
    b_grad += tl.dot(b_z_grad, matrix(w_o, WIDTH), input_precision=PRECISION, out_dtype=ACC)
    if LAYER_NORM:
        b_grad, b_gain_grad, b_bias_grad = layer_norm_backward(b_grad, b_unit0, b_rstd0, norm, WIDTH, ACC)
        add_to(norm_part, b_gain_grad, WIDTH)
        add_to(norm_part + WIDTH, b_bias_grad, WIDTH)
    return b_grad


@triton.jit(do_not_specialize=["first_bin", "slab_rows", "tiles"])
def block_backward_kernel(
    chunk_ptr,
    order,
    table,
    w_qkv,
    b_qkv,
    w_o,
    b_o,
    norm,
    saved,
    rows_grad,
    products,
    norm_part,
    first_bin,
    slab_rows,
    tiles,
    WIDTH: tl.constexpr,
    HEADS: tl.constexpr,
    LAYER_NORM: tl.constexpr,
    SLOTS: tl.constexpr,
    MIN_LENGTH: tl.constexpr,
    MAX_LENGTH: tl.constexpr,
    MULTI_CHUNK: tl.constexpr,
    BINS: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    """Go back through one of blocks 1 to 3, whose parameters and saved input the pointers already stand at.

    ``products (5, slab_rows, h)`` gets the gradients of q, k, v and of fc_o's result, and fc_o's input.
    """
    ROWS: tl.constexpr = BINS * SLOTS
    SQUARE: tl.constexpr = WIDTH * WIDTH
    UNMASKED: tl.constexpr = MIN_LENGTH == SLOTS
    operand = saved.dtype.element_ty
    i_program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    norm_part += i_program * 4 * WIDTH
    i_row_bin, i_slot = row_slots(BINS, SLOTS)
    for i_tile in tl.range(i_program, tiles, programs, disable_licm=True):  # addresses ahead of it would be spilled
        i_row = i_tile * ROWS + i_row_bin * SLOTS + i_slot
        i_heads_bin = first_bin + i_tile * BINS + tl.arange(0, BINS * HEADS) % BINS
        m_keys = attends(chunk_ptr, order, table, i_heads_bin, MIN_LENGTH, MAX_LENGTH, SLOTS, MULTI_CHUNK)
        b_x = load_rows(saved, i_row, WIDTH)  # [M, h]
        b_q_rows = linear(b_x, w_qkv, b_qkv, WIDTH, PRECISION, ACC)  # [M, h]
        b_k_rows = unbiased(b_x, w_qkv + SQUARE, WIDTH, PRECISION, ACC).to(operand)
        b_v_rows = linear(b_x, w_qkv + 2 * SQUARE, b_qkv + 2 * WIDTH, WIDTH, PRECISION, ACC).to(operand)
        b_q, b_k = to_heads(b_q_rows.to(operand), BINS, SLOTS, HEADS), to_heads(b_k_rows, BINS, SLOTS, HEADS)
        b_v = to_heads(b_v_rows, BINS, SLOTS, HEADS)  # [H * NB, S, d]
        b_p, b_inverse, b_q, b_k, b_v = attention_exponentials(
            b_q, b_k, b_v, m_keys, WIDTH, UNMASKED, MULTI_CHUNK, PRECISION, ACC
        )
        b_p = (b_p * b_inverse[:, :, None]).to(operand)  # [H * NB, S, S]
        b_attended = tl.dot(b_p, b_v, input_precision=PRECISION, out_dtype=ACC)
        b_res = b_q_rows + from_heads(b_attended, BINS, SLOTS, HEADS)  # [M, h]

        b_res_grad = feed_forward_backward(
            rows_grad, b_res, w_o, b_o, norm, norm_part, products, slab_rows, i_row,
            LAYER_NORM, WIDTH, PRECISION, ACC,
        )  # fmt: skip

        b_a_grad = to_heads(b_res_grad.to(operand), BINS, SLOTS, HEADS)  # [H * NB, S, d]
        if (
            MULTI_CHUNK
        ):  # as in attention_exponentials: rows that are not finite turn their own chunk's weights into NaN
            b_flag = finite_rows(b_a_grad, ACC)
            b_a_grad = kept(b_a_grad, b_flag)
            b_p = tl.where(m_keys, b_p.to(ACC) + b_flag[:, :, None], 0.0).to(operand)
        b_v_grad = tl.dot(tl.permute(b_p, (0, 2, 1)), b_a_grad, input_precision=PRECISION, out_dtype=ACC)
        b_p_grad = row_products(b_a_grad, b_v, PRECISION, ACC)  # [H * NB, S, S]
        b_weights = b_p.to(ACC)
        if UNMASKED:
            b_mean = tl.sum(b_weights * b_p_grad, 2)
            b_logits_grad = b_weights * (b_p_grad - b_mean[:, :, None])
        else:
            b_mean = tl.sum(tl.where(m_keys, b_weights * b_p_grad, 0.0), 2)
            b_logits_grad = tl.where(m_keys, b_weights * (b_p_grad - b_mean[:, :, None]), 0.0)
        b_logits_grad = (b_logits_grad * (1 / WIDTH**0.5)).to(operand)
        b_q_grad = tl.dot(b_logits_grad, b_k, input_precision=PRECISION, out_dtype=ACC)
        b_k_grad = tl.dot(tl.permute(b_logits_grad, (0, 2, 1)), b_q, input_precision=PRECISION, out_dtype=ACC)

        b_dq = (b_res_grad + from_heads(b_q_grad, BINS, SLOTS, HEADS)).to(operand)  # [M, h]
        save_rows(products, i_row, b_dq, WIDTH)
        b_x_grad = tl.dot(b_dq, matrix(w_qkv, WIDTH), input_precision=PRECISION, out_dtype=ACC)
        b_dk = from_heads(b_k_grad.to(operand), BINS, SLOTS, HEADS)  # [M, h]
        save_rows(products + slab_rows * WIDTH, i_row, b_dk, WIDTH)
        b_x_grad += tl.dot(b_dk, matrix(w_qkv + SQUARE, WIDTH), input_precision=PRECISION, out_dtype=ACC)
        b_dv = from_heads(b_v_grad.to(operand), BINS, SLOTS, HEADS)  # [M, h]
        save_rows(products + 2 * slab_rows * WIDTH, i_row, b_dv, WIDTH)
        b_x_grad += tl.dot(b_dv, matrix(w_qkv + 2 * SQUARE, WIDTH), input_precision=PRECISION, out_dtype=ACC)
        save_rows(rows_grad, i_row, b_x_grad, WIDTH)


@triton.jit(do_not_specialize=["slab_rows", "tiles"])
def weight_grad_kernel(
    saved,
    products,
    w_qkv_part,
    b_qkv_part,
    w_o_part,
    b_o_part,
    spare,
    first_w_o_part,
    first_b_o_part,
    slab_rows,
    tiles,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    """Sum the gradients of fc_q, fc_k, fc_v (parts 0 to 2) and fc_o (part 3) over this program's rows.

    The input of parts 0 to 2 is ``saved``, that of part 3 is plane 4 of ``products``. Part 4 is fc_o of block 0, from
    planes 3 and 4 of ``spare``.
    """
    SQUARE: tl.constexpr = WIDTH * WIDTH
    i_program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    i_part = tl.program_id(1)
    p_grads = products + i_part * slab_rows * WIDTH
    if i_part == 4:
        p_grads, p_inputs = spare + 3 * slab_rows * WIDTH, spare + 4 * slab_rows * WIDTH
        p_w_part, p_b_part = first_w_o_part + i_program * SQUARE, first_b_o_part + i_program * WIDTH
    elif i_part == 3:
        p_inputs = products + 4 * slab_rows * WIDTH
        p_w_part, p_b_part = w_o_part + i_program * SQUARE, b_o_part + i_program * WIDTH
    else:
        p_inputs = saved
        p_w_part = w_qkv_part + (i_program * 3 + i_part) * SQUARE
        p_b_part = b_qkv_part + (i_program * 3 + i_part) * WIDTH
    b_w_sum, b_b_sum = tl.zeros((WIDTH, WIDTH), ACC), tl.zeros((WIDTH,), ACC)
    for i_tile in range(i_program, tiles, programs):
        i_row = i_tile * ROWS + tl.arange(0, ROWS)
        b_grad = load_rows(p_grads, i_row, WIDTH)  # [ROWS, h]
        b_x = load_rows(p_inputs, i_row, WIDTH)  # [ROWS, h]
        b_b_sum += tl.sum(b_grad.to(ACC), 0)
        b_w_sum += tl.dot(tl.trans(b_grad), b_x, input_precision=PRECISION, out_dtype=ACC)
    add_matrix_to(p_w_part, b_w_sum, WIDTH, WIDTH)
    add_to(p_b_part, b_b_sum, WIDTH)


@triton.jit(do_not_specialize=["first_bin", "tiles", "codes"])
def codes_backward_kernel(
    chunk_ptr,
    order,
    table,
    rows_grad,
    chunk_grad,
    element_part,
    first_bin,
    tiles,
    codes,
    WIDTH: tl.constexpr,
    SLOTS: tl.constexpr,
    MIN_LENGTH: tl.constexpr,
    MAX_LENGTH: tl.constexpr,
    MULTI_CHUNK: tl.constexpr,
    BINS: tl.constexpr,
    ACC: tl.constexpr,
):
    """Sum the gradient of the codes over each chunk, into ``chunk_grad (N, h)``, and for each element index.

    The latter, over this program's chunks, goes to its rows of ``element_part (programs, codes, h)``.
    """
    ELEMENTS: tl.constexpr = 16 if MULTI_CHUNK else SLOTS
    i_program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    i_column, i_index = tl.arange(0, WIDTH), tl.arange(0, ELEMENTS)
    b_element_sum = tl.zeros((ELEMENTS, WIDTH), ACC)
    for i_tile in range(i_program, tiles, programs):
        i_bin = first_bin + i_tile * BINS + tl.arange(0, BINS)
        n, begin, end = bin_lengths(chunk_ptr, order, table, i_bin, MIN_LENGTH, MAX_LENGTH, SLOTS, MULTI_CHUNK)
        i_chunk, i_element, i_group, m_element = places(
            order,
            n[:, None],
            begin[:, None],
            end[:, None],
            tl.arange(0, SLOTS)[None, :],
            MIN_LENGTH,
            SLOTS,
            MULTI_CHUNK,
        )  # [NB, S]
        i_row = i_tile * BINS * SLOTS + tl.arange(0, BINS)[:, None] * SLOTS + tl.arange(0, SLOTS)[None, :]
        i_value = i_row[:, :, None] * WIDTH + i_column[None, None, :]
        b_grad = tl.load(rows_grad + i_value, mask=m_element[:, :, None], other=0)  # [NB, S, h]
        last = tl.max(end - begin, 0).to(tl.int32) if MULTI_CHUNK else 1
        for place in range(0, last):
            b_part = tl.sum(tl.where((i_group == place)[:, :, None], b_grad, 0.0), 1)  # [NB, h]
            m_chunk = begin + place < end
            i_target = tl.load(order + begin + place, mask=m_chunk, other=0)  # [NB]
            tl.store(chunk_grad + i_target[:, None] * WIDTH + i_column[None, :], b_part, mask=m_chunk[:, None])
        if MULTI_CHUNK:
            for i in range(ELEMENTS):
                b_part = tl.sum(tl.sum(tl.where((i_element == i)[:, :, None], b_grad, 0.0), 1), 0)  # [h]
                b_element_sum += tl.where((i_index == i)[:, None], b_part[None, :], 0.0)
        else:
            b_element_sum += tl.sum(b_grad, 0)
    p_element_part = element_part + i_program * codes * WIDTH + i_index[:, None] * WIDTH + i_column[None, :]
    m_index = (i_index < codes)[:, None]
    tl.store(p_element_part, tl.load(p_element_part, mask=m_index, other=0) + b_element_sum, mask=m_index)

"""Rows of short sets, cut by heads, as tiles of the kernels of whole blocks."""

from __future__ import annotations

import triton
import triton.language as tl

from .chunk_tiles import LOG2E, finite_rows, kept, row_products
from .tiles import add_relu, layer_norm_backward, linear, matrix, normed, unbiased, vector


@triton.jit
def to_heads(
    b_t,
    HEADS: tl.constexpr,
):
    """Rearrange [M, h] -> [H, M, d]."""
    return tl.permute(tl.reshape(b_t, (b_t.shape[0], HEADS, b_t.shape[1] // HEADS)), (1, 0, 2))


@triton.jit
def from_heads(
    b_t,
):
    """Rearrange [H, M, d] -> [M, h]."""
    return tl.reshape(tl.permute(b_t, (1, 0, 2)), (b_t.shape[1], b_t.shape[0] * b_t.shape[2]))


@triton.jit
def own_rows(
    ptr,
    owner,
    i_tile,
    rows,
    ROWS: tl.constexpr,
):
    """Return the rows of a tile [M], which of them there are, their sets, and where all rows of these sets lie."""
    first = i_tile * ROWS
    i_row = first + tl.arange(0, ROWS)
    m_row = i_row < rows
    b_set = tl.load(owner + i_row, mask=m_row, other=-1)
    begin = tl.load(ptr + tl.load(owner + first))
    end = tl.load(ptr + tl.load(owner + tl.minimum(first + ROWS, rows) - 1) + 1)
    return i_row, m_row, b_set, begin, end


@triton.jit
def rows_at(
    x,
    i_row,
    m_row,
    WIDTH: tl.constexpr,
):
    """Load rows, zeros where there are none: [M, h]."""
    i_value = i_row[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    return tl.load(x + i_value, mask=m_row[:, None], other=0)


@triton.jit
def inner_rows(
    x,
    owner,
    first,
    end,
    INNER: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Return some of the rows that a program walks through, which of them there are, their values [N, h] and sets."""
    i_row = first + tl.arange(0, INNER)
    m_row = i_row < end
    return i_row, m_row, rows_at(x, i_row, m_row, WIDTH), tl.load(owner + i_row, mask=m_row, other=-2)


@triton.jit
def keys_and_values(
    b_x,
    w_k,
    w_v,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    """Return keys and values of rows by head [H, N, d], and NaN for the rows of either that are not finite [H, N].

    Without biases: that of the keys is constant in the softmax, that of the values is added to its mean.
    """
    operand = b_x.dtype
    b_k = to_heads(unbiased(b_x, w_k, WIDTH, PRECISION, ACC).to(operand), HEADS)
    b_v = to_heads(unbiased(b_x, w_v, WIDTH, PRECISION, ACC).to(operand), HEADS)
    b_flag = finite_rows(b_k, ACC) + finite_rows(b_v, ACC)
    return kept(b_k, b_flag), kept(b_v, b_flag), b_flag


@triton.jit
def softmax_step(
    b_logits,
    b_values,
    b_top,
    b_sum,
    b_out,
    SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    """Take logits [H, M, N] and values [H, N, d] into a softmax whose maximum runs along.

    Returns the largest logit and the sum, [H, M], and the undivided sum of values, [H, M, d].
    """
    b_new_top = tl.maximum(b_top, tl.max(b_logits, 2))
    b_shift = tl.where(b_new_top == float("-inf"), 0.0, b_new_top)
    b_e = tl.exp2((b_logits - b_shift[:, :, None]) * SCALE)
    b_decay = tl.exp2((b_top - b_shift) * SCALE)
    b_product = tl.dot(b_e.to(b_values.dtype), b_values, input_precision=PRECISION, out_dtype=ACC)
    return b_new_top, b_sum * b_decay + tl.sum(b_e, 2), b_out * b_decay[:, :, None] + b_product


@triton.jit
def attend(
    b_q,
    b_set,
    x,
    owner,
    begin,
    end,
    w_k,
    w_v,
    INNER: tl.constexpr,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    """Attend from queries [H, M, d] to the rows of their sets by a softmax whose maximum runs along.

    Returns the attended rows [H, M, d] without the bias of the values, the largest logit and 1 / the sum, [H, M].
    """
    SCALE: tl.constexpr = LOG2E / WIDTH**0.5
    b_top = tl.full((b_q.shape[0], b_q.shape[1]), float("-inf"), ACC)
    b_sum = tl.zeros((b_q.shape[0], b_q.shape[1]), ACC)
    b_out = tl.zeros(b_q.shape, ACC)
    for first in range(begin, end, INNER):
        _i_inner, _m_inner, b_x, b_inner_set = inner_rows(x, owner, first, end, INNER, WIDTH)
        b_k, b_v, b_flag = keys_and_values(b_x, w_k, w_v, HEADS, WIDTH, PRECISION, ACC)
        m_seen = (b_set[:, None] == b_inner_set[None, :])[None, :, :]
        b_logits = row_products(b_q, b_k, PRECISION, ACC) + b_flag[:, None, :]
        b_logits = tl.where(m_seen, b_logits, float("-inf"))  # [H, M, N]
        b_top, b_sum, b_out = softmax_step(b_logits, b_v, b_top, b_sum, b_out, SCALE, PRECISION, ACC)
    b_inverse = 1 / tl.where(b_sum == 0.0, 1.0, b_sum)
    return b_out * b_inverse[:, :, None], b_top, b_inverse


@triton.jit
def weights_of(
    b_logits,
    m_seen,
    b_top,
    b_inverse,
    WIDTH: tl.constexpr,
):
    """Return the weights of a softmax, from its largest logits and 1 / its sums; 0 where not ``m_seen``."""
    b_p = tl.exp2((b_logits - b_top) * (LOG2E / WIDTH**0.5)) * b_inverse
    return tl.where(m_seen, b_p, 0.0)


@triton.jit
def add_values(
    p_partial,
    b_values,
    done,
):
    """Add values to this program's own partial sums at ``p_partial``, which hold nothing until a tile is ``done``.

    The barrier as in :func:`add_to`.
    """
    tl.debug_barrier()
    m_partial = tl.zeros_like(b_values) + done > 0
    tl.store(p_partial, tl.load(p_partial, mask=m_partial, other=0) + b_values)


@triton.jit
def add_matrix(
    partial,
    b_matrix,
    done,
    WIDTH: tl.constexpr,
):
    """Add a matrix [h, h] to this program's own partial sum, as :func:`add_values`."""
    i_row = tl.arange(0, WIDTH)
    add_values(partial + i_row[:, None] * WIDTH + i_row[None, :], b_matrix, done)


@triton.jit
def add_vector(
    partial,
    b_vector,
    done,
    WIDTH: tl.constexpr,
):
    """Add a vector [h] to this program's own partial sum, as :func:`add_values`."""
    add_values(partial + tl.arange(0, WIDTH), b_vector, done)


@triton.jit
def feed_forward_backward(
    grad,
    i_row,
    m_row,
    b_in,
    w_o,
    b_o,
    norm,
    w_part,
    b_part,
    norm_part,
    done,
    LAYER_NORM: tl.constexpr,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    """Return the gradient of a block's residual sum [M, h] from rows of ``grad``, and add those of parameters to sums.

    The forward, ``feed_forward`` of chunk_tiles, is computed again on the way.
    """
    operand = w_o.dtype.element_ty
    if LAYER_NORM:
        b_unit0, b_rstd0 = normed(b_in, WIDTH)
        b_in = b_unit0 * vector(norm, WIDTH, ACC)[None, :] + vector(norm + WIDTH, WIDTH, ACC)[None, :]
    b_z = linear(b_in.to(operand), w_o, b_o, WIDTH, PRECISION, ACC)
    b_grad = rows_at(grad, i_row, m_row, WIDTH).to(ACC)
    if LAYER_NORM:
        b_unit1, b_rstd1 = normed(add_relu(b_in, b_z), WIDTH)
        b_grad, b_gain_grad, b_bias_grad = layer_norm_backward(b_grad, b_unit1, b_rstd1, norm + 2 * WIDTH, WIDTH, ACC)
        add_vector(norm_part + 2 * WIDTH, b_gain_grad, done, WIDTH)
        add_vector(norm_part + 3 * WIDTH, b_bias_grad, done, WIDTH)
    b_z_grad = tl.where(b_z <= 0, 0.0, b_grad)
    add_vector(b_part, tl.sum(b_z_grad, 0), done, WIDTH)
    b_z_grad = b_z_grad.to(operand)
    b_w_grad = tl.dot(tl.trans(b_z_grad), b_in.to(operand), input_precision=PRECISION, out_dtype=ACC)
    add_matrix(w_part, b_w_grad, done, WIDTH)
    b_grad += tl.dot(b_z_grad, matrix(w_o, WIDTH), input_precision=PRECISION, out_dtype=ACC)
    if LAYER_NORM:
        b_grad, b_gain_grad, b_bias_grad = layer_norm_backward(b_grad, b_unit0, b_rstd0, norm, WIDTH, ACC)
        add_vector(norm_part, b_gain_grad, done, WIDTH)
        add_vector(norm_part + WIDTH, b_bias_grad, done, WIDTH)
    return b_grad

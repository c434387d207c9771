"""Device functions of the chunk kernels: which chunk stands in which slot, and the parts of a set-attention block.

A tile is NB blocks of S slots, one row each. A block holds chunks of one length n: one of them if n > 16 (SHARED off:
the block's number is its place in the order of lengths), else ``S // n`` (SHARED on). ``table`` (int64) says where
each length begins in that order (entries 0 to 257) and, from ``SHARED_STARTS`` on, at which block each length up to 16.
Slots without an element are parked: they hold finite rows, attend to finite rows, and get no gradient.
What one chunk holds, be it NaN, must not reach another: masks select, and no product meets another chunk's NaN.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..gpu_plans.chunks import LONGEST_SHARED, SHARED_STARTS

_LONGEST_SHARED = tl.constexpr(LONGEST_SHARED)
_SHARED_STARTS = tl.constexpr(SHARED_STARTS)
_LOG2E = tl.constexpr(1.4426950408889634)
_EPS = tl.constexpr(1e-5)


@triton.jit
def block_lengths(chunk_ptr, order, table, block, LOWEST: tl.constexpr, SLOTS: tl.constexpr, SHARED: tl.constexpr):
    """Length, first place and end of places (in the order of lengths) of the chunks in each block: all [B] int64."""
    if SHARED:
        starts = tl.load(table + _SHARED_STARTS + tl.arange(0, _LONGEST_SHARED))
        n = tl.sum((starts[None, :] <= block[:, None]).to(tl.int64), 1)  # lengths without blocks start with the next
        begin = tl.load(table + n) + (block - tl.load(table + _SHARED_STARTS + n - 1)) * (SLOTS // n)
        end = tl.minimum(begin + SLOTS // n, tl.load(table + n + 1))
    else:
        begin = tl.load(table + LOWEST) + block
        end = tl.minimum(begin + 1, tl.load(table + SLOTS + 1))
        chunk = tl.load(order + begin, mask=begin < end, other=0)
        n = tl.load(chunk_ptr + chunk + 1) - tl.load(chunk_ptr + chunk)
    return n, begin, end


@triton.jit
def places(chunk_ptr, order, table, block, LOWEST: tl.constexpr, SLOTS: tl.constexpr, SHARED: tl.constexpr):
    """Chunk id, element index, chunk within the block, and whether there is one: all [B, S]."""
    n, begin, end = block_lengths(chunk_ptr, order, table, block, LOWEST, SLOTS, SHARED)
    n = n.to(tl.int32)[:, None]
    slot = tl.arange(0, SLOTS)[None, :] + tl.zeros_like(n)
    if SHARED:
        group = slot // n
        element = slot - group * n
        there = begin[:, None] + group < end[:, None]
    else:
        group = tl.zeros_like(slot)
        element = slot
        there = (slot < n) & (begin < end)[:, None]
    chunk = tl.load(order + begin[:, None] + group, mask=there, other=0)
    return chunk, element, group, there


@triton.jit
def attends(chunk_ptr, order, table, block, LOWEST: tl.constexpr, SLOTS: tl.constexpr, SHARED: tl.constexpr):
    """Whether slot i may attend to slot j: [B, S, S] (SHARED) or [B, 1, S]. No row is without a key."""
    n, _, _ = block_lengths(chunk_ptr, order, table, block, LOWEST, SLOTS, SHARED)
    n = n.to(tl.int32)[:, None]
    slot = tl.arange(0, SLOTS)[None, :] + tl.zeros_like(n)
    if SHARED:
        group = slot // n
        return group[:, :, None] == group[:, None, :]
    else:
        return (slot < n)[:, None, :]


@triton.jit
def matrix(w, WIDTH: tl.constexpr):
    """A (h, h) matrix as stored."""
    at = tl.arange(0, WIDTH)
    return tl.load(w + at[:, None] * WIDTH + at[None, :])


@triton.jit
def transposed(w, WIDTH: tl.constexpr):
    """The transpose of a stored (h, h) matrix."""
    at = tl.arange(0, WIDTH)
    return tl.load(w + at[None, :] * WIDTH + at[:, None])


@triton.jit
def vector(v, WIDTH: tl.constexpr, ACC: tl.constexpr):
    return tl.load(v + tl.arange(0, WIDTH)).to(ACC)


@triton.jit
def linear(x, w, b, WIDTH: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr):
    """x [M, h] -> x w^T + b [M, h]."""
    return tl.dot(x, transposed(w, WIDTH), input_precision=PRECISION, out_dtype=ACC) + vector(b, WIDTH, ACC)[None, :]


@triton.jit
def normed(x, WIDTH: tl.constexpr):
    """Rows of mean 0 and variance 1 [M, h], and one over their spread [M]."""
    centred = x - (tl.sum(x, 1) * (1 / WIDTH))[:, None]
    rstd = tl.rsqrt(tl.sum(centred * centred, 1) * (1 / WIDTH) + _EPS)
    return centred * rstd[:, None], rstd


@triton.jit
def normed_backward(grad, unit, rstd, WIDTH: tl.constexpr):
    """Gradient through ``normed``, of its rows ``unit`` [M, h]."""
    mean = tl.sum(grad, 1) * (1 / WIDTH)
    slope = tl.sum(grad * unit, 1) * (1 / WIDTH)
    return (grad - mean[:, None] - unit * slope[:, None]) * rstd[:, None]


@triton.jit
def layer_norm(o, norm, LAYER_NORM: tl.constexpr, WIDTH: tl.constexpr, ACC: tl.constexpr):
    """Layer norm of rows [M, h] by gain and bias ``norm (2, h)``; without LAYER_NORM the rows as they are."""
    if LAYER_NORM:
        o, _ = normed(o, WIDTH)
        o = o * vector(norm, WIDTH, ACC)[None, :] + vector(norm + WIDTH, WIDTH, ACC)[None, :]
    return o


@triton.jit
def layer_norm_backward(grad, unit, rstd, norm, norm_part, WIDTH: tl.constexpr, ACC: tl.constexpr):
    """Gradient through a layer norm whose ``normed`` rows are ``unit`` [M, h]; adds up that of gain and bias."""
    add_to(norm_part, tl.sum(grad * unit, 0), WIDTH)
    add_to(norm_part + WIDTH, tl.sum(grad, 0), WIDTH)
    return normed_backward(grad * vector(norm, WIDTH, ACC)[None, :], unit, rstd, WIDTH)


@triton.jit
def add_relu(o, z):
    return o + tl.where(z <= 0, 0.0, z)  # a NaN stays one


@triton.jit
def feed_forward(
    o, w_o, b_o, norm, LAYER_NORM: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr
):
    """ln1(o' + relu(fc_o(o'))) with o' = ln0(o): [M, h]."""
    o = layer_norm(o, norm, LAYER_NORM, WIDTH, ACC)
    z = linear(o.to(w_o.dtype.element_ty), w_o, b_o, WIDTH, PRECISION, ACC)
    return layer_norm(add_relu(o, z), norm + 2 * WIDTH, LAYER_NORM, WIDTH, ACC)


@triton.jit
def scalar_weights(x, keys, slope, offset):
    """Block 0, one head: softmax_j((slope x_i + offset) x_j) [B, S, S], the slopes of its rows and its means [B, S]."""
    slopes = slope * x + offset
    logits = tl.where(keys, slopes[:, :, None] * x[:, None, :], float("-inf"))
    p = tl.exp2((logits - tl.max(logits, 2)[:, :, None]) * _LOG2E)
    p = p / tl.sum(p, 2)[:, :, None]
    mean = tl.sum(tl.where(keys, p * x[:, None, :], 0.0), 2)
    return p, slopes, mean


@triton.jit
def scalar_attention(
    x, keys, logit, basis,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Block 0 up to its residual: x [B, S] -> o [M, h], and the attended mean of each column's head [M, h]."""
    head_of = tl.arange(0, WIDTH) // (WIDTH // HEADS)
    mean = tl.zeros((ROWS, WIDTH), ACC)
    for head in range(HEADS):
        slope, offset = tl.load(logit + head).to(ACC), tl.load(logit + HEADS + head).to(ACC)
        _, _, m = scalar_weights(x, keys, slope, offset)
        mean = tl.where((head_of == head)[None, :], tl.reshape(m, (ROWS,))[:, None], mean)
    by_x, by_mean = vector(basis, WIDTH, ACC), vector(basis + WIDTH, WIDTH, ACC)
    constant = vector(basis + 2 * WIDTH, WIDTH, ACC)
    o = tl.reshape(x, (ROWS,))[:, None] * by_x[None, :] + mean * by_mean[None, :] + constant[None, :]
    return o, mean


@triton.jit
def to_heads(t, BLOCKS: tl.constexpr, SLOTS: tl.constexpr, HEADS: tl.constexpr):
    """[M, h] -> [NB * H, S, d]."""
    DIM: tl.constexpr = t.shape[1] // HEADS
    t = tl.permute(tl.reshape(t, (BLOCKS, SLOTS, HEADS, DIM)), (0, 2, 1, 3))
    return tl.reshape(t, (BLOCKS * HEADS, SLOTS, DIM))


@triton.jit
def from_heads(t, BLOCKS: tl.constexpr, SLOTS: tl.constexpr, HEADS: tl.constexpr):
    """[NB * H, S, d] -> [M, h]."""
    DIM: tl.constexpr = t.shape[2]
    t = tl.permute(tl.reshape(t, (BLOCKS, HEADS, SLOTS, DIM)), (0, 2, 1, 3))
    return tl.reshape(t, (BLOCKS * SLOTS, HEADS * DIM))


@triton.jit
def widened(t):
    """[B, S, d] -> [B, S, 2d], every second column zero: matrix units want 16 half-precision columns."""
    return tl.reshape(tl.join(t, tl.zeros_like(t)), (t.shape[0], t.shape[1], 2 * t.shape[2]))


@triton.jit
def row_products(a, b, PRECISION: tl.constexpr, ACC: tl.constexpr):
    """a b^T of each batch entry: [B, S, d] x [B, S, d] -> [B, S, S]."""
    if a.shape[2] < 16 and a.dtype.primitive_bitwidth == 16:
        a, b = widened(a), widened(b)
    return tl.dot(a, tl.permute(b, (0, 2, 1)), input_precision=PRECISION, out_dtype=ACC)


@triton.jit
def finite_rows(t, ACC: tl.constexpr):
    """0 for a row of finite numbers, else NaN: [B, S]."""
    return tl.sum(t.to(ACC) * 0.0, 2)


@triton.jit
def kept(t, flag):
    """t [B, S, d] with zeros in the rows that ``flag`` [B, S] marks by NaN."""
    return tl.where((flag == 0)[:, :, None], t, 0.0).to(t.dtype)


@triton.jit
def attention_weights(
    q, k, v, keys, WIDTH: tl.constexpr, SHARED: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr
):
    """softmax(q k^T / sqrt(h)) [B, S, S] per batch entry; where chunks share a block, q, k, v come back finite."""
    if SHARED:  # p v and, in the backward, its relatives add zero times another chunk's row: that row must be finite
        flag = finite_rows(q, ACC) + finite_rows(k, ACC) + finite_rows(v, ACC)
        q, k, v = kept(q, flag), kept(k, flag), kept(v, flag)
    logits = row_products(q, k, PRECISION, ACC)
    if SHARED:
        logits += flag[:, None, :] + flag[:, :, None]
    logits = tl.where(keys, logits, float("-inf"))
    p = tl.exp2((logits - tl.max(logits, 2)[:, :, None]) * (_LOG2E / WIDTH**0.5))
    return p / tl.sum(p, 2)[:, :, None], q, k, v


@triton.jit
def save_rows(to, first_row, t, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Write t [M, h] to the workspace rows from ``first_row`` on."""
    row = first_row + tl.arange(0, ROWS)
    tl.store(to + row[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :], t.to(to.dtype.element_ty))


@triton.jit
def load_rows(of, first_row, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    row = first_row + tl.arange(0, ROWS)
    return tl.load(of + row[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :])


@triton.jit
def add_to(partial, t, N: tl.constexpr):
    """Add a vector [N] to this program's own partial sum.

    Kept in registers it would cost 8 to 16 per thread. The atomic is only a way to add without waiting: one thread of
    one program adds to an address, so the order is that of the program and two runs give the same bits.
    """
    tl.atomic_add(partial + tl.arange(0, N), t, sem="relaxed")


@triton.jit
def add_matrix_to(partial, t, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    at = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    tl.store(partial + at, tl.load(partial + at) + t)

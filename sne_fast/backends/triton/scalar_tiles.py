"""Functions of block 0 of the chunk kernels, whose rows come from scalars by few factors.

See "The first block sees scalars" in docs/method.md.

With slopes s_i = a x_i + c of a head, element i attends by softmax_j(s_i x_j), and its row is a sum of rows of
``basis``, with the attended mean of each head, the value, and 1 as factors. Weights are tiles [S, M] of keys by rows: a
thread has a row, so that sums over keys take no exchange between threads.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .chunk_tiles import LOG2E, bin_lengths, places, row_slots


@triton.jit
def tile_values(
    values,
    chunk_ptr,
    order,
    table,
    first_bin,
    MIN_LENGTH: tl.constexpr,
    MAX_LENGTH: tl.constexpr,
    SLOTS: tl.constexpr,
    MULTI_CHUNK: tl.constexpr,
    BINS: tl.constexpr,
    ACC: tl.constexpr,
):
    """Return the values of a tile's rows [M] and of all slots of a row's bin [S, M], the mask of keys, and places.

    The mask [S, M] says which slots belong to the row's chunk; the values of others are 0. Places, all [M], are the
    index of the value, chunk, element, whether there is an element, and whether it is not of a bin that
    :func:`chunk_tiles.places` repeats.
    """
    i_row_bin, i_slot = row_slots(BINS, SLOTS)
    n, begin, end = bin_lengths(
        chunk_ptr, order, table, first_bin + i_row_bin, MIN_LENGTH, MAX_LENGTH, SLOTS, MULTI_CHUNK
    )
    i_chunk, i_element, i_group, m_element = places(order, n, begin, end, i_slot, MIN_LENGTH, SLOTS, MULTI_CHUNK)
    i_value = tl.load(chunk_ptr + i_chunk) + i_element
    b_x = tl.load(values + i_value, mask=m_element, other=0).to(ACC)  # [M]
    m_own = m_element & (begin < end)
    # The values of a bin are read once, and repeated for its rows.
    i_key = tl.arange(0, SLOTS)[:, None]
    i_bin = first_bin + tl.arange(0, BINS)
    n, begin, end = bin_lengths(chunk_ptr, order, table, i_bin, MIN_LENGTH, MAX_LENGTH, SLOTS, MULTI_CHUNK)
    i_key_chunk, i_key_element, i_key_group, m_key = places(
        order, n[None, :], begin[None, :], end[None, :], i_key, MIN_LENGTH, SLOTS, MULTI_CHUNK
    )
    b_keys = tl.load(values + tl.load(chunk_ptr + i_key_chunk) + i_key_element, mask=m_key, other=0)  # [S, NB]
    b_keys = repeated(b_keys.to(ACC), BINS, SLOTS)
    if MULTI_CHUNK:
        m_keys = repeated(i_key_group, BINS, SLOTS) == i_group[None, :]
        b_keys = tl.where(m_keys, b_keys, 0.0)
    else:
        m_keys = repeated(i_key < n[None, :], BINS, SLOTS)
    return b_x, b_keys, m_keys, i_value, i_chunk, i_element, m_element, m_own


@triton.jit
def repeated(
    b_t,
    BINS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Repeat what each bin has for all its rows, [S, NB] -> [S, M]."""
    b_t = tl.broadcast_to(b_t[:, None, :, None], (b_t.shape[0], SLOTS // 16, BINS, 16))
    return tl.reshape(b_t, (b_t.shape[0], SLOTS * BINS))


@triton.jit
def by_slot(
    b_t,
    BINS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Repeat what the rows of a bin have for each of its rows, [M] -> [S, M]."""
    b_t = tl.permute(tl.reshape(b_t, (SLOTS // 16, BINS, 16)), (0, 2, 1))
    return repeated(tl.reshape(b_t, (SLOTS, BINS)), BINS, SLOTS)


@triton.jit
def scalar_softmax(
    b_x,
    b_keys,
    m_keys,
    slope,
    offset,
    UNMASKED: tl.constexpr,
):
    """Return one head of block 0: exponentials of (slope x_i + offset) x_j [S, M], and by row slope, shift, 1 / sum.

    The largest logit of a row is that of its largest or its smallest key.
    """
    b_slope = slope * b_x + offset  # [M]
    if UNMASKED:
        b_high, b_low = tl.max(b_keys, 0), tl.min(b_keys, 0)
    else:
        b_high = tl.max(tl.where(m_keys, b_keys, float("-inf")), 0)
        b_low = tl.min(tl.where(m_keys, b_keys, float("inf")), 0)
    b_scaled = b_slope * LOG2E
    b_top = b_scaled * tl.where(b_slope >= 0, b_high, b_low)
    b_e = tl.exp2(b_scaled[None, :] * b_keys - b_top[None, :])  # [S, M]
    if not UNMASKED:
        b_e = tl.where(m_keys, b_e, 0.0)
    return b_e, b_slope, b_top, 1 / tl.sum(b_e, 0)  # all but the first [M]


@triton.jit
def scalar_factors(
    b_x,
    b_keys,
    m_keys,
    logit,
    HEADS: tl.constexpr,
    UNMASKED: tl.constexpr,
    ACC: tl.constexpr,
):
    """Return the factors of block 0's rows, [M, C]: the attended mean of each head, the value, ones."""
    COLUMNS: tl.constexpr = 16 if HEADS <= 14 else 32
    i_column = tl.arange(0, COLUMNS)[None, :]
    b_factors = tl.where(i_column == HEADS, b_x[:, None], 1.0)
    for i_head in tl.static_range(HEADS):
        slope, offset = tl.load(logit + i_head).to(ACC), tl.load(logit + HEADS + i_head).to(ACC)
        b_e, _, _, b_inverse = scalar_softmax(b_x, b_keys, m_keys, slope, offset, UNMASKED)
        b_mean = tl.sum(b_e * b_keys, 0) * b_inverse  # [M]
        b_factors = tl.where(i_column == i_head, b_mean[:, None], b_factors)
    return b_factors


@triton.jit
def load_basis(
    basis,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Load ``basis`` as a matrix that the factors of block 0 are multiplied by, [C, h]."""
    i_factor = tl.arange(0, COLUMNS)[:, None]
    i_column = tl.arange(0, WIDTH)[None, :]
    i_which = tl.where(i_factor == HEADS, 0, tl.where(i_factor > HEADS, 2, 1))
    m_own = tl.where(i_factor < HEADS, i_column // (WIDTH // HEADS) == i_factor, i_factor < HEADS + 2)
    return tl.load(basis + i_which * WIDTH + i_column, mask=m_own, other=0)


@triton.jit
def halves(
    b_t,
    operand: tl.constexpr,
):
    """Return two operands of 16 bits whose sum is ``b_t`` to the precision of both."""
    b_first = b_t.to(operand)
    return b_first, (b_t - b_first.to(b_t.dtype)).to(operand)


@triton.jit
def scalar_rows(
    b_factors,
    b_basis,
    ACC: tl.constexpr,
):
    """Return block 0 up to its residual: the product of factors [M, C] and basis [C, h], [M, h]."""
    if b_basis.dtype.primitive_bitwidth == 16:
        b_first, b_second = halves(b_factors, b_basis.dtype)
        return tl.dot(b_first, b_basis, tl.dot(b_second, b_basis, out_dtype=ACC), out_dtype=ACC)
    else:
        return tl.dot(b_factors, b_basis, input_precision="ieee", out_dtype=ACC)

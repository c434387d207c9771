"""Kernels of ``gather_chunks``: tiles of all tensors in one launch, each found by a search in the tiles' prefix sum.

``table (FIELDS, T)`` int64 holds per tensor: its first tile, the address of its values (in backward: of its gradient),
the code of its dtype, R, K, its first value in the result, its index in ``scale``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .pieces_kernels import WAYS

FLOAT32, FLOAT64, FLOAT16, BFLOAT16 = (tl.constexpr(code) for code in range(4))


@triton.jit
def find_tensor(
    first_tile,
    tensors,
    i_tile,
):
    """Return the last tensor whose first tile is not after ``i_tile``, by the search of ``find_set``."""
    i_low = i_tile * 0
    size = tensors + i_low
    while size > 1:
        step = (size + WAYS - 1) // WAYS
        i_tensor = i_low + tl.arange(0, WAYS) * step
        m_tensor = i_tensor < i_low + size
        b_first = tl.load(first_tile + i_tensor, mask=m_tensor, other=0)  # [WAYS]
        below = tl.sum((m_tensor & (b_first <= i_tile)).to(tl.int64), 0) - 1
        end = i_low + size
        i_low += below * step
        size = tl.minimum(step, end - i_low)
    return i_low


@triton.jit
def divided(
    a,
    b,
    ACC: tl.constexpr,
):
    """Return a / b rounded to nearest: the plain ``/`` of float32 is an approximation on a GPU."""
    if ACC == tl.float32:
        return tl.div_rn(a, b)
    return a / b


@triton.jit
def load_as(
    address,
    i_value,
    m_value,
    code,
    ACC: tl.constexpr,
):
    """Load values ``i_value`` of an array of any of the four dtypes, as ACC."""
    if code == FLOAT32:
        b_values = tl.load(address.to(tl.pointer_type(tl.float32)) + i_value, mask=m_value, other=0).to(ACC)
    elif code == FLOAT64:
        b_values = tl.load(address.to(tl.pointer_type(tl.float64)) + i_value, mask=m_value, other=0).to(ACC)
    elif code == FLOAT16:
        b_values = tl.load(address.to(tl.pointer_type(tl.float16)) + i_value, mask=m_value, other=0).to(ACC)
    else:
        b_values = tl.load(address.to(tl.pointer_type(tl.bfloat16)) + i_value, mask=m_value, other=0).to(ACC)
    return b_values


@triton.jit
def store_as(
    address,
    i_value,
    b_values,
    m_value,
    code,
):
    """Store values into an array of any of the four dtypes."""
    if code == FLOAT32:
        tl.store(address.to(tl.pointer_type(tl.float32)) + i_value, b_values.to(tl.float32), mask=m_value)
    elif code == FLOAT64:
        tl.store(address.to(tl.pointer_type(tl.float64)) + i_value, b_values.to(tl.float64), mask=m_value)
    elif code == FLOAT16:
        tl.store(address.to(tl.pointer_type(tl.float16)) + i_value, b_values.to(tl.float16), mask=m_value)
    else:
        tl.store(address.to(tl.pointer_type(tl.bfloat16)) + i_value, b_values.to(tl.bfloat16), mask=m_value)


@triton.jit
def flat_tile(
    i_local,
    rows,
    positions,
    TILE: tl.constexpr,
):
    """Return the values of a tile of a matrix of one row or column, which is its own transpose, and their mask."""
    i_value = i_local * TILE + tl.arange(0, TILE)
    return i_value, i_value < rows * positions


@triton.jit
def transposed_tile(
    i_local,
    rows,
    positions,
    TILE: tl.constexpr,
    TILE_K: tl.constexpr,
):
    """Return a tile's values in the matrix (R, K), in its transpose, and their mask: [TILE / TILE_K, TILE_K]."""
    TILE_R: tl.constexpr = TILE // TILE_K
    along_k = (positions + TILE_K - 1) // TILE_K
    i_row = (i_local // along_k) * TILE_R + tl.arange(0, TILE_R)[:, None]
    i_position = (i_local % along_k) * TILE_K + tl.arange(0, TILE_K)[None, :]
    i_value, i_transposed = i_row * positions + i_position, i_position * rows + i_row
    return i_value, i_transposed, (i_row < rows) & (i_position < positions)


@triton.jit(do_not_specialize=["tensors", "stride"])
def gather_kernel(
    table,
    scale,
    values,
    tensors,
    stride,
    TILE: tl.constexpr,
    TILE_K: tl.constexpr,
    ACC: tl.constexpr,
):
    """Write one tile of one tensor's transpose over its scale."""
    i_tile = tl.program_id(0).to(tl.int64)
    i_tensor = find_tensor(table, tensors, i_tile)
    i_local = i_tile - tl.load(table + i_tensor)
    address = tl.load(table + stride + i_tensor)
    code = tl.load(table + 2 * stride + i_tensor)
    rows = tl.load(table + 3 * stride + i_tensor)
    positions = tl.load(table + 4 * stride + i_tensor)
    p_result = values + tl.load(table + 5 * stride + i_tensor)
    divisor = tl.load(scale + tl.load(table + 6 * stride + i_tensor)).to(ACC)
    if (rows == 1) | (positions == 1):
        i_value, m_value = flat_tile(i_local, rows, positions, TILE)
        b_flat = divided(load_as(address, i_value, m_value, code, ACC), divisor, ACC)  # [TILE]
        tl.store(p_result + i_value, b_flat.to(values.dtype.element_ty), mask=m_value)
    else:
        i_source, i_target, m_tile = transposed_tile(i_local, rows, positions, TILE, TILE_K)
        b_tile = divided(load_as(address, i_source, m_tile, code, ACC), divisor, ACC)  # [TILE_R, TILE_K]
        tl.store(p_result + i_target, b_tile.to(values.dtype.element_ty), mask=m_tile)


@triton.jit(do_not_specialize=["tensors", "stride"])
def scatter_kernel(
    table,
    scale,
    grad,
    values,
    part,
    tensors,
    stride,
    TILE: tl.constexpr,
    TILE_K: tl.constexpr,
    ACC: tl.constexpr,
):
    """Write one tile of one tensor's gradient, and the tile's part of the gradient of its scale."""
    i_tile = tl.program_id(0).to(tl.int64)
    i_tensor = find_tensor(table, tensors, i_tile)
    i_local = i_tile - tl.load(table + i_tensor)
    address = tl.load(table + stride + i_tensor)
    code = tl.load(table + 2 * stride + i_tensor)
    rows = tl.load(table + 3 * stride + i_tensor)
    positions = tl.load(table + 4 * stride + i_tensor)
    begin = tl.load(table + 5 * stride + i_tensor)
    divisor = tl.load(scale + tl.load(table + 6 * stride + i_tensor)).to(ACC)
    if (rows == 1) | (positions == 1):
        i_value, m_value = flat_tile(i_local, rows, positions, TILE)
        b_flat = divided(tl.load(grad + begin + i_value, mask=m_value, other=0).to(ACC), divisor, ACC)  # [TILE]
        store_as(address, i_value, b_flat, m_value, code)
        total = tl.sum(b_flat * tl.load(values + begin + i_value, mask=m_value, other=0).to(ACC), 0)
    else:
        i_target, i_source, m_tile = transposed_tile(i_local, rows, positions, TILE, TILE_K)
        b_tile = divided(tl.load(grad + begin + i_source, mask=m_tile, other=0).to(ACC), divisor, ACC)
        store_as(address, i_target, b_tile, m_tile, code)
        b_products = b_tile * tl.load(values + begin + i_source, mask=m_tile, other=0).to(ACC)  # [TILE_R, TILE_K]
        total = tl.sum(tl.sum(b_products, 1), 0)
    tl.store(part + i_tile, total)


@triton.jit(do_not_specialize=["tensors", "tiles", "stride"])
def scale_grad_kernel(
    table,
    part,
    grad_scale,
    tensors,
    tiles,
    stride,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    """Write the gradient of one tensor's scale: minus the sum of its tiles, in their order."""
    i_tensor = tl.program_id(0).to(tl.int64)
    first = tl.load(table + i_tensor)
    end = tl.load(table + i_tensor + 1, mask=i_tensor + 1 < tensors, other=tiles)
    b_sum = tl.zeros([BLOCK], ACC)
    for start in range(first, end, BLOCK):
        i_tile = start + tl.arange(0, BLOCK)
        b_sum += tl.load(part + i_tile, mask=i_tile < end, other=0)  # [BLOCK]
    tl.store(grad_scale + tl.load(table + 6 * stride + i_tensor), -tl.sum(b_sum, 0))

"""Device code of gather_chunks: tiles of all tensors in one launch, each found by a search in the tiles' prefix sum.

``table (FIELDS, T)`` int64 holds per tensor: its first tile, the address of its values (in backward: of its gradient),
the code of its dtype, R, K, where it starts in the result, its place in ``scale``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .pieces import WAYS

FLOAT32, FLOAT64, FLOAT16, BFLOAT16 = (tl.constexpr(code) for code in range(4))


@triton.jit
def find_tensor(first_tile, tensors, tile):
    """The last tensor whose first tile is not after ``tile``; see :func:`_slots.find_set`."""
    low = tile * 0
    size = tensors + low
    while size > 1:
        step = (size + WAYS - 1) // WAYS
        at = low + tl.arange(0, WAYS) * step
        inside = at < low + size
        first = tl.load(first_tile + at, mask=inside, other=0)
        below = tl.sum((inside & (first <= tile)).to(tl.int64), 0) - 1
        end = low + size
        low += below * step
        size = tl.minimum(step, end - low)
    return low


@triton.jit
def divided(a, b, ACC: tl.constexpr):
    """a / b rounded as IEEE says: the plain ``/`` of float32 is an approximation on a GPU."""
    if ACC == tl.float32:
        return tl.div_rn(a, b)
    return a / b


@triton.jit
def load_as(address, at, mask, code, ACC: tl.constexpr):
    """Values at ``at`` of an array of any of the four dtypes, as ACC."""
    if code == FLOAT32:
        values = tl.load(address.to(tl.pointer_type(tl.float32)) + at, mask=mask, other=0).to(ACC)
    elif code == FLOAT64:
        values = tl.load(address.to(tl.pointer_type(tl.float64)) + at, mask=mask, other=0).to(ACC)
    elif code == FLOAT16:
        values = tl.load(address.to(tl.pointer_type(tl.float16)) + at, mask=mask, other=0).to(ACC)
    else:
        values = tl.load(address.to(tl.pointer_type(tl.bfloat16)) + at, mask=mask, other=0).to(ACC)
    return values


@triton.jit
def flat_tile(local, rows, positions, TILE: tl.constexpr):
    """Of a matrix of one row or one column: places in it, places in the result (the same), and what is inside."""
    at = local * TILE + tl.arange(0, TILE)
    return at, at < rows * positions


@triton.jit
def transposed_tile(local, rows, positions, TILE: tl.constexpr, TILE_K: tl.constexpr):
    """[TILE / TILE_K, TILE_K]: places in the matrix (R, K), in its transpose, and what is inside."""
    TILE_R: tl.constexpr = TILE // TILE_K
    along_k = (positions + TILE_K - 1) // TILE_K
    r = (local // along_k) * TILE_R + tl.arange(0, TILE_R)[:, None]
    k = (local % along_k) * TILE_K + tl.arange(0, TILE_K)[None, :]
    return r * positions + k, k * rows + r, (r < rows) & (k < positions)


@triton.jit(do_not_specialize=["tensors", "stride"])
def gather_kernel(table, scale, values, tensors, stride, TILE: tl.constexpr, TILE_K: tl.constexpr, ACC: tl.constexpr):
    tile = tl.program_id(0).to(tl.int64)
    own = find_tensor(table, tensors, tile)
    local = tile - tl.load(table + own)
    address = tl.load(table + stride + own)
    code = tl.load(table + 2 * stride + own)
    rows = tl.load(table + 3 * stride + own)
    positions = tl.load(table + 4 * stride + own)
    result = values + tl.load(table + 5 * stride + own)
    divisor = tl.load(scale + tl.load(table + 6 * stride + own)).to(ACC)
    if (rows == 1) | (positions == 1):
        at, mask = flat_tile(local, rows, positions, TILE)
        quotient = divided(load_as(address, at, mask, code, ACC), divisor, ACC)
        tl.store(result + at, quotient.to(values.dtype.element_ty), mask=mask)
    else:
        source, to, mask2 = transposed_tile(local, rows, positions, TILE, TILE_K)
        quotient2 = divided(load_as(address, source, mask2, code, ACC), divisor, ACC)
        tl.store(result + to, quotient2.to(values.dtype.element_ty), mask=mask2)


@triton.jit
def store_as(address, at, tile, mask, code):
    """The inverse of :func:`load_as`."""
    if code == FLOAT32:
        tl.store(address.to(tl.pointer_type(tl.float32)) + at, tile.to(tl.float32), mask=mask)
    elif code == FLOAT64:
        tl.store(address.to(tl.pointer_type(tl.float64)) + at, tile.to(tl.float64), mask=mask)
    elif code == FLOAT16:
        tl.store(address.to(tl.pointer_type(tl.float16)) + at, tile.to(tl.float16), mask=mask)
    else:
        tl.store(address.to(tl.pointer_type(tl.bfloat16)) + at, tile.to(tl.bfloat16), mask=mask)


@triton.jit(do_not_specialize=["tensors", "stride"])
def scatter_kernel(
    table, scale, grad, values, part, tensors, stride,
    TILE: tl.constexpr, TILE_K: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Gradients of the tensors, and per tile what it adds to the gradient of its scale."""
    tile = tl.program_id(0).to(tl.int64)
    own = find_tensor(table, tensors, tile)
    local = tile - tl.load(table + own)
    address = tl.load(table + stride + own)
    code = tl.load(table + 2 * stride + own)
    rows = tl.load(table + 3 * stride + own)
    positions = tl.load(table + 4 * stride + own)
    begin = tl.load(table + 5 * stride + own)
    divisor = tl.load(scale + tl.load(table + 6 * stride + own)).to(ACC)
    if (rows == 1) | (positions == 1):
        at, mask = flat_tile(local, rows, positions, TILE)
        by_value = divided(tl.load(grad + begin + at, mask=mask, other=0).to(ACC), divisor, ACC)
        store_as(address, at, by_value, mask, code)
        total = tl.sum(by_value * tl.load(values + begin + at, mask=mask, other=0).to(ACC), 0)
    else:
        target, source, mask2 = transposed_tile(local, rows, positions, TILE, TILE_K)
        by_value2 = divided(tl.load(grad + begin + source, mask=mask2, other=0).to(ACC), divisor, ACC)
        store_as(address, target, by_value2, mask2, code)
        products = by_value2 * tl.load(values + begin + source, mask=mask2, other=0).to(ACC)
        total = tl.sum(tl.sum(products, 1), 0)
    tl.store(part + tile, total)


@triton.jit(do_not_specialize=["tensors", "tiles", "stride"])
def scale_grad_kernel(table, part, grad_scale, tensors, tiles, stride, BLOCK: tl.constexpr, ACC: tl.constexpr):
    """Minus the sum of a tensor's tiles, in their order."""
    own = tl.program_id(0).to(tl.int64)
    first = tl.load(table + own)
    end = tl.load(table + own + 1, mask=own + 1 < tensors, other=tiles)
    total = tl.zeros([BLOCK], ACC)
    for start in range(first, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        total += tl.load(part + at, mask=at < end, other=0)
    tl.store(grad_scale + tl.load(table + 6 * stride + own), -tl.sum(total, 0))

"""Cutting ragged sets into pieces of ``BLOCK`` rows without a map, a prefix sum or a host synchronisation.

Set s owns the slots ``ptr[s] // BLOCK + s`` up to, not including, ``ptr[s+1] // BLOCK + s + 1``: always enough for its
pieces, at most one more. There are ``rows // BLOCK + sets`` slots in all, known on the host, and a slot's set is found
by a search in ``ptr``. Sums over a set's slots run in their order, so that two runs give the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launches import next_power_of_2, on_device, triton_dtype

WAYS = tl.constexpr(64)


def slot_count(rows: int, sets: int, block: int) -> int:
    return rows // block + sets


@triton.jit
def find_set(ptr, sets, slot, BLOCK: tl.constexpr):
    """The set of a slot: a search that looks at 64 pointers at a time, as every look waits for memory."""
    low = slot * 0  # int64
    size = sets + low
    while size > 1:
        step = (size + WAYS - 1) // WAYS
        at = low + tl.arange(0, WAYS) * step
        inside = at < low + size
        first = tl.load(ptr + at, mask=inside, other=0) // BLOCK + at
        below = tl.sum((inside & (first <= slot)).to(tl.int64), 0) - 1
        end = low + size
        low += below * step
        size = tl.minimum(step, end - low)
    return low


@triton.jit
def slot_range(ptr, sets, slot, BLOCK: tl.constexpr):
    """Set of a slot, and the slot's first row and its set's last row plus one: no rows where they meet."""
    own = find_set(ptr, sets, slot, BLOCK)
    begin = tl.load(ptr + own)
    end = tl.load(ptr + own + 1)
    start = begin + (slot - (begin // BLOCK + own)) * BLOCK
    return own, start, end


@triton.jit
def set_slots(ptr, own, BLOCK: tl.constexpr):
    """First slot of set ``own``, and how many hold rows."""
    begin = tl.load(ptr + own)
    end = tl.load(ptr + own + 1)
    return begin // BLOCK + own, (end - begin + BLOCK - 1) // BLOCK


@triton.jit(do_not_specialize=["stride"])
def sum_slots_kernel(
    partial, out, ptr, row_ptr, stride, width,
    ONE_ROW: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """out[row_ptr[s] + i] = sum over the slots of set s of partial[slot, i], i = 0.., each of ``width`` values."""
    own = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    if ONE_ROW:
        row = own
        size = width + own * 0
    else:
        row = tl.load(row_ptr + own)
        size = (tl.load(row_ptr + own + 1) - row) * width
    inside = columns < size
    first, count = set_slots(ptr, own, BLOCK)
    total = tl.zeros([COLUMNS], ACC)
    for slot in range(first, first + count):
        total += tl.load(partial + slot * stride + columns, mask=inside, other=0)
    tl.store(out + row * width + columns, total.to(out.dtype.element_ty), mask=inside)


def sum_slots(partial: Tensor, out: Tensor, ptr: Tensor, row_ptr: Tensor | None, block: int) -> None:
    """Fill the rows of ``out`` by :func:`sum_slots_kernel`; ``partial`` is ``(slots, most rows of a set, width)``.

    ``row_ptr`` None: one row of ``out`` per set.
    """
    width = out.shape[1]
    size = partial.shape[1] * width
    sets = ptr.shape[0] - 1
    if not sets or not size:
        return
    columns = min(1024, next_power_of_2(size))
    with on_device(out):
        sum_slots_kernel[(sets, triton.cdiv(size, columns))](
            partial, out, ptr, ptr if row_ptr is None else row_ptr, size, width, ONE_ROW=row_ptr is None, BLOCK=block,
            COLUMNS=columns, ACC=triton_dtype(partial.dtype), num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip


def empty_partial(slots: int, rows: int, width: int, like: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty((slots, rows, width), dtype=dtype, device=like.device)

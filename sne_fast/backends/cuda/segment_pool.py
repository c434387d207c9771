"""``segment_pool`` on the CUDA backend: division of the work, allocation and launches of csrc/cuda/segment_pool.

See docs/method.md, Ops.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from ...ops import checks
from ...ops.backend import Arguments
from ...ops.schema import named
from ...ops.supported_widths import pool_width_reasons
from . import library

# Work items of a block (csrc/cuda/segment_pool/segments.h): at least so many, because every block first searches its
# segments, and at most as many as the kernels have room for. In between, BLOCKS for each multiprocessor.
MIN_ITEMS, MAX_ITEMS = 128, 16320
BLOCKS = 8


def divide_work(rows: int, sets: int, queries: int, multiprocessors: int) -> tuple[int, int]:
    """Return the number of work items per block, and of blocks."""
    items = rows + queries * sets
    per_block = min(MAX_ITEMS, max(MIN_ITEMS, -(-items // (BLOCKS * multiprocessors))))
    return per_block, -(-items // per_block)


def _argument(x: Tensor, logits: Tensor, ptr: Tensor, lse: Tensor, **tensors: Tensor) -> Any:
    (rows, width), queries, sets = x.shape, logits.shape[1], ptr.shape[0] - 1
    per_block, blocks = divide_work(rows, sets, queries, library.multiprocessors(x.device))
    tensors.update(x=x, logits=logits, ptr=ptr, lse=lse)
    return library.SegmentPool(
        rows=rows, sets=sets, width=width, queries=queries, precision=library.precision(x.dtype), per_block=per_block,
        blocks=blocks, **{name: t.data_ptr() for name, t in tensors.items()},
    )  # fmt: skip


def _workspace(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def segment_pool(x: Tensor, logits: Tensor, ptr: Tensor, ptr_host: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the op ``segment_pool``, with arguments and results as in :mod:`sne_fast.ops.schema`."""
    checks.segment_pool("segment_pool", x, logits, ptr, ptr_host)
    x, logits, ptr = library.aligned(x), library.aligned(logits), ptr.contiguous()
    width, queries, sets = x.shape[1], logits.shape[1], ptr.shape[0] - 1
    out = torch.empty((sets, queries, width), dtype=x.dtype, device=x.device)
    lse = _workspace(x, sets, queries)
    if out.numel():
        argument = _argument(x, logits, ptr, lse, out=out)
        partials = 2 * argument.blocks if argument.blocks > 1 else 0
        part, part_state = _workspace(x, partials, queries, width), _workspace(x, partials, queries, 2)
        argument.part, argument.part_state = library.pointers(part, part_state)
        library.run("segment_pool", x.device, ctypes.byref(argument))
    return out, lse


def segment_pool_backward(
    grad: Tensor, x: Tensor, logits: Tensor, out: Tensor, lse: Tensor, ptr: Tensor, ptr_host: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute the op ``segment_pool_backward``, with arguments and results as in :mod:`sne_fast.ops.schema`."""
    checks.segment_pool("segment_pool_backward", x, logits, ptr, ptr_host)
    grad, x, logits = library.aligned(grad.to(x.dtype)), library.aligned(x), library.aligned(logits)
    lse, ptr = lse.contiguous(), ptr.contiguous()
    width, queries, sets = x.shape[1], logits.shape[1], ptr.shape[0] - 1
    checks.saved("segment_pool_backward", "grad", grad, (sets, queries, width), x.device)
    checks.saved("segment_pool_backward", "lse", lse, (sets, queries), x.device)
    if lse.dtype != torch.float32:
        raise TypeError(f"segment_pool_backward: lse must be float32, got {checks.described(lse)}")
    grad_logits = torch.empty_like(logits)
    if not x.numel() or not queries or not sets:
        return torch.zeros_like(x), grad_logits
    grad_x, weights_grad = torch.empty_like(x), _workspace(x, *logits.shape)
    argument = _argument(x, logits, ptr, lse, grad=grad, grad_x=grad_x, grad_logits=grad_logits,
                         weights_grad=weights_grad)  # fmt: skip
    part_mean = _workspace(x, 2 * argument.blocks, queries)
    argument.part_mean = part_mean.data_ptr()
    library.run("segment_pool_backward", x.device, ctypes.byref(argument))
    return grad_x, grad_logits


def why_not(op: str, args: Arguments) -> list[str]:
    """Return why these kernels cannot run a call; empty if they can."""
    return pool_width_reasons(named(op, args)["x"].shape[1])

"""Softmax pooling of ragged segments (SPEC 4.2): shares of the blocks, allocation, csrc/cuda/segment_pool."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from . import library

# Items (see csrc/cuda/segment_pool/segments.h) of a thread block: at least so many, as every block searches for its
# segments first; at most what the kernels have room for. In between, BLOCKS for each multiprocessor.
FEWEST, MOST = 128, 16320
BLOCKS = 8


def shares(rows: int, sets: int, queries: int, multiprocessors: int) -> tuple[int, int]:
    """Items per block, and blocks."""
    items = rows + queries * sets
    per_block = min(MOST, max(FEWEST, -(-items // (BLOCKS * multiprocessors))))
    return per_block, -(-items // per_block)


def _vectors(t: Tensor) -> Tensor:
    """Contiguous and at a multiple of 16 bytes."""
    t = t.contiguous()
    return t.clone() if t.data_ptr() % 16 else t


def _check(op: str, x: Tensor, logits: Tensor, ptr: Tensor) -> None:
    """Nothing has looked at the inputs of a compiled call, and wrong sizes would write anywhere."""
    if x.dim() != 2 or logits.dim() != 2 or logits.shape[0] != x.shape[0] or ptr.dim() != 1 or not ptr.numel():
        raise ValueError(
            f"{op}: x, logits and ptr must have shapes (rows, h), (rows, A) and (S+1,), got {tuple(x.shape)}, "
            f"{tuple(logits.shape)} and {tuple(ptr.shape)}"
        )
    if x.dtype != logits.dtype or not x.device == logits.device == ptr.device or ptr.dtype != torch.int64:
        raise TypeError(
            f"{op}: x and logits must have one dtype and device, ptr be int64 beside them, got {x.dtype} on "
            f"{x.device}, {logits.dtype} on {logits.device} and {ptr.dtype} on {ptr.device}"
        )


def _argument(x: Tensor, logits: Tensor, ptr: Tensor, lse: Tensor, **tensors: Tensor) -> Any:
    (rows, width), queries, sets = x.shape, logits.shape[1], ptr.shape[0] - 1
    per_block, blocks = shares(rows, sets, queries, library.multiprocessors(x.device))
    tensors.update(x=x, logits=logits, ptr=ptr, lse=lse)
    return library.SegmentPool(
        rows=rows, sets=sets, width=width, queries=queries, precision=library.precision(x.dtype), per_block=per_block,
        blocks=blocks, **{name: t.data_ptr() for name, t in tensors.items()},
    )  # fmt: skip


def _workspace(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def segment_pool(x: Tensor, logits: Tensor, ptr: Tensor, ptr_host: Tensor) -> tuple[Tensor, Tensor]:
    _check("segment_pool", x, logits, ptr)
    x, logits, ptr = _vectors(x), _vectors(logits), ptr.contiguous()
    width, queries, sets = x.shape[1], logits.shape[1], ptr.shape[0] - 1
    out = torch.empty((sets, queries, width), dtype=x.dtype, device=x.device)
    lse = _workspace(x, sets, queries)
    if out.numel():
        argument = _argument(x, logits, ptr, lse, out=out)
        slots = 2 * argument.blocks if argument.blocks > 1 else 0
        part, part_state = _workspace(x, slots, queries, width), _workspace(x, slots, queries, 2)
        argument.part, argument.part_state = library.pointers(part, part_state)
        library.run("segment_pool", x.device, ctypes.byref(argument))
    return out, lse


def segment_pool_backward(
    grad: Tensor, x: Tensor, logits: Tensor, out: Tensor, lse: Tensor, ptr: Tensor, ptr_host: Tensor
) -> tuple[Tensor, Tensor]:
    _check("segment_pool_backward", x, logits, ptr)
    grad, x, logits = _vectors(grad.to(x.dtype)), _vectors(x), _vectors(logits)
    lse, ptr = lse.contiguous(), ptr.contiguous()
    width, queries, sets = x.shape[1], logits.shape[1], ptr.shape[0] - 1
    if grad.shape != (sets, queries, width) or lse.shape != (sets, queries) or lse.dtype != torch.float32:
        raise ValueError(
            f"segment_pool_backward: grad and lse must have shapes {(sets, queries, width)} and {(sets, queries)}, lse "
            f"of float32, got {tuple(grad.shape)}, {tuple(lse.shape)} and {lse.dtype}"
        )
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


def why_not(op: str, args: tuple[Any, ...]) -> list[str]:
    width = args[1 if op.endswith("_backward") else 0].shape[1]
    return [f"width must be a multiple of 16, got {width}"] if width % 16 or not width else []

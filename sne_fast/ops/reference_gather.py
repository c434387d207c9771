"""The ops ``gather_chunks`` and ``gather_stored`` in plain PyTorch, for :mod:`sne_fast.ops.reference`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .schema import STORED_DTYPES, accumulate_dtype


def gather_chunks(tensors: Sequence[Tensor], scale: Tensor, plan: Tensor, dtype: torch.dtype) -> Tensor:
    """Write the transpose ``(K, R)`` of each tensor, a matrix ``(R, K)`` by its row of ``plan``, over its scale."""
    values = scale.new_empty((sum(t.numel() for t in tensors),), dtype=dtype)
    at = 0
    for tensor, (rows, positions), divisor in zip(tensors, plan.tolist(), scale, strict=True):
        out = values[at : at + tensor.numel()].view(positions, rows)
        source = tensor.reshape(rows, positions).t()
        if dtype == accumulate_dtype(dtype):
            out.copy_(source).div_(divisor)
        else:
            out.copy_(source.to(accumulate_dtype(dtype)) / divisor)
        at += tensor.numel()
    return values


def gather_stored(
    buffers: Sequence[Tensor], table: Tensor, scale: Tensor, num_values: int, dtype: torch.dtype
) -> Tensor:
    """Write tensors that lie in buffers one after another, each as the transpose of its matrix over its scale.

    A row of ``table`` is the place of the buffer, the offset in it in bytes, the place of the dtype in
    ``STORED_DTYPES``, and the matrix ``(R, K)``.
    """
    held = [buffer.reshape(-1).view(torch.uint8) for buffer in buffers]
    tensors = []
    for buffer, offset, code, rows, columns in table.tolist():
        stored = STORED_DTYPES[code]
        tensors.append(held[buffer][offset : offset + rows * columns * stored.itemsize].view(stored))
    return gather_chunks(tensors, scale, table[:, 3:], dtype)


def gather_chunks_backward(
    grad: Tensor, values: Tensor, tensors: Sequence[Tensor], scale: Tensor, plan: Tensor
) -> tuple[list[Tensor], Tensor]:
    """Return the gradients of the tensors and of their scale."""
    grads, grad_scale, at = [], torch.zeros_like(scale), 0
    for t, (tensor, (rows, positions)) in enumerate(zip(tensors, plan.tolist(), strict=True)):
        part = slice(at, at + tensor.numel())
        by_value = grad[part].to(scale.dtype) / scale[t]
        grads.append(by_value.view(positions, rows).t().reshape(tensor.shape).to(tensor.dtype).contiguous())
        grad_scale[t] = -torch.dot(by_value, values[part].to(scale.dtype))
        at += tensor.numel()
    return grads, grad_scale

"""Parameters that live on a GPU, cut, transposed, scaled and cast in one launch (SPEC 1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._schema import accumulate_dtype
from . import _gather_chunks as device
from ._device_tables import on_device_without_waiting
from ._launch import Launch, architecture, launch, on_device, sum_dtype, triton_dtype

CODES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}


def _sizes(scale: Tensor, dtype: torch.dtype) -> Launch:
    return launch("gather_chunks", dtype=dtype, arch=architecture(scale.device))


def _check(op: str, tensors: Sequence[Tensor], scale: Tensor, plan: Tensor) -> None:
    """Nothing has looked at the inputs of a compiled call, and wrong sizes would write anywhere."""
    if plan.shape != (len(tensors), 2) or scale.shape != (len(tensors),) or plan.device.type != "cpu":
        raise ValueError(
            f"{op}: scale and plan must have shapes ({len(tensors)},) and ({len(tensors)}, 2), plan on the CPU, got "
            f"{tuple(scale.shape)} and {tuple(plan.shape)} on {plan.device}"
        )
    for t, (tensor, (rows, positions)) in enumerate(zip(tensors, plan.tolist(), strict=True)):
        if min(rows, positions) < 0 or tensor.numel() != rows * positions or tensor.device != scale.device:
            raise ValueError(
                f"{op}: tensors[{t}] must have shape {(rows, positions)} by plan[{t}] and be on {scale.device}, got "
                f"{tuple(tensor.shape)} on {tensor.device}"
            )


def _table(tensors: Sequence[Tensor], plan: Tensor, sizes: Launch) -> tuple[np.ndarray, int]:
    """Table (7, tensors that are not empty) of _gather_chunks.py, and the number of tiles."""
    rows, positions = plan.numpy().T.astype(np.int64).reshape(2, -1)
    counts = rows * positions
    tile, tile_k = sizes["TILE"], sizes["TILE_K"]
    flat = (rows == 1) | (positions == 1)
    transposed = -(-rows // (tile // tile_k)) * -(-positions // tile_k)
    tiles = np.where(flat, -(-counts // tile), transposed)
    fields = [
        np.cumsum(tiles) - tiles, np.array([t.data_ptr() for t in tensors], np.int64),
        np.array([CODES[t.dtype] for t in tensors], np.int64),
        rows, positions, np.cumsum(counts) - counts, np.arange(len(tensors)),
    ]  # fmt: skip
    used = counts > 0
    return np.ascontiguousarray(np.stack(fields)[:, used]), int(tiles[used].sum())


def gather_chunks(tensors: Sequence[Tensor], scale: Tensor, plan: Tensor, dtype: torch.dtype) -> Tensor:
    _check("gather_chunks", tensors, scale, plan)
    acc = accumulate_dtype(dtype)
    matrices = [(t if t.dtype in CODES else t.to(acc)).contiguous() for t in tensors]  # float8 and the like
    values = scale.new_empty((sum(t.numel() for t in matrices),), dtype=dtype)
    sizes = _sizes(scale, dtype)
    table, tiles = _table(matrices, plan, sizes)
    if tiles:
        count = table.shape[1]
        with on_device(scale):
            device.gather_kernel[(tiles,)](
                on_device_without_waiting(table, scale.device, repeats=True), scale.contiguous(), values, count, count,
                ACC=sum_dtype(dtype), **sizes.blocks, **sizes.options,
            )  # fmt: skip
    return values


def gather_chunks_backward(
    grad: Tensor, values: Tensor, tensors: Sequence[Tensor], scale: Tensor, plan: Tensor
) -> tuple[list[Tensor], Tensor]:
    _check("gather_chunks_backward", tensors, scale, plan)
    if grad.shape != values.shape or values.shape != (sum(t.numel() for t in tensors),):
        raise ValueError(f"gather_chunks_backward: grad and values must have the shape of all tensors' values, got "
                         f"{tuple(grad.shape)} and {tuple(values.shape)}")  # fmt: skip
    computed = accumulate_dtype(values.dtype)
    types = [t.dtype if t.dtype in CODES else computed for t in tensors]
    grads = [torch.empty(t.shape, dtype=dtype, device=t.device) for t, dtype in zip(tensors, types, strict=True)]
    grad_scale = torch.zeros_like(scale, memory_format=torch.contiguous_format)
    sizes, acc = _sizes(scale, values.dtype), triton_dtype(scale.dtype)
    table, tiles = _table(grads, plan, sizes)
    if tiles:
        count, part = table.shape[1], torch.empty(tiles, dtype=scale.dtype, device=scale.device)
        with on_device(scale):
            at = on_device_without_waiting(table, scale.device, repeats=False)
            device.scatter_kernel[(tiles,)](
                at, scale.contiguous(), grad.contiguous(), values.contiguous(), part, count, count,
                ACC=acc, **sizes.blocks, **sizes.options,
            )  # fmt: skip
            device.scale_grad_kernel[(count,)](
                at, part, grad_scale, count, tiles, count, BLOCK=1024, ACC=acc, num_warps=4, enable_fp_fusion=True
            )
    return [g.to(t.dtype) for g, t in zip(grads, tensors, strict=True)], grad_scale


def why_not(op: str, args: tuple[Any, ...]) -> list[str]:
    dtype = args[0].dtype if op.endswith("_backward") else args[3]
    return [] if dtype in CODES else [f"dtype must be one of {', '.join(map(str, CODES))}, got {dtype}"]

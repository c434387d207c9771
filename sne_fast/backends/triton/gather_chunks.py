"""``gather_chunks`` in Triton: table of the tensors and launches."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ...ops import checks
from ...ops.schema import accumulate_dtype
from ..gpu_plans import gather_tables
from ..gpu_plans.device_tables import on_device_without_waiting
from . import gather_chunks_kernels as kernels
from .launches import Launch, architecture, launch, on_device, sum_dtype, triton_dtype


def _sizes(scale: Tensor, dtype: torch.dtype) -> Launch:
    return launch("gather_chunks", dtype=dtype, arch=architecture(scale.device))


def _table(tensors: Sequence[Tensor], plan: Tensor, sizes: Launch) -> tuple[np.ndarray, int]:
    """Return the table of the kernels, and the number of tiles."""
    rows, positions = gather_tables.shapes(plan)
    tile, tile_k = sizes["TILE"], sizes["TILE_K"]
    flat = (rows == 1) | (positions == 1)
    transposed = -(-rows // (tile // tile_k)) * -(-positions // tile_k)
    return gather_tables.table(tensors, rows, positions, np.where(flat, -(-rows * positions // tile), transposed))


def gather_chunks(tensors: Sequence[Tensor], scale: Tensor, plan: Tensor, dtype: torch.dtype) -> Tensor:
    """Compute the op ``gather_chunks``, with arguments and results as in :mod:`sne_fast.ops.schema`."""
    checks.gather_chunks("gather_chunks", tensors, scale, plan)
    matrices = gather_tables.sources(tensors, accumulate_dtype(dtype))
    values = scale.new_empty((sum(t.numel() for t in matrices),), dtype=dtype)
    sizes = _sizes(scale, dtype)
    table, tiles = _table(matrices, plan, sizes)
    if tiles:
        count = table.shape[1]
        with on_device(scale):
            kernels.gather_kernel[(tiles,)](
                on_device_without_waiting(table, scale.device, repeats=True), scale.contiguous(), values, count, count,
                ACC=sum_dtype(dtype), **sizes.blocks, **sizes.options,
            )  # fmt: skip
    return values


def gather_chunks_backward(
    grad: Tensor, values: Tensor, tensors: Sequence[Tensor], scale: Tensor, plan: Tensor
) -> tuple[list[Tensor], Tensor]:
    """Compute the op ``gather_chunks_backward``, with arguments and results as in :mod:`sne_fast.ops.schema`."""
    checks.gather_chunks_backward("gather_chunks_backward", grad, values, tensors, scale, plan)
    grads = gather_tables.empty_gradients(tensors, accumulate_dtype(values.dtype))
    grad_scale = torch.zeros_like(scale, memory_format=torch.contiguous_format)
    sizes, acc = _sizes(scale, values.dtype), triton_dtype(scale.dtype)
    table, tiles = _table(grads, plan, sizes)
    if tiles:
        count, part = table.shape[1], torch.empty(tiles, dtype=scale.dtype, device=scale.device)
        with on_device(scale):
            at = on_device_without_waiting(table, scale.device, repeats=False)
            kernels.scatter_kernel[(tiles,)](
                at, scale.contiguous(), grad.contiguous(), values.contiguous(), part, count, count,
                ACC=acc, **sizes.blocks, **sizes.options,
            )  # fmt: skip
            kernels.scale_grad_kernel[(count,)](
                at, part, grad_scale, count, tiles, count, BLOCK=1024, ACC=acc, num_warps=4, enable_fp_fusion=True
            )
    return [g.to(t.dtype) for g, t in zip(grads, tensors, strict=True)], grad_scale


why_not = gather_tables.why_not

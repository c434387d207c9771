"""``gather_chunks`` on the CUDA backend: division into tiles and launches of csrc/cuda/gather_chunks."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...ops import checks
from ...ops.schema import accumulate_dtype
from ..gpu_plans import gather_tables
from ..gpu_plans.device_tables import on_device_without_waiting
from . import library

TILE = 4096  # values, as in csrc/cuda/gather_chunks/gather_chunks.cu
SIDE = 64  # rows that fit shared memory
FLAT = SIDE  # sides up to this are taken whole, so that a tile reads, or writes, one contiguous run


def _up(a: np.ndarray | int, unit: int) -> Any:
    return -(-a // unit) * unit


def tile_shapes(rows: np.ndarray, columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return height and width of each matrix's tiles: at most TILE values, all of one side or at most SIDE of both."""
    rows, columns = np.maximum(rows, 1), np.maximum(columns, 1)
    # Sides that are multiples of 8 keep rows of every dtype aligned to 16 bytes.
    even = _up(-(-columns // -(-columns // SIDE)), 8)
    height = np.where(columns <= FLAT, TILE // columns // 8 * 8, np.where(rows <= FLAT, rows, SIDE))
    width = np.where(columns <= FLAT, columns, np.where(rows <= FLAT, TILE // rows // 8 * 8, even))
    return height, width


def _table(tensors: Sequence[Tensor], plan: Tensor) -> tuple[np.ndarray, int]:
    rows, columns = gather_tables.shapes(plan)
    flat = rows == 1
    rows, columns = np.where(flat, columns, rows), np.where(flat, rows, columns)  # a matrix of one row is a column
    height, width = tile_shapes(rows, columns)
    tiles = -(-rows // height) * -(-columns // width)
    return gather_tables.table(tensors, rows, columns, tiles, height, width)


def _argument(values: Tensor, scale: Tensor, table: Tensor, tiles: int) -> Any:
    return library.GatherChunks(
        type=gather_tables.CODES[values.dtype], wide_scale=scale.dtype == torch.float64, tensors=table.shape[1],
        stride=table.shape[1], tiles=tiles, table=table.data_ptr(), scale=scale.data_ptr(), values=values.data_ptr(),
    )  # fmt: skip


def gather_chunks(tensors: Sequence[Tensor], scale: Tensor, plan: Tensor, dtype: torch.dtype) -> Tensor:
    """Compute the op ``gather_chunks``, with arguments and results as in :mod:`sne_fast.ops.schema`."""
    checks.gather_chunks("gather_chunks", tensors, scale, plan)
    matrices = gather_tables.sources(tensors, accumulate_dtype(dtype))
    values = scale.new_empty((sum(t.numel() for t in matrices),), dtype=dtype)
    host, tiles = _table(matrices, plan)
    if tiles:
        scale, table = scale.contiguous(), on_device_without_waiting(host, scale.device, repeats=True)
        argument = _argument(values, scale, table, tiles)
        library.run("gather_chunks", scale.device, ctypes.byref(argument))
    return values


def gather_chunks_backward(
    grad: Tensor, values: Tensor, tensors: Sequence[Tensor], scale: Tensor, plan: Tensor
) -> tuple[list[Tensor], Tensor]:
    """Compute the op ``gather_chunks_backward``, with arguments and results as in :mod:`sne_fast.ops.schema`."""
    checks.gather_chunks_backward("gather_chunks_backward", grad, values, tensors, scale, plan)
    grads = gather_tables.empty_gradients(tensors, accumulate_dtype(values.dtype))
    grad_scale = torch.zeros_like(scale, memory_format=torch.contiguous_format)
    host, tiles = _table(grads, plan)
    if tiles:
        grad, values, scale = library.aligned(grad.to(values.dtype)), library.aligned(values), scale.contiguous()
        table = on_device_without_waiting(host, scale.device, repeats=False)
        parts = torch.empty(tiles, dtype=scale.dtype, device=scale.device)
        argument = _argument(values, scale, table, tiles)
        argument.grad, argument.parts, argument.grad_scale = library.pointers(grad, parts, grad_scale)
        library.run("gather_chunks_backward", scale.device, ctypes.byref(argument))
    return [g.to(t.dtype) for g, t in zip(grads, tensors, strict=True)], grad_scale


why_not = gather_tables.why_not

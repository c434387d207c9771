"""``chunk_encode_backward`` in Triton: slabs of a bounded workspace, a launch per stage, sums in a fixed order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...ops.schema import CHUNK_PARAMETERS, accumulate_dtype
from ..gpu_plans.chunks import CLASSES, SLAB_ROWS_TIMES_WIDTH, ChunkPlan, SlotClass, count_lengths, owners, plan_chunks
from .chunk_encode_backward_kernels import (
    block_backward_kernel,
    codes_backward_kernel,
    pool_backward_kernel,
    scalar_backward_kernel,
    sum_rows_kernel,
    weight_grad_kernel,
)
from .chunk_encode_kernels import chunk_encode_kernel
from .chunk_encode_staged import Staged, staged_backward
from .launches import Launch, architecture, launch, on_device, product_precision, programs_of, sum_dtype, triton_dtype
from .pieces import slot_count, sum_slots

FUSED_CLASSES, FUSED_WIDTHS = CLASSES[:3], (32, 64)
"""What the fused kernels take; longer chunks and wider tiles are staged."""
BLOCK_MULTIPLE = 8
"""Every kernel of a slab covers the same blocks, a multiple of this: a launch table's BLOCKS must divide it."""
SUM_BLOCK, SUM_STEP = 512, 32
BY_BLOCK = ("w_qkv", "b_qkv", "w_o", "b_o", "norm")
"""Parameters whose first axis is the block."""
MATRICES = ("w_qkv", "b_qkv", "w_o", "b_o")
"""Those summed by ``weight_grad_kernel``, by one program per multiprocessor and part; the others by two."""
PROGRAMS_PER_SUM = 2


def fits_a_tile(width: int, counts: np.ndarray, dtype: torch.dtype | None = None) -> bool:
    """Whether all chunks go through the fused kernels, else the staged form takes them; given a ``dtype``, whether
    those of the forward can: a tile of width 128 still fits with operands of 16 bits."""
    fits = width in FUSED_WIDTHS or (width == 128 and dtype in (torch.float16, torch.bfloat16))
    return fits and not counts[FUSED_CLASSES[-1].slots + 1 :].any()


def constants(pool_query: Tensor, norm: Tensor) -> dict[str, Any]:
    """Constexpr arguments that the chunk kernels share."""
    heads, width = pool_query.shape
    return {
        "WIDTH": width, "HEADS": heads, "LAYER_NORM": norm.shape[0] > 0,
        "PRECISION": product_precision(pool_query.dtype), "ACC": sum_dtype(pool_query.dtype),
    }  # fmt: skip


def class_constants(slot_class: SlotClass) -> dict[str, Any]:
    return {"SLOTS": slot_class.slots, "LOWEST": slot_class.min_length, "SHARED": slot_class.multi_chunk}


def padded_heads(heads: int) -> int:
    """Rows of the pool's queries in a tile: matrix units want 16."""
    return max(16, heads)


def length_class(slot_class: SlotClass, precision: str = "") -> str:
    """The class's name in launch tables: its slots, with "shared" before where several chunks share a block, and
    "ieee" before that where products of float32 keep full precision and so do without matrix units."""
    return f"{'ieee' if precision == 'ieee' else ''}{'shared' if slot_class.multi_chunk else ''}{slot_class.slots}"


def sizes_for(op: str, pool_query: Tensor, slot_class: SlotClass) -> Launch:
    dtype = pool_query.dtype
    precision = product_precision(dtype) if dtype == torch.float32 else ""
    return launch(op, h=pool_query.shape[1], heads=pool_query.shape[0], length=length_class(slot_class, precision),
                  dtype=dtype, arch=architecture(pool_query.device))  # fmt: skip


def staged_call(
    values: Tensor, chunk_ptr: Tensor, chunk_ptr_host: Tensor, owner: Tensor, weights: Sequence[Tensor]
) -> Staged:
    named = dict(zip(CHUNK_PARAMETERS, weights, strict=True))
    return Staged(named, programs_of(values.device), {}, values, chunk_ptr, chunk_ptr_host, owner)


@dataclass
class _Workspace:
    """Rows of a slab: inputs of blocks 1 to 3 and pool, the gradient on its way, factors of the matrices' gradients."""

    saved: Tensor
    rows_grad: Tensor
    products: Tensor


@dataclass
class _Call:
    """What all launches of one backward call share; ``parts`` are sums per program of each parameter's gradient."""

    grad: Tensor
    values: Tensor
    chunk_ptr: Tensor
    owner: Tensor
    plan: ChunkPlan
    weights: tuple[Tensor, ...]
    programs: int
    parts: dict[str, Tensor]
    values_grad: Tensor
    chunk_grad: Tensor

    @property
    def shared(self) -> dict[str, Any]:
        return constants(self.weights[-1], self.weights[-2])

    def sizes(self, op: str, slot_class: SlotClass) -> Launch:
        return sizes_for(op, self.weights[-1], slot_class)


def _slab(call: _Call, slot_class: SlotClass, first_block: int, blocks: int, space: _Workspace) -> None:
    """All stages of ``blocks`` blocks, a multiple of BLOCK_MULTIPLE: recompute, then pool, blocks 3 to 0."""
    _, element_code, logit, basis, w_qkv, b_qkv, w_o, b_o, norm, pool_query = call.weights
    heads, width = pool_query.shape
    saved, rows_grad, products, slab_rows = space.saved, space.rows_grad, space.products, space.saved.shape[1]
    lengths = (call.chunk_ptr, call.plan.order, call.plan.table)
    class_of, parts, shared = class_constants(slot_class), call.parts, call.shared

    def norm_of(block: int) -> tuple[Tensor, Tensor]:
        return (norm[block], parts["norm"][block]) if norm.shape[0] else (norm, parts["norm"])

    def sizes_of(op: str) -> tuple[Launch, tuple[int], int]:
        """Launch sizes, a grid of persistent programs, and how many tiles they share out."""
        sizes = call.sizes(op, slot_class)
        tiles = blocks // sizes["BLOCKS"]
        return sizes, (min(tiles, PROGRAMS_PER_SUM * call.programs),), tiles

    def weight_grad(inputs: Tensor, block: int) -> None:
        sizes = call.sizes("chunk_encode_weight_grad", slot_class)
        first, full = (0, block - 1) if block else (3, 0)  # block 0 has fc_o only
        tiles = blocks * slot_class.slots // sizes["ROWS"]
        weight_grad_kernel[(min(tiles, call.programs), 4 - first)](
            inputs, products, parts["w_qkv"][full], parts["b_qkv"][full], parts["w_o"][block], parts["b_o"][block],
            slab_rows, tiles, FIRST=first, WIDTH=width, PRECISION=shared["PRECISION"], ACC=shared["ACC"],
            **sizes.blocks, **sizes.options,
        )  # fmt: skip

    sizes = call.sizes("chunk_encode", slot_class)
    chunk_encode_kernel[(blocks // sizes["BLOCKS"],)](
        call.values, call.chunk_ptr, call.plan.order, call.owner, call.plan.table, *call.weights, saved, saved,
        first_block, slab_rows, PADDED_HEADS=padded_heads(heads), SAVE=True,
        **shared, **class_of, **sizes.blocks, **sizes.options,
    )  # fmt: skip
    sizes, grid, tiles = sizes_of("chunk_encode_pool_backward")
    pool_backward_kernel[grid](
        call.grad, *lengths, pool_query, saved, rows_grad, parts["pool_query"], first_block, slab_rows, tiles,
        PADDED_HEADS=padded_heads(heads), **shared, **class_of, **sizes.blocks, **sizes.options,
    )  # fmt: skip
    for full in (2, 1, 0):
        norms, norm_part = norm_of(full + 1)
        sizes, grid, tiles = sizes_of("chunk_encode_block_backward")
        block_backward_kernel[grid](
            *lengths, w_qkv[full], b_qkv[full], w_o[full + 1], b_o[full + 1], norms, saved[full], rows_grad, products,
            norm_part, first_block, slab_rows, tiles, **shared, **class_of, **sizes.blocks, **sizes.options,
        )  # fmt: skip
        weight_grad(saved[full], full + 1)
        if full == 1:
            sizes, grid, tiles = sizes_of("chunk_encode_codes_backward")
            codes_backward_kernel[grid](
                *lengths, rows_grad, call.chunk_grad, parts["element_code"], first_block, tiles,
                element_code.shape[0], WIDTH=width, ACC=shared["ACC"], **class_of, **sizes.blocks, **sizes.options,
            )  # fmt: skip
    norms, norm_part = norm_of(0)
    sizes, grid, tiles = sizes_of("chunk_encode_scalar_backward")
    scalar_backward_kernel[grid](
        call.values, *lengths, logit, basis, w_o[0], b_o[0], norms, rows_grad, call.values_grad, products,
        parts["logit"], parts["basis"], norm_part, first_block, slab_rows, tiles,
        **shared, **class_of, **sizes.blocks, **sizes.options,
    )  # fmt: skip
    weight_grad(saved, 0)


def sum_over_sets(rows: Tensor, ptr: Tensor) -> Tensor:
    """Sums of the packed rows ``(R, h)`` of each set ``(S, h)``, in a fixed order and without a host copy."""
    sets, (count, width) = ptr.shape[0] - 1, rows.shape
    out = rows.new_zeros((sets, width))
    if not sets or not count:
        return out
    slots = slot_count(count, sets, SUM_BLOCK)
    partial = rows.new_empty((slots, 1, width))
    sum_rows_kernel[(slots,)](
        rows, ptr, partial, sets, BLOCK=SUM_BLOCK, STEP=SUM_STEP, WIDTH=width,
        ACC=triton_dtype(rows.dtype), num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    sum_slots(partial, out, ptr, torch.arange(sets + 1, device=rows.device), SUM_BLOCK)
    return out


def _fused(
    grad: Tensor, values: Tensor, chunk_ptr: Tensor, owner: Tensor, plan: ChunkPlan, weights: tuple[Tensor, ...],
    values_grad: Tensor, chunk_grad: Tensor,
) -> dict[str, Tensor]:  # fmt: skip
    """Fills ``values_grad (V,)`` and ``chunk_grad (N, h)`` (of the row codes); returns the shared gradients."""
    width, classes = weights[-1].shape[1], list(plan.classes(FUSED_CLASSES))
    most = max(-(-blocks // BLOCK_MULTIPLE) for _, blocks in classes) * BLOCK_MULTIPLE
    programs = min(programs_of(values.device), most)
    parts = {}
    for name, weight in zip(CHUNK_PARAMETERS[1:], weights[1:], strict=True):
        shape = tuple(weight.shape)
        many = programs if name in MATRICES else PROGRAMS_PER_SUM * programs
        shape = (shape[0], many, *shape[1:]) if name in BY_BLOCK else (many, *shape)
        parts[name] = chunk_grad.new_zeros(shape)
    call = _Call(grad, values, chunk_ptr, owner, plan, weights, programs, parts, values_grad, chunk_grad)
    for slot_class, blocks in classes:
        # Slabs of whole rounds of tiles, so that all programs end together.
        tile = call.sizes("chunk_encode_block_backward", slot_class)["BLOCKS"]
        unit = max(BLOCK_MULTIPLE, PROGRAMS_PER_SUM * programs * tile)
        unit = -(-unit // BLOCK_MULTIPLE) * BLOCK_MULTIPLE
        slab = max(1, SLAB_ROWS_TIMES_WIDTH // (width * slot_class.slots * unit)) * unit
        padded = -(-blocks // BLOCK_MULTIPLE) * BLOCK_MULTIPLE
        slab_rows = min(slab, padded) * slot_class.slots
        space = _Workspace(values.new_empty((4, slab_rows, width)), chunk_grad.new_empty((slab_rows, width)),
                           values.new_empty((5, slab_rows, width)))  # fmt: skip
        for first_block in range(0, padded, slab):
            _slab(call, slot_class, first_block, min(slab, padded - first_block), space)
    return {name: part.sum(1 if name in BY_BLOCK else 0) for name, part in parts.items()}


def chunk_encode_backward(
    grad: Tensor, values: Tensor, chunk_ptr: Tensor, tensor_ptr: Tensor, chunk_ptr_host: Tensor,
    tensor_ptr_host: Tensor, *parameters: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The op ``chunk_encode_backward``: arguments and results as in :mod:`sne_fast.ops.schema`."""
    grad, values, chunk_ptr, tensor_ptr = (t.contiguous() for t in (grad, values, chunk_ptr, tensor_ptr))
    weights = tuple(t.contiguous() for t in parameters)
    chunks, width, acc = chunk_ptr.shape[0] - 1, weights[-1].shape[1], accumulate_dtype(values.dtype)
    values_grad = torch.empty_like(values)
    if not chunks:
        return (values_grad, *(torch.zeros_like(t) for t in weights))
    counts = count_lengths(chunk_ptr_host)
    with on_device(values):
        owner, chunk_grad = owners(tensor_ptr, chunks), values.new_empty((chunks, width), dtype=acc)
        if fits_a_tile(width, counts):
            plan = plan_chunks(chunk_ptr, counts)
            shared = _fused(grad, values, chunk_ptr, owner, plan, weights, values_grad, chunk_grad)
        else:
            staged = staged_call(values, chunk_ptr, chunk_ptr_host, owner, weights)
            shared = staged_backward(staged, grad, values_grad, chunk_grad, sum_over_sets)
        grads = [sum_over_sets(chunk_grad, tensor_ptr), *(shared[name] for name in CHUNK_PARAMETERS[1:])]
    return (values_grad, *(g.to(t.dtype) for g, t in zip(grads, parameters, strict=True)))

"""``chunk_encode_backward`` in Triton: slabs of a bounded workspace, a launch per stage, sums in a fixed order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...ops.pointer_facts import owners
from ...ops.schema import CHUNK_PARAMETERS, accumulate_dtype
from ..gpu_plans.chunks import SLAB_ROWS_TIMES_WIDTH, ChunkPlan, SlotClass, count_lengths, plan_chunks
from ..gpu_plans.lengths import Lengths
from .chunk_encode_backward_kernels import (
    block_backward_kernel,
    codes_backward_kernel,
    pool_backward_kernel,
    weight_grad_kernel,
)
from .chunk_encode_kernels import chunk_encode_kernel
from .chunk_encode_scalar_kernels import scalar_backward_kernel
from .chunk_encode_staged import staged_backward
from .chunk_launches import (
    FUSED_CLASSES,
    class_constants,
    constants,
    fits_a_tile,
    padded_heads,
    sizes_for,
    staged_call,
)
from .launches import Launch, on_device, programs_of
from .partial_sums import Part, PartialSums
from .pieces import sum_over_sets

BIN_MULTIPLE = 8
"""Every kernel of a slab covers the same bins, a multiple of this, which BINS of a launch table must divide."""
BY_BLOCK = ("w_qkv", "b_qkv", "w_o", "b_o", "norm")
"""Parameters whose first axis is the block of the chunk encoder."""
MATRICES = ("w_qkv", "b_qkv", "w_o", "b_o")
"""Parameters summed by ``weight_grad_kernel``, by one program per multiprocessor and part; the others by two."""
PROGRAMS_PER_SUM = 2


@dataclass
class _Workspace:
    """Rows of a slab: gradient of the rows, and planes ``(9, rows, h)`` of what the stages leave for each other."""

    rows_grad: Tensor
    planes: Tensor

    @property
    def products(self) -> Tensor:
        """Factors of the matrices' gradients of a block, five planes."""
        return self.planes[:5]

    @property
    def saved(self) -> Tensor:
        """Inputs of blocks 1 to 3 and of the pool."""
        return self.planes[5:]

    @property
    def spare(self) -> Tensor:
        """Room for the products of block 0, whose planes 3 and 4 are the inputs of blocks 2 and 3, used up by then."""
        return self.planes[3:8]


@dataclass
class _Call:
    """Arguments that all launches of a backward share; ``parts`` are sums per program of each parameter's gradient."""

    grad: Tensor
    values: Tensor
    chunk_ptr: Tensor
    owner: Tensor
    plan: ChunkPlan
    weights: tuple[Tensor, ...]
    programs: int
    parts: Mapping[str, Tensor]
    values_grad: Tensor
    chunk_grad: Tensor

    @property
    def shared(self) -> dict[str, Any]:
        return constants(self.weights[-1], self.weights[-2])

    def sizes(self, op: str, slot_class: SlotClass) -> Launch:
        return sizes_for(op, self.weights[-1], slot_class)


def _slab(call: _Call, slot_class: SlotClass, first_bin: int, bins: int, space: _Workspace) -> None:
    """Run all stages of ``bins`` bins, a multiple of BIN_MULTIPLE: recompute, then back through pool, blocks 3 to 0."""
    _, element_code, logit, basis, w_qkv, b_qkv, w_o, b_o, norm, pool_query = call.weights
    heads, width = pool_query.shape
    saved, rows_grad, products, spare = space.saved, space.rows_grad, space.products, space.spare
    slab_rows = saved.shape[1]
    lengths = (call.chunk_ptr, call.plan.order, call.plan.table)
    of_class, parts, shared = class_constants(slot_class), call.parts, call.shared

    def norm_of(block: int) -> tuple[Tensor, Tensor]:
        return (norm[block], parts["norm"][block]) if norm.shape[0] else (norm, parts["norm"])

    def sizes_of(op: str) -> tuple[Launch, tuple[int], int]:
        """Return launch sizes, a grid of persistent programs, and the number of tiles that they share out."""
        sizes = call.sizes(op, slot_class)
        tiles = bins // sizes["BINS"]
        return sizes, (min(tiles, PROGRAMS_PER_SUM * call.programs),), tiles

    def weight_grad(inputs: Tensor, full: int, with_first: bool) -> None:
        """Sum up for one of blocks 1 to 3, and at last for fc_o, all that block 0 has."""
        sizes = call.sizes("chunk_encode_weight_grad", slot_class)
        block = full + 1
        tiles = bins * slot_class.slots // sizes["ROWS"]
        weight_grad_kernel[(min(tiles, call.programs), 5 if with_first else 4)](
            inputs, products, parts["w_qkv"][full], parts["b_qkv"][full], parts["w_o"][block], parts["b_o"][block],
            spare, parts["w_o"][0], parts["b_o"][0], slab_rows, tiles, WIDTH=width, PRECISION=shared["PRECISION"],
            ACC=shared["ACC"], **sizes.blocks, **sizes.options,
        )  # fmt: skip

    sizes = call.sizes("chunk_encode", slot_class)
    chunk_encode_kernel[(bins // sizes["BINS"],)](
        call.values, call.chunk_ptr, call.plan.order, call.owner, call.plan.table, *call.weights, saved, saved,
        first_bin, slab_rows, PADDED_HEADS=padded_heads(heads), SAVE=True,
        **shared, **of_class, **sizes.blocks, **sizes.options,
    )  # fmt: skip
    sizes, grid, tiles = sizes_of("chunk_encode_pool_backward")
    pool_backward_kernel[grid](
        call.grad, *lengths, pool_query, saved, rows_grad, parts["pool_query"], first_bin, slab_rows, tiles,
        PADDED_HEADS=padded_heads(heads), **shared, **of_class, **sizes.blocks, **sizes.options,
    )  # fmt: skip
    for full in (2, 1, 0):
        norms, norm_part = norm_of(full + 1)
        sizes, grid, tiles = sizes_of("chunk_encode_block_backward")
        block_backward_kernel[grid](
            *lengths, w_qkv[full], b_qkv[full], w_o[full + 1], b_o[full + 1], norms, saved[full], rows_grad, products,
            norm_part, first_bin, slab_rows, tiles, **shared, **of_class, **sizes.blocks, **sizes.options,
        )  # fmt: skip
        if full:
            weight_grad(saved[full], full, with_first=False)
        if full == 1:
            sizes, grid, tiles = sizes_of("chunk_encode_codes_backward")
            codes_backward_kernel[grid](
                *lengths, rows_grad, call.chunk_grad, parts["element_code"], first_bin, tiles,
                element_code.shape[0], WIDTH=width, ACC=shared["ACC"], **of_class, **sizes.blocks, **sizes.options,
            )  # fmt: skip
    norms, norm_part = norm_of(0)
    sizes, grid, tiles = sizes_of("chunk_encode_scalar_backward")
    scalar_backward_kernel[grid](
        call.values, *lengths, logit, basis, w_o[0], b_o[0], norms, rows_grad, call.values_grad, spare,
        parts["logit"], parts["basis"], norm_part, first_bin, slab_rows, tiles,
        **shared, **of_class, **sizes.blocks, **sizes.options,
    )  # fmt: skip
    weight_grad(saved[0], 0, with_first=True)


def _fused(
    grad: Tensor, values: Tensor, chunk_ptr: Tensor, owner: Tensor, plan: ChunkPlan, weights: tuple[Tensor, ...],
    values_grad: Tensor, chunk_grad: Tensor,
) -> dict[str, Tensor]:  # fmt: skip
    """Fill ``values_grad (V,)`` and ``chunk_grad (N, h)`` (of the row codes); return the other gradients."""
    width, classes = weights[-1].shape[1], list(plan.classes(FUSED_CLASSES))
    max_bins = max(-(-bins // BIN_MULTIPLE) for _, bins in classes) * BIN_MULTIPLE
    programs = min(programs_of(values.device), max_bins)
    layout = []
    for name, weight in zip(CHUNK_PARAMETERS[1:], weights[1:], strict=True):
        count = programs if name in MATRICES else PROGRAMS_PER_SUM * programs
        layout.append((name, Part(tuple(weight.shape), count, name in BY_BLOCK)))
    sums = PartialSums.make(layout, values, zeros=True)
    call = _Call(grad, values, chunk_ptr, owner, plan, weights, programs, sums.parts, values_grad, chunk_grad)
    for slot_class, bins in classes:
        # Slabs consist of whole rounds of tiles, so that all programs end together.
        tile = call.sizes("chunk_encode_block_backward", slot_class)["BINS"]
        unit = max(BIN_MULTIPLE, PROGRAMS_PER_SUM * programs * tile)
        unit = -(-unit // BIN_MULTIPLE) * BIN_MULTIPLE
        slab = max(1, SLAB_ROWS_TIMES_WIDTH // (width * slot_class.slots * unit)) * unit
        padded = -(-bins // BIN_MULTIPLE) * BIN_MULTIPLE
        slab_rows = min(slab, padded) * slot_class.slots
        space = _Workspace(chunk_grad.new_empty((slab_rows, width)), values.new_empty((9, slab_rows, width)))
        for first_bin in range(0, padded, slab):
            _slab(call, slot_class, first_bin, min(slab, padded - first_bin), space)
    return sums.summed(values.dtype)


def chunk_encode_backward(
    grad: Tensor, values: Tensor, chunk_ptr: Tensor, tensor_ptr: Tensor, chunk_ptr_host: Tensor,
    tensor_ptr_host: Tensor, *parameters: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Compute the op ``chunk_encode_backward``, with arguments and results as in :mod:`sne_fast.ops.schema`."""
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
            shared = staged_backward(staged, grad, values_grad, chunk_grad)
        longest = Lengths.of(tensor_ptr_host).longest
        row_grad = sum_over_sets(chunk_grad, tensor_ptr, longest, values.dtype)
        grads = [row_grad, *(shared[name] for name in CHUNK_PARAMETERS[1:])]
    return (values_grad, *(g.to(t.dtype) for g, t in zip(grads, parameters, strict=True)))

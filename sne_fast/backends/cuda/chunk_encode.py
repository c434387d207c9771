"""``chunk_encode`` on the CUDA backend: workspaces and launches of the kernels in csrc/cuda/chunk_encode."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...ops import devices
from ...ops.backend import Arguments
from ...ops.pointer_facts import owners
from ...ops.schema import CHUNK_PARAMETERS, named
from ...ops.supported_widths import width_reasons
from ..gpu_plans.chunks import CLASSES as ALL_CLASSES
from ..gpu_plans.chunks import FULL, MASKED, SLAB_ROWS_TIMES_WIDTH, ChunkPlan, SlotClass, count_lengths, plan_chunks
from . import library

BY_BLOCK = ("w_qkv", "b_qkv", "w_o", "b_o", "norm")
"""Parameters whose first axis is the block of the chunk encoder."""
CLASSES = ALL_CLASSES[:4]
"""Bins of more than 128 slots would need more warps than the registers of a multiprocessor allow."""
BACKWARD_CLASSES = (CLASSES[0], MASKED, FULL, *CLASSES[2:])
"""Classes of the backward where it has kernels of its own for bins that one chunk fills."""
SUM_PIECE, POOL_BLOCKS = 256, 4
"""The same numbers as in csrc/cuda/chunk_encode/segment_sum.cu and cuda_abi.h."""
EMULATED_WGMMA = False
"""Whether the emulated GPU has wgmma, as a test says."""


def has_wgmma(device: torch.device) -> bool:
    """Return whether the device has Hopper's matrix instruction, as no other generation, and the build uses it."""
    if device.type != "cuda":
        return EMULATED_WGMMA
    built = any(name.removeprefix("compute_").startswith("90a") for name in library.architectures())
    return built and devices.capability(device) == (9, 0)


@dataclass
class ChunkCall:
    """Arguments that all launches of one call share; ``weights`` are the parameters by name, contiguous and aligned."""

    values: Tensor
    chunk_ptr: Tensor
    owner: Tensor
    plan: ChunkPlan
    weights: dict[str, Tensor]
    prepared: Tensor
    multiprocessors: int
    shared_limit: int
    wgmma: bool

    @classmethod
    def make(
        cls, values: Tensor, chunk_ptr: Tensor, tensor_ptr: Tensor, chunk_ptr_host: Tensor,
        parameters: Sequence[Tensor], backward: bool,
    ) -> ChunkCall:  # fmt: skip
        """Plan a call and prepare its weights on the device."""
        weights = {name: library.aligned(t) for name, t in zip(CHUNK_PARAMETERS, parameters, strict=True)}
        heads, h = weights["pool_query"].shape
        plan = plan_chunks(chunk_ptr, count_lengths(chunk_ptr_host))
        size = library.library().sne_fast_cuda_chunk_weights_size(h, heads)
        prepared = values.new_empty(size)
        args = library.ChunkWeightsArgs(
            h, heads, backward, *library.pointers(weights["w_qkv"], weights["w_o"], weights["pool_query"], prepared)
        )
        library.run("chunk_weights", values.device, library.precision(values.dtype), ctypes.byref(args))
        device = values.device
        return cls(
            values, chunk_ptr, owners(tensor_ptr, chunk_ptr.shape[0] - 1), plan, weights, prepared,
            library.multiprocessors(device), library.shared_limit(device), has_wgmma(device),
        )  # fmt: skip

    @property
    def heads(self) -> int:
        """Number of heads H."""
        return self.weights["pool_query"].shape[0]

    @property
    def width(self) -> int:
        """Width h."""
        return self.weights["pool_query"].shape[1]

    def args(self, slot_class: SlotClass, bins: int, first_bin: int, count: int) -> Any:
        """Return the struct of a launch on bins ``first_bin .. first_bin + count`` of a class of ``bins``."""
        w = self.weights
        return library.ChunkArgs(
            self.width, self.heads, w["norm"].shape[0] > 0, slot_class.slots, slot_class.min_length,
            slot_class.longest, slot_class.multi_chunk,
            bins, first_bin, count, self.multiprocessors, self.shared_limit, self.wgmma,
            *library.pointers(
                self.chunk_ptr, self.plan.order, self.owner, self.plan.table, self.values, w["row_code"],
                w["element_code"], w["logit"], w["basis"], w["b_qkv"], w["b_o"], w["norm"], w["pool_query"],
                self.prepared,
            ),
        )  # fmt: skip

    def run(self, name: str, *args: Any) -> None:
        """Launch a kernel."""
        library.run(name, self.values.device, library.precision(self.values.dtype), *args)


def chunk_encode(
    values: Tensor, chunk_ptr: Tensor, tensor_ptr: Tensor, chunk_ptr_host: Tensor, tensor_ptr_host: Tensor,
    *parameters: Tensor,
) -> Tensor:  # fmt: skip
    """Compute the op ``chunk_encode``, with arguments and results as in :mod:`sne_fast.ops.schema`."""
    values, chunk_ptr, tensor_ptr = (t.contiguous() for t in (values, chunk_ptr, tensor_ptr))
    chunks = chunk_ptr.shape[0] - 1
    out = values.new_empty((chunks, *parameters[-1].shape))
    if not chunks:
        return out
    call = ChunkCall.make(values, chunk_ptr, tensor_ptr, chunk_ptr_host, parameters, backward=False)
    for slot_class, bins in call.plan.classes(CLASSES):
        args = call.args(slot_class, bins, 0, bins)
        call.run("chunk_encode", ctypes.byref(args), out.data_ptr(), None)
    return out


@dataclass
class _Slab:
    """Workspace of the backward for a number of rows, whose stages run one after the other."""

    saved: Tensor
    rows_grad: Tensor
    products: Tensor

    @classmethod
    def empty(cls, call: ChunkCall, rows: int, rows_with_products: int) -> _Slab:
        return cls(
            call.values.new_empty((4, rows, call.width)),
            call.values.new_empty((rows, call.width), dtype=torch.float32),
            call.values.new_empty((5, rows_with_products, call.width)),
        )


def _slab_backward(
    call: ChunkCall, slab: _Slab, args: Any, grad: Tensor, parts: dict[str, Tensor], values_grad: Tensor,
    chunk_grad: Tensor,
) -> None:  # fmt: skip
    """Run all stages of a slab: recompute, then go back through pool, blocks 3 to 1 with codes in between, block 0."""
    rows = args.count * args.slots
    space = library.ChunkSpace(*library.pointers(slab.saved, slab.rows_grad, slab.products))
    ref, space_ref = ctypes.byref(args), ctypes.byref(space)
    full = args.min_length == FULL.min_length

    def matrix_parts(block: int) -> list[int]:
        qkv = max(0, block - 1)
        return library.pointers(parts["w_qkv"][qkv], parts["b_qkv"][qkv], parts["w_o"][block], parts["b_o"][block])

    def weight_grad(block: int) -> None:
        if not full:
            weight_args = library.ChunkWeightGradArgs(
                call.width, rows, block, parts["w_o"].shape[1], *library.pointers(slab.saved, slab.products),
                *matrix_parts(block),
            )  # fmt: skip
            call.run("chunk_weight_grad", ctypes.byref(weight_args))

    def norm_part(block: int) -> int | None:
        return parts["norm"][block].data_ptr() if parts["norm"].shape[0] else None

    call.run("chunk_encode", ref, None, slab.saved.data_ptr())
    call.run("chunk_pool_backward", ref, space_ref, grad.data_ptr(), parts["pool_query"].data_ptr())
    for block in (3, 2, 1):
        block_grads = library.ChunkBlockGrads(norm_part(block), *matrix_parts(block))
        call.run("chunk_block_backward", ref, space_ref, block, ctypes.byref(block_grads))
        weight_grad(block)
        if block == 2:
            codes = parts["element_code"].shape[1]
            call.run(
                "chunk_codes_backward", ref, space_ref, codes, chunk_grad.data_ptr(), parts["element_code"].data_ptr()
            )
    grads = library.ChunkScalarGrads(
        *library.pointers(values_grad, parts["logit"], parts["basis"]), norm_part(0), *matrix_parts(0)[2:]
    )
    call.run("chunk_scalar_backward", ref, space_ref, ctypes.byref(grads))
    weight_grad(0)


def segment_sum(x: Tensor, ptr: Tensor) -> Tensor:
    """Sum the float32 rows ``(R, h)`` of each segment, in a fixed order: ``(S, h)``."""
    (rows, width), segments = x.shape, ptr.shape[0] - 1
    out, partial = x.new_empty((segments, width)), x.new_empty((rows // SUM_PIECE + segments, width))
    args = library.SegmentSumArgs(rows, segments, width, *library.pointers(ptr, x, partial, out))
    library.run("segment_sum", x.device, ctypes.byref(args))
    return out


def chunk_encode_backward(
    grad: Tensor, values: Tensor, chunk_ptr: Tensor, tensor_ptr: Tensor, chunk_ptr_host: Tensor,
    tensor_ptr_host: Tensor, *parameters: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Compute the op ``chunk_encode_backward``, with arguments and results as in :mod:`sne_fast.ops.schema`."""
    values, chunk_ptr, tensor_ptr = (t.contiguous() for t in (values, chunk_ptr, tensor_ptr))
    grad = library.aligned(grad)
    chunks, width = chunk_ptr.shape[0] - 1, parameters[-1].shape[1]
    values_grad = torch.empty_like(values)
    if not chunks:
        return (values_grad, *(torch.zeros_like(t, memory_format=torch.contiguous_format) for t in parameters))
    call = ChunkCall.make(values, chunk_ptr, tensor_ptr, chunk_ptr_host, parameters, backward=True)
    parts = {}
    for name in CHUNK_PARAMETERS[1:]:
        shape = tuple(call.weights[name].shape)
        count = POOL_BLOCKS * call.multiprocessors if name == "pool_query" else call.multiprocessors
        shape = (shape[0], count, *shape[1:]) if name in BY_BLOCK else (count, *shape)
        parts[name] = values.new_zeros(shape, dtype=torch.float32)
    chunk_grad = values.new_empty((chunks, width), dtype=torch.float32)
    classes = list(call.plan.classes(_backward_classes(call)))
    max_bins = [max(1, SLAB_ROWS_TIMES_WIDTH // (width * c.slots)) for c, _ in classes]
    rows = {c: min(most, bins) * c.slots for (c, bins), most in zip(classes, max_bins, strict=True)}
    slab = _Slab.empty(call, max(rows.values()), max((n for c, n in rows.items() if c != FULL), default=0))
    for (slot_class, bins), max_count in zip(classes, max_bins, strict=True):
        for first in range(0, bins, max_count):
            args = call.args(slot_class, bins, first, min(max_count, bins - first))
            _slab_backward(call, slab, args, grad, parts, values_grad, chunk_grad)
    shared = {name: part.sum(1 if name in BY_BLOCK else 0) for name, part in parts.items()}
    grads = [segment_sum(chunk_grad, tensor_ptr), *(shared[name] for name in CHUNK_PARAMETERS[1:])]
    return (values_grad, *(g.to(t.dtype) for g, t in zip(grads, parameters, strict=True)))


@functools.cache
def _fits(kind: int, width: int, heads: int, slots: int, min_length: int, limit: int, wgmma: bool) -> bool:
    """Return whether every kernel of forward and backward can be launched: their launchers are asked with no work."""
    args = library.ChunkArgs(width, heads, 1, slots, min_length, slots, 0, 0, 0, 0, 1, limit, wgmma)
    ref, space = ctypes.byref(args), ctypes.byref(library.ChunkSpace())
    block, scalar = ctypes.byref(library.ChunkBlockGrads()), ctypes.byref(library.ChunkScalarGrads())
    lib, somewhere = library.library(), 16  # a pointer that is not null and never followed
    return not any((
        lib.sne_fast_cuda_chunk_encode(kind, ref, somewhere, None, None),
        lib.sne_fast_cuda_chunk_encode(kind, ref, None, somewhere, None),
        lib.sne_fast_cuda_chunk_pool_backward(kind, ref, space, somewhere, somewhere, None),
        lib.sne_fast_cuda_chunk_block_backward(kind, ref, space, 1, block, None),
        lib.sne_fast_cuda_chunk_scalar_backward(kind, ref, space, scalar, None),
    ))  # fmt: skip


def _backward_classes(call: ChunkCall) -> tuple[SlotClass, ...]:
    """Return the classes of the backward: bins that one chunk fills are apart where kernels of their own can run."""
    kind = library.precision(call.values.dtype)
    fits = _fits(kind, call.width, call.heads, FULL.slots, FULL.min_length, call.shared_limit, call.wgmma)
    return BACKWARD_CLASSES if fits else CLASSES


def why_not(op: str, args: Arguments) -> list[str]:
    """Return why these kernels cannot run a call of ``chunk_encode`` or its backward; empty if they can."""
    given = named(op, args)
    values, (heads, h), codes = given["values"], given["pool_query"].shape, given["element_code"].shape[0]
    reasons = width_reasons(h, heads)
    if not reasons and values.dtype == torch.float32 and h > 128:
        reasons.append(f"rows of float32 fit the registers up to width 128, got {h}")
    if codes > CLASSES[-1].slots:
        reasons.append(f"chunk size must be at most {CLASSES[-1].slots}, got {codes}")
    if not reasons:
        slots = max(c.slots for c in CLASSES if c.min_length <= max(1, codes))
        limit = library.shared_limit(values.device)
        if not _fits(library.precision(values.dtype), h, heads, slots, 1, limit, has_wgmma(values.device)):
            reasons.append(
                f"chunks of {codes} at width {h}, {heads} heads, do not fit the {limit >> 10} KB of shared memory here"
            )
    return reasons

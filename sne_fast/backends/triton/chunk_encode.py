"""``chunk_encode`` in Triton: plan, launches, and the limits of the kernels."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ...ops.backend import Arguments
from ...ops.pointer_facts import owners
from ...ops.schema import named
from ...ops.supported_widths import width_reasons
from ..gpu_plans.chunks import LONGEST_CHUNK, count_lengths, plan_chunks
from .chunk_encode_backward import chunk_encode_backward
from .chunk_encode_kernels import chunk_encode_kernel
from .chunk_encode_staged import staged_forward
from .chunk_launches import (
    FUSED_CLASSES,
    class_constants,
    constants,
    fits_a_tile,
    padded_heads,
    sizes_for,
    staged_call,
)
from .launches import on_device

__all__ = ["chunk_encode", "chunk_encode_backward", "why_not"]


def chunk_encode(
    values: Tensor, chunk_ptr: Tensor, tensor_ptr: Tensor, chunk_ptr_host: Tensor, tensor_ptr_host: Tensor,
    *parameters: Tensor,
) -> Tensor:  # fmt: skip
    """Compute the op ``chunk_encode``, with arguments and results as in :mod:`sne_fast.ops.schema`."""
    values, chunk_ptr, tensor_ptr, *weights = (t.contiguous() for t in (values, chunk_ptr, tensor_ptr, *parameters))
    norm, pool_query = weights[-2:]
    chunks = chunk_ptr.shape[0] - 1
    out = values.new_empty((chunks, *pool_query.shape))
    if not chunks:
        return out
    counts = count_lengths(chunk_ptr_host)
    with on_device(values):
        owner = owners(tensor_ptr, chunks)
        if not fits_a_tile(pool_query.shape[1], counts, values.dtype):
            staged_forward(staged_call(values, chunk_ptr, chunk_ptr_host, owner, weights), out)
            return out
        plan = plan_chunks(chunk_ptr, counts)
        for slot_class, bins in plan.classes(FUSED_CLASSES):
            sizes = sizes_for("chunk_encode", pool_query, slot_class)
            chunk_encode_kernel[(triton.cdiv(bins, sizes["BINS"]),)](
                values, chunk_ptr, plan.order, owner, plan.table, *weights, out, out, 0, 0,
                PADDED_HEADS=padded_heads(pool_query.shape[0]), SAVE=False,
                **constants(pool_query, norm), **class_constants(slot_class), **sizes.blocks, **sizes.options,
            )  # fmt: skip
    return out


def why_not(op: str, args: Arguments) -> list[str]:
    """Return why these kernels cannot run a call of ``chunk_encode`` or its backward; empty if they can."""
    given = named(op, args)
    values, (heads, h), codes = given["values"], given["pool_query"].shape, given["element_code"].shape[0]
    reasons = width_reasons(h, heads)
    if codes > LONGEST_CHUNK:
        reasons.append(f"chunk size must be at most {LONGEST_CHUNK}, got {codes}")
    if values.dtype == torch.float64 and values.device.type == "cuda":
        reasons.append("float64 runs in Triton's interpreter only; on a GPU use the reference")
    return reasons

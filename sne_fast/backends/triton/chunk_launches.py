"""Choices that forward and backward of ``chunk_encode`` share: which kernels take a call, their constants and sizes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...ops.precision import product_precision
from ...ops.schema import CHUNK_PARAMETERS
from ..gpu_plans.chunks import CLASSES, FULL, MASKED, SlotClass
from .chunk_encode_staged import Staged
from .launches import Launch, architecture, launch, programs_of, sum_dtype

FUSED_CLASSES = (CLASSES[0], MASKED, FULL, CLASSES[2])
"""Slot classes of the fused kernels; longer chunks are staged."""
FUSED_WIDTHS = (32, 64)
"""Widths of the fused kernels; wider tiles are staged."""


def fits_a_tile(width: int, counts: np.ndarray, dtype: torch.dtype | None = None) -> bool:
    """Return whether the fused kernels take all chunks; with a ``dtype``, whether those of the forward do.

    A tile of width 128 fits the forward with operands of 16 bits.
    """
    fits = width in FUSED_WIDTHS or (width == 128 and dtype in (torch.float16, torch.bfloat16))
    return fits and not counts[FUSED_CLASSES[-1].slots + 1 :].any()


def constants(pool_query: Tensor, norm: Tensor) -> dict[str, Any]:
    """Return the constexpr arguments that the chunk kernels share."""
    heads, width = pool_query.shape
    return {
        "WIDTH": width, "HEADS": heads, "LAYER_NORM": norm.shape[0] > 0,
        "PRECISION": product_precision(pool_query.dtype), "ACC": sum_dtype(pool_query.dtype),
    }  # fmt: skip


def class_constants(slot_class: SlotClass) -> dict[str, Any]:
    """Return the constexpr arguments of a slot class."""
    return {"SLOTS": slot_class.slots, "MIN_LENGTH": slot_class.min_length, "MAX_LENGTH": slot_class.longest,
            "MULTI_CHUNK": slot_class.multi_chunk}  # fmt: skip


def padded_heads(heads: int) -> int:
    """Return the rows of the pool's queries in a tile: matrix units need 16."""
    return max(16, heads)


def length_class(slot_class: SlotClass, precision: str = "") -> str:
    """Return the name of a slot class in launch tables: its slots, such as "32", "multi32" or "ieee64".

    "multi" stands before the slots where several chunks share a bin, "full" where one fills it, "ieee" before that
    where products of float32 keep full precision and so do without matrix units.
    """
    kind = "multi" if slot_class.multi_chunk else "full" if slot_class == FULL else ""
    return f"{'ieee' if precision == 'ieee' else ''}{kind}{slot_class.slots}"


def sizes_for(op: str, pool_query: Tensor, slot_class: SlotClass) -> Launch:
    """Return the launch sizes of a kernel for a slot class."""
    dtype = pool_query.dtype
    precision = product_precision(dtype) if dtype == torch.float32 else ""
    return launch(op, h=pool_query.shape[1], heads=pool_query.shape[0], length=length_class(slot_class, precision),
                  dtype=dtype, arch=architecture(pool_query.device))  # fmt: skip


def staged_call(
    values: Tensor, chunk_ptr: Tensor, chunk_ptr_host: Tensor, owner: Tensor, weights: Sequence[Tensor]
) -> Staged:
    """Return a call of the staged form."""
    named = dict(zip(CHUNK_PARAMETERS, weights, strict=True))
    return Staged(named, programs_of(values.device), {}, values, chunk_ptr, chunk_ptr_host, owner)

"""``pool_block`` in Triton: short sets by kernels of whole blocks, others in parts.

Whole blocks take one launch forward and two backward. In parts, pooling and feed-forward are the ops of these names and
products are torch's. The backward computes the forward again, as nothing but the rows is saved.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...ops.backend import Arguments
from ...ops.pointer_facts import owners
from ...ops.reference_pool import PoolParts, pool_block_backward_in_parts, pool_block_in_parts
from ...ops.schema import POOL_PARAMETERS, named
from ...ops.supported_widths import width_reasons
from ..gpu_plans import whole_blocks
from ..gpu_plans.lengths import Lengths
from . import pool_block_kernels as kernels
from .block_plans import BlockPlan
from .feed_forward import feed_forward, feed_forward_backward
from .launches import on_device
from .partial_sums import Part, PartialSums
from .segment_pool import segment_pool, segment_pool_backward

PARTS = PoolParts(segment_pool, segment_pool_backward, feed_forward, feed_forward_backward)
LONGEST = 1024
"""Rows of the longest set that whole blocks take: one program walks through them."""


class Plan(BlockPlan):
    """Launch of one kernel of whole blocks, whose tiles are sets."""

    @classmethod
    def make(
        cls, kernel: str, x: Tensor, heads: int, layer_norm: bool, lengths: Lengths | None, arch: int | None = None
    ) -> Plan:
        """Look up the sizes of ``kernel`` for rows like ``x``; ``arch`` None asks for its device."""
        constants = {"LAYER_NORM": layer_norm, "POOLED": lengths is None}
        return cls.of("pool_block", kernel, x, heads, lengths, arch, tile="SETS", **constants)


def lengths_of(x: Tensor, ptr_host: Tensor) -> Lengths | None:
    """Return the lengths of the sets; None for rows that are pooled already."""
    return None if x.dim() == 3 else Lengths.of(ptr_host)


def takes_whole(x: Tensor, lengths: Lengths | None) -> bool:
    """Return whether the kernels of whole blocks take a call."""
    return x.shape[-1] in whole_blocks.WIDTHS and (lengths is None or lengths.longest <= LONGEST)


def pool_block(x: Tensor, ptr: Tensor, ptr_host: Tensor, *parameters: Tensor) -> Tensor:
    """Compute the op ``pool_block``, with arguments and results as in :mod:`sne_fast.ops.schema`."""
    sets, lengths = x.shape[0] if x.dim() == 3 else ptr.shape[0] - 1, lengths_of(x, ptr_host)
    if not sets:
        return x.new_empty((0, x.shape[-1]))
    with on_device(x):
        if not takes_whole(x, lengths):
            return pool_block_in_parts(PARTS, x, ptr, ptr_host, *parameters)
        x, ptr, *weights = (t.contiguous() for t in (x, ptr, *parameters))
        out = x.new_empty((sets, x.shape[-1]))
        plan = Plan.make("forward", x, weights[0].shape[0], weights[-1].shape[0] > 0, lengths)
        kernels.forward_kernel[(plan.tiles(sets),)](
            x, ptr, ptr if x.dim() == 3 else owners(ptr, x.shape[0]), *weights, out, sets, **plan.options
        )  # fmt: skip
    return out


def pool_block_backward(grad: Tensor, x: Tensor, ptr: Tensor, ptr_host: Tensor, *parameters: Tensor) -> tuple[Any, ...]:
    """Compute the op ``pool_block_backward``, with arguments and results as in :mod:`sne_fast.ops.schema`."""
    sets, lengths = x.shape[0] if x.dim() == 3 else ptr.shape[0] - 1, lengths_of(x, ptr_host)
    if not sets:
        return tuple(torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (x, *parameters))
    with on_device(x):
        if not takes_whole(x, lengths):
            return pool_block_backward_in_parts(PARTS, grad, x, ptr, ptr_host, *parameters)
        grad, x, ptr, *weights = (t.contiguous() for t in (grad, x, ptr, *parameters))
        x_grad = torch.empty_like(x)
        plan = Plan.make("backward", x, weights[0].shape[0], weights[-1].shape[0] > 0, lengths)
        tiles, programs = plan.tiles(sets), plan.programs(sets, x)
        layout = ((name, Part(tuple(t.shape), programs)) for name, t in zip(POOL_PARAMETERS, weights, strict=True))
        sums = PartialSums.make(layout, x, zeros=False)
        owner = ptr if x.dim() == 3 else owners(ptr, x.shape[0])
        kernels.backward_kernel[(programs,)](
            grad, x, ptr, owner, *weights, x_grad, *sums.parts.values(), sets, tiles, **plan.options
        )
        return (x_grad, *sums.summed(x.dtype).values())


def why_not(op: str, args: Arguments) -> list[str]:
    """Return why these kernels cannot run a call; empty if they can."""
    given = named(op, args)
    return width_reasons(given["x"].shape[-1], given["logits"].shape[0])

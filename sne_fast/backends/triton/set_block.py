"""``set_block`` in Triton: short sets of rows that attend to each other by kernels of whole blocks, others in parts.

Whole blocks take one launch forward and three backward. In parts, projections are torch's products, and attention and
feed-forward are the ops of these names. The backward computes the forward again, as nothing but the rows is saved.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...ops.backend import Arguments
from ...ops.pointer_facts import owners
from ...ops.reference_block import (
    BlockParts,
    gradients_without_rows,
    set_block_backward_in_parts,
    set_block_in_parts,
)
from ...ops.schema import BLOCK_PARAMETERS, accumulate_dtype, named, no_keys
from ...ops.supported_widths import width_reasons
from ..gpu_plans.lengths import Lengths
from ..gpu_plans.whole_blocks import takes_whole
from . import set_block_kernels as kernels
from .block_plans import BlockPlan
from .feed_forward import feed_forward, feed_forward_backward
from .launches import on_device
from .partial_sums import Part, PartialSums
from .set_attention import set_attention, set_attention_backward

PARTS = BlockParts(set_attention, set_attention_backward, feed_forward, feed_forward_backward)
PROJECTIONS = 6
"""Parameters of the projections, whose gradients the kernel of the keys sums; that of the queries sums the others."""


class Plan(BlockPlan):
    """Launch of one kernel of whole blocks, whose tiles are rows."""

    @classmethod
    def make(
        cls, kernel: str, x: Tensor, heads: int, layer_norm: bool, lengths: Lengths, arch: int | None = None
    ) -> Plan:
        """Look up the sizes of ``kernel`` for rows like ``x``; ``arch`` None asks for its device."""
        norms = {} if kernel == "key_backward" else {"LAYER_NORM": layer_norm}
        return cls.of("set_block", kernel, x, heads, lengths, arch, tile="ROWS", **norms)


def set_block(
    q: Tensor, k: Tensor | None, q_ptr: Tensor, k_ptr: Tensor, q_ptr_host: Tensor, k_ptr_host: Tensor, *parameters: Any
) -> Tensor:
    """Compute the op ``set_block``, with arguments and results as in :mod:`sne_fast.ops.schema`."""
    *weights, heads = parameters
    rows, w_o, norm, pointers = q.shape[0], weights[6], weights[8], (q_ptr, k_ptr, q_ptr_host, k_ptr_host)
    if not rows:
        return q.new_empty((0, w_o.shape[0]))
    with on_device(q):
        if not takes_whole(q, k, q_ptr_host, w_o):
            return set_block_in_parts(PARTS, q, k, *pointers, *parameters)
        x, ptr, *weights = (t.contiguous() for t in (q, q_ptr, *weights))
        out, plan = torch.empty_like(x), Plan.make("forward", x, heads, norm.shape[0] > 0, Lengths.of(q_ptr_host))
        kernels.forward_kernel[(plan.tiles(rows),)](x, ptr, owners(ptr, rows), *weights, out, rows, **plan.options)
    return out


def set_block_backward(
    grad: Tensor, q: Tensor, k: Tensor | None, q_ptr: Tensor, k_ptr: Tensor, q_ptr_host: Tensor, k_ptr_host: Tensor,
    *parameters: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Compute the op ``set_block_backward``, with arguments and results as in :mod:`sne_fast.ops.schema`."""
    *weights, heads = parameters
    if not q.shape[0]:
        return gradients_without_rows(q, k, weights)
    with on_device(q):
        if takes_whole(q, k, q_ptr_host, weights[6]):
            tensors = [t.contiguous() for t in (grad, q, q_ptr, *weights)]
            return _whole_backward(*tensors, heads=heads, lengths=Lengths.of(q_ptr_host))
        pointers = (q_ptr, k_ptr, q_ptr_host, k_ptr_host)
        return set_block_backward_in_parts(PARTS, grad, q, k, *pointers, *parameters)


def _whole_backward(
    grad: Tensor, x: Tensor, ptr: Tensor, *weights: Tensor, heads: int, lengths: Lengths
) -> tuple[Tensor, ...]:
    w_q, b_q, w_k, _, w_v, *_, norm = weights
    rows, owner = x.shape[0], owners(ptr, x.shape[0])
    by_query, by_key = (
        Plan.make(kernel, x, heads, norm.shape[0] > 0, lengths) for kernel in ("query_backward", "key_backward")
    )
    programs = [by_key.programs(rows, x)] * PROJECTIONS + [by_query.programs(rows, x)] * (len(weights) - PROJECTIONS)
    parts = (Part(tuple(t.shape), count) for t, count in zip(weights, programs, strict=True))
    sums = PartialSums.make(zip(BLOCK_PARAMETERS, parts, strict=True), x, zeros=False)
    buffers = list(sums.parts.values())
    sum_grad, query_grad, x_grad = (torch.empty_like(x) for _ in range(3))
    stats = x.new_empty((3, rows, heads), dtype=accumulate_dtype(x.dtype))
    kernels.query_backward_kernel[(programs[-1],)](
        grad, x, ptr, owner, *weights, sum_grad, query_grad, stats, *buffers[PROJECTIONS:],
        rows, by_query.tiles(rows), **by_query.options,
    )  # fmt: skip
    kernels.key_backward_kernel[(programs[0],)](
        x, ptr, owner, w_q, b_q, w_k, w_v, sum_grad, query_grad, stats, x_grad, *buffers[:PROJECTIONS],
        rows, by_key.tiles(rows), **by_key.options,
    )  # fmt: skip
    return (x_grad, no_keys(x), *sums.summed(x.dtype).values())


def why_not(op: str, args: Arguments) -> list[str]:
    """Return why these kernels cannot run a call; empty if they can."""
    given = named(op, args)
    return width_reasons(given["w_o"].shape[0], given["num_heads"])

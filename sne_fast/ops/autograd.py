"""Gradients of the ops: each forward saves the inputs of its backward op, the same ones under every backend."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

OPS = torch.ops.sne_fast


def apply(function: type[torch.autograd.Function], *args: Any) -> Tensor:
    """Call one of the functions below, all of which return one tensor."""
    out: Tensor = function.apply(*args)
    return out


def _refuse_double_backward(op: str) -> None:
    # Autograd runs a backward with grad mode on only where a graph of the gradient was asked for.
    if not torch.compiler.is_compiling() and torch.is_grad_enabled():
        raise RuntimeError(f"{op}: double backward is not implemented; call backward without create_graph=True")


class GatherChunks(torch.autograd.Function):
    """Autograd function of the op ``gather_chunks``."""

    @staticmethod
    def forward(ctx: Any, scale: Tensor, plan: Tensor, dtype: torch.dtype, *tensors: Tensor) -> Tensor:
        """Call the forward op and save the inputs of the backward op."""
        values: Tensor = OPS.gather_chunks(list(tensors), scale, plan, dtype)
        ctx.save_for_backward(values, scale, plan, *tensors)
        return values

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Call the backward op."""
        _refuse_double_backward("gather_chunks")
        values, scale, plan, *tensors = ctx.saved_tensors
        grads, grad_scale = OPS.gather_chunks_backward(grad, values, tensors, scale, plan)
        return (grad_scale, None, None, *grads)


class ChunkEncode(torch.autograd.Function):
    """Autograd function of the op ``chunk_encode``."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, *args: Tensor) -> Tensor:
        """Call the forward op and save the inputs of the backward op."""
        ctx.save_for_backward(values, *args)
        pooled: Tensor = OPS.chunk_encode(values, *args)
        return pooled

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Call the backward op."""
        _refuse_double_backward("chunk_encode")
        grad_values, *grads = OPS.chunk_encode_backward(grad, *ctx.saved_tensors)
        return (grad_values, None, None, None, None, *grads)


class SetAttention(torch.autograd.Function):
    """Autograd function of the op ``set_attention``."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, *args: Any) -> Tensor:
        """Call the forward op and save the inputs of the backward op."""
        *pointers, num_heads = args
        out: Tensor
        out, lse = OPS.set_attention(q, k, v, *pointers, num_heads)
        ctx.save_for_backward(q, k, v, out, lse, *pointers)
        ctx.num_heads = num_heads
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Call the backward op."""
        _refuse_double_backward("set_attention")
        grads = OPS.set_attention_backward(grad, *ctx.saved_tensors, ctx.num_heads)
        return (*grads, None, None, None, None, None)


class SegmentPool(torch.autograd.Function):
    """Autograd function of the op ``segment_pool``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, logits: Tensor, ptr: Tensor, ptr_host: Tensor) -> Tensor:
        """Call the forward op and save the inputs of the backward op."""
        out: Tensor
        out, lse = OPS.segment_pool(x, logits, ptr, ptr_host)
        ctx.save_for_backward(x, logits, out, lse, ptr, ptr_host)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Call the backward op."""
        _refuse_double_backward("segment_pool")
        return (*OPS.segment_pool_backward(grad, *ctx.saved_tensors), None, None)


class FeedForward(torch.autograd.Function):
    """Autograd function of the op ``feed_forward``."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, attended: Tensor, *parameters: Tensor) -> Tensor:
        """Call the forward op and save the inputs of the backward op."""
        ctx.save_for_backward(q, attended, *parameters)
        out: Tensor = OPS.feed_forward(q, attended, *parameters)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Call the backward op."""
        _refuse_double_backward("feed_forward")
        grad_sum, *grads = OPS.feed_forward_backward(grad, *ctx.saved_tensors)
        return (grad_sum, grad_sum, *grads)

"""Gradients of the ops: each forward saves the inputs of its backward op, the same ones under every backend.

Forward and context are apart (`setup_context`), so that one level of `torch.func.grad` or `vjp` runs on the kernels.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .transforms import torch_func_is_active

OPS = torch.ops.sne_fast

Gradients = tuple[Tensor | None, ...]


def apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """Call one of the functions below."""
    return function.apply(*args)


def _no_double_backward(op: str) -> RuntimeError:
    return RuntimeError(f"{op}: double backward is not implemented; call backward without create_graph=True")


class _FirstDerivative(torch.autograd.Function):
    """Gradient inside `torch.func`, where autograd always records it: differentiating it again is refused by name."""

    @staticmethod
    def forward(op: str, backward: Callable[..., tuple[Tensor, ...]], *tensors: Tensor) -> tuple[Tensor, ...]:
        """Call the backward op."""
        return backward(*tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Remember the name of the op."""
        ctx.op = inputs[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Gradients:
        """Refuse a second derivative."""
        raise _no_double_backward(ctx.op)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, ...]:
        """Refuse a second derivative."""
        raise _no_double_backward(ctx.op)

    @staticmethod
    def vmap(info: Any, in_dims: Any, op: str, backward: Callable[..., Any], *tensors: Tensor) -> Any:
        """Call the backward op for every gradient in turn, as `torch.func.jacrev` asks."""
        results = [
            apply(
                _FirstDerivative, op, backward,
                *(t if d is None else t.select(d, b) for t, d in zip(tensors, in_dims[2:], strict=True)),
            )
            for b in range(info.batch_size)
        ]  # fmt: skip
        stacked = tuple(torch.stack(parts) for parts in zip(*results, strict=True))
        return stacked, (0,) * len(stacked)


def _first_derivative(
    ctx: Any, op: str, backward: Callable[..., tuple[Tensor, ...]], *tensors: Tensor
) -> tuple[Tensor, ...]:
    """Call `backward`, which calls the backward op; a derivative of its results is refused."""
    # What `torch.func.vjp` returns is called outside of it, and asks for a graph without need.
    if ctx.in_torch_func or torch_func_is_active():
        gradients: tuple[Tensor, ...] = apply(_FirstDerivative, op, backward, *tensors)
        return gradients
    # Autograd runs a backward with grad mode on only where a graph of the gradient was asked for.
    if not torch.compiler.is_compiling() and torch.is_grad_enabled():
        raise _no_double_backward(op)
    return backward(*tensors)


class _OfInputs(torch.autograd.Function):
    """A function whose backward op takes all of its inputs."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """Save the inputs of the backward op."""
        ctx.in_torch_func = torch_func_is_active()
        ctx.save_for_backward(*inputs)


class GatherChunks(torch.autograd.Function):
    """Autograd function of the op ``gather_chunks``."""

    @staticmethod
    def forward(scale: Tensor, plan: Tensor, dtype: torch.dtype, *tensors: Tensor) -> Tensor:
        """Call the forward op."""
        values: Tensor = OPS.gather_chunks(list(tensors), scale, plan, dtype)
        return values

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Save the inputs of the backward op."""
        ctx.in_torch_func = torch_func_is_active()
        scale, plan, _, *tensors = inputs
        ctx.save_for_backward(output, scale, plan, *tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Gradients:
        """Call the backward op."""

        def backward(grad: Tensor, values: Tensor, scale: Tensor, plan: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
            grads, grad_scale = OPS.gather_chunks_backward(grad, values, list(tensors), scale, plan)
            return (grad_scale, *grads)

        grad_scale, *grads = _first_derivative(ctx, "gather_chunks", backward, grad, *ctx.saved_tensors)
        return (grad_scale, None, None, *grads)


class ChunkEncode(_OfInputs):
    """Autograd function of the op ``chunk_encode``."""

    @staticmethod
    def forward(*args: Tensor) -> Tensor:
        """Call the forward op."""
        pooled: Tensor = OPS.chunk_encode(*args)
        return pooled

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Gradients:
        """Call the backward op."""
        grad_values, *grads = _first_derivative(
            ctx, "chunk_encode", OPS.chunk_encode_backward, grad, *ctx.saved_tensors
        )
        return (grad_values, None, None, None, None, *grads)


class SetAttention(torch.autograd.Function):
    """Autograd function of the op ``set_attention``."""

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        """Call the forward op."""
        out, lse = OPS.set_attention(q, k, v, *args)
        return out, lse

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        """Save the inputs of the backward op."""
        ctx.in_torch_func = torch_func_is_active()
        *tensors, num_heads = inputs
        out, lse = output
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)  # of lse there is none
        ctx.save_for_backward(*tensors[:3], out, lse, *tensors[3:])
        ctx.num_heads = num_heads

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _lse: None) -> Gradients:
        """Call the backward op."""
        if grad is None:
            return (None,) * 8
        num_heads = ctx.num_heads

        def backward(*args: Tensor) -> tuple[Tensor, ...]:
            grads: tuple[Tensor, ...] = OPS.set_attention_backward(*args, num_heads)
            return grads

        return (*_first_derivative(ctx, "set_attention", backward, grad, *ctx.saved_tensors), *[None] * 5)


class SegmentPool(torch.autograd.Function):
    """Autograd function of the op ``segment_pool``."""

    @staticmethod
    def forward(x: Tensor, logits: Tensor, ptr: Tensor, ptr_host: Tensor) -> tuple[Tensor, Tensor]:
        """Call the forward op."""
        out, lse = OPS.segment_pool(x, logits, ptr, ptr_host)
        return out, lse

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
        """Save the inputs of the backward op."""
        ctx.in_torch_func = torch_func_is_active()
        x, logits, *pointers = inputs
        out, lse = output
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)  # of lse there is none
        ctx.save_for_backward(x, logits, out, lse, *pointers)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _lse: None) -> Gradients:
        """Call the backward op."""
        if grad is None:
            return (None,) * 4
        grads = _first_derivative(ctx, "segment_pool", OPS.segment_pool_backward, grad, *ctx.saved_tensors)
        return (*grads, None, None)


class SetBlock(torch.autograd.Function):
    """Autograd function of the op ``set_block``."""

    @staticmethod
    def forward(*args: Any) -> Tensor:
        """Call the forward op."""
        out: Tensor = OPS.set_block(*args)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Save the inputs of the backward op."""
        ctx.in_torch_func = torch_func_is_active()
        *tensors, ctx.num_heads = inputs
        ctx.itself = inputs[1] is None
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Gradients:
        """Call the backward op."""
        num_heads = ctx.num_heads

        def backward(*args: Tensor) -> tuple[Tensor, ...]:
            grads: tuple[Tensor, ...] = OPS.set_block_backward(*args, num_heads)
            return grads

        grad_q, grad_k, *grads = _first_derivative(ctx, "set_block", backward, grad, *ctx.saved_tensors)
        return (grad_q, None if ctx.itself else grad_k, *[None] * 4, *grads, None)


class PoolBlock(_OfInputs):
    """Autograd function of the op ``pool_block``."""

    @staticmethod
    def forward(*args: Tensor) -> Tensor:
        """Call the forward op."""
        out: Tensor = OPS.pool_block(*args)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Gradients:
        """Call the backward op."""
        grad_x, *grads = _first_derivative(ctx, "pool_block", OPS.pool_block_backward, grad, *ctx.saved_tensors)
        return (grad_x, None, None, *grads)


class AddCodes(torch.autograd.Function):
    """Autograd function of the op ``add_codes``."""

    @staticmethod
    def forward(*args: Tensor) -> Tensor:
        """Call the forward op."""
        out: Tensor = OPS.add_codes(*args)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """Save the inputs of the backward op."""
        ctx.in_torch_func = torch_func_is_active()
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Gradients:
        """Call the backward op."""
        grads = _first_derivative(ctx, "add_codes", OPS.add_codes_backward, grad, *ctx.saved_tensors)
        return (grad, *[None] * 5, *grads)


class FeedForward(_OfInputs):
    """Autograd function of the op ``feed_forward``."""

    @staticmethod
    def forward(*args: Tensor) -> Tensor:
        """Call the forward op."""
        out: Tensor = OPS.feed_forward(*args)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Gradients:
        """Call the backward op."""
        grad_sum, *grads = _first_derivative(ctx, "feed_forward", OPS.feed_forward_backward, grad, *ctx.saved_tensors)
        return (grad_sum, grad_sum, *grads)


# torch binds the arguments of every call to the signature of `forward`, and would read it anew each time.
for _function in (
    _FirstDerivative,
    GatherChunks,
    ChunkEncode,
    SetAttention,
    SegmentPool,
    SetBlock,
    PoolBlock,
    AddCodes,
    FeedForward,
):
    _function.forward.__signature__ = inspect.signature(_function.forward)  # type: ignore[union-attr]

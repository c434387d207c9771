"""The op ``pool_block`` in parts: the ops for pooling and feed-forward of any backend, and plain products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class PoolParts(NamedTuple):
    """The ops that a pooling block consists of, as one backend has them."""

    segment_pool: Callable[..., Any]
    segment_pool_backward: Callable[..., Any]
    feed_forward: Callable[..., Any]
    feed_forward_backward: Callable[..., Any]


def _attended(
    parts: PoolParts, x: Tensor, ptr: Tensor, ptr_host: Tensor, parameters: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """Return logits, pooled rows, their lse, queries, attended rows ``(S, h)``, and 1 for sets with rows ``(S, 1)``."""
    logits, query, w_v, b_v, *_ = parameters
    if x.dim() == 3:  # pooled already
        by_row, pooled, lse, full = x, x, x, x.new_ones((x.shape[0], 1))
    else:
        by_row, full = x @ logits.t(), (ptr.diff() > 0)[:, None].to(x.dtype)  # [rows, H], [S, 1]
        pooled, lse = parts.segment_pool(x, by_row, ptr, ptr_host)
    attended = torch.bmm(pooled.transpose(0, 1), w_v.mT).transpose(0, 1).flatten(1)
    return by_row, pooled, lse, query + full * b_v, attended, full


def pool_block_in_parts(parts: PoolParts, x: Tensor, ptr: Tensor, ptr_host: Tensor, *parameters: Tensor) -> Tensor:
    """Compute the op ``pool_block``, with arguments and results as in :mod:`sne_fast.ops.schema`."""
    *_, query, attended, _ = _attended(parts, x, ptr, ptr_host, parameters)
    out: Tensor = parts.feed_forward(query, attended, *parameters[4:])
    return out


def pool_block_backward_in_parts(
    parts: PoolParts, grad: Tensor, x: Tensor, ptr: Tensor, ptr_host: Tensor, *parameters: Tensor
) -> tuple[Tensor, ...]:
    """Compute the op ``pool_block_backward``, with arguments and results as in :mod:`sne_fast.ops.schema`."""
    logits, _, w_v, *_ = parameters
    by_row, pooled, lse, query, attended, full = _attended(parts, x, ptr, ptr_host, parameters)
    sum_grad, *by_feed_forward = parts.feed_forward_backward(grad, query, attended, *parameters[4:])
    by_head = sum_grad.unflatten(1, (logits.shape[0], -1)).transpose(0, 1)  # [H, S, d]
    pooled_grad = torch.bmm(by_head, w_v).transpose(0, 1).contiguous()  # [S, H, h]
    w_grad = torch.bmm(by_head.mT, pooled.transpose(0, 1)).contiguous()  # [H, d, h]
    others = (sum_grad.sum(0), w_grad, (full * sum_grad).sum(0), *by_feed_forward)
    if x.dim() == 3:
        return (pooled_grad, torch.zeros_like(logits, memory_format=torch.contiguous_format), *others)
    x_grad, row_grad = parts.segment_pool_backward(pooled_grad, x, by_row, pooled, lse, ptr, ptr_host)
    return (x_grad + row_grad @ logits, row_grad.t() @ x, *others)

"""The op ``set_block`` in parts: the ops for attention and feed-forward of any backend, and plain products."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .schema import no_keys


class BlockParts(NamedTuple):
    """The ops that an attention block consists of, as one backend has them."""

    set_attention: Callable[..., Any]
    set_attention_backward: Callable[..., Any]
    feed_forward: Callable[..., Any]
    feed_forward_backward: Callable[..., Any]


def gradients_without_rows(q: Tensor, k: Tensor | None, weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return the gradients of a call that has no queries: zeros."""
    given = (q, no_keys(q) if k is None else k, *weights)
    return tuple(torch.zeros_like(t, memory_format=torch.contiguous_format) for t in given)


def _attended(
    parts: BlockParts, q: Tensor, k: Tensor, pointers: Sequence[Tensor], weights: Sequence[Tensor], num_heads: int
) -> tuple[Tensor, ...]:
    """Return queries, keys, values, the attended rows and their lse."""
    w_q, b_q, w_k, b_k, w_v, b_v, *_ = weights
    projected = F.linear(q, w_q, b_q), F.linear(k, w_k, b_k), F.linear(k, w_v, b_v)
    return (*projected, *parts.set_attention(*projected, *pointers, num_heads))


def set_block_in_parts(parts: BlockParts, q: Tensor, k: Tensor | None, *args: Any) -> Tensor:
    """Compute the op ``set_block``, with arguments and results as in :mod:`sne_fast.ops.schema`."""
    *pointers, num_heads = args[:4] + args[-1:]
    weights = args[4:-1]
    query, *_, attended, _ = _attended(parts, q, q if k is None else k, pointers, weights, num_heads)
    out: Tensor = parts.feed_forward(query, attended, *weights[6:])
    return out


def set_block_backward_in_parts(
    parts: BlockParts, grad: Tensor, q: Tensor, k: Tensor | None, *args: Any
) -> tuple[Tensor, ...]:
    """Compute the op ``set_block_backward``, with arguments and results as in :mod:`sne_fast.ops.schema`."""
    if k is None:
        grad_q, grad_k, *others = set_block_backward_in_parts(parts, grad, q, q, *args)
        return (grad_q + grad_k, no_keys(q), *others)
    *pointers, num_heads = args[:4] + args[-1:]
    weights = args[4:-1]
    w_q, _, w_k, _, w_v, *_ = weights
    query, key, value, attended, lse = _attended(parts, q, k, pointers, weights, num_heads)
    sum_grad, *by_feed_forward = parts.feed_forward_backward(grad, query, attended, *weights[6:])
    by_query, by_key, by_value = parts.set_attention_backward(
        sum_grad, query, key, value, attended, lse, *pointers, num_heads
    )
    by_query = by_query + sum_grad
    grads: list[Tensor] = [by_query @ w_q, torch.addmm(by_key @ w_k, by_value, w_v)]
    for by_row, rows in ((by_query, q), (by_key, k), (by_value, k)):
        grads += [by_row.t() @ rows, by_row.sum(0)]
    grads[5] = torch.zeros_like(weights[3])  # the bias of the keys is constant in the softmax
    return (*grads, *by_feed_forward)

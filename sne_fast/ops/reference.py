"""The ops in plain PyTorch, for any floating dtype and device: the reference that every backend is tested against.

The ops run in tiles of rows or of sets of equal length, so nothing is padded and memory does not grow with the number
of weights times the width. Half types are computed in float32 and rounded once, at the end. The functions have the
arguments and results of :mod:`sne_fast.ops.schema`; docs/method.md, Ops, says what they compute.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .reference_block import BlockParts, set_block_backward_in_parts, set_block_in_parts
from .reference_codes import add_codes, add_codes_backward
from .reference_gather import gather_chunks, gather_chunks_backward, gather_stored
from .reference_pool import PoolParts, pool_block_backward_in_parts, pool_block_in_parts
from .reference_statistics import tensor_statistics
from .schema import accumulate_dtype

__all__ = ["add_codes", "add_codes_backward", "chunk_encode", "chunk_encode_backward", "feed_forward",
           "feed_forward_backward", "gather_chunks", "gather_chunks_backward", "gather_stored", "pool_block",
           "pool_block_backward", "segment_pool", "segment_pool_backward", "set_attention", "set_attention_backward",
           "set_block", "set_block_backward", "tensor_statistics"]  # fmt: skip

LAYER_NORM_EPS = 1e-5
# Elements of a tile's largest intermediate: 2 MB in float32 stays in a core's cache, which makes eager ops 2.7x faster.
TILE_ELEMENTS = 1 << 19


# ---------------------------------------------------------------------------------------------- sets of equal length


def equal_length_tiles(lengths: Tensor, elements_per_set: Tensor) -> Iterator[Tensor]:
    """Yield int64 ids of sets that share a row of ``lengths`` (S, pointers), at most ``TILE_ELEMENTS`` at a time.

    ``elements_per_set (S,)`` is the size of the largest intermediate of each set; one set alone may exceed a tile.
    """
    if lengths.shape[0] == 0:
        return
    _, group = torch.unique(lengths, dim=0, return_inverse=True)
    order = torch.argsort(group, stable=True)
    for ids in order.split(torch.bincount(group).tolist()):
        yield from ids.split(max(1, TILE_ELEMENTS // max(1, int(elements_per_set[ids[0]]))))


def row_index(ptr: Tensor, ids: Tensor) -> Tensor:
    """Return the rows of the sets ``ids``, which share one length n: ``(len(ids), n)`` int64."""
    start = ptr[ids]
    return start[:, None] + torch.arange(int(ptr[ids[0] + 1] - ptr[ids[0]]), device=ptr.device)


# ------------------------------------------------------------------------------------------------------- chunk_encode


def _attend(q: Tensor, k: Tensor, v: Tensor, num_heads: int) -> Tensor:
    """Compute softmax(q k^T / sqrt(h)) v per head, for dense q (m, n, h) and k, v (m, l, h)."""
    q_heads, k_heads, v_heads = (t.unflatten(-1, (num_heads, -1)).transpose(1, 2) for t in (q, k, v))
    weights = torch.softmax(q_heads @ k_heads.transpose(2, 3) / math.sqrt(q.shape[-1]), dim=-1)  # [m, H, n, l]
    attended: Tensor = (weights @ v_heads).transpose(1, 2).flatten(2)
    return attended


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Normalise the rows of x, as `torch.nn.LayerNorm` does."""
    return F.layer_norm(x, x.shape[-1:], weight, bias, LAYER_NORM_EPS)


Normalise = Callable[[Tensor, Tensor, Tensor], Tensor]


def residual(o: Tensor, w_o: Tensor, b_o: Tensor, norm: Tensor | None, normalise: Normalise = layer_norm) -> Tensor:
    """Compute ln1(o' + relu(fc_o(o'))) with o' = ln0(o); ``norm`` (4, h) holds both norms, None leaves them out."""
    if norm is not None:
        o = normalise(o, norm[0], norm[1])
    o = o + torch.relu(F.linear(o, w_o, b_o))
    return o if norm is None else normalise(o, norm[2], norm[3])


def chunk_tile(
    x: Tensor, row_code: Tensor, element_code: Tensor, *parameters: Tensor, normalise: Normalise = layer_norm
) -> Tensor:
    """Encode m chunks of one length n: x (m, n), row_code (m, h), element_code (n, h) -> pooled rows (m, H, h)."""
    logit, basis, w_qkv, b_qkv, w_o, b_o, norm, pool_query = parameters
    num_heads, width = pool_query.shape
    norms = norm if norm.shape[0] else [None] * 4
    # Block 0 sees scalars, so its attention is one mean of x per head: docs/method.md, The first block sees scalars.
    slope = logit[0, :, None] * x[:, None, :] + logit[1, :, None]  # [m, H, n]
    mean = torch.softmax(slope[..., None] * x[:, None, None, :], dim=-1) @ x[:, None, :, None]  # [m, H, n, 1]
    mean = mean.squeeze(-1).transpose(1, 2).repeat_interleave(width // num_heads, dim=-1)  # [m, n, h]
    h = residual(x[..., None] * basis[0] + mean * basis[1] + basis[2], w_o[0], b_o[0], norms[0], normalise)
    for block in (1, 2, 3):
        if block == 2:
            h = h + row_code[:, None, :] + element_code
        q, k, v = F.linear(h, w_qkv[block - 1], b_qkv[block - 1]).chunk(3, dim=-1)
        h = residual(q + _attend(q, k, v, num_heads), w_o[block], b_o[block], norms[block], normalise)
    weights = torch.softmax(h @ pool_query.t(), dim=1)  # [m, n, H]
    return weights.transpose(1, 2) @ h


def chunk_tiles(chunk_ptr_host: Tensor, pool_query: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield chunk ids (m,) and the rows (m, n) of their values."""
    lengths = chunk_ptr_host.diff()
    per_element = torch.clamp(lengths * pool_query.shape[0], min=3 * pool_query.shape[1])
    for ids in equal_length_tiles(lengths[:, None], lengths * per_element):
        yield ids, row_index(chunk_ptr_host, ids)


def tensor_of_chunk(tensor_ptr_host: Tensor) -> Tensor:
    """Return the tensor that each chunk belongs to, `(N,)`."""
    return torch.repeat_interleave(tensor_ptr_host.diff())


def chunk_encode(
    values: Tensor,
    chunk_ptr: Tensor,
    tensor_ptr: Tensor,
    chunk_ptr_host: Tensor,
    tensor_ptr_host: Tensor,
    row_code: Tensor,
    element_code: Tensor,
    *parameters: Tensor,
) -> Tensor:
    """Encode every chunk up to its pooled rows, ``(N, H, h)``."""
    acc, owner = accumulate_dtype(values.dtype), tensor_of_chunk(tensor_ptr_host)
    pooled = values.new_empty((chunk_ptr.shape[0] - 1, *parameters[-1].shape))
    row_code, element_code, *weights = (t.to(acc) for t in (row_code, element_code, *parameters))
    for ids, rows in chunk_tiles(chunk_ptr_host, weights[-1]):
        x = values[rows.to(values.device)].to(acc)
        row = row_code[owner[ids].to(values.device)]
        pooled[ids.to(values.device)] = chunk_tile(x, row, element_code[: x.shape[1]], *weights).to(values.dtype)
    return pooled


@contextmanager
def _autograd_inside_an_op() -> Iterator[None]:
    """Turn autograd on, also below a ``TorchDispatchMode``, whose handlers run ops without autograd in dispatch."""
    key = torch._C.DispatchKey.AutogradFunctionality
    excluded = torch._C._dispatch_tls_is_dispatch_key_excluded(key)
    torch._C._dispatch_tls_set_dispatch_key_excluded(key, False)
    try:
        with torch.enable_grad():
            yield
    finally:
        torch._C._dispatch_tls_set_dispatch_key_excluded(key, excluded)


def chunk_encode_backward(
    grad: Tensor,
    values: Tensor,
    chunk_ptr: Tensor,
    tensor_ptr: Tensor,
    chunk_ptr_host: Tensor,
    tensor_ptr_host: Tensor,
    *parameters: Tensor,
) -> tuple[Tensor, ...]:
    """Recompute each tile with autograd on, differentiate it, and add up the gradients of all tiles."""
    acc, owner, device = accumulate_dtype(values.dtype), tensor_of_chunk(tensor_ptr_host), values.device
    row_code, *shared = (t.detach().to(acc).requires_grad_() for t in parameters)  # shared: element_code and weights
    grad_values = torch.zeros_like(values, memory_format=torch.contiguous_format)
    grad_row = values.new_zeros((chunk_ptr.shape[0] - 1, row_code.shape[1]), dtype=acc)
    grad_shared = [torch.zeros_like(t) for t in shared]
    for ids, rows in chunk_tiles(chunk_ptr_host, shared[-1]):
        ids, rows, at = ids.to(device), rows.to(device), owner[ids].to(device)
        x = values[rows].detach().to(acc).requires_grad_()
        row = row_code.detach()[at].requires_grad_()
        with _autograd_inside_an_op():
            pooled = chunk_tile(x, row, shared[0][: x.shape[1]], *shared[1:])
            tile = torch.autograd.grad(pooled, [x, row, *shared], grad[ids].to(acc), allow_unused=True)
        grad_values[rows] = tile[0].to(values.dtype)
        grad_row[ids] = tile[1]
        for total, part in zip(grad_shared, tile[2:], strict=True):
            if part is not None:  # None for the empty norm of a network without layer norm
                total += part
    # The chunks of a tensor stand together: one sum per segment, in a fixed order.
    grad_row = torch.segment_reduce(grad_row, "sum", offsets=tensor_ptr, axis=0, initial=0)
    grads = zip((grad_row, *grad_shared), parameters, strict=True)
    return (grad_values, *(g.to(parameter.dtype) for g, parameter in grads))


# ------------------------------------------------------------------------------------------------------ set_attention


def attention_tiles(q_ptr: Tensor, k_ptr: Tensor, num_heads: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield rows of queries (m, a) and of keys (m, l) of sets that share both lengths, long sets in parts."""
    lengths = torch.stack([q_ptr.diff(), k_ptr.diff()], dim=1)
    for ids in equal_length_tiles(lengths, num_heads * lengths.prod(dim=1)):
        q_rows, k_rows = row_index(q_ptr, ids), row_index(k_ptr, ids)
        if q_rows.numel() == 0 or k_rows.numel() == 0:
            continue
        for part in q_rows.split(max(1, TILE_ELEMENTS // (num_heads * k_rows.numel())), dim=1):
            yield part, k_rows


def _heads(t: Tensor, rows: Tensor, num_heads: int) -> Tensor:
    """Return the ``rows`` (m, n) of t (rows, h) by heads, (m, H, n, d), in the dtype of accumulation."""
    heads: Tensor = t[rows].to(accumulate_dtype(t.dtype)).unflatten(-1, (num_heads, -1)).transpose(1, 2)
    return heads


def set_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_ptr: Tensor,
    k_ptr: Tensor,
    q_ptr_host: Tensor,
    k_ptr_host: Tensor,
    num_heads: int,
) -> tuple[Tensor, Tensor]:
    """Attend inside each set; return the attended rows and lse, the log-sum of the softmax of each row and head."""
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    lse = q.new_full((q.shape[0], num_heads), -math.inf, dtype=accumulate_dtype(q.dtype))
    for q_rows, k_rows in attention_tiles(q_ptr_host, k_ptr_host, num_heads):
        q_rows, k_rows = q_rows.to(q.device), k_rows.to(q.device)
        logits = _heads(q, q_rows, num_heads) @ _heads(k, k_rows, num_heads).mT / math.sqrt(q.shape[1])  # [m, H, a, l]
        attended = torch.softmax(logits, dim=-1) @ _heads(v, k_rows, num_heads)
        out[q_rows] = attended.transpose(1, 2).flatten(2).to(q.dtype)
        lse[q_rows] = torch.logsumexp(logits, dim=-1).transpose(1, 2)
    return out, lse


def set_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    q_ptr: Tensor,
    k_ptr: Tensor,
    q_ptr_host: Tensor,
    k_ptr_host: Tensor,
    num_heads: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v."""
    acc, scale = accumulate_dtype(q.dtype), 1 / math.sqrt(q.shape[1])
    grad_q, grad_k, grad_v = (torch.zeros_like(t, dtype=acc, memory_format=torch.contiguous_format) for t in (q, k, v))
    for q_rows, k_rows in attention_tiles(q_ptr_host, k_ptr_host, num_heads):
        q_rows, k_rows = q_rows.to(q.device), k_rows.to(q.device)
        qh, gh = (_heads(t, q_rows, num_heads) for t in (q, grad))
        kh, vh = (_heads(t, k_rows, num_heads) for t in (k, v))
        # Not by lse: where logits are large, its rounding error is as large as the logarithm of the sum.
        weights = torch.softmax(qh @ kh.mT * scale, dim=-1)  # [m, H, a, l]
        grad_weights = gh @ vh.mT
        # The mean equals <grad, out>, but out may be rounded to a half type, and the difference below nearly cancels.
        grad_logits = weights * (grad_weights - (weights * grad_weights).sum(-1, keepdim=True)) * scale
        grad_q[q_rows] = (grad_logits @ kh).transpose(1, 2).flatten(2)
        # A long set comes in several tiles of queries, each of which adds to all of its keys.
        grad_k[k_rows] += (grad_logits.mT @ qh).transpose(1, 2).flatten(2)
        grad_v[k_rows] += (weights.mT @ gh).transpose(1, 2).flatten(2)
    return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype)


# ------------------------------------------------------------------------------------------------------- segment_pool


def segment_tiles(x: Tensor, logits: Tensor, ptr_host: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield segment ids (m,) and their rows (m, n), n > 0."""
    lengths = ptr_host.diff()
    for ids in equal_length_tiles(lengths[:, None], lengths * max(x.shape[1], logits.shape[1])):
        rows = row_index(ptr_host, ids)
        if rows.shape[1]:
            yield ids, rows


def segment_pool(x: Tensor, logits: Tensor, ptr: Tensor, ptr_host: Tensor) -> tuple[Tensor, Tensor]:
    """Pool the rows of each segment; return the pooled rows and lse, the log-sum of each softmax."""
    acc, segments = accumulate_dtype(x.dtype), ptr.shape[0] - 1
    out = x.new_zeros((segments, logits.shape[1], x.shape[1]))
    lse = x.new_full((segments, logits.shape[1]), -math.inf, dtype=acc)
    for ids, rows in segment_tiles(x, logits, ptr_host):
        ids, rows = ids.to(x.device), rows.to(x.device)
        tile = logits[rows].to(acc)  # [m, n, A]
        lse[ids] = torch.logsumexp(tile, dim=1)
        weights = torch.softmax(tile, dim=1)
        out[ids] = (weights.mT @ x[rows].to(acc)).to(x.dtype)
    return out, lse


def segment_pool_backward(
    grad: Tensor, x: Tensor, logits: Tensor, out: Tensor, lse: Tensor, ptr: Tensor, ptr_host: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and of the logits."""
    acc = accumulate_dtype(x.dtype)
    grad_x, grad_logits = (torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (x, logits))
    for ids, rows in segment_tiles(x, logits, ptr_host):
        ids, rows = ids.to(x.device), rows.to(x.device)
        tile_grad = grad[ids].to(acc)  # [m, A, h]
        weights = torch.softmax(logits[rows].to(acc), dim=1)  # [m, n, A]; not by lse, as in set_attention_backward
        grad_weights = x[rows].to(acc) @ tile_grad.mT  # [m, n, A]
        mean = (weights * grad_weights).sum(1, keepdim=True)  # [m, 1, A]; not <grad, out>: out may be rounded
        grad_x[rows] = (weights @ tile_grad).to(x.dtype)
        grad_logits[rows] = (weights * (grad_weights - mean)).to(logits.dtype)
    return grad_x, grad_logits


# ------------------------------------------------------------------------------------------------------- feed_forward


def _row_tiles(q: Tensor) -> Iterator[slice]:
    # One tile on a GPU: no cache there holds a tile, and every further tile would cost a dozen launches.
    step = max(1, TILE_ELEMENTS // max(1, q.shape[1]) if q.device.type == "cpu" else q.shape[0])
    return (slice(start, start + step) for start in range(0, q.shape[0], step))


def _optional(norm: Tensor) -> Tensor | None:
    return norm if norm.shape[0] else None


def feed_forward(q: Tensor, attended: Tensor, w_o: Tensor, b_o: Tensor, norm: Tensor) -> Tensor:
    """Compute the feed-forward half of an attention block, row by row."""
    acc, out = accumulate_dtype(q.dtype), torch.empty_like(attended, memory_format=torch.contiguous_format)
    w, b, n = (t.to(acc) for t in (w_o, b_o, norm))
    for tile in _row_tiles(q):
        out[tile] = residual(q[tile].to(acc) + attended[tile].to(acc), w, b, _optional(n)).to(q.dtype)
    return out


def feed_forward_backward(
    grad: Tensor, q: Tensor, attended: Tensor, w_o: Tensor, b_o: Tensor, norm: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradient of q + attended, which is that of each, and those of the parameters; tile by tile."""
    acc, grad_sum = accumulate_dtype(q.dtype), torch.empty_like(attended, memory_format=torch.contiguous_format)
    leaves = [t.detach().to(acc).requires_grad_() for t in (w_o, b_o, norm)]
    totals = [torch.zeros_like(t, memory_format=torch.contiguous_format) for t in leaves]
    for tile in _row_tiles(q):
        o = (q[tile].detach().to(acc) + attended[tile].detach().to(acc)).requires_grad_()
        with _autograd_inside_an_op():
            out = residual(o, leaves[0], leaves[1], _optional(leaves[2]))
            by_rows, *parts = torch.autograd.grad(out, [o, *leaves], grad[tile].to(acc), allow_unused=True)
        grad_sum[tile] = by_rows.to(q.dtype)
        for total, part in zip(totals, parts, strict=True):
            if part is not None:  # None for the empty norm of a network without layer norm
                total += part
    grad_w, grad_b, grad_norm = (t.to(q.dtype) for t in totals)
    return grad_sum, grad_w, grad_b, grad_norm


# ---------------------------------------------------------------------------------------------------------- set_block


_BLOCK_PARTS = BlockParts(set_attention, set_attention_backward, feed_forward, feed_forward_backward)


def _widened(*args: Any) -> list[Any]:
    """Return arguments with floating tensors in the dtype of sums."""
    return [t.to(accumulate_dtype(t.dtype)) if isinstance(t, Tensor) and t.is_floating_point() else t for t in args]


def set_block(q: Tensor, k: Tensor | None, *args: Any) -> Tensor:
    """Compute a whole attention block on packed sets: projections, attention inside each set, feed-forward."""
    return set_block_in_parts(_BLOCK_PARTS, *_widened(q, k, *args)).to(q.dtype)


def set_block_backward(grad: Tensor, q: Tensor, k: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
    """Return the gradients of the rows and of the parameters."""
    grads = set_block_backward_in_parts(_BLOCK_PARTS, *_widened(grad, q, k, *args))
    return tuple(g.to(q.dtype) for g in grads)


# --------------------------------------------------------------------------------------------------------- pool_block

_POOL_PARTS = PoolParts(segment_pool, segment_pool_backward, feed_forward, feed_forward_backward)


def pool_block(x: Tensor, ptr: Tensor, ptr_host: Tensor, *parameters: Tensor) -> Tensor:
    """Compute a pooling block of one seed on packed sets: pooling per head, projection, feed-forward."""
    rows, *weights = (t.to(accumulate_dtype(x.dtype)) for t in (x, *parameters))
    return pool_block_in_parts(_POOL_PARTS, rows, ptr, ptr_host, *weights).to(x.dtype)


def pool_block_backward(
    grad: Tensor, x: Tensor, ptr: Tensor, ptr_host: Tensor, *parameters: Tensor
) -> tuple[Tensor, ...]:
    """Return the gradients of the rows and of the parameters."""
    out_grad, rows, *weights = (t.to(accumulate_dtype(x.dtype)) for t in (grad, x, *parameters))
    grads = pool_block_backward_in_parts(_POOL_PARTS, out_grad, rows, ptr, ptr_host, *weights)
    return tuple(g.to(x.dtype) for g in grads)

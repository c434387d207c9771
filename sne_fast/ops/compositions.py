"""The ops as compositions of PyTorch operations that nothing writes into, so that PyTorch can transform them freely.

They serve `torch.func.jvp`, `vmap`, `jacfwd`, `hessian` and dual tensors, for which the kernels have no rules, with the
values of :mod:`sne_fast.ops.reference`. They keep what autograd keeps of every operation: a call that needs first
derivatives in reverse mode only runs on a backend's kernels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference
from .schema import accumulate_dtype


def _placed(parts: Sequence[Tensor], places: Sequence[Tensor], rows: int, like: Tensor) -> Tensor:
    """Return `(rows, *like.shape)`: the rows of `parts` at their `places`, and 0 everywhere else."""
    nothing = like.new_zeros((1, *like.shape))
    place = torch.full((rows,), sum(p.shape[0] for p in places), device="cpu")
    if places:
        order = torch.cat([p.flatten() for p in places])
        place[order] = torch.arange(order.shape[0], device="cpu")
    return torch.cat([*parts, nothing]).index_select(0, place.to(like.device))


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    # Not torch's: a derivative of its forward-mode derivative is wrong (`jacfwd(jacfwd(f))`, torch 2.13).
    centred = x - x.mean(-1, keepdim=True)
    variance = centred.square().mean(-1, keepdim=True)
    return centred * (variance + reference.LAYER_NORM_EPS).rsqrt() * weight + bias


def gather_chunks(tensors: Sequence[Tensor], scale: Tensor, plan: Tensor, dtype: torch.dtype) -> Tensor:
    """Compute the op ``gather_chunks``, with arguments and results as in :mod:`sne_fast.ops.schema`."""
    computed = accumulate_dtype(dtype)
    pieces = [
        (tensor.to(computed).reshape(rows, positions).t().reshape(-1) / scale[t]).to(dtype)
        for t, (tensor, (rows, positions)) in enumerate(zip(tensors, plan.tolist(), strict=True))
    ]
    return torch.cat([scale.new_zeros((0,), dtype=dtype), *pieces])


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
    """Compute the op ``chunk_encode``, with arguments and results as in :mod:`sne_fast.ops.schema`."""
    computed, dtype, device = accumulate_dtype(values.dtype), values.dtype, values.device
    values, row_code, element_code, *weights = (t.to(computed) for t in (values, row_code, element_code, *parameters))
    owner = reference.tensor_of_chunk(tensor_ptr_host)
    parts, places = [], []
    for ids, rows in reference.chunk_tiles(chunk_ptr_host, weights[-1]):
        x, row = values[rows.to(device)], row_code[owner[ids].to(device)]
        parts.append(reference.chunk_tile(x, row, element_code[: rows.shape[1]], *weights, normalise=_layer_norm))
        places.append(ids)
    return _placed(parts, places, chunk_ptr_host.shape[0] - 1, weights[-1]).to(dtype)


def set_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_ptr: Tensor,
    k_ptr: Tensor,
    q_ptr_host: Tensor,
    k_ptr_host: Tensor,
    num_heads: int,
) -> Tensor:
    """Compute the first result of the op ``set_attention``, with arguments as in :mod:`sne_fast.ops.schema`."""
    computed, width = accumulate_dtype(q.dtype), q.shape[1]
    queries, keys, values = (t.to(computed).unflatten(1, (num_heads, -1)) for t in (q, k, v))  # [rows, H, d]
    parts, places = [], []
    for q_rows, k_rows in reference.attention_tiles(q_ptr_host, k_ptr_host, num_heads):
        at, of = q_rows.to(q.device), k_rows.to(q.device)
        logits = torch.einsum("mahd,mlhd->mhal", queries[at], keys[of]) / math.sqrt(width)
        attended = torch.einsum("mhal,mlhd->mahd", torch.softmax(logits, dim=-1), values[of])
        parts.append(attended.flatten(2).flatten(0, 1))
        places.append(q_rows.flatten())
    return _placed(parts, places, q.shape[0], queries.new_zeros(width)).to(q.dtype)


def segment_pool(x: Tensor, logits: Tensor, ptr: Tensor, ptr_host: Tensor) -> Tensor:
    """Compute the first result of the op ``segment_pool``, with arguments as in :mod:`sne_fast.ops.schema`."""
    computed = accumulate_dtype(x.dtype)
    rows_of, logits = x.to(computed), logits.to(computed)
    parts, places = [], []
    for ids, rows in reference.segment_tiles(x, logits, ptr_host):
        at = rows.to(x.device)
        weights = torch.softmax(logits[at], dim=1)  # [m, n, A]
        parts.append(weights.mT @ rows_of[at])
        places.append(ids)
    like = rows_of.new_zeros((logits.shape[1], x.shape[1]))
    return _placed(parts, places, ptr_host.shape[0] - 1, like).to(x.dtype)


def set_block(
    q: Tensor,
    k: Tensor,
    q_ptr: Tensor,
    k_ptr: Tensor,
    q_ptr_host: Tensor,
    k_ptr_host: Tensor,
    *parameters: Any,
) -> Tensor:
    """Compute the op ``set_block``, with arguments and results as in :mod:`sne_fast.ops.schema`."""
    *weights, num_heads = parameters
    computed = accumulate_dtype(q.dtype)
    rows_q, rows_k, w_q, b_q, w_k, b_k, w_v, b_v, *rest = (t.to(computed) for t in (q, k, *weights))
    query, key, value = F.linear(rows_q, w_q, b_q), F.linear(rows_k, w_k, b_k), F.linear(rows_k, w_v, b_v)
    attended = set_attention(query, key, value, q_ptr, k_ptr, q_ptr_host, k_ptr_host, num_heads)
    return feed_forward(query, attended, *rest).to(q.dtype)


def pool_block(x: Tensor, ptr: Tensor, ptr_host: Tensor, *parameters: Tensor) -> Tensor:
    """Compute the op ``pool_block``, with arguments and results as in :mod:`sne_fast.ops.schema`."""
    rows, logits, query, w_v, b_v, *rest = (t.to(accumulate_dtype(x.dtype)) for t in (x, *parameters))
    pooled = rows if x.dim() == 3 else segment_pool(rows, rows @ logits.t(), ptr, ptr_host)  # [S, H, h]
    attended = torch.einsum("sah,adh->sad", pooled, w_v).flatten(1)
    full = rows.new_ones((x.shape[0], 1)) if x.dim() == 3 else (ptr_host.diff() > 0)[:, None].to(x.device)
    return feed_forward(query + b_v * full, attended, *rest).to(x.dtype)


def feed_forward(q: Tensor, attended: Tensor, w_o: Tensor, b_o: Tensor, norm: Tensor) -> Tensor:
    """Compute the op ``feed_forward``, with arguments and results as in :mod:`sne_fast.ops.schema`."""
    computed = accumulate_dtype(q.dtype)
    q_wide, rows, w, b, n = (t.to(computed) for t in (q, attended, w_o, b_o, norm))
    return reference.residual(q_wide + rows, w, b, n if n.shape[0] else None, _layer_norm).to(q.dtype)

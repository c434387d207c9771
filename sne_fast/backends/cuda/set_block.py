"""``set_block`` on the CUDA backend: short sets of rows that attend to each other by kernels of whole blocks.

Others go in parts: projections are torch's products, attention is this backend's ``set_attention``, and feed-forward
ordinary torch operations. The backward computes the forward again, as nothing but the rows is saved.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from ...ops import reference
from ...ops.backend import Arguments
from ...ops.pointer_facts import owners
from ...ops.reference_block import BlockParts, set_block_backward_in_parts, set_block_in_parts
from ...ops.schema import BLOCK_PARAMETERS, named, no_keys
from ...ops.supported_widths import width_reasons
from ..gpu_plans.lengths import Lengths
from . import library
from .set_attention import set_attention, set_attention_backward

PARTS = BlockParts(set_attention, set_attention_backward, reference.feed_forward, reference.feed_forward_backward)
LONGEST = 512
"""Rows of the longest set that whole blocks take: every tile computes the keys and values of its sets again."""


@functools.cache
def _has_kernels(precision: int, width: int, heads: int, shared_limit: int) -> bool:
    """Return whether the kernels of whole blocks can be launched: they are asked with no rows."""
    args = library.SetBlock(width=width, heads=heads, multiprocessors=1, shared_limit=shared_limit)
    return not library.library().sne_fast_cuda_set_block(precision, ctypes.byref(args), None)


def takes_whole(q: Tensor, k: Tensor | None, q_ptr_host: Tensor, w_o: Tensor, heads: int) -> bool:
    """Return whether the kernels of whole blocks take a call: rows of the block's width that attend to each other."""
    h = w_o.shape[0]
    if k is not None or q.shape[1] != h or Lengths.of(q_ptr_host).longest > LONGEST:
        return False
    return _has_kernels(library.precision(q.dtype), h, heads, library.shared_limit(q.device))


def _args(x: Tensor, ptr: Tensor, owner: Tensor, weights: dict[str, Tensor], heads: int, **more: Tensor) -> Any:
    """Return the struct of all launches of a call; the tensors are contiguous and aligned and must outlive it."""
    tensors = {"x": x, "ptr": ptr, "owner": owner, **weights, **more}
    del tensors["b_k"]  # constant in the softmax
    return library.SetBlock(
        rows=x.shape[0], width=x.shape[1], heads=heads, layer_norm=weights["norm"].shape[0] > 0,
        multiprocessors=library.multiprocessors(x.device), shared_limit=library.shared_limit(x.device),
        **{name: t.data_ptr() for name, t in tensors.items()},
    )  # fmt: skip


def set_block(
    q: Tensor, k: Tensor | None, q_ptr: Tensor, k_ptr: Tensor, q_ptr_host: Tensor, k_ptr_host: Tensor, *parameters: Any
) -> Tensor:
    """Compute the op ``set_block``, with arguments and results as in :mod:`sne_fast.ops.schema`."""
    *weights, heads = parameters
    w_o = weights[6]
    if not q.shape[0]:
        return q.new_empty((0, w_o.shape[0]))
    if not takes_whole(q, k, q_ptr_host, w_o, heads):
        return set_block_in_parts(PARTS, q, k, q_ptr, k_ptr, q_ptr_host, k_ptr_host, *parameters)
    x, ptr, *ready = (library.aligned(t) for t in (q, q_ptr, *weights))
    out = torch.empty_like(x)
    owner, by_name = owners(q_ptr, x.shape[0]), dict(zip(BLOCK_PARAMETERS, ready, strict=True))
    args = _args(x, ptr, owner, by_name, heads, out=out)
    library.run("set_block", x.device, library.precision(x.dtype), ctypes.byref(args))
    return out


def set_block_backward(
    grad: Tensor, q: Tensor, k: Tensor | None, q_ptr: Tensor, k_ptr: Tensor, q_ptr_host: Tensor, k_ptr_host: Tensor,
    *parameters: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Compute the op ``set_block_backward``, with arguments and results as in :mod:`sne_fast.ops.schema`."""
    *weights, _ = parameters
    if not q.shape[0]:
        given = (q, no_keys(q) if k is None else k, *weights)
        return tuple(torch.zeros_like(t, memory_format=torch.contiguous_format) for t in given)
    return set_block_backward_in_parts(PARTS, grad, q, k, q_ptr, k_ptr, q_ptr_host, k_ptr_host, *parameters)


def why_not(op: str, args: Arguments) -> list[str]:
    """Return why these kernels cannot run a call; empty if they can."""
    given = named(op, args)
    return width_reasons(given["w_o"].shape[0], given["num_heads"])

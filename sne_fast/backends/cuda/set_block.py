"""``set_block`` on the CUDA backend: short sets of rows that attend to each other by kernels of whole blocks.

Others go in parts: projections are torch's products, attention is this backend's ``set_attention``, and feed-forward
ordinary torch operations. The backward computes the forward again, as nothing but the rows is saved.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...ops import reference
from ...ops.backend import Arguments
from ...ops.pointer_facts import owners
from ...ops.reference_block import (
    BlockParts,
    gradients_without_rows,
    set_block_backward_in_parts,
    set_block_in_parts,
)
from ...ops.schema import BLOCK_PARAMETERS, named, no_keys
from ...ops.supported_widths import width_reasons
from ..gpu_plans import whole_blocks
from . import library
from .set_attention import set_attention, set_attention_backward

PARTS = BlockParts(set_attention, set_attention_backward, reference.feed_forward, reference.feed_forward_backward)
MAX_BLOCKS = 2
"""Thread blocks of the backward per multiprocessor, the number of csrc/include/sne_fast/cuda_abi.h."""


@functools.cache
def _has_kernels(precision: int, width: int, heads: int, shared_limit: int) -> bool:
    """Return whether the kernels of whole blocks can be launched: they are asked with no rows."""
    ref = ctypes.byref(library.SetBlock(width=width, heads=heads, multiprocessors=1, shared_limit=shared_limit))
    lib = library.library()
    return not any((
        lib.sne_fast_cuda_set_block(precision, ref, None),
        lib.sne_fast_cuda_set_block_query_grad(precision, ref, None),
        lib.sne_fast_cuda_set_block_key_grad(precision, ref, None),
    ))  # fmt: skip


def takes_whole(q: Tensor, k: Tensor | None, q_ptr_host: Tensor, w_o: Tensor, heads: int) -> bool:
    """Return whether the kernels of whole blocks take a call, as in :mod:`..gpu_plans.whole_blocks`, on this device."""
    if not whole_blocks.takes_whole(q, k, q_ptr_host, w_o):
        return False
    return _has_kernels(library.precision(q.dtype), w_o.shape[0], heads, library.shared_limit(q.device))


def _operands(q: Tensor, q_ptr: Tensor, weights: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return the operands of all launches of a call by field, contiguous and aligned."""
    x, ptr, *ready = (library.aligned(t) for t in (q, q_ptr, *weights))
    by_name = dict(zip(BLOCK_PARAMETERS, ready, strict=True))
    del by_name["b_k"]  # constant in the softmax
    return {"x": x, "ptr": ptr, "owner": owners(q_ptr, q.shape[0]), **by_name}


def _run(name: str, heads: int, operands: Mapping[str, Tensor], **more: Tensor) -> None:
    x = operands["x"]
    args = library.SetBlock(
        rows=x.shape[0], width=x.shape[1], heads=heads, layer_norm=operands["norm"].shape[0] > 0,
        multiprocessors=library.multiprocessors(x.device), shared_limit=library.shared_limit(x.device),
        **{field: t.data_ptr() for field, t in (*operands.items(), *more.items())},
    )  # fmt: skip
    library.run(name, x.device, library.precision(x.dtype), ctypes.byref(args))


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
    operands = _operands(q, q_ptr, weights)
    out = torch.empty_like(operands["x"])
    _run("set_block", heads, operands, out=out)
    return out


def set_block_backward(
    grad: Tensor, q: Tensor, k: Tensor | None, q_ptr: Tensor, k_ptr: Tensor, q_ptr_host: Tensor, k_ptr_host: Tensor,
    *parameters: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Compute the op ``set_block_backward``, with arguments and results as in :mod:`sne_fast.ops.schema`."""
    *weights, heads = parameters
    if not q.shape[0]:
        return gradients_without_rows(q, k, weights)
    if not takes_whole(q, k, q_ptr_host, weights[6], heads):
        return set_block_backward_in_parts(PARTS, grad, q, k, q_ptr, k_ptr, q_ptr_host, k_ptr_host, *parameters)
    return _whole_backward(library.aligned(grad), _operands(q, q_ptr, weights), heads)


def _whole_backward(grad: Tensor, operands: dict[str, Tensor], heads: int) -> tuple[Tensor, ...]:
    x = operands["x"]
    (rows, h), parts = x.shape, PartialSums.make(x, operands["norm"].shape[0] > 0)
    factors, sum_grad, x_grad = x.new_empty((5, rows, h)), torch.empty_like(x), torch.empty_like(x)
    numbers = x.new_empty((rows, heads, 2), dtype=torch.float32)
    work = {"factors": factors, "sum_grad": sum_grad, "numbers": numbers}
    _run("set_block_query_grad", heads, operands, **work, grad=grad, norm_part=parts.norm)
    _run("set_block_key_grad", heads, operands, **work, x_grad=x_grad)
    matrices = library.pointers(x, factors, parts.w_qkv, parts.b_qkv, parts.w_o, parts.b_o)
    args = library.ChunkWeightGradArgs(h, rows, 1, library.multiprocessors(x.device), *matrices)
    library.run("chunk_weight_grad", x.device, library.precision(x.dtype), ctypes.byref(args))
    return (x_grad, no_keys(x), *parts.summed(x.dtype))


@dataclass(frozen=True)
class PartialSums:
    """Partial sums of the parameters' gradients, float32, a row for each thread block: ``w_qkv (blocks, 3, h, h)``.

    And ``b_qkv (blocks, 3, h)``, ``w_o (blocks, h, h)``, ``b_o (blocks, h)``, ``norm (blocks, 4, h)``.
    """

    w_qkv: Tensor
    b_qkv: Tensor
    w_o: Tensor
    b_o: Tensor
    norm: Tensor

    @classmethod
    def make(cls, x: Tensor, layer_norm: bool) -> PartialSums:
        """Make zeros that kernels add to, for rows like ``x (rows, h)``."""
        h, blocks = x.shape[1], library.multiprocessors(x.device)
        norms = (MAX_BLOCKS * blocks, 4 if layer_norm else 0, h)
        shapes = ((blocks, 3, h, h), (blocks, 3, h), (blocks, h, h), (blocks, h), norms)
        sizes = [math.prod(shape) for shape in shapes]
        flat = x.new_zeros(sum(sizes), dtype=torch.float32).split(sizes)
        return cls(*(part.view(shape) for part, shape in zip(flat, shapes, strict=True)))

    def summed(self, dtype: torch.dtype) -> list[Tensor]:
        """Return the gradients of the parameters in the order of the schema; that of the bias of the keys is zero."""
        (w_q, w_k, w_v), (b_q, b_k, b_v) = self.w_qkv.unbind(1), self.b_qkv.unbind(1)
        parts = [w_q, b_q, w_k, b_k, w_v, b_v, self.w_o, self.b_o, self.norm]
        grads = [
            part.new_zeros(part.shape[1:], dtype=dtype) if part is b_k else part.new_empty(part.shape[1:], dtype=dtype)
            for part in parts
        ]
        tables = [
            library.Table(part.shape[0], part.stride(0), grad.numel(), part.data_ptr(), grad.data_ptr())
            for part, grad in zip(parts, grads, strict=True)
            if part is not b_k and grad.numel()
        ]
        array = (library.Table * len(tables))(*tables)
        library.run("sum_tables", self.norm.device, library.precision(dtype), len(tables), array)
        return grads


def why_not(op: str, args: Arguments) -> list[str]:
    """Return why these kernels cannot run a call; empty if they can."""
    given = named(op, args)
    return width_reasons(given["w_o"].shape[0], given["num_heads"])

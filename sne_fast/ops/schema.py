"""The schema of every op and its shape-only ("fake") version: the one place that states names and arity.

Each op is opaque to the compiler and has a forward and, but for ``CONSTANT_OPS``, a backward. ``*_host`` arguments are
CPU int64 copies of the pointers beside them, so that a backend can plan its launches without waiting for the device.
In ``set_block`` a k of None stands for q, and the gradient of q is that of both.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

LIBRARY = torch.library.Library("sne_fast", "DEF")

_POINTERS = "Tensor chunk_ptr, Tensor tensor_ptr, Tensor chunk_ptr_host, Tensor tensor_ptr_host"
_CHUNK = (
    "Tensor row_code, Tensor element_code, Tensor logit, Tensor basis, "
    "Tensor w_qkv, Tensor b_qkv, Tensor w_o, Tensor b_o, Tensor norm, Tensor pool_query"
)
_FEED_FORWARD = "Tensor q, Tensor attended, Tensor w_o, Tensor b_o, Tensor norm"
_BLOCK = (
    "Tensor q, Tensor? k, Tensor q_ptr, Tensor k_ptr, Tensor q_ptr_host, Tensor k_ptr_host, Tensor w_q, Tensor b_q, "
    "Tensor w_k, Tensor b_k, Tensor w_v, Tensor b_v, Tensor w_o, Tensor b_o, Tensor norm, int num_heads"
)
_POOL = (
    "Tensor x, Tensor ptr, Tensor ptr_host, Tensor logits, Tensor query, Tensor w_v, Tensor b_v, Tensor w_o, "
    "Tensor b_o, Tensor norm"
)
_CODES = "Tensor ptr, Tensor ptr_host, Tensor level, Tensor table, Tensor scale, Tensor magnitude, Tensor gain"

SCHEMAS: dict[str, str] = {
    "gather_chunks": "(Tensor[] tensors, Tensor scale, Tensor plan, ScalarType dtype) -> Tensor",
    "gather_chunks_backward": (
        "(Tensor grad, Tensor values, Tensor[] tensors, Tensor scale, Tensor plan) -> (Tensor[], Tensor)"
    ),
    "chunk_encode": f"(Tensor values, {_POINTERS}, {_CHUNK}) -> Tensor",
    "chunk_encode_backward": (f"(Tensor grad, Tensor values, {_POINTERS}, {_CHUNK}) -> ({', '.join(['Tensor'] * 11)})"),
    "set_attention": (
        "(Tensor q, Tensor k, Tensor v, Tensor q_ptr, Tensor k_ptr, Tensor q_ptr_host, Tensor k_ptr_host, "
        "int num_heads) -> (Tensor, Tensor)"
    ),
    "set_attention_backward": (
        "(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor q_ptr, Tensor k_ptr, "
        "Tensor q_ptr_host, Tensor k_ptr_host, int num_heads) -> (Tensor, Tensor, Tensor)"
    ),
    "segment_pool": "(Tensor x, Tensor logits, Tensor ptr, Tensor ptr_host) -> (Tensor, Tensor)",
    "segment_pool_backward": (
        "(Tensor grad, Tensor x, Tensor logits, Tensor out, Tensor lse, Tensor ptr, Tensor ptr_host) "
        "-> (Tensor, Tensor)"
    ),
    "feed_forward": f"({_FEED_FORWARD}) -> Tensor",
    "feed_forward_backward": f"(Tensor grad, {_FEED_FORWARD}) -> (Tensor, Tensor, Tensor, Tensor)",
    "set_block": f"({_BLOCK}) -> Tensor",
    "set_block_backward": f"(Tensor grad, {_BLOCK}) -> ({', '.join(['Tensor'] * 11)})",
    "pool_block": f"({_POOL}) -> Tensor",
    "pool_block_backward": f"(Tensor grad, {_POOL}) -> ({', '.join(['Tensor'] * 8)})",
    "add_codes": f"(Tensor x, {_CODES}) -> Tensor",
    "add_codes_backward": f"(Tensor grad, {_CODES}) -> (Tensor, Tensor)",
    "tensor_statistics": "(Tensor values, Tensor start, Tensor scale, Tensor dims, Tensor start_host) -> Tensor",
    "gather_stored": "(Tensor[] buffers, Tensor table, Tensor scale, int num_values, ScalarType dtype) -> Tensor",
}
"""Op name -> arguments and results."""


@functools.cache
def argument_names(op: str) -> tuple[str, ...]:
    """Return the names of an op's arguments, in order, as its schema has them.

    Example::

        >>> from sne_fast.ops.schema import argument_names
        >>> argument_names("segment_pool")
        ('x', 'logits', 'ptr', 'ptr_host')
    """
    arguments = SCHEMAS[op].partition(" -> ")[0]
    return tuple(argument.split()[1] for argument in arguments.strip("()").split(", "))


def named(op: str, args: Sequence[Any]) -> dict[str, Any]:
    """Return the arguments of one call of an op by name."""
    return dict(zip(argument_names(op), args, strict=True))


CHUNK_PARAMETERS = argument_names("chunk_encode")[5:]
"""Names of the folded parameters of ``chunk_encode``, which follow values and pointers."""
BLOCK_PARAMETERS = argument_names("set_block")[6:-1]
"""Names of the parameters of ``set_block``, which follow rows and pointers."""
POOL_PARAMETERS = argument_names("pool_block")[3:]
"""Names of the parameters of ``pool_block``, which follow rows and pointer."""

FORWARD_OPS = tuple(name for name in SCHEMAS if not name.endswith("_backward"))
OPTIONAL_OPS = ("feed_forward", "set_block", "pool_block", "add_codes")
"""Ops for which modules have ordinary torch operations: they call the op only under a backend that fuses it."""
CONSTANT_OPS = ("tensor_statistics", "gather_stored")
"""Ops without a gradient, called once per network: the reference computes them where a backend has no kernel."""
DIFFERENTIABLE_OPS = tuple(name for name in FORWARD_OPS if name not in CONSTANT_OPS)
"""Ops with a backward."""
REQUIRED_OPS = tuple(name for name in DIFFERENTIABLE_OPS if name not in OPTIONAL_OPS)
"""Ops that a backend should have."""
STATISTICS = 23
"""Results of ``tensor_statistics`` for each tensor."""
STORED_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
"""Dtypes of tensors that ``gather_stored`` reads; its table has their places here."""


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of softmax, norms and sums for operands of ``dtype``: float32 for half types, else the same."""
    return dtype if dtype == torch.float64 else torch.float32


def _fake_like(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in tensors)


def _gather_chunks(tensors: list[Tensor], scale: Tensor, plan: Tensor, dtype: torch.dtype) -> Tensor:
    total = sum(t.numel() for t in tensors)
    return scale.new_empty((total,), dtype=dtype)


def _gather_chunks_backward(
    grad: Tensor, values: Tensor, tensors: list[Tensor], scale: Tensor, plan: Tensor
) -> tuple[list[Tensor], Tensor]:
    return list(_fake_like(*tensors)), torch.empty_like(scale)


def _chunk_encode(values: Tensor, chunk_ptr: Tensor, *args: Tensor) -> Tensor:
    num_heads, width = args[-1].shape  # pool_query
    return values.new_empty((chunk_ptr.shape[0] - 1, num_heads, width))


def _chunk_encode_backward(grad: Tensor, values: Tensor, *args: Tensor) -> tuple[Tensor, ...]:
    return _fake_like(values, *args[4:])


def _set_attention(q: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    num_heads = args[-1]
    lse = q.new_empty((q.shape[0], num_heads), dtype=accumulate_dtype(q.dtype))
    return torch.empty_like(q, memory_format=torch.contiguous_format), lse


def _set_attention_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return _fake_like(q, k, v)


def _segment_pool(x: Tensor, logits: Tensor, ptr: Tensor, ptr_host: Tensor) -> tuple[Tensor, Tensor]:
    segments, queries = ptr.shape[0] - 1, logits.shape[1]
    lse = x.new_empty((segments, queries), dtype=accumulate_dtype(x.dtype))
    return x.new_empty((segments, queries, x.shape[1])), lse


def _segment_pool_backward(grad: Tensor, x: Tensor, logits: Tensor, *args: Tensor) -> tuple[Tensor, ...]:
    return _fake_like(x, logits)


def _feed_forward(q: Tensor, attended: Tensor, w_o: Tensor, b_o: Tensor, norm: Tensor) -> Tensor:
    return torch.empty_like(attended, memory_format=torch.contiguous_format)


def _feed_forward_backward(grad: Tensor, q: Tensor, *args: Tensor) -> tuple[Tensor, ...]:
    return _fake_like(*args)  # attended, whose gradient is also q's, and the parameters


def _set_block(q: Tensor, *args: Any) -> Tensor:
    return q.new_empty((q.shape[0], args[-4].shape[0]))  # w_o


def no_keys(q: Tensor) -> Tensor:
    """Return the gradient of k where ``set_block`` got None for rows q that attend to each other: ``(0,)``."""
    return q.new_empty((0,))


def _set_block_backward(grad: Tensor, q: Tensor, k: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
    grad_q, *grads = _fake_like(q, *args[4:-1])
    return (grad_q, no_keys(q) if k is None else _fake_like(k)[0], *grads)


def _pool_block(x: Tensor, ptr: Tensor, *args: Tensor) -> Tensor:
    return x.new_empty((x.shape[0] if x.dim() == 3 else ptr.shape[0] - 1, x.shape[-1]))


def _pool_block_backward(grad: Tensor, x: Tensor, ptr: Tensor, ptr_host: Tensor, *args: Tensor) -> tuple[Tensor, ...]:
    return _fake_like(x, *args)


def _add_codes(x: Tensor, *args: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _add_codes_backward(grad: Tensor, *args: Tensor) -> tuple[Tensor, ...]:
    return _fake_like(*args[-2:])  # magnitude and gain: the gradient of x is that of the result


def _tensor_statistics(values: Tensor, start: Tensor, scale: Tensor, dims: Tensor, start_host: Tensor) -> Tensor:
    return values.new_empty((scale.shape[0], STATISTICS), dtype=accumulate_dtype(values.dtype))


def _gather_stored(buffers: list[Tensor], table: Tensor, scale: Tensor, num_values: int, dtype: torch.dtype) -> Tensor:
    return scale.new_empty((num_values,), dtype=dtype)


FAKES: dict[str, Callable[..., Any]] = {
    "gather_chunks": _gather_chunks,
    "gather_chunks_backward": _gather_chunks_backward,
    "chunk_encode": _chunk_encode,
    "chunk_encode_backward": _chunk_encode_backward,
    "set_attention": _set_attention,
    "set_attention_backward": _set_attention_backward,
    "segment_pool": _segment_pool,
    "segment_pool_backward": _segment_pool_backward,
    "feed_forward": _feed_forward,
    "feed_forward_backward": _feed_forward_backward,
    "set_block": _set_block,
    "set_block_backward": _set_block_backward,
    "pool_block": _pool_block,
    "pool_block_backward": _pool_block_backward,
    "add_codes": _add_codes,
    "add_codes_backward": _add_codes_backward,
    "tensor_statistics": _tensor_statistics,
    "gather_stored": _gather_stored,
}
"""Op name -> function from inputs to empty outputs of the right shapes and dtypes."""

for _name, _schema in SCHEMAS.items():
    LIBRARY.define(_name + _schema)
    torch.library.register_fake(f"sne_fast::{_name}", FAKES[_name], lib=LIBRARY)

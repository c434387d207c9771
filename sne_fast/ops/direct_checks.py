"""Checks of direct calls of ``torch.ops.sne_fast``, and of compiled graphs: backends make them before a kernel runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from . import checks
from .schema import BLOCK_PARAMETERS, CHUNK_PARAMETERS, POOL_PARAMETERS, named

_SETS = ("q_ptr", "k_ptr", "q_ptr_host", "k_ptr_host")


def pointer_and_copy(op: str, name: str, ptr: Tensor, host: Tensor, rows: int) -> None:
    """Check that ``host`` cuts ``rows`` rows into sets and, where ``ptr`` is on the CPU too, that they are equal.

    Cheap enough for every call. A pointer on a GPU is not read: a copy that differs from it is not noticed.
    """
    numbers = host.numpy()
    if numbers[0] != 0 or numbers[-1] != rows or (numbers[1:] < numbers[:-1]).any():
        checks.pointer_content(op, f"{name}_host", host, host, rows)
    if ptr is not host and ptr.device.type == "cpu" and not torch.equal(ptr, host):
        raise ValueError(f"{op}: {name}_host must be a CPU copy of {name}, got other numbers")


def chunk_pointers(
    op: str,
    values: Tensor,
    chunk_ptr: Tensor,
    tensor_ptr: Tensor,
    chunk_ptr_host: Tensor,
    tensor_ptr_host: Tensor,
    *,
    element_codes: int,
) -> None:
    """Check what the pointers of a call of ``chunk_encode`` hold. No chunk may exceed ``element_codes``."""
    pointer_and_copy(op, "chunk_ptr", chunk_ptr, chunk_ptr_host, values.shape[0])
    pointer_and_copy(op, "tensor_ptr", tensor_ptr, tensor_ptr_host, chunk_ptr.shape[0] - 1)
    numbers = chunk_ptr_host.numpy()
    if (numbers[1:] - numbers[:-1] > element_codes).any():
        checks.chunk_lengths(op, chunk_ptr_host, element_codes)


def set_pointers(
    op: str, q: Tensor, k: Tensor, q_ptr: Tensor, k_ptr: Tensor, q_ptr_host: Tensor, k_ptr_host: Tensor
) -> None:
    """Check what the pointers of a call of ``set_attention`` hold."""
    pointer_and_copy(op, "q_ptr", q_ptr, q_ptr_host, q.shape[0])
    if k_ptr is not q_ptr or k_ptr_host is not q_ptr_host or k.shape[0] != q.shape[0]:
        pointer_and_copy(op, "k_ptr", k_ptr, k_ptr_host, k.shape[0])


def _queries_and_keys(given: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Return q and k, which is None where it is q."""
    return given["q"], given["q"] if given["k"] is None else given["k"]


def direct_call_pointers(op: str, args: Sequence[Any]) -> None:
    """Check what the pointers of one call of an op hold.

    Args:
        op: name of the op or of its backward.
        args: its arguments, in the order of its schema.
    """
    given = named(op, args)
    if "chunk_ptr" in given:
        names = ("values", "chunk_ptr", "tensor_ptr", "chunk_ptr_host", "tensor_ptr_host")
        chunk_pointers(op, *(given[name] for name in names), element_codes=given["element_code"].shape[0])
    elif "q_ptr" in given:
        set_pointers(op, *_queries_and_keys(given), *(given[name] for name in _SETS))
    elif "dims" in given:
        pointer_and_copy(op, "start", given["start"], given["start_host"], given["values"].shape[0])
        checks.statistics_dims(op, given["dims"], given["start_host"])
    elif "level" in given:
        checks.code_rows(op, given["ptr"], given["ptr_host"], args[0].shape[0], given["table"])
    elif "ptr" in given and given["x"].dim() == 2:
        pointer_and_copy(op, "ptr", given["ptr"], given["ptr_host"], given["x"].shape[0])


def direct_call(op: str, args: Sequence[Any]) -> None:
    """Check all arguments of one call of an op, for backends whose kernels check none themselves.

    Args:
        op: name of the op or of its backward.
        args: its arguments, in the order of its schema.

    Raises:
        TypeError: for inputs of the wrong type or dtype.
        ValueError: for inputs of the wrong shape, device or content.
    """
    given = named(op, args)
    forward = op.removesuffix("_backward")
    results: dict[str, tuple[int, ...]] = {}  # of the backward: what has the shape of a result of the forward
    if forward == "gather_chunks":
        if op == forward:
            checks.gather_chunks(op, given["tensors"], given["scale"], given["plan"])
        else:
            checks.gather_chunks_backward(op, *args)
    elif forward == "chunk_encode":
        inputs = {name: given[name] for name in CHUNK_PARAMETERS}
        pointers = [given[name] for name in ("chunk_ptr", "tensor_ptr", "chunk_ptr_host", "tensor_ptr_host")]
        checks.chunk_encode(op, given["values"], *pointers, **inputs)
        results = {"grad": (given["chunk_ptr"].shape[0] - 1, *given["pool_query"].shape)}
    elif forward == "set_attention":
        checks.set_attention(op, *(given[name] for name in ("q", "k", "v", *_SETS, "num_heads")))
        rows = tuple(given["q"].shape)
        results = {"grad": rows, "out": rows, "lse": (rows[0], given["num_heads"])}
    elif forward == "set_block":
        inputs = {name: given[name] for name in (*BLOCK_PARAMETERS, "num_heads")}
        checks.set_block(op, *_queries_and_keys(given), *(given[name] for name in _SETS), **inputs)
        results = {"grad": (given["q"].shape[0], given["w_o"].shape[0])}
    elif forward == "segment_pool":
        checks.segment_pool(op, given["x"], given["logits"], given["ptr"], given["ptr_host"])
        pooled = (given["ptr"].shape[0] - 1, given["logits"].shape[1], given["x"].shape[1])
        results = {"grad": pooled, "out": pooled, "lse": pooled[:2]}
    elif forward == "pool_block":
        checks.pool_block(op, *(given[name] for name in ("x", "ptr", "ptr_host", *POOL_PARAMETERS)))
        x, ptr = given["x"], given["ptr"]
        results = {"grad": (x.shape[0] if x.dim() == 3 else ptr.shape[0] - 1, x.shape[-1])}
    elif forward == "add_codes":
        checks.add_codes(op, *args)
    elif forward == "feed_forward":
        checks.feed_forward(op, *(given[name] for name in ("q", "attended", "w_o", "b_o", "norm")))
        results = {"grad": tuple(given["q"].shape)}
    elif forward == "tensor_statistics":
        checks.tensor_statistics(op, *args)
    elif forward == "gather_stored":
        checks.gather_stored(op, *args)
    if op != forward:
        device = next(t for t in args if isinstance(t, Tensor)).device
        for name, expected in results.items():
            checks.saved(op, name, given[name], expected, device)
    direct_call_pointers(op, args)

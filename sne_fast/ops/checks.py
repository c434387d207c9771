"""Checks of op inputs: every message names op and argument, the contract, what came, and a remedy where there is one.

The functions named after ops check types, sizes and devices. The public functions of :mod:`sne_fast.ops.functional`
call them, and so do backends, because direct calls of ``torch.ops.sne_fast`` and compiled graphs skip the Python-level
checks and wrong sizes would make a kernel write anywhere. What pointers hold is checked by :func:`pointer_content`, in
a direct call by :func:`direct_call_pointers`; :func:`direct_call` checks all of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .schema import CHUNK_PARAMETERS, STORED_DTYPES, named

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def described(value: object) -> str:
    """Return ``float32 (3, 4) on cpu`` for such a tensor, the type's name for anything else."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)} on {value.device}"
    return type(value).__name__


def floating(op: str, **tensors: Tensor) -> None:
    """Check that every tensor is floating, and that all share one dtype and one device."""
    first_name, first = next(iter(tensors.items()))
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or tensor.dtype not in FLOATING:
            raise TypeError(
                f"{op}: {name} must be a tensor of float16, bfloat16, float32 or float64, got {described(tensor)}"
            )
        if tensor.dtype != first.dtype or tensor.device != first.device:
            raise TypeError(
                f"{op}: {name} must have the dtype and device of {first_name} ({described(first)}), got "
                f"{described(tensor)}; use .to() on one of them"
            )


def shape(op: str, name: str, tensor: Tensor, contract: str, expected: tuple[int | None, ...]) -> None:
    """Check that ``tensor.shape`` is ``expected``, where None allows any size; ``contract`` says it in the message."""
    fits = tensor.dim() == len(expected) and all(
        want is None or have == want for have, want in zip(tensor.shape, expected, strict=True)
    )
    if not fits:
        raise ValueError(f"{op}: {name} must have shape {contract}, got {described(tensor)}")


def saved(op: str, name: str, tensor: Tensor, expected: tuple[int, ...], device: torch.device) -> None:
    """Check what a backward op takes besides the inputs of its forward: the gradient and saved results."""
    shape(op, name, tensor, str(expected), expected)
    if tensor.device != device:
        raise ValueError(f"{op}: {name} must be on {device} beside the inputs, got {described(tensor)}")


def pointer(op: str, name: str, ptr: Tensor, host: Tensor, device: torch.device) -> None:
    """Check that ``ptr`` is int64 of shape ``(S+1,)`` on ``device`` and ``host`` its like on the CPU."""
    contract = "int64 of shape (S+1,) for S sets"
    if not isinstance(ptr, Tensor) or ptr.dtype != torch.int64 or ptr.dim() != 1 or not ptr.shape[0]:
        raise TypeError(f"{op}: {name} must be {contract}, got {described(ptr)}")
    if ptr.device != device:
        raise ValueError(f"{op}: {name} must be on {device} beside the values, got {described(ptr)}; use .to({device})")
    if host.dtype != torch.int64 or host.shape != ptr.shape or host.device.type != "cpu":
        raise ValueError(f"{op}: {name}_host must be a CPU copy of {name} ({described(ptr)}), got {described(host)}")


def pointer_content(op: str, name: str, ptr: Tensor, host: Tensor, rows: int) -> None:
    """Check that ``ptr``, by its copy ``host`` on the CPU, cuts ``rows`` rows into sets."""
    if int(host[0]) != 0 or int(host[-1]) != rows or bool((host[1:] < host[:-1]).any()):
        raise ValueError(
            f"{op}: {name} must start at 0, never decrease and end at the number of rows, {rows}; got "
            f"{described(ptr)} from {host[:1].tolist()} to {host[-1:].tolist()}"
        )


# ----------------------------------------------------------------------------------------------------------- the ops


def gather_chunks(op: str, tensors: Sequence[Tensor], scale: Tensor, plan: Tensor) -> None:
    """Check the inputs of ``gather_chunks`` and of its backward, except their dtype of results."""
    for name, value in {"scale": scale, "plan": plan, **{f"tensors[{t}]": v for t, v in enumerate(tensors)}}.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{op}: {name} must be a tensor, got {described(value)}")
    count = len(tensors)
    if scale.dtype not in (torch.float32, torch.float64) or scale.shape != (count,):
        raise TypeError(f"{op}: scale must be float32 or float64 of shape (T,) = ({count},), got {described(scale)}")
    if plan.dtype != torch.int64 or plan.shape != (count, 2) or plan.device.type != "cpu":
        raise TypeError(f"{op}: plan must be int64 of shape (T, 2) = ({count}, 2) on the CPU, got {described(plan)}")
    for t, (tensor, (rows, positions)) in enumerate(zip(tensors, plan.tolist(), strict=True)):
        if min(rows, positions) < 0 or tensor.numel() != rows * positions or not tensor.is_floating_point():
            raise ValueError(
                f"{op}: tensors[{t}] must be floating with plan[{t}] = {rows} x {positions} elements, got "
                f"{described(tensor)}"
            )
        if tensor.device != scale.device:
            raise ValueError(
                f"{op}: tensors[{t}] must be on {scale.device} beside scale, got {described(tensor)}; use .to()"
            )


def gather_chunks_backward(
    op: str, grad: Tensor, values: Tensor, tensors: Sequence[Tensor], scale: Tensor, plan: Tensor
) -> None:
    """Check the inputs of ``gather_chunks_backward``."""
    gather_chunks(op, tensors, scale, plan)
    total = sum(t.numel() for t in tensors)
    saved(op, "grad", grad, (total,), scale.device)
    saved(op, "values", values, (total,), scale.device)


def chunk_encode(
    op: str,
    values: Tensor,
    chunk_ptr: Tensor,
    tensor_ptr: Tensor,
    chunk_ptr_host: Tensor,
    tensor_ptr_host: Tensor,
    **parameters: Tensor,
) -> None:
    """Check the inputs of ``chunk_encode``, with its parameters by name."""
    floating(op, values=values, **parameters)
    shape(op, "values", values, "(V,)", (None,))
    shape(op, "pool_query", parameters["pool_query"], "(H, h)", (None, None))
    pointer(op, "chunk_ptr", chunk_ptr, chunk_ptr_host, values.device)
    pointer(op, "tensor_ptr", tensor_ptr, tensor_ptr_host, values.device)
    heads, h = parameters["pool_query"].shape
    norms, tensors = 4 if parameters["norm"].shape[:1] != (0,) else 0, tensor_ptr.shape[0] - 1
    contracts = {
        "row_code": ("(T, h)", (tensors, h)), "element_code": ("(c, h)", (None, h)), "logit": ("(2, H)", (2, heads)),
        "basis": ("(3, h)", (3, h)), "w_qkv": ("(3, 3h, h)", (3, 3 * h, h)), "b_qkv": ("(3, 3h)", (3, 3 * h)),
        "w_o": ("(4, h, h)", (4, h, h)), "b_o": ("(4, h)", (4, h)),
        "norm": ("(4, 4, h), or (0, 4, h) for no layer norm", (norms, 4, h)),
    }  # fmt: skip
    for name, (contract, expected) in contracts.items():
        shape(op, name, parameters[name], f"{contract} with T = {tensors}, H = {heads}, h = {h}", expected)
    if not heads or h % heads:
        raise ValueError(f"{op}: pool_query must have a width that its heads divide, got h = {h} and H = {heads}")


def chunk_lengths(op: str, chunk_ptr_host: Tensor, longest: int) -> None:
    """Check that every chunk has 1 to ``longest`` values, the number of element codes."""
    if chunk_ptr_host.shape[0] > 1:
        lengths = chunk_ptr_host.diff()
        if int(lengths.min()) < 1 or int(lengths.max()) > longest:
            raise ValueError(
                f"{op}: chunk_ptr must hold chunks of 1 to c = {longest} values (the rows of element_code), got "
                f"lengths from {int(lengths.min())} to {int(lengths.max())}"
            )


def set_attention(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_ptr: Tensor,
    k_ptr: Tensor,
    q_ptr_host: Tensor,
    k_ptr_host: Tensor,
    num_heads: int,
) -> None:
    """Check the inputs of ``set_attention``."""
    floating(op, q=q, k=k, v=v)
    shape(op, "q", q, "(rows_q, h)", (None, None))
    shape(op, "k", k, f"(rows_k, h) with h = {q.shape[1]}", (None, q.shape[1]))
    shape(op, "v", v, f"that of k, {tuple(k.shape)}", tuple(k.shape))
    if not isinstance(num_heads, int) or num_heads < 1 or q.shape[1] % num_heads:
        raise ValueError(f"{op}: num_heads must be an integer that divides the width h = {q.shape[1]}, got {num_heads}")
    pointer(op, "q_ptr", q_ptr, q_ptr_host, q.device)
    pointer(op, "k_ptr", k_ptr, k_ptr_host, q.device)
    if q_ptr.shape != k_ptr.shape:
        raise ValueError(
            f"{op}: k_ptr must have as many sets as q_ptr, got {k_ptr.shape[0] - 1} and {q_ptr.shape[0] - 1}"
        )


def segment_pool(op: str, x: Tensor, logits: Tensor, ptr: Tensor, ptr_host: Tensor) -> None:
    """Check the inputs of ``segment_pool``."""
    floating(op, x=x, logits=logits)
    shape(op, "x", x, "(rows, h)", (None, None))
    shape(op, "logits", logits, f"(rows, A) with rows = {x.shape[0]}", (x.shape[0], None))
    pointer(op, "ptr", ptr, ptr_host, x.device)


def feed_forward(op: str, q: Tensor, attended: Tensor, w_o: Tensor, b_o: Tensor, norm: Tensor) -> None:
    """Check the inputs of ``feed_forward``."""
    floating(op, q=q, attended=attended, w_o=w_o, b_o=b_o, norm=norm)
    shape(op, "q", q, "(rows, h)", (None, None))
    h, norms = q.shape[1], 4 if norm.shape[:1] != (0,) else 0
    shape(op, "attended", attended, f"that of q, {tuple(q.shape)}", tuple(q.shape))
    shape(op, "w_o", w_o, f"(h, h) with h = {h}", (h, h))
    shape(op, "b_o", b_o, f"(h,) with h = {h}", (h,))
    shape(op, "norm", norm, f"(4, h), or (0, h) for no layer norm, with h = {h}", (norms, h))


def gather_stored(
    op: str, buffers: Sequence[Tensor], table: Tensor, scale: Tensor, num_values: int, dtype: torch.dtype
) -> None:
    """Check the inputs of ``gather_stored``, and that every tensor of the table lies inside its buffer."""
    for b, given in enumerate(buffers):
        if not isinstance(given, Tensor) or not given.is_cpu or not given.is_contiguous():
            raise TypeError(f"{op}: buffers[{b}] must be a contiguous tensor on the CPU, got {described(given)}")
    for name, tensor in (("table", table), ("scale", scale)):
        if not isinstance(tensor, Tensor) or tensor.device.type != "cpu":
            raise TypeError(f"{op}: {name} must be a tensor on the CPU, got {described(tensor)}")
    if table.dtype != torch.int64 or table.dim() != 2 or table.shape[1] != 5:
        raise TypeError(f"{op}: table must be int64 of shape (T, 5), got {described(table)}")
    if scale.dtype not in (torch.float32, torch.float64) or scale.shape != table.shape[:1]:
        raise TypeError(
            f"{op}: scale must be float32 or float64 of shape (T,) = ({len(table)},), got {described(scale)}"
        )
    if dtype not in FLOATING:
        raise TypeError(f"{op}: dtype must be one of {FLOATING}, got {dtype}")
    buffer, offset, code, rows, columns = (column.numpy() for column in table.unbind(1))
    known = (code >= 0) & (code < len(STORED_DTYPES)) & (buffer >= 0) & (buffer < len(buffers))
    known &= (offset >= 0) & (rows >= 0) & (columns >= 0)
    if known.all():
        widths = np.array([stored.itemsize for stored in STORED_DTYPES])[code]
        held = np.array([one.numel() * one.dtype.itemsize for one in buffers], np.float64)[buffer]
        # Sizes as float64, which do not wrap around.
        known = (offset % widths == 0) & (offset + rows.astype(np.float64) * columns * widths <= held)
    if not known.all():
        t = int(np.argmin(known))
        raise ValueError(
            f"{op}: table must have (buffer, byte offset, dtype, R, K) of tensors inside the {len(buffers)} buffers, "
            f"got {table[t].tolist()} in row {t}"
        )
    if int((rows * columns).sum()) != num_values:
        raise ValueError(f"{op}: num_values must be {int((rows * columns).sum())} by table, got {num_values}")


def tensor_statistics(op: str, values: Tensor, start: Tensor, scale: Tensor, dims: Tensor, start_host: Tensor) -> None:
    """Check the inputs of ``tensor_statistics``."""
    if not isinstance(values, Tensor) or not values.is_floating_point() or values.dim() != 1:
        raise TypeError(f"{op}: values must be floating of shape (V,), got {described(values)}")
    pointer(op, "start", start, start_host, values.device)
    count = start.shape[0] - 1
    floats = (torch.float32, torch.float64)
    if not isinstance(scale, Tensor) or scale.dtype not in floats or scale.shape != (count,):
        raise TypeError(f"{op}: scale must be float32 or float64 of shape (T,) = ({count},), got {described(scale)}")
    if scale.device != values.device:
        raise ValueError(f"{op}: scale must be on {values.device} beside values, got {described(scale)}; use .to()")
    if not isinstance(dims, Tensor) or dims.dtype != torch.int64 or dims.shape != (count, 6) or dims.is_cuda:
        raise TypeError(f"{op}: dims must be int64 of shape (T, 6) = ({count}, 6) on the CPU, got {described(dims)}")


def statistics_dims(op: str, dims: Tensor, start_host: Tensor) -> None:
    """Check what ``dims`` of a call of ``tensor_statistics`` holds, of tensors that ``start_host`` cuts."""
    size, (out, inn, kernel, fan_in, fan_out, first) = start_host.diff(), dims.unbind(1)
    fits = (out > 0) & (inn >= 0) & (kernel > 0) & (fan_in > 0) & (fan_out > 0) & (first >= 0) & (first <= 1)
    fits &= (out * inn.clamp_min(1) * kernel == size) & ((inn > 0) | (kernel == 1))
    if not bool(fits.all()):
        t = int((~fits).nonzero()[0])
        raise ValueError(
            f"{op}: dims[{t}] must be out, in, k, fan-in and fan-out of a tensor of {int(size[t])} values, and 0 or 1, "
            f"got {dims[t].tolist()}"
        )


# ------------------------------------------------------------------------------------------------------ direct calls


def pointer_and_copy(op: str, name: str, ptr: Tensor, host: Tensor, rows: int) -> None:
    """Check that ``host`` cuts ``rows`` rows into sets and, where ``ptr`` is on the CPU too, that they are equal.

    Cheap enough for every call. A pointer on a GPU is not read: a copy that differs from it is not noticed.
    """
    numbers = host.numpy()
    if numbers[0] != 0 or numbers[-1] != rows or (numbers[1:] < numbers[:-1]).any():
        pointer_content(op, f"{name}_host", host, host, rows)
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
        chunk_lengths(op, chunk_ptr_host, element_codes)


def set_pointers(
    op: str, q: Tensor, k: Tensor, q_ptr: Tensor, k_ptr: Tensor, q_ptr_host: Tensor, k_ptr_host: Tensor
) -> None:
    """Check what the pointers of a call of ``set_attention`` hold."""
    pointer_and_copy(op, "q_ptr", q_ptr, q_ptr_host, q.shape[0])
    pointer_and_copy(op, "k_ptr", k_ptr, k_ptr_host, k.shape[0])


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
        set_pointers(op, *(given[name] for name in ("q", "k", "q_ptr", "k_ptr", "q_ptr_host", "k_ptr_host")))
    elif "dims" in given:
        pointer_and_copy(op, "start", given["start"], given["start_host"], given["values"].shape[0])
        statistics_dims(op, given["dims"], given["start_host"])
    elif "ptr" in given:
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
            gather_chunks(op, given["tensors"], given["scale"], given["plan"])
        else:
            gather_chunks_backward(op, *args)
    elif forward == "chunk_encode":
        inputs = {name: given[name] for name in CHUNK_PARAMETERS}
        pointers = [given[name] for name in ("chunk_ptr", "tensor_ptr", "chunk_ptr_host", "tensor_ptr_host")]
        chunk_encode(op, given["values"], *pointers, **inputs)
        results = {"grad": (given["chunk_ptr"].shape[0] - 1, *given["pool_query"].shape)}
    elif forward == "set_attention":
        names = ("q", "k", "v", "q_ptr", "k_ptr", "q_ptr_host", "k_ptr_host", "num_heads")
        set_attention(op, *(given[name] for name in names))
        rows = tuple(given["q"].shape)
        results = {"grad": rows, "out": rows, "lse": (rows[0], given["num_heads"])}
    elif forward == "segment_pool":
        segment_pool(op, given["x"], given["logits"], given["ptr"], given["ptr_host"])
        pooled = (given["ptr"].shape[0] - 1, given["logits"].shape[1], given["x"].shape[1])
        results = {"grad": pooled, "out": pooled, "lse": pooled[:2]}
    elif forward == "feed_forward":
        feed_forward(op, *(given[name] for name in ("q", "attended", "w_o", "b_o", "norm")))
        results = {"grad": tuple(given["q"].shape)}
    elif forward == "tensor_statistics":
        tensor_statistics(op, *args)
    elif forward == "gather_stored":
        gather_stored(op, *args)
    if op != forward:
        device = next(t for t in args if isinstance(t, Tensor)).device
        for name, expected in results.items():
            saved(op, name, given[name], expected, device)
    direct_call_pointers(op, args)

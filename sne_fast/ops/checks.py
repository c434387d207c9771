"""Checks of op inputs: every message names op and argument, the contract, what came, and a remedy where there is one.

The functions named after ops check types, sizes and devices. The public functions of :mod:`sne_fast.ops.functional`
call them, and so do backends, because direct calls of ``torch.ops.sne_fast`` and compiled graphs skip the Python-level
checks and wrong sizes would make a kernel write anywhere. What pointers hold is checked by :func:`pointer_content`, in
a direct call by :func:`sne_fast.ops.direct_checks.direct_call_pointers`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .pointer_facts import derived
from .schema import STORED_DTYPES
from .transforms import follows_nothing

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
        if isinstance(tensor, Tensor) and tensor.dtype in FLOATING:
            if tensor.dtype is first.dtype and tensor.device == first.device:
                continue
        else:
            raise TypeError(
                f"{op}: {name} must be a tensor of float16, bfloat16, float32 or float64, got {described(tensor)}"
            )
        raise TypeError(
            f"{op}: {name} must have the dtype and device of {first_name} ({described(first)}), got "
            f"{described(tensor)}; use .to() on one of them"
        )


def shape(op: str, name: str, tensor: Tensor, contract: str, expected: tuple[int | None, ...]) -> None:
    """Check that ``tensor.shape`` is ``expected``, where None allows any size; ``contract`` says it in the message."""
    if tensor.shape == expected:
        return
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


def cuts_rows(host: Tensor, rows: int) -> bool:
    """Return whether a pointer, ``(S+1,)`` on the CPU, starts at 0, never decreases and ends at ``rows``."""
    if follows_nothing():  # numpy, whose calls cost a tenth of torch's
        numbers = host.detach().numpy()
        return bool(numbers[0] == 0 and numbers[-1] == rows and (numbers[1:] >= numbers[:-1]).all())
    return int(host[0]) == 0 and int(host[-1]) == rows and not bool((host[1:] < host[:-1]).any())


def pointer_content(op: str, name: str, ptr: Tensor, host: Tensor, rows: int) -> None:
    """Check that ``ptr``, by its copy ``host`` on the CPU, cuts ``rows`` rows into sets."""
    if not derived(host, ("cuts", rows), lambda: cuts_rows(host, rows)):
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
        least, most = derived(chunk_ptr_host, "extreme lengths", lambda: chunk_ptr_host.diff().aminmax())
        if int(least) < 1 or int(most) > longest:
            raise ValueError(
                f"{op}: chunk_ptr must hold chunks of 1 to c = {longest} values (the rows of element_code), got "
                f"lengths from {int(least)} to {int(most)}"
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
    sets(op, q.shape[1], q.device, q_ptr, k_ptr, q_ptr_host, k_ptr_host, num_heads)


def sets(
    op: str,
    h: int,
    device: torch.device,
    q_ptr: Tensor,
    k_ptr: Tensor,
    q_ptr_host: Tensor,
    k_ptr_host: Tensor,
    num_heads: int,
) -> None:
    """Check the heads of attention of width h, and the pointers of queries and keys."""
    if not isinstance(num_heads, int) or num_heads < 1 or h % num_heads:
        raise ValueError(f"{op}: num_heads must be an integer that divides the width h = {h}, got {num_heads}")
    pointer(op, "q_ptr", q_ptr, q_ptr_host, device)
    if k_ptr is q_ptr and k_ptr_host is q_ptr_host:
        return
    pointer(op, "k_ptr", k_ptr, k_ptr_host, device)
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


def _feed_forward_parameters(op: str, h: int, w_o: Tensor, b_o: Tensor, norm: Tensor) -> None:
    shape(op, "w_o", w_o, f"(h, h) with h = {h}", (h, h))
    shape(op, "b_o", b_o, f"(h,) with h = {h}", (h,))
    norms = 4 if norm.shape[:1] != (0,) else 0
    shape(op, "norm", norm, f"(4, h), or (0, h) for no layer norm, with h = {h}", (norms, h))


def feed_forward(op: str, q: Tensor, attended: Tensor, w_o: Tensor, b_o: Tensor, norm: Tensor) -> None:
    """Check the inputs of ``feed_forward``."""
    floating(op, q=q, attended=attended, w_o=w_o, b_o=b_o, norm=norm)
    shape(op, "q", q, "(rows, h)", (None, None))
    shape(op, "attended", attended, f"that of q, {tuple(q.shape)}", tuple(q.shape))
    _feed_forward_parameters(op, q.shape[1], w_o, b_o, norm)


def pool_block(
    op: str, x: Tensor, ptr: Tensor, ptr_host: Tensor, logits: Tensor, query: Tensor, w_v: Tensor, b_v: Tensor,
    w_o: Tensor, b_o: Tensor, norm: Tensor,
) -> None:  # fmt: skip
    """Check the inputs of ``pool_block``."""
    floating(op, x=x, logits=logits, query=query, w_v=w_v, b_v=b_v, w_o=w_o, b_o=b_o, norm=norm)
    if x.dim() != 3:
        shape(op, "x", x, "(rows, h), or (S, H, h) of pooled rows", (None, None))
    h = x.shape[-1]
    shape(op, "logits", logits, f"(H, h) with h = {h}", (None, h))
    heads = logits.shape[0]
    if not heads or h % heads:
        raise ValueError(f"{op}: logits must have a row for each of H heads, a divisor of h = {h}, got {heads}")
    shape(op, "w_v", w_v, f"(H, h/H, h) = {(heads, h // heads, h)}", (heads, h // heads, h))
    for name, tensor in (("query", query), ("b_v", b_v)):
        shape(op, name, tensor, f"(h,) with h = {h}", (h,))
    _feed_forward_parameters(op, h, w_o, b_o, norm)
    if x.dim() == 3:
        shape(op, "x", x, f"(S, H, h) with H = {heads}", (None, heads, h))
        shape(op, "ptr", ptr, "(0,), as x is pooled already", (0,))
    else:
        pointer(op, "ptr", ptr, ptr_host, x.device)


def add_codes(
    op: str, x: Tensor, ptr: Tensor, ptr_host: Tensor, level: Tensor, table: Tensor, scale: Tensor, magnitude: Tensor,
    gain: Tensor,
) -> None:  # fmt: skip
    """Check the inputs of ``add_codes``, or with the gradient as ``x`` those of its backward."""
    floating(op, x=x)
    floating(op, level=level, table=table, scale=scale, magnitude=magnitude, gain=gain)
    if x.device != level.device:
        raise ValueError(f"{op}: level must be on {x.device} beside x, got {described(level)}; use .to({x.device})")
    shape(op, "x", x, "(rows, h)", (None, None))
    h, sets = x.shape[1], ptr.shape[0] - 1 if ptr.shape[0] else x.shape[0]
    shape(op, "level", level, f"(S, h) = {(sets, h)}", (sets, h))
    shape(op, "table", table, f"(P, h) with h = {h}", (None, h))
    shape(op, "scale", scale, f"(S,) = {(sets,)}, or (0,) for none", (sets if scale.shape[:1] != (0,) else 0,))
    shape(op, "magnitude", magnitude, f"(h,) with h = {h}", (h,))
    shape(op, "gain", gain, "()", ())
    if ptr.shape[0]:
        pointer(op, "ptr", ptr, ptr_host, x.device)


def code_rows(op: str, ptr: Tensor, ptr_host: Tensor, rows: int, table: Tensor) -> None:
    """Check what the pointer of ``add_codes`` holds, and that the table of places has a row for each."""
    longest = min(rows, 1)
    if ptr.shape[0]:
        pointer_content(op, "ptr", ptr, ptr_host, rows)
        longest = derived(ptr_host, "longest set", lambda: int(ptr_host.diff().max()) if ptr_host.shape[0] > 1 else 0)
    if 0 < table.shape[0] < longest:
        raise ValueError(f"{op}: table must have a row for each place of a set, {longest}, got {described(table)}")


def set_block(
    op: str,
    q: Tensor,
    k: Tensor,
    q_ptr: Tensor,
    k_ptr: Tensor,
    q_ptr_host: Tensor,
    k_ptr_host: Tensor,
    *,
    num_heads: int,
    **parameters: Tensor,
) -> None:
    """Check the inputs of ``set_block``, with its parameters by name."""
    floating(op, q=q, k=k, **parameters)
    shape(op, "q", q, "(rows_q, dim_q)", (None, None))
    shape(op, "k", k, "(rows_k, dim_k)", (None, None))
    w_o, norm = parameters["w_o"], parameters["norm"]
    shape(op, "w_o", w_o, "(h, h)", (None, w_o.shape[0] if w_o.dim() else None))
    h, norms = w_o.shape[0], 4 if norm.shape[:1] != (0,) else 0
    widths = {"w_q": q.shape[1], "w_k": k.shape[1], "w_v": k.shape[1]}
    for name, width in widths.items():
        if parameters[name].shape != (h, width):  # no message is made where all is well
            shape(op, name, parameters[name], f"(h, width of its rows) = {(h, width)}", (h, width))
    for name in ("b_q", "b_k", "b_v", "b_o"):
        if parameters[name].shape != (h,):
            shape(op, name, parameters[name], f"(h,) with h = {h}", (h,))
    if norm.shape != (norms, h):
        shape(op, "norm", norm, f"(4, h), or (0, h) for no layer norm, with h = {h}", (norms, h))
    sets(op, h, q.device, q_ptr, k_ptr, q_ptr_host, k_ptr_host, num_heads)


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

"""The CPU backend: csrc/cpu through ctypes. float32 and float64 natively; half types are converted at the edge."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...ops.backend import Backend
from ...ops.schema import REQUIRED_OPS, accumulate_dtype
from ...ops.supported_widths import width_reasons
from . import library

LONGEST_CHUNK = 256


def _dtype_reasons(name: str, tensor: Tensor) -> list[str]:
    if tensor.dtype in library.DTYPES:
        return []
    return [f"{name} must be float32, float64, float16 or bfloat16, got {tensor.dtype}"]


def why_not(op: str, args: tuple[Any, ...]) -> list[str]:
    if op.endswith("_backward"):
        args = args[1:]
    if op.startswith("chunk_encode"):
        values, pool_query, element_code = args[0], args[14], args[6]
        reasons = _dtype_reasons("values", values) + width_reasons(pool_query.shape[1], pool_query.shape[0])
        if element_code.shape[0] > LONGEST_CHUNK and args[3].numel() > 1:  # a shorter table bounds the chunks itself
            longest = int(args[3].diff().amax())
            if longest > LONGEST_CHUNK:
                reasons.append(f"chunks must be at most {LONGEST_CHUNK} long, got {longest}")
        return reasons
    if op.startswith("set_attention"):
        return _dtype_reasons("q", args[0]) + width_reasons(args[0].shape[1], args[-1])
    if op.startswith("segment_pool"):
        width = args[0].shape[1]
        short = [f"width must be a multiple of 16, got {width}"] if width % 16 or not width else []
        return _dtype_reasons("x", args[0]) + short
    return []


def _ready(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype).contiguous()


# Under torch.compile, and for who calls torch.ops.sne_fast himself, nothing has looked at the inputs before the backend
# gets their addresses; these checks are of concrete sizes. What the pointers hold is checked by the backend.


def _check_shape(op: str, name: str, tensor: Tensor, expected: tuple[int, ...]) -> None:
    if tensor.shape != expected:
        raise ValueError(f"{op}: {name} must have shape {expected}, got {tuple(tensor.shape)}")


def _check_like(op: str, first_name: str, first: Tensor, **others: Tensor) -> None:
    """All of the dtype of the first, and in main memory."""
    for name, tensor in ((first_name, first), *others.items()):
        if tensor.dtype != first.dtype or tensor.device.type != "cpu":
            raise ValueError(
                f"{op}: {name} must be {first.dtype} on the CPU, got {tensor.dtype} on {tensor.device}; use .to()"
            )


def _check_pointer(op: str, name: str, ptr: Tensor) -> None:
    if ptr.dtype != torch.int64 or ptr.dim() != 1 or ptr.shape[0] == 0 or ptr.device.type != "cpu":
        raise ValueError(
            f"{op}: {name} must have shape (S+1,), be int64 and on the CPU, got {tuple(ptr.shape)}, {ptr.dtype} on "
            f"{ptr.device}"
        )


def _run(function: str, *args: Any) -> None:
    library.check(getattr(library.library(), function)(*args), function.removeprefix("sne_fast_cpu_"))


# ------------------------------------------------------------------------------------------------------- chunk_encode

PARAMETERS = (
    "row_code", "element_code", "logit", "basis", "w_qkv", "b_qkv", "w_o", "b_o", "norm", "pool_query",
)  # fmt: skip


def _check_chunk_encode(op: str, args: Sequence[Tensor], grad: Tensor | None) -> None:
    values, _, _, chunk_ptr, tensor_ptr, *parameters = args
    named = dict(zip(PARAMETERS, parameters, strict=True))
    _check_like(op, "values", values, **named)
    _check_pointer(op, "chunk_ptr_host", chunk_ptr)
    _check_pointer(op, "tensor_ptr_host", tensor_ptr)
    if named["pool_query"].dim() != 2:
        raise ValueError(f"{op}: pool_query must have shape (H, h), got {tuple(named['pool_query'].shape)}")
    heads, h = named["pool_query"].shape
    shapes = (
        (tensor_ptr.shape[0] - 1, h), (named["element_code"].shape[0], h), (2, heads), (3, h), (3, 3 * h, h),
        (3, 3 * h), (4, h, h), (4, h), (4 if named["norm"].shape[0] else 0, 4, h),
    )  # fmt: skip
    _check_shape(op, "values", values, (values.numel(),))
    for (name, tensor), shape in zip(named.items(), shapes, strict=False):
        _check_shape(op, name, tensor, shape)
    if grad is not None:
        _check_shape(op, "grad", grad, (chunk_ptr.shape[0] - 1, heads, h))


def _chunk_encode_args(
    op: str, args: Sequence[Tensor], grad: Tensor | None = None
) -> tuple[Any, torch.dtype, list[Tensor]]:
    """The struct, the dtype computed in, and the tensors that must outlive the call (values and parameters first)."""
    _check_chunk_encode(op, args, grad)
    values, _, _, chunk_ptr, tensor_ptr, *parameters = args
    dtype = accumulate_dtype(values.dtype)
    reals = [_ready(t, dtype) for t in (values, *parameters)]
    pointers = [chunk_ptr.contiguous(), tensor_ptr.contiguous()]
    heads, h = parameters[9].shape
    struct = library.ChunkEncodeArgs(
        chunk_ptr.shape[0] - 1, tensor_ptr.shape[0] - 1, values.shape[0], h, heads, parameters[1].shape[0],
        int(parameters[8].shape[0] > 0), torch.get_num_threads(), *(t.data_ptr() for t in (*pointers, *reals)),
    )  # fmt: skip
    return struct, dtype, [*reals, *pointers]


def chunk_encode(*args: Tensor) -> Tensor:
    struct, dtype, _kept = _chunk_encode_args("chunk_encode", args)
    out = torch.empty(struct.num_chunks, struct.heads, struct.hidden, dtype=dtype)
    _run("sne_fast_cpu_chunk_encode", library.DTYPES[dtype], ctypes.byref(struct), out.data_ptr())
    return out.to(args[0].dtype)


def chunk_encode_backward(grad: Tensor, *args: Tensor) -> tuple[Tensor, ...]:
    struct, dtype, kept = _chunk_encode_args("chunk_encode_backward", args, grad)
    grad = _ready(grad, dtype)
    inputs = (args[0], *args[5:])
    grads = [torch.empty(t.shape, dtype=dtype) for t in inputs]
    pointers = library.ChunkEncodeGrads(grad.data_ptr(), *(t.data_ptr() for t in grads))
    _run("sne_fast_cpu_chunk_encode_backward", library.DTYPES[dtype], ctypes.byref(struct), ctypes.byref(pointers))
    del kept
    return tuple(g.to(t.dtype) for g, t in zip(grads, inputs, strict=True))


# ------------------------------------------------------------------------------------------------------ set_attention


def _check_set_attention(
    op: str, q: Tensor, k: Tensor, v: Tensor, q_ptr: Tensor, k_ptr: Tensor, heads: int, **saved: Tensor
) -> None:
    _check_like(op, "q", q, k=k, v=v)
    _check_pointer(op, "q_ptr_host", q_ptr)
    _check_shape(op, "k_ptr_host", k_ptr, tuple(q_ptr.shape))
    _check_pointer(op, "k_ptr_host", k_ptr)
    rows, h = q.shape
    _check_shape(op, "k", k, (k.shape[0], h))
    _check_shape(op, "v", v, tuple(k.shape))
    for name, tensor in saved.items():
        _check_shape(op, name, tensor, (rows, heads) if name == "lse" else (rows, h))


def _set_attention_args(
    q: Tensor, k: Tensor, v: Tensor, q_ptr: Tensor, k_ptr: Tensor, heads: int, out: Tensor, lse: Tensor
) -> Any:
    return library.SetAttentionArgs(
        q_ptr.shape[0] - 1, q.shape[0], k.shape[0], q.shape[1], heads, torch.get_num_threads(),
        *(t.data_ptr() for t in (q_ptr, k_ptr, q, k, v, out, lse)),
    )  # fmt: skip


def set_attention(
    q: Tensor, k: Tensor, v: Tensor, q_ptr: Tensor, k_ptr: Tensor, q_host: Tensor, k_host: Tensor, num_heads: int
) -> tuple[Tensor, Tensor]:
    _check_set_attention("set_attention", q, k, v, q_host, k_host, num_heads)
    dtype = accumulate_dtype(q.dtype)
    queries, keys, values = (_ready(t, dtype) for t in (q, k, v))
    q_host, k_host = q_host.contiguous(), k_host.contiguous()
    out, lse = torch.empty_like(queries), torch.empty(q.shape[0], num_heads, dtype=dtype)
    struct = _set_attention_args(queries, keys, values, q_host, k_host, num_heads, out, lse)
    _run("sne_fast_cpu_set_attention", library.DTYPES[dtype], ctypes.byref(struct))
    return out.to(q.dtype), lse


def set_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    q_ptr: Tensor, k_ptr: Tensor, q_host: Tensor, k_host: Tensor, num_heads: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    _check_set_attention("set_attention_backward", q, k, v, q_host, k_host, num_heads, grad=grad, out=out, lse=lse)
    dtype = accumulate_dtype(q.dtype)
    grad, queries, keys, values, out, lse = (_ready(t, dtype) for t in (grad, q, k, v, out, lse))
    q_host, k_host = q_host.contiguous(), k_host.contiguous()
    grads = [torch.empty_like(t) for t in (queries, keys, values)]
    if q.dtype != dtype:  # <grad, out> meets numbers close to it: a rounded out spoils the gradient of fc_k
        same_lse = torch.empty_like(lse)
        again = _set_attention_args(queries, keys, values, q_host, k_host, num_heads, out, same_lse)
        _run("sne_fast_cpu_set_attention", library.DTYPES[dtype], ctypes.byref(again))
    struct = _set_attention_args(queries, keys, values, q_host, k_host, num_heads, out, lse)
    pointers = library.SetAttentionGrads(grad.data_ptr(), *(t.data_ptr() for t in grads))
    _run("sne_fast_cpu_set_attention_backward", library.DTYPES[dtype], ctypes.byref(struct), ctypes.byref(pointers))
    return tuple(g.to(t.dtype) for g, t in zip(grads, (q, k, v), strict=True))


# ------------------------------------------------------------------------------------------------------- segment_pool


def _check_segment_pool(op: str, x: Tensor, logits: Tensor, ptr: Tensor, **saved: Tensor) -> None:
    _check_like(op, "x", x, logits=logits)
    _check_pointer(op, "ptr_host", ptr)
    rows, h = x.shape
    if logits.dim() != 2:
        raise ValueError(f"{op}: logits must have shape (rows, A), got {tuple(logits.shape)}")
    heads, segments = logits.shape[1], ptr.shape[0] - 1
    _check_shape(op, "logits", logits, (rows, heads))
    for name, tensor in saved.items():
        _check_shape(op, name, tensor, (segments, heads) if name == "lse" else (segments, heads, h))


def _segment_pool_args(x: Tensor, logits: Tensor, ptr: Tensor, out: Tensor, lse: Tensor) -> Any:
    return library.SegmentPoolArgs(
        ptr.shape[0] - 1, x.shape[0], x.shape[1], logits.shape[1], torch.get_num_threads(),
        *(t.data_ptr() for t in (ptr, x, logits, out, lse)),
    )  # fmt: skip


def segment_pool(x: Tensor, logits: Tensor, ptr: Tensor, ptr_host: Tensor) -> tuple[Tensor, Tensor]:
    _check_segment_pool("segment_pool", x, logits, ptr_host)
    dtype = accumulate_dtype(x.dtype)
    rows, weights, ptr_host = _ready(x, dtype), _ready(logits, dtype), ptr_host.contiguous()
    segments, heads = ptr_host.shape[0] - 1, logits.shape[1]
    out = torch.empty(segments, heads, x.shape[1], dtype=dtype)
    lse = torch.empty(segments, heads, dtype=dtype)
    struct = _segment_pool_args(rows, weights, ptr_host, out, lse)
    _run("sne_fast_cpu_segment_pool", library.DTYPES[dtype], ctypes.byref(struct))
    return out.to(x.dtype), lse


def segment_pool_backward(
    grad: Tensor, x: Tensor, logits: Tensor, out: Tensor, lse: Tensor, ptr: Tensor, ptr_host: Tensor
) -> tuple[Tensor, Tensor]:
    _check_segment_pool("segment_pool_backward", x, logits, ptr_host, grad=grad, out=out, lse=lse)
    dtype = accumulate_dtype(x.dtype)
    grad, rows, weights, out, lse = (_ready(t, dtype) for t in (grad, x, logits, out, lse))
    ptr_host = ptr_host.contiguous()
    grads = torch.empty_like(rows), torch.empty_like(weights)
    if x.dtype != dtype:  # as in set_attention_backward
        same_lse = torch.empty_like(lse)
        again = _segment_pool_args(rows, weights, ptr_host, out, same_lse)
        _run("sne_fast_cpu_segment_pool", library.DTYPES[dtype], ctypes.byref(again))
    struct = _segment_pool_args(rows, weights, ptr_host, out, lse)
    pointers = library.SegmentPoolGrads(grad.data_ptr(), *(t.data_ptr() for t in grads))
    _run("sne_fast_cpu_segment_pool_backward", library.DTYPES[dtype], ctypes.byref(struct), ctypes.byref(pointers))
    return grads[0].to(x.dtype), grads[1].to(logits.dtype)


# ------------------------------------------------------------------------------------------------------ gather_chunks


def _check_gather(op: str, tensors: Sequence[Tensor], scale: Tensor, plan: Tensor, **values: Tensor) -> None:
    _check_shape(op, "scale", scale, (len(tensors),))
    _check_shape(op, "plan", plan, (len(tensors), 2))
    if plan.dtype != torch.int64 or plan.device.type != "cpu":
        raise ValueError(f"{op}: plan must be int64 on the CPU, got {plan.dtype} on {plan.device}")
    for t, (tensor, (rows, positions)) in enumerate(zip(tensors, plan.tolist(), strict=True)):
        if min(rows, positions) < 0 or tensor.numel() != rows * positions or tensor.device.type != "cpu":
            raise ValueError(
                f"{op}: tensors[{t}] must have shape {(rows, positions)} by plan[{t}] and be on the CPU, got "
                f"{tuple(tensor.shape)} on {tensor.device}"
            )
    for name, tensor in values.items():
        _check_shape(op, name, tensor, (sum(t.numel() for t in tensors),))


def _gather_args(matrices: Sequence[Tensor], scale: Tensor, plan: Tensor, values: Tensor) -> tuple[Any, list[Any]]:
    count = len(matrices)
    dtypes = (ctypes.c_int32 * count)(*(library.DTYPES[m.dtype] for m in matrices))
    pointers = (ctypes.c_void_p * count)(*(m.data_ptr() for m in matrices))
    plan, scale = plan.contiguous(), scale.to(torch.float64).contiguous()
    struct = library.GatherChunksArgs(
        count, values.shape[0], torch.get_num_threads(), plan.data_ptr(), ctypes.addressof(dtypes),
        ctypes.addressof(pointers), scale.data_ptr(), values.data_ptr(),
    )  # fmt: skip
    return struct, [dtypes, pointers, plan, scale]


def gather_chunks(tensors: Sequence[Tensor], scale: Tensor, plan: Tensor, dtype: torch.dtype) -> Tensor:
    _check_gather("gather_chunks", tensors, scale, plan)
    computed = accumulate_dtype(dtype)
    matrices = [(t if t.dtype in library.DTYPES else t.to(computed)).contiguous() for t in tensors]  # fp8 and the like
    values = torch.empty(sum(t.numel() for t in matrices), dtype=computed)
    struct, _kept = _gather_args(matrices, scale, plan, values)
    _run("sne_fast_cpu_gather_chunks", library.DTYPES[computed], ctypes.byref(struct))
    return values.to(dtype)


def gather_chunks_backward(
    grad: Tensor, values: Tensor, tensors: Sequence[Tensor], scale: Tensor, plan: Tensor
) -> tuple[list[Tensor], Tensor]:
    _check_gather("gather_chunks_backward", tensors, scale, plan, grad=grad, values=values)
    computed = accumulate_dtype(values.dtype)
    grad, values = _ready(grad, computed), _ready(values, computed)
    grads = [
        torch.empty(t.shape, dtype=t.dtype if t.dtype in (torch.float32, torch.float64) else computed) for t in tensors
    ]
    struct, _kept = _gather_args(grads, scale, plan, values)
    scale_grad = torch.empty(scale.shape, dtype=torch.float64)
    struct.grad, struct.scale_grad = grad.data_ptr(), scale_grad.data_ptr()
    _run("sne_fast_cpu_gather_chunks_backward", library.DTYPES[computed], ctypes.byref(struct))
    return [g.to(t.dtype) for g, t in zip(grads, tensors, strict=True)], scale_grad.to(scale.dtype)


def describe() -> str:
    """Return what the native library was built for and runs, or why there is none."""
    reasons = library.reasons()
    return reasons[0] if reasons else f"built for {', '.join(library.supported_isas())}; runs {library.isa()}"


BACKEND = Backend(
    name="cpu",
    kernels={op: globals()[op] for name in REQUIRED_OPS for op in (name, f"{name}_backward")},
    devices=("cpu",),
    priority=100,
    unavailable=library.reasons,
    why_not=why_not,
    describe=describe,
)

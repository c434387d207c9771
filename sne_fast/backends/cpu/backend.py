"""The CPU backend: csrc/cpu through ctypes, in float32 and float64; half types are converted on the way in and out."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...ops import checks, direct_checks
from ...ops.backend import Arguments, Backend
from ...ops.schema import (
    BLOCK_PARAMETERS,
    CHUNK_PARAMETERS,
    CONSTANT_OPS,
    REQUIRED_OPS,
    STATISTICS,
    STORED_DTYPES,
    accumulate_dtype,
    named,
    no_keys,
)
from ...ops.supported_widths import block_width_reasons, pool_width_reasons, width_reasons
from . import library

LONGEST_CHUNK = 256
FUSIONS = ("set_block",)
CODES = np.array([library.DTYPES[dtype] for dtype in STORED_DTYPES], np.int32)


def _dtype_reasons(name: str, tensor: Tensor) -> list[str]:
    if tensor.dtype in library.DTYPES:
        return []
    return [f"{name} must be float32, float64, float16 or bfloat16, got {tensor.dtype}"]


def why_not(op: str, args: Arguments) -> list[str]:
    """Return why the backend cannot run a call; empty if it can."""
    given = named(op, args)
    if op.startswith("chunk_encode"):
        pool_query, element_code = given["pool_query"], given["element_code"]
        reasons = _dtype_reasons("values", given["values"]) + width_reasons(pool_query.shape[1], pool_query.shape[0])
        # A table of fewer codes bounds the chunks by itself.
        if element_code.shape[0] > LONGEST_CHUNK and given["chunk_ptr_host"].numel() > 1:
            longest = int(given["chunk_ptr_host"].diff().amax())
            if longest > LONGEST_CHUNK:
                reasons.append(f"chunks must be at most {LONGEST_CHUNK} long, got {longest}")
        return reasons
    if op.startswith("set_attention"):
        return _dtype_reasons("q", given["q"]) + width_reasons(given["q"].shape[1], given["num_heads"])
    if op.startswith("segment_pool"):
        return _dtype_reasons("x", given["x"]) + pool_width_reasons(given["x"].shape[1])
    if op.startswith("set_block"):
        h, heads = given["w_o"].shape[0], given["num_heads"]
        dim_q, dim_k = (given[name].shape[1] for name in ("w_q", "w_k"))
        return _dtype_reasons("q", given["q"]) + block_width_reasons(dim_q, dim_k, h, heads)
    if op == "tensor_statistics":
        return _dtype_reasons("values", given["values"])
    return []


def _ready(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    # Calls of torch cost more than what they look up, and small steps make hundreds of them.
    return tensor if tensor.dtype == dtype and tensor.is_contiguous() else tensor.to(dtype).contiguous()


def _like(results: Sequence[Tensor], inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return the results, each in the dtype of its input."""
    return tuple(r if r.dtype is t.dtype else r.to(t.dtype) for r, t in zip(results, inputs, strict=True))


def _products(dtype: torch.dtype) -> int:
    """Return the library's dtype for a call on tensors of ``dtype``: bfloat16 where the processor multiplies it."""
    if dtype == torch.bfloat16 and library.multiplies_bf16():
        return library.DTYPES[dtype]
    return library.DTYPES[accumulate_dtype(dtype)]


def _row_dtype(dtype: torch.dtype, width: int) -> torch.dtype:
    """Return the dtype of rows for `set_attention` and `segment_pool` on tensors of ``dtype`` and so many columns."""
    if dtype == torch.bfloat16 and width % 32 == 0 and library.multiplies_bf16():
        return dtype
    return accumulate_dtype(dtype)


def _rows(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a tensor of ``dtype``, contiguous, whose bfloat16 numbers can be read in pairs."""
    tensor = _ready(tensor, dtype)
    return tensor.clone() if dtype == torch.bfloat16 and tensor.data_ptr() % 4 else tensor


def _run(op: str, *args: Any) -> None:
    library.check(getattr(library.library(), f"sne_fast_cpu_{op}")(*args), op)


# ------------------------------------------------------------------------------------------------------- chunk_encode


def _chunk_encode_args(
    op: str, args: Sequence[Tensor], grad: Tensor | None = None
) -> tuple[Any, torch.dtype, list[Tensor]]:
    """Return the struct, the dtype computed in, and the tensors that must outlive the call."""
    values, _, _, chunk_ptr, tensor_ptr, *parameters = args
    checks.chunk_encode(op, *args[:5], **dict(zip(CHUNK_PARAMETERS, parameters, strict=True)))
    direct_checks.chunk_pointers(op, *args[:5], element_codes=parameters[1].shape[0])
    heads, h = parameters[-1].shape  # pool_query
    if grad is not None:
        checks.saved(op, "grad", grad, (chunk_ptr.shape[0] - 1, heads, h), values.device)
    dtype = accumulate_dtype(values.dtype)
    reals = [_ready(t, dtype) for t in (values, *parameters)]
    pointers = [chunk_ptr.contiguous(), tensor_ptr.contiguous()]
    _, element_code, *_, norm, _ = parameters
    struct = library.ChunkEncodeArgs(
        chunk_ptr.shape[0] - 1, tensor_ptr.shape[0] - 1, values.shape[0], h, heads, element_code.shape[0],
        int(norm.shape[0] > 0), library.num_threads(), *(t.data_ptr() for t in (*pointers, *reals)),
    )  # fmt: skip
    return struct, dtype, [*reals, *pointers]


def chunk_encode(*args: Tensor) -> Tensor:
    """Compute the op ``chunk_encode``, with arguments and results as in :mod:`sne_fast.ops.schema`."""
    struct, dtype, _kept = _chunk_encode_args("chunk_encode", args)
    out = torch.empty(struct.num_chunks, struct.heads, struct.hidden, dtype=dtype)
    _run("chunk_encode", _products(args[0].dtype), ctypes.byref(struct), out.data_ptr())
    return out.to(args[0].dtype)


def chunk_encode_backward(grad: Tensor, *args: Tensor) -> tuple[Tensor, ...]:
    """Compute the op ``chunk_encode_backward``, with arguments and results as in :mod:`sne_fast.ops.schema`."""
    struct, dtype, kept = _chunk_encode_args("chunk_encode_backward", args, grad)
    grad = _ready(grad, dtype)
    grads = [torch.empty_like(t) for t in kept[:-2]]
    pointers = library.ChunkEncodeGrads(grad.data_ptr(), *(t.data_ptr() for t in grads))
    _run("chunk_encode_backward", _products(args[0].dtype), ctypes.byref(struct), ctypes.byref(pointers))
    return _like(grads, (args[0], *args[5:]))


# ------------------------------------------------------------------------------------------------------ set_attention


def _set_attention_args(
    q: Tensor, k: Tensor, v: Tensor, q_ptr: Tensor, k_ptr: Tensor, heads: int, out: Tensor, lse: Tensor
) -> Any:
    return library.SetAttentionArgs(
        q_ptr.shape[0] - 1, q.shape[0], k.shape[0], q.shape[1], heads, library.num_threads(),
        *(t.data_ptr() for t in (q_ptr, k_ptr, q, k, v, out, lse)),
    )  # fmt: skip


def set_attention(
    q: Tensor, k: Tensor, v: Tensor, q_ptr: Tensor, k_ptr: Tensor, q_host: Tensor, k_host: Tensor, num_heads: int
) -> tuple[Tensor, Tensor]:
    """Compute the op ``set_attention``, with arguments and results as in :mod:`sne_fast.ops.schema`."""
    checks.set_attention("set_attention", q, k, v, q_ptr, k_ptr, q_host, k_host, num_heads)
    direct_checks.set_pointers("set_attention", q, k, q_ptr, k_ptr, q_host, k_host)
    dtype = _row_dtype(q.dtype, q.shape[1])
    queries, keys, values = (_rows(t, dtype) for t in (q, k, v))
    q_host, k_host = q_host.contiguous(), k_host.contiguous()
    out, lse = torch.empty_like(queries), torch.empty(q.shape[0], num_heads, dtype=accumulate_dtype(dtype))
    struct = _set_attention_args(queries, keys, values, q_host, k_host, num_heads, out, lse)
    _run("set_attention", library.DTYPES[dtype], ctypes.byref(struct))
    return out.to(q.dtype), lse


def set_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    q_ptr: Tensor, k_ptr: Tensor, q_host: Tensor, k_host: Tensor, num_heads: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Compute the op ``set_attention_backward``, with arguments and results as in :mod:`sne_fast.ops.schema`."""
    op = "set_attention_backward"
    checks.set_attention(op, q, k, v, q_ptr, k_ptr, q_host, k_host, num_heads)
    direct_checks.set_pointers(op, q, k, q_ptr, k_ptr, q_host, k_host)
    for name, tensor, shape in (("grad", grad, q.shape), ("out", out, q.shape), ("lse", lse, (q.shape[0], num_heads))):
        checks.saved(op, name, tensor, tuple(shape), q.device)
    dtype = _row_dtype(q.dtype, q.shape[1])
    grad, queries, keys, values, out = (_rows(t, dtype) for t in (grad, q, k, v, out))
    q_host, k_host, lse = q_host.contiguous(), k_host.contiguous(), _ready(lse, accumulate_dtype(dtype))
    grads = [torch.empty_like(t) for t in (queries, keys, values)]
    if q.dtype != dtype:  # <grad, out> nearly cancels: a rounded out would spoil the gradient of fc_k
        same_lse = torch.empty_like(lse)
        again = _set_attention_args(queries, keys, values, q_host, k_host, num_heads, out, same_lse)
        _run("set_attention", library.DTYPES[dtype], ctypes.byref(again))
    struct = _set_attention_args(queries, keys, values, q_host, k_host, num_heads, out, lse)
    pointers = library.SetAttentionGrads(grad.data_ptr(), *(t.data_ptr() for t in grads))
    _run(op, library.DTYPES[dtype], ctypes.byref(struct), ctypes.byref(pointers))
    return _like(grads, (q, k, v))


# ------------------------------------------------------------------------------------------------------- segment_pool


def _segment_pool_args(x: Tensor, logits: Tensor, ptr: Tensor, out: Tensor, lse: Tensor) -> Any:
    return library.SegmentPoolArgs(
        ptr.shape[0] - 1, x.shape[0], x.shape[1], logits.shape[1], library.num_threads(),
        *(t.data_ptr() for t in (ptr, x, logits, out, lse)),
    )  # fmt: skip


def segment_pool(x: Tensor, logits: Tensor, ptr: Tensor, ptr_host: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the op ``segment_pool``, with arguments and results as in :mod:`sne_fast.ops.schema`."""
    checks.segment_pool("segment_pool", x, logits, ptr, ptr_host)
    direct_checks.pointer_and_copy("segment_pool", "ptr", ptr, ptr_host, x.shape[0])
    dtype = _row_dtype(x.dtype, x.shape[1])
    rows, weights, ptr_host = _rows(x, dtype), _rows(logits, dtype), ptr_host.contiguous()
    segments, heads = ptr_host.shape[0] - 1, logits.shape[1]
    out = torch.empty(segments, heads, x.shape[1], dtype=dtype)
    lse = torch.empty(segments, heads, dtype=accumulate_dtype(dtype))
    struct = _segment_pool_args(rows, weights, ptr_host, out, lse)
    _run("segment_pool", library.DTYPES[dtype], ctypes.byref(struct))
    return out.to(x.dtype), lse


def segment_pool_backward(
    grad: Tensor, x: Tensor, logits: Tensor, out: Tensor, lse: Tensor, ptr: Tensor, ptr_host: Tensor
) -> tuple[Tensor, ...]:
    """Compute the op ``segment_pool_backward``, with arguments and results as in :mod:`sne_fast.ops.schema`."""
    checks.segment_pool("segment_pool_backward", x, logits, ptr, ptr_host)
    direct_checks.pointer_and_copy("segment_pool_backward", "ptr", ptr, ptr_host, x.shape[0])
    pooled = (ptr.shape[0] - 1, logits.shape[1], x.shape[1])
    for name, tensor, shape in (("grad", grad, pooled), ("out", out, pooled), ("lse", lse, pooled[:2])):
        checks.saved("segment_pool_backward", name, tensor, shape, x.device)
    dtype = _row_dtype(x.dtype, x.shape[1])
    grad, rows, weights = (_rows(t, dtype) for t in (grad, x, logits))
    ptr_host, lse = ptr_host.contiguous(), _ready(lse, accumulate_dtype(dtype))
    grads = torch.empty_like(rows), torch.empty_like(weights)
    struct = _segment_pool_args(rows, weights, ptr_host, out, lse)
    pointers = library.SegmentPoolGrads(grad.data_ptr(), *(t.data_ptr() for t in grads))
    _run("segment_pool_backward", library.DTYPES[dtype], ctypes.byref(struct), ctypes.byref(pointers))
    return _like(grads, (x, logits))


# ---------------------------------------------------------------------------------------------------------- set_block


def _set_block_args(op: str, args: Sequence[Any], grad: Tensor | None = None) -> tuple[Any, torch.dtype, list[Tensor]]:
    """Return the struct, without ``out``, the dtype computed in, and the tensors that must outlive the call."""
    q, k, q_ptr, k_ptr, q_host, k_host, *parameters, heads = args
    k = q if k is None else k
    checks.set_block(op, q, k, *args[2:6], num_heads=heads, **dict(zip(BLOCK_PARAMETERS, parameters, strict=True)))
    direct_checks.set_pointers(op, q, k, q_ptr, k_ptr, q_host, k_host)
    h = parameters[-3].shape[0]  # w_o
    if grad is not None:
        checks.saved(op, "grad", grad, (q.shape[0], h), q.device)
    dtype = accumulate_dtype(q.dtype)
    kept = [q_host.contiguous(), k_host.contiguous(), *[_ready(t, dtype) for t in (q, k, *parameters)]]
    struct = library.SetBlockArgs(
        q_ptr.shape[0] - 1, q.shape[0], k.shape[0], q.shape[1], k.shape[1], h, heads, int(parameters[-1].shape[0] > 0),
        library.num_threads(), *(t.data_ptr() for t in kept),
    )  # fmt: skip
    return struct, dtype, kept


def set_block(*args: Any) -> Tensor:
    """Compute the op ``set_block``, with arguments and results as in :mod:`sne_fast.ops.schema`."""
    struct, dtype, _kept = _set_block_args("set_block", args)
    out = torch.empty(struct.rows_q, struct.hidden, dtype=dtype)
    struct.out = out.data_ptr()
    _run("set_block", _products(args[0].dtype), ctypes.byref(struct))
    return out.to(args[0].dtype)


def set_block_backward(grad: Tensor, *args: Any) -> tuple[Tensor, ...]:
    """Compute the op ``set_block_backward``, with arguments and results as in :mod:`sne_fast.ops.schema`."""
    struct, dtype, kept = _set_block_args("set_block_backward", args, grad)
    grad = _ready(grad, dtype)
    grads = [torch.empty_like(t) for t in kept[2:]]
    pointers = library.SetBlockGrads(grad.data_ptr(), *(t.data_ptr() for t in grads))
    _run("set_block_backward", _products(args[0].dtype), ctypes.byref(struct), ctypes.byref(pointers))
    q, k = args[:2]
    if k is None:
        grads[0] += grads.pop(1)
        grad_q, *others = _like(grads, (q, *args[6:-1]))
        return (grad_q, no_keys(q), *others)
    return _like(grads, (q, k, *args[6:-1]))


# ------------------------------------------------------------------------------------------------------ gather_chunks


def _gather_args(matrices: Sequence[Tensor], scale: Tensor, plan: Tensor, values: Tensor) -> tuple[Any, list[Any]]:
    count = len(matrices)
    dtypes = (ctypes.c_int32 * count)(*(library.DTYPES[m.dtype] for m in matrices))
    pointers = (ctypes.c_void_p * count)(*(m.data_ptr() for m in matrices))
    plan, scale = plan.contiguous(), scale.to(torch.float64).contiguous()
    struct = library.GatherChunksArgs(
        count, values.shape[0], library.num_threads(), plan.data_ptr(), ctypes.addressof(dtypes),
        ctypes.addressof(pointers), scale.data_ptr(), values.data_ptr(),
    )  # fmt: skip
    return struct, [dtypes, pointers, plan, scale]


def gather_chunks(tensors: Sequence[Tensor], scale: Tensor, plan: Tensor, dtype: torch.dtype) -> Tensor:
    """Compute the op ``gather_chunks``, with arguments and results as in :mod:`sne_fast.ops.schema`."""
    checks.gather_chunks("gather_chunks", tensors, scale, plan)
    computed = accumulate_dtype(dtype)
    matrices = [(t if t.dtype in library.DTYPES else t.to(computed)).contiguous() for t in tensors]  # fp8 and the like
    values = torch.empty(sum(t.numel() for t in matrices), dtype=computed)
    struct, _kept = _gather_args(matrices, scale, plan, values)
    _run("gather_chunks", library.DTYPES[computed], ctypes.byref(struct))
    return values.to(dtype)


def gather_chunks_backward(
    grad: Tensor, values: Tensor, tensors: Sequence[Tensor], scale: Tensor, plan: Tensor
) -> tuple[list[Tensor], Tensor]:
    """Compute the op ``gather_chunks_backward``, with arguments and results as in :mod:`sne_fast.ops.schema`."""
    checks.gather_chunks_backward("gather_chunks_backward", grad, values, tensors, scale, plan)
    computed = accumulate_dtype(values.dtype)
    grad, values = _ready(grad, computed), _ready(values, computed)
    grads = [
        torch.empty(t.shape, dtype=t.dtype if t.dtype in (torch.float32, torch.float64) else computed) for t in tensors
    ]
    struct, _kept = _gather_args(grads, scale, plan, values)
    scale_grad = torch.empty(scale.shape, dtype=torch.float64)
    struct.grad, struct.scale_grad = grad.data_ptr(), scale_grad.data_ptr()
    _run("gather_chunks_backward", library.DTYPES[computed], ctypes.byref(struct))
    return [g.to(t.dtype) for g, t in zip(grads, tensors, strict=True)], scale_grad.to(scale.dtype)


def gather_stored(
    buffers: Sequence[Tensor], table: Tensor, scale: Tensor, num_values: int, dtype: torch.dtype
) -> Tensor:
    """Compute the op ``gather_stored``, with arguments and results as in :mod:`sne_fast.ops.schema`."""
    checks.gather_stored("gather_stored", buffers, table, scale, num_values, dtype)
    computed = accumulate_dtype(dtype)
    rows = table.numpy()
    starts = np.array([buffer.data_ptr() for buffer in buffers], np.int64)
    matrices, dtypes = starts[rows[:, 0]] + rows[:, 1], CODES[rows[:, 2]]
    plan, scale = table[:, 3:].contiguous(), scale.to(torch.float64).contiguous()
    values = torch.empty(num_values, dtype=computed)
    struct = library.GatherChunksArgs(
        table.shape[0], num_values, library.num_threads(), plan.data_ptr(), dtypes.ctypes.data, matrices.ctypes.data,
        scale.data_ptr(), values.data_ptr(),
    )  # fmt: skip
    _run("gather_chunks", library.DTYPES[computed], ctypes.byref(struct))
    return values.to(dtype)


# -------------------------------------------------------------------------------------------------- tensor_statistics


def tensor_statistics(values: Tensor, start: Tensor, scale: Tensor, dims: Tensor, start_host: Tensor) -> Tensor:
    """Compute the op ``tensor_statistics``, with arguments and results as in :mod:`sne_fast.ops.schema`."""
    direct_checks.direct_call("tensor_statistics", (values, start, scale, dims, start_host))
    dtype = accumulate_dtype(values.dtype)
    reals, scales = _ready(values, dtype), _ready(scale, torch.float64)
    start_host, dims = start_host.contiguous(), dims.contiguous()
    out = torch.empty(scale.shape[0], STATISTICS, dtype=dtype)
    struct = library.TensorStatisticsArgs(
        scale.shape[0], values.shape[0], library.num_threads(),
        *(t.data_ptr() for t in (start_host, dims, scales, reals, out)),
    )  # fmt: skip
    _run("tensor_statistics", library.DTYPES[dtype], ctypes.byref(struct))
    return out


def describe() -> str:
    """Return what the native library was built for and runs, or why there is none."""
    reasons = library.reasons()
    return reasons[0] if reasons else f"built for {', '.join(library.supported_isas())}; runs {library.isa()}"


BACKEND = Backend(
    name="cpu",
    kernels={
        **{op: globals()[op] for name in (*REQUIRED_OPS, *FUSIONS) for op in (name, f"{name}_backward")},
        **{op: globals()[op] for op in CONSTANT_OPS},
    },
    devices=("cpu",),
    priority=100,
    unavailable=library.reasons,
    why_not=why_not,
    fusions=FUSIONS,
    describe=describe,
)

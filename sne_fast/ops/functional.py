"""The ops as functions: checks, autocast and gradient routing around the opaque ops of :mod:`sne_fast.ops.schema`.

Each takes ``*_host``, CPU copies of its pointers; without them a GPU call waits for a copy. Gradients flow to every
floating input; a second derivative is refused by name. While `torch.compile` traces, inputs are not checked: sizes in
messages would specialise the graph to them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import checks, dispatch  # dispatch registers the implementations
from .autograd import OPS, ChunkEncode, FeedForward, GatherChunks, SegmentPool, SetAttention
from .supported_widths import WIDTHS


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast to the autocast dtype where autocast is on: a raw op would see whatever dtype its caller held."""
    if not all(isinstance(t, Tensor) for t in tensors):
        return tensors  # the checks that follow say which
    device_type = tensors[0].device.type
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        return tuple(t.to(dtype) if t.dtype != torch.float64 else t for t in tensors)
    return tensors


def _on_host(ptr: Tensor, host: Tensor | None) -> Tensor:
    if host is not None or not isinstance(ptr, Tensor):
        return host
    return ptr if ptr.device.type == "cpu" else ptr.cpu()


def _needs_grad(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def _distinct(*args: Any) -> list[Any]:
    """Repeated tensors as views, while tracing: dynamo refuses one tensor in two places of an autograd.Function."""
    if not torch.compiler.is_compiling():
        return list(args)
    distinct: list[Any] = []
    for arg in args:
        repeated = isinstance(arg, Tensor) and any(arg is other for other in distinct)
        distinct.append(arg.view_as(arg) if repeated else arg)
    return distinct


def gather_chunks(tensors: Sequence[Tensor], scale: Tensor, plan: Tensor, dtype: torch.dtype) -> Tensor:
    """Write parameter tensors one after another in chunk order, divided by their scale and cast (SPEC 1).

    Args:
        tensors: T floating tensors of any dtype on one device; tensor t is read row-major as a matrix ``(R, K)``, R
            the product of its first two dimensions and K of its kernel dimensions.
        scale: ``(T,)`` float32 or float64, what each tensor is divided by.
        plan: ``(T, 2)`` int64 on the CPU, the rows ``(R, K)``.
        dtype: floating dtype of the result.

    Returns:
        values ``(V,)``, V the number of all elements: for each tensor its transpose ``(K, R)``, row-major.

    Raises:
        TypeError, ValueError: for inputs that break the contract above.

    Example::

        >>> w = torch.arange(6.0).reshape(1, 2, 3)                     # out 1, in 2, kernel 3
        >>> gather_chunks([w], torch.ones(1), torch.tensor([[2, 3]]), torch.float32)
        tensor([0., 3., 1., 4., 2., 5.])
    """
    op, tensors = "gather_chunks", list(tensors)
    for name, value in {"scale": scale, "plan": plan, **{f"tensors[{t}]": v for t, v in enumerate(tensors)}}.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{op}: {name} must be a tensor, got {checks.described(value)}")
    if scale.dtype not in (torch.float32, torch.float64) or scale.shape != (len(tensors),):
        raise TypeError(f"{op}: scale must be float32 or float64 of shape (T,) = ({len(tensors)},), got "
                        f"{checks.described(scale)}")  # fmt: skip
    if plan.dtype != torch.int64 or plan.shape != (len(tensors), 2) or plan.device.type != "cpu":
        raise TypeError(f"{op}: plan must be int64 of shape (T, 2) = ({len(tensors)}, 2) on the CPU, got "
                        f"{checks.described(plan)}")  # fmt: skip
    if dtype not in checks.FLOATING:
        raise TypeError(f"{op}: dtype must be one of {checks.FLOATING}, got {dtype}")
    for t, (tensor, (rows, positions)) in enumerate(zip(tensors, plan.tolist(), strict=True)):
        if min(rows, positions) < 0 or tensor.numel() != rows * positions or not tensor.is_floating_point():
            raise ValueError(f"{op}: tensors[{t}] must be floating with plan[{t}] = {rows} x {positions} elements, got "
                             f"{checks.described(tensor)}")  # fmt: skip
        if tensor.device != scale.device:
            raise ValueError(f"{op}: tensors[{t}] must be on {scale.device} beside scale, got "
                             f"{checks.described(tensor)}; use .to()")  # fmt: skip
    if _needs_grad(scale, *tensors):
        return GatherChunks.apply(*_distinct(scale, plan, dtype, *tensors))
    return OPS.gather_chunks(tensors, scale, plan, dtype)


def _check_chunk_encode(
    values: Tensor,
    chunk_ptr: Tensor,
    tensor_ptr: Tensor,
    chunk_ptr_host: Tensor,
    tensor_ptr_host: Tensor,
    parameters: dict[str, Tensor],
) -> None:
    op = "chunk_encode"
    checks.floating(op, values=values, **parameters)
    checks.shape(op, "values", values, "(V,)", (None,))
    checks.shape(op, "pool_query", parameters["pool_query"], "(H, h)", (None, None))
    heads, h = parameters["pool_query"].shape
    norms, tensors = 4 if parameters["norm"].shape[0] else 0, tensor_ptr.shape[0] - 1
    contracts = {
        "row_code": ("(T, h)", (tensors, h)), "element_code": ("(c, h)", (None, h)), "logit": ("(2, H)", (2, heads)),
        "basis": ("(3, h)", (3, h)), "w_qkv": ("(3, 3h, h)", (3, 3 * h, h)), "b_qkv": ("(3, 3h)", (3, 3 * h)),
        "w_o": ("(4, h, h)", (4, h, h)), "b_o": ("(4, h)", (4, h)),
        "norm": ("(4, 4, h), or (0, 4, h) for no layer norm", (norms, 4, h)),
    }  # fmt: skip
    for name, (contract, expected) in contracts.items():
        checks.shape(op, name, parameters[name], f"{contract} with T = {tensors}, H = {heads}, h = {h}", expected)
    if h % heads:
        raise ValueError(f"{op}: pool_query must have a width that its heads divide, got h = {h} and H = {heads}")
    checks.pointer(op, "chunk_ptr", chunk_ptr, chunk_ptr_host, values.device, values.shape[0])
    checks.pointer(op, "tensor_ptr", tensor_ptr, tensor_ptr_host, values.device, chunk_ptr.shape[0] - 1)
    if chunk_ptr_host.shape[0] > 1:
        lengths, longest = chunk_ptr_host.diff(), parameters["element_code"].shape[0]
        if int(lengths.min()) < 1 or int(lengths.max()) > longest:
            raise ValueError(
                f"{op}: chunk_ptr must hold chunks of 1 to c = {longest} values (the rows of element_code), got "
                f"lengths from {int(lengths.min())} to {int(lengths.max())}"
            )


def chunk_encode(
    values: Tensor,
    chunk_ptr: Tensor,
    tensor_ptr: Tensor,
    row_code: Tensor,
    element_code: Tensor,
    logit: Tensor,
    basis: Tensor,
    w_qkv: Tensor,
    b_qkv: Tensor,
    w_o: Tensor,
    b_o: Tensor,
    norm: Tensor,
    pool_query: Tensor,
    *,
    chunk_ptr_host: Tensor | None = None,
    tensor_ptr_host: Tensor | None = None,
) -> Tensor:
    """Encode every chunk up to its pooled rows: eq. 2-6 of the paper, on parameters folded as SPEC 4 allows.

    Four set-attention blocks of width h with H heads run inside each chunk, codes are added after the second, and the
    rows are pooled per head by softmax: ``sum_i softmax_i(<pool_query_a, x_i>) x_i``.

    Args:
        values: ``(V,)`` float16, bfloat16, float32 or float64; all floating arguments share its dtype and device.
        chunk_ptr: ``(N+1,)`` int64, the chunks' values.
        tensor_ptr: ``(T+1,)`` int64, the tensors' chunks.
        row_code: ``(T, h)``, added to every element of the tensor.
        element_code: ``(c, h)``, row i added to element i of each chunk; c at least the longest chunk.
        logit: ``(2, H)``, rows a and c: block 0 attends by ``softmax_j((a x_i + c) x_j)`` (SPEC 4.1).
        basis: ``(3, h)``, what x_i, the attended mean of its head, and 1 are multiplied by in block 0.
        w_qkv, b_qkv: ``(3, 3h, h)``, ``(3, 3h)``, blocks 1 to 3, rows fc_q, fc_k, fc_v.
        w_o, b_o: ``(4, h, h)``, ``(4, h)``, fc_o of blocks 0 to 3.
        norm: ``(4, 4, h)``, per block ln0.weight, ln0.bias, ln1.weight, ln1.bias; ``(0, 4, h)`` for no layer norm.
        pool_query: ``(H, h)``, ``(fc_k^T q) / sqrt(h)`` of the pool, per head (SPEC 4.2).
        chunk_ptr_host, tensor_ptr_host: CPU copies of the pointers.

    Returns:
        ``(N, H, h)`` in the dtype of ``values`` (of autocast, where it is on), before ``fc_v`` of the pool.

    Raises:
        TypeError, ValueError: for inputs that break the contract above.

    Example::

        encoder = sne_fast.SNE()
        batch = encoder.pack([torch.nn.Linear(3, 2)])
        pooled = encoder.chunk_encoder.pooled_rows(batch, encoder.type_embedding.weight)   # calls this function
    """
    parameters = {
        "row_code": row_code, "element_code": element_code, "logit": logit, "basis": basis, "w_qkv": w_qkv,
        "b_qkv": b_qkv, "w_o": w_o, "b_o": b_o, "norm": norm, "pool_query": pool_query,
    }  # fmt: skip
    values, *cast = _autocast(values, *parameters.values())
    chunk_ptr_host, tensor_ptr_host = _on_host(chunk_ptr, chunk_ptr_host), _on_host(tensor_ptr, tensor_ptr_host)
    if not torch.compiler.is_compiling():
        parameters = dict(zip(parameters, cast, strict=True))
        _check_chunk_encode(values, chunk_ptr, tensor_ptr, chunk_ptr_host, tensor_ptr_host, parameters)
    args = (values, chunk_ptr, tensor_ptr, chunk_ptr_host, tensor_ptr_host, *cast)
    return ChunkEncode.apply(*_distinct(*args)) if _needs_grad(values, *cast) else OPS.chunk_encode(*args)


def _check_set_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_ptr: Tensor,
    k_ptr: Tensor,
    num_heads: int,
    q_ptr_host: Tensor,
    k_ptr_host: Tensor,
) -> None:
    op = "set_attention"
    checks.floating(op, q=q, k=k, v=v)
    checks.shape(op, "q", q, "(rows_q, h)", (None, None))
    checks.shape(op, "k", k, f"(rows_k, h) with h = {q.shape[1]}", (None, q.shape[1]))
    checks.shape(op, "v", v, f"that of k, {tuple(k.shape)}", tuple(k.shape))
    if not isinstance(num_heads, int) or num_heads < 1 or q.shape[1] % num_heads:
        raise ValueError(f"{op}: num_heads must be an integer that divides the width h = {q.shape[1]}, got {num_heads}")
    checks.pointer(op, "q_ptr", q_ptr, q_ptr_host, q.device, q.shape[0])
    if k_ptr is not q_ptr or k_ptr_host is not q_ptr_host or k.shape[0] != q.shape[0]:
        checks.pointer(op, "k_ptr", k_ptr, k_ptr_host, q.device, k.shape[0])
    if q_ptr.shape != k_ptr.shape:
        raise ValueError(
            f"{op}: k_ptr must have as many sets as q_ptr, got {k_ptr.shape[0] - 1} and {q_ptr.shape[0] - 1}"
        )


def set_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_ptr: Tensor,
    k_ptr: Tensor,
    num_heads: int,
    *,
    q_ptr_host: Tensor | None = None,
    k_ptr_host: Tensor | None = None,
) -> Tensor:
    """``softmax(q_a k_a^T / sqrt(h)) v_a`` for each head a, inside each set (SPEC 2; note sqrt(h), not sqrt(d)).

    Args:
        q: ``(rows_q, h)``, float16, bfloat16, float32 or float64.
        k, v: ``(rows_k, h)``, same dtype and device.
        q_ptr, k_ptr: ``(S+1,)`` int64; queries ``q_ptr[s]:q_ptr[s+1]`` attend to keys ``k_ptr[s]:k_ptr[s+1]``.
        num_heads: H, a divisor of h; head a owns columns ``a h/H`` to ``(a+1) h/H``.
        q_ptr_host, k_ptr_host: CPU copies of the pointers.

    Returns:
        ``(rows_q, h)`` in the dtype of q (of autocast, where it is on); 0 where a set has no keys.

    Raises:
        TypeError, ValueError: for inputs that break the contract above.

    Example::

        >>> ptr = torch.tensor([0, 2, 5])
        >>> x = torch.randn(5, 8)
        >>> set_attention(x, x, x, ptr, ptr, num_heads=2).shape
        torch.Size([5, 8])
    """
    q, k, v = _autocast(q, k, v)
    q_ptr_host, k_ptr_host = _on_host(q_ptr, q_ptr_host), _on_host(k_ptr, k_ptr_host)
    if not torch.compiler.is_compiling():
        _check_set_attention(q, k, v, q_ptr, k_ptr, num_heads, q_ptr_host, k_ptr_host)
    args = (q, k, v, q_ptr, k_ptr, q_ptr_host, k_ptr_host, num_heads)
    return SetAttention.apply(*_distinct(*args)) if _needs_grad(q, k, v) else OPS.set_attention(*args)[0]


def segment_pool(x: Tensor, logits: Tensor, ptr: Tensor, *, ptr_host: Tensor | None = None) -> Tensor:
    """``sum_i softmax_i(logits[i, a]) x[i]`` over the rows of each segment, for every query a (SPEC 4.2).

    Args:
        x: ``(rows, h)`` float16, bfloat16, float32 or float64.
        logits: ``(rows, A)``, same dtype and device.
        ptr: ``(S+1,)`` int64, the segments' rows.
        ptr_host: CPU copy of ``ptr``.

    Returns:
        ``(S, A, h)`` in the dtype of x (of autocast, where it is on); 0 for an empty segment.

    Raises:
        TypeError, ValueError: for inputs that break the contract above.

    Example::

        >>> segment_pool(torch.ones(3, 4), torch.zeros(3, 2), torch.tensor([0, 1, 3])).shape
        torch.Size([2, 2, 4])
    """
    op, (x, logits) = "segment_pool", _autocast(x, logits)
    ptr_host = _on_host(ptr, ptr_host)
    if not torch.compiler.is_compiling():
        checks.floating(op, x=x, logits=logits)
        checks.shape(op, "x", x, "(rows, h)", (None, None))
        checks.shape(op, "logits", logits, f"(rows, A) with rows = {x.shape[0]}", (x.shape[0], None))
        checks.pointer(op, "ptr", ptr, ptr_host, x.device, x.shape[0])
    args = (x, logits, ptr, ptr_host)
    return SegmentPool.apply(*_distinct(*args)) if _needs_grad(x, logits) else OPS.segment_pool(*args)[0]


def feed_forward(q: Tensor, attended: Tensor, w_o: Tensor, b_o: Tensor, norm: Tensor) -> Tensor:
    """``ln1(o + relu(fc_o(o)))`` with ``o = ln0(q + attended)``, row by row: what follows the attention (SPEC 2).

    Args:
        q: ``(rows, h)`` float16, bfloat16, float32 or float64; all arguments share its dtype and device. One row
            expanded to all, as :class:`sne_fast.PMA` has it, is read once (unless autocast has to cast it).
        attended: ``(rows, h)``.
        w_o, b_o: ``(h, h)``, ``(h,)``, fc_o.
        norm: ``(4, h)``, ln0.weight, ln0.bias, ln1.weight, ln1.bias; ``(0, h)`` for no layer norm.

    Returns:
        ``(rows, h)`` in the dtype of q (of autocast, where it is on).

    Raises:
        TypeError, ValueError: for inputs that break the contract above.

    Example::

        >>> mab = MAB(8, 8, 8, num_heads=2, layer_norm=True)
        >>> x = torch.randn(5, 8)
        >>> feed_forward(x, x, mab.fc_o.weight, mab.fc_o.bias, mab.norm_parameters()).shape
        torch.Size([5, 8])
    """
    op, args = "feed_forward", _autocast(q, attended, w_o, b_o, norm)
    if not torch.compiler.is_compiling():
        checks.floating(op, **dict(zip(("q", "attended", "w_o", "b_o", "norm"), args, strict=True)))
        q, attended, w_o, b_o, norm = args
        checks.shape(op, "q", q, "(rows, h)", (None, None))
        h, norms = q.shape[1], 4 if norm.shape[:1] != (0,) else 0
        checks.shape(op, "attended", attended, f"that of q, {tuple(q.shape)}", tuple(q.shape))
        checks.shape(op, "w_o", w_o, f"(h, h) with h = {h}", (h, h))
        checks.shape(op, "b_o", b_o, f"(h,) with h = {h}", (h,))
        checks.shape(op, "norm", norm, f"(4, h), or (0, h) for no layer norm, with h = {h}", (norms, h))
    return FeedForward.apply(*_distinct(*args)) if _needs_grad(*args) else OPS.feed_forward(*args)


def fuses_feed_forward(q: Tensor) -> bool:
    """Whether rows like ``q (..., h)`` should go through :func:`feed_forward`, or ordinary torch operations are better.

    They are on a CPU, by a backend that has no kernels for it, and for dtypes and widths that such kernels do not take.
    """
    if not dispatch.fuses("feed_forward", q.device) or q.shape[-1] not in WIDTHS:
        return False
    return q.device.type != "cuda" or q.dtype != torch.float64

"""The ops as functions: checks, autocast and gradient routing around the opaque ops of :mod:`sne_fast.ops.schema`.

Each function takes ``*_host``, CPU copies of its pointers; without them a GPU call waits for a copy. Gradients flow to
every floating input, and a second derivative by autograd raises an error. Under `torch.func` and in forward mode one
level of `grad` or `vjp` runs on the kernels; everything else (`jvp`, `vmap`, `jacfwd`, `hessian`, dual tensors) runs on
plain PyTorch operations, whatever the backend. Inputs are not checked while ``torch.compile`` traces: sizes in messages
would specialise the graph to them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import checks, compositions, dispatch  # dispatch registers the implementations
from .autograd import OPS, ChunkEncode, FeedForward, GatherChunks, SegmentPool, SetAttention, apply
from .calls import autocast, distinct, needs_grad, on_host
from .functional_add_codes import add_codes, fuses_add_codes
from .functional_pool_block import fuses_pool_block, pool_block
from .functional_set_block import fuses_set_block, set_block
from .schema import CHUNK_PARAMETERS
from .supported_widths import WIDTHS
from .transforms import is_transformed, needs_composition, outside_transforms, unwrapped

__all__ = ["add_codes", "chunk_encode", "feed_forward", "fuses_add_codes", "fuses_feed_forward", "fuses_pool_block",
           "fuses_set_block", "gather_chunks", "gather_stored", "pool_block", "segment_pool", "set_attention",
           "set_block", "tensor_statistics"]  # fmt: skip


def gather_chunks(tensors: Sequence[Tensor], scale: Tensor, plan: Tensor, dtype: torch.dtype) -> Tensor:
    """Write parameter tensors one after another in chunk order, divided by their scale and cast.

    See docs/method.md, How a tensor is cut.

    Args:
        tensors: T floating tensors of any dtype on one device; tensor t is read row-major as a matrix ``(R, K)``, R
            the product of its first two dimensions and K of its kernel dimensions.
        scale: ``(T,)`` float32 or float64; each tensor is divided by its entry.
        plan: ``(T, 2)`` int64 on the CPU, the rows ``(R, K)``.
        dtype: floating dtype of the result.

    Returns:
        values ``(V,)``, V the number of all elements: for each tensor its transpose ``(K, R)``, row-major.

    Raises:
        TypeError: for inputs of the wrong type or dtype.
        ValueError: for inputs of the wrong shape, device or content.

    Example::

        >>> w = torch.arange(6.0).reshape(1, 2, 3)  # out 1, in 2, kernel 3
        >>> sne_fast.functional.gather_chunks([w], torch.ones(1), torch.tensor([[2, 3]]), torch.float32)
        tensor([0., 3., 1., 4., 2., 5.])
    """
    tensors = list(tensors)
    checks.gather_chunks("gather_chunks", tensors, scale, plan)
    if dtype not in checks.FLOATING:
        raise TypeError(f"gather_chunks: dtype must be one of {checks.FLOATING}, got {dtype}")
    values: Tensor
    if needs_composition("gather_chunks", (scale, *tensors)):
        values = compositions.gather_chunks(tensors, scale, plan, dtype)
    elif needs_grad((scale, *tensors)):
        values = apply(GatherChunks, *distinct(scale, plan, dtype, *tensors))
    else:
        values = OPS.gather_chunks(tensors, scale, plan, dtype)
    return values


def gather_stored(
    buffers: Sequence[Tensor], table: Tensor, scale: Tensor, num_values: int, dtype: torch.dtype
) -> Tensor:
    """Write tensors that lie in buffers one after another in chunk order, as :func:`gather_chunks`, without gradients.

    Many small tensors of a file cost one buffer and a row each of a table, and no tensor object.

    Args:
        buffers: contiguous tensors on the CPU of any dtype, such as the bytes of files.
        table: ``(T, 5)`` int64 on the CPU: the place of the buffer, the offset in it in bytes, the place of the dtype
            in ``sne_fast.ops.schema.STORED_DTYPES``, and the matrix ``(R, K)``.
        scale: ``(T,)`` float32 or float64; each tensor is divided by its entry.
        num_values: V, the number of all elements.
        dtype: floating dtype of the result.

    Returns:
        values ``(V,)``: for each tensor its transpose ``(K, R)``, row-major.

    Raises:
        TypeError: for inputs of the wrong type or dtype.
        ValueError: for a row of the table that is outside its buffer, or another number of values.

    Example::

        >>> table = torch.tensor([[0, 8, 0, 2, 1], [0, 0, 0, 2, 1]])
        >>> gather_stored([torch.arange(4.0)], table, torch.ones(2), 4, torch.float32)
        tensor([2., 3., 0., 1.])
    """
    values: Tensor = OPS.gather_stored(list(buffers), table, scale, num_values, dtype)
    return values


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
    """Encode every chunk up to its pooled rows: eq. 2-6 of the paper, on folded parameters.

    Four set-attention blocks of width h with H heads run inside each chunk, codes are added after the second, and the
    rows are pooled per head by softmax: ``sum_i softmax_i(<pool_query_a, x_i>) x_i``. See docs/method.md, Algebra of
    the fast code, for the folding.

    Args:
        values: ``(V,)`` float16, bfloat16, float32 or float64; all floating arguments share its dtype and device.
        chunk_ptr: ``(N+1,)`` int64, chunk n holds values ``chunk_ptr[n]:chunk_ptr[n+1]``.
        tensor_ptr: ``(T+1,)`` int64, tensor t holds chunks ``tensor_ptr[t]:tensor_ptr[t+1]``.
        row_code: ``(T, h)``, added to every element of the tensor.
        element_code: ``(c, h)``, row i added to element i of each chunk; c at least the longest chunk.
        logit: ``(2, H)``, rows a and c: block 0 attends by ``softmax_j((a x_i + c) x_j)``.
        basis: ``(3, h)``, coefficients in block 0 of x_i, of the attended mean of its head, and of 1.
        w_qkv, b_qkv: ``(3, 3h, h)``, ``(3, 3h)``, blocks 1 to 3, rows fc_q, fc_k, fc_v.
        w_o, b_o: ``(4, h, h)``, ``(4, h)``, fc_o of blocks 0 to 3.
        norm: ``(4, 4, h)``, per block ln0.weight, ln0.bias, ln1.weight, ln1.bias; ``(0, 4, h)`` for no layer norm.
        pool_query: ``(H, h)``, ``(fc_k^T q) / sqrt(h)`` of the pool, per head.
        chunk_ptr_host, tensor_ptr_host: CPU copies of the pointers.

    Returns:
        ``(N, H, h)`` in the dtype of ``values`` (of autocast, where it is on), before ``fc_v`` of the pool.

    Raises:
        TypeError: for inputs of the wrong type or dtype.
        ValueError: for inputs of the wrong shape, device or content.

    Example::

        >>> encoder = sne_fast.SNE(hidden_dim=32)
        >>> batch = encoder.pack([torch.nn.Linear(3, 2)])
        >>> row_code = torch.zeros(2, 32)  # of two tensors, each of one chunk
        >>> encoder.chunk_encoder.pooled_rows(batch, row_code).shape  # calls this function
        torch.Size([2, 4, 32])
    """
    values, *parameters = autocast(
        values, row_code, element_code, logit, basis, w_qkv, b_qkv, w_o, b_o, norm, pool_query
    )
    chunk_ptr_host, tensor_ptr_host = on_host(chunk_ptr, chunk_ptr_host), on_host(tensor_ptr, tensor_ptr_host)
    pointers = (chunk_ptr, tensor_ptr, chunk_ptr_host, tensor_ptr_host)
    if not torch.compiler.is_compiling():
        op = "chunk_encode"
        checks.chunk_encode(op, values, *pointers, **dict(zip(CHUNK_PARAMETERS, parameters, strict=True)))
        checks.pointer_content(op, "chunk_ptr", chunk_ptr, chunk_ptr_host, values.shape[0])
        checks.pointer_content(op, "tensor_ptr", tensor_ptr, tensor_ptr_host, chunk_ptr.shape[0] - 1)
        checks.chunk_lengths(op, chunk_ptr_host, element_code.shape[0])
    args = (values, *pointers, *parameters)
    pooled: Tensor
    if needs_composition("chunk_encode", (values, *parameters)):
        pooled = compositions.chunk_encode(*args)
    elif needs_grad((values, *parameters)):
        pooled = apply(ChunkEncode, *distinct(*args))
    else:
        pooled = OPS.chunk_encode(*args)
    return pooled


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
    """Attend inside each set: ``softmax(q_a k_a^T / sqrt(h)) v_a`` for each head a (sqrt(h), not sqrt(h/H)).

    See docs/method.md, Set blocks.

    Args:
        q: ``(rows_q, h)``, float16, bfloat16, float32 or float64.
        k, v: ``(rows_k, h)``, same dtype and device.
        q_ptr, k_ptr: ``(S+1,)`` int64; queries ``q_ptr[s]:q_ptr[s+1]`` attend to keys ``k_ptr[s]:k_ptr[s+1]``.
        num_heads: H, a divisor of h; head a owns columns ``a h/H`` to ``(a+1) h/H``.
        q_ptr_host, k_ptr_host: CPU copies of the pointers.

    Returns:
        ``(rows_q, h)`` in the dtype of q (of autocast, where it is on); 0 where a set has no keys.

    Raises:
        TypeError: for inputs of the wrong type or dtype.
        ValueError: for inputs of the wrong shape, device or content.

    Example::

        >>> ptr = torch.tensor([0, 2, 5])
        >>> x = torch.randn(5, 8)
        >>> sne_fast.functional.set_attention(x, x, x, ptr, ptr, num_heads=2).shape
        torch.Size([5, 8])
    """
    q, k, v = autocast(q, k, v)
    q_ptr_host, k_ptr_host = on_host(q_ptr, q_ptr_host), on_host(k_ptr, k_ptr_host)
    if not torch.compiler.is_compiling():
        op = "set_attention"
        checks.set_attention(op, q, k, v, q_ptr, k_ptr, q_ptr_host, k_ptr_host, num_heads)
        checks.pointer_content(op, "q_ptr", q_ptr, q_ptr_host, q.shape[0])
        if k_ptr is not q_ptr or k_ptr_host is not q_ptr_host or k.shape[0] != q.shape[0]:
            checks.pointer_content(op, "k_ptr", k_ptr, k_ptr_host, k.shape[0])
    args = (q, k, v, q_ptr, k_ptr, q_ptr_host, k_ptr_host, num_heads)
    out: Tensor
    if needs_composition("set_attention", (q, k, v)):
        return compositions.set_attention(*args)
    if needs_grad((q, k, v)):
        out, _ = apply(SetAttention, *distinct(*args))
    else:
        out, _ = OPS.set_attention(*args)
    return out


def segment_pool(x: Tensor, logits: Tensor, ptr: Tensor, *, ptr_host: Tensor | None = None) -> Tensor:
    """Pool the rows of each segment: ``sum_i softmax_i(logits[i, a]) x[i]`` for every query a.

    See docs/method.md, One seed pools before it projects.

    Args:
        x: ``(rows, h)`` float16, bfloat16, float32 or float64.
        logits: ``(rows, A)``, same dtype and device.
        ptr: ``(S+1,)`` int64, the rows of segment s are ``ptr[s]:ptr[s+1]``.
        ptr_host: CPU copy of ``ptr``.

    Returns:
        ``(S, A, h)`` in the dtype of x (of autocast, where it is on); 0 for an empty segment.

    Raises:
        TypeError: for inputs of the wrong type or dtype.
        ValueError: for inputs of the wrong shape, device or content.

    Example::

        >>> sne_fast.functional.segment_pool(torch.ones(3, 4), torch.zeros(3, 2), torch.tensor([0, 1, 3])).shape
        torch.Size([2, 2, 4])
    """
    x, logits = autocast(x, logits)
    ptr_host = on_host(ptr, ptr_host)
    if not torch.compiler.is_compiling():
        checks.segment_pool("segment_pool", x, logits, ptr, ptr_host)
        checks.pointer_content("segment_pool", "ptr", ptr, ptr_host, x.shape[0])
    args = (x, logits, ptr, ptr_host)
    out: Tensor
    if needs_composition("segment_pool", (x, logits)):
        return compositions.segment_pool(*args)
    if needs_grad((x, logits)):
        out, _ = apply(SegmentPool, *distinct(*args))
    else:
        out, _ = OPS.segment_pool(*args)
    return out


def feed_forward(q: Tensor, attended: Tensor, w_o: Tensor, b_o: Tensor, norm: Tensor) -> Tensor:
    """Compute the feed-forward half of an attention block, fused: residual add, norm, linear, ReLU, residual add, norm.

    ``ln1(o + relu(fc_o(o)))`` with ``o = ln0(q + attended)``, row by row; see docs/method.md, Set blocks.

    Args:
        q: ``(rows, h)`` float16, bfloat16, float32 or float64; all arguments share its dtype and device. One row
            expanded to all, as :class:`sne_fast.PMA` passes it, is read once (unless autocast has to cast it).
        attended: ``(rows, h)``.
        w_o, b_o: ``(h, h)``, ``(h,)``, fc_o.
        norm: ``(4, h)``, rows ln0.weight, ln0.bias, ln1.weight, ln1.bias; ``(0, h)`` for no layer norm.

    Returns:
        ``(rows, h)`` in the dtype of q (of autocast, where it is on).

    Raises:
        TypeError: for inputs of the wrong type or dtype.
        ValueError: for inputs of the wrong shape, device or content.

    Example::

        >>> mab = sne_fast.MAB(8, 8, 8, num_heads=2, layer_norm=True)
        >>> x = torch.randn(5, 8)
        >>> sne_fast.functional.feed_forward(x, x, mab.fc_o.weight, mab.fc_o.bias, mab.norm_parameters()).shape
        torch.Size([5, 8])
    """
    args = autocast(q, attended, w_o, b_o, norm)
    if not torch.compiler.is_compiling():
        checks.feed_forward("feed_forward", *args)
    out: Tensor
    if needs_composition("feed_forward", args):
        return compositions.feed_forward(*args)
    out = apply(FeedForward, *distinct(*args)) if needs_grad(args) else OPS.feed_forward(*args)
    return out


def fuses_feed_forward(q: Tensor) -> bool:
    """Return whether rows like ``q (..., h)`` should go through :func:`feed_forward`.

    Ordinary torch operations are better on a CPU, under a backend that has no kernels for it, and for the dtypes and
    widths that such kernels do not take; not for derivatives of forward-mode derivatives, where layer norm is wrong.
    """
    if needs_composition("feed_forward", (q,)):
        return True
    if not dispatch.fuses("feed_forward", q.device) or q.shape[-1] not in WIDTHS:
        return False
    return q.device.type != "cuda" or q.dtype != torch.float64


def tensor_statistics(
    values: Tensor, start: Tensor, scale: Tensor, dims: Tensor, *, start_host: Tensor | None = None
) -> Tensor:
    """Compute 23 statistics of every tensor of a batch, without gradients.

    See :func:`sne_fast.tensor_statistics`, which calls it on a batch, for what they are.

    Args:
        values: ``(V,)`` floating, tensors one after another, in the order of a batch.
        start: ``(T+1,)`` int64, the first value of each tensor, and the end.
        scale: ``(T,)`` float32 or float64: what the values of each tensor were divided by.
        dims: ``(T, 6)`` int64 on the CPU: out, in and kernel positions k of each tensor, fan-in and fan-out of its
            layer, and 1 where kernel positions are outermost in ``values``. A tensor of fewer than two dimensions has
            in = 0 and k = 1, and all its elements are outputs.
        start_host: a CPU copy of ``start``.

    Returns:
        ``(T, 23)`` float32, float64 if the values are; NaN for a tensor with values that are not finite. Where a matrix
        has more than 64 rows and columns, the cpu backend finds its spectral norm by Lanczos, to a relative error of
        1e-4 (usually 1e-6).

    Raises:
        TypeError: for inputs of the wrong type or dtype.
        ValueError: for inputs of the wrong shape, device or content.

    Example::

        >>> start, dims = torch.tensor([0, 6]), torch.tensor([[3, 2, 1, 2, 3, 0]])
        >>> sne_fast.functional.tensor_statistics(torch.randn(6), start, torch.ones(1), dims).shape
        torch.Size([1, 23])
    """
    start_host = on_host(start, start_host)
    if is_transformed((values, scale)):  # which take the result for a constant
        plain, scale = unwrapped((values, scale))
        if plain.dim() != values.dim():
            raise ValueError(
                "tensor_statistics: values must not be batched by torch.func.vmap, which cannot compute statistics; "
                "call sne_fast.tensor_statistics outside of it and give batches their results by "
                "batch.with_fields(values=..., statistics=...)"
            )
        values = plain
        with outside_transforms():
            return tensor_statistics(values, start, scale, dims, start_host=start_host)
    if not torch.compiler.is_compiling():
        checks.tensor_statistics("tensor_statistics", values, start, scale, dims, start_host)
        checks.pointer_content("tensor_statistics", "start", start, start_host, values.shape[0])
        checks.statistics_dims("tensor_statistics", dims, start_host)
    out: Tensor = OPS.tensor_statistics(values.detach(), start, scale.detach(), dims, start_host)
    return out

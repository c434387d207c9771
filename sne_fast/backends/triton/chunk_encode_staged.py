"""The staged ``chunk_encode``, for calls that a tile cannot hold: widths 128 and 256, chunks of more than 64 elements.

Slabs of whole chunks go through the stages with their rows packed: matrix products are torch's, attention and pooling
are the kernels of ``set_attention`` and ``segment_pool``. The workspace is bounded by the slab.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..gpu_plans.chunks import SLAB_ROWS_TIMES_WIDTH
from .chunk_encode_staged_kernels import element_sum_kernel, scalar_means_backward_kernel, scalar_means_kernel
from .launches import next_power_of_2, triton_dtype
from .pieces import sum_over_sets
from .segment_pool import segment_pool, segment_pool_backward
from .set_attention import set_attention, set_attention_backward
from .staged_rows import StagedRows, affine, feed_forward, feed_forward_backward, product

QUERIES, CHUNK_TILE, ELEMENT_PARTS = 32, 16, 8


@dataclass
class Slab:
    """Chunks ``first`` to ``last`` and their rows; ``ptr`` counts from the slab's first row."""

    first: int
    last: int
    start: int
    rows: int
    longest: int
    ptr: Tensor
    ptr_host: Tensor
    values: Tensor


@dataclass
class Staged(StagedRows):
    """One call of ``chunk_encode`` or its backward."""

    values: Tensor
    chunk_ptr: Tensor
    chunk_ptr_host: Tensor
    owner: Tensor

    @property
    def heads(self) -> int:
        """Number of heads H."""
        return self.weights["pool_query"].shape[0]

    def slabs(self) -> Iterator[Slab]:
        """Cut the chunks into slabs of a bounded number of rows; one chunk alone may exceed it."""
        ends = self.chunk_ptr_host.numpy()
        first, chunks = 0, len(ends) - 1
        while first < chunks:
            max_end = ends[first] + SLAB_ROWS_TIMES_WIDTH // self.width
            last = max(first + 1, int(np.searchsorted(ends, max_end, side="right")) - 1)
            start, rows = int(ends[first]), int(ends[last] - ends[first])
            longest = int(np.diff(ends[first : last + 1]).max())
            yield Slab(first, last, start, rows, longest, self.chunk_ptr[first : last + 1] - start,
                       self.chunk_ptr_host[first : last + 1] - start, self.values[start : start + rows])  # fmt: skip
            first = last

    def scalar_options(self, slab: Slab) -> dict[str, Any]:
        """Return constants and options of the kernels of block 0."""
        slots = max(16, next_power_of_2(slab.longest))
        return {"HEADS": self.heads, "SLOTS": slots, "QUERIES": min(QUERIES, slots), "ACC": triton_dtype(self.acc),
                "num_warps": 4 if slots > 32 else 1, "enable_fp_fusion": True}  # fmt: skip


def scalar_block(call: Staged, slab: Slab) -> tuple[Tensor, Tensor, Tensor]:
    """Compute block 0 up to its residual: the direct and the attended part of o, and the means (R, H)."""
    means = slab.values.new_empty((slab.rows, call.heads), dtype=call.acc)
    scalar_means_kernel[(slab.last - slab.first,)](
        slab.values, slab.ptr, call.weights["logit"], means, **call.scalar_options(slab)
    )
    basis = call.weights["basis"].to(call.acc)
    direct = torch.addcmul(basis[2], slab.values.to(call.acc)[:, None], basis[0])
    attended = (means[:, :, None] * basis[1].view(call.heads, -1)).flatten(1)
    return direct, attended, means


def attention(call: Staged, slab: Slab, x: Tensor, full: int) -> tuple[Tensor, ...]:
    """Compute q, k, v, the attended rows and their lse in one of the blocks 1 to 3."""
    w, b = call.weights["w_qkv"][full], call.weights["b_qkv"][full]
    q, k, v = (affine(x, *wb) for wb in zip(w.chunk(3), b.chunk(3), strict=True))
    return (q, k, v, *set_attention(q, k, v, slab.ptr, slab.ptr, slab.ptr_host, slab.ptr_host, call.heads))


def codes(call: Staged, slab: Slab) -> Tensor:
    """Compute the codes that are added to the rows after block 1, ``(R, h)``."""
    lengths = slab.ptr.diff()
    chunk = torch.arange(slab.last - slab.first, device=lengths.device)
    chunk = torch.repeat_interleave(chunk, lengths, output_size=slab.rows)
    element = torch.arange(slab.rows, device=lengths.device) - slab.ptr[chunk]
    row = call.weights["row_code"][call.owner[slab.first : slab.last][chunk]].to(call.acc)
    return row + call.weights["element_code"][element]


def forward_slab(call: Staged, slab: Slab) -> list[Tensor]:
    """Compute the inputs of blocks 1, 2, 3 and of the pool."""
    direct, attended, _ = scalar_block(call, slab)
    inputs = [feed_forward(call, direct, attended, 0)]
    for full in range(3):
        q, _, _, attended, _ = attention(call, slab, inputs[-1], full)
        x = feed_forward(call, q, attended, full + 1)
        inputs.append((x + codes(call, slab)).to(x.dtype) if full == 0 else x)
    return inputs


def pool(call: Staged, slab: Slab, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute logits, pooled rows and their lse."""
    logits = x @ call.weights["pool_query"].t()
    return (logits, *segment_pool(x, logits, slab.ptr, slab.ptr_host))


def staged_forward(call: Staged, out: Tensor) -> None:
    """Fill ``out (N, H, h)`` with the pooled rows of every chunk."""
    for slab in call.slabs():
        out[slab.first : slab.last] = pool(call, slab, forward_slab(call, slab)[-1])[1]


def _pool_backward(call: Staged, slab: Slab, x: Tensor, pooled_grad: Tensor) -> Tensor:
    logits, out, lse = pool(call, slab, x)
    x_grad, logits_grad = segment_pool_backward(pooled_grad, x, logits, out, lse, slab.ptr, slab.ptr_host)
    call.parts["pool_query"] += product(logits_grad.t(), x, call.acc)
    return x_grad.to(call.acc) + product(logits_grad, call.weights["pool_query"], call.acc)


def _block_backward(call: Staged, slab: Slab, x: Tensor, grad: Tensor, full: int) -> Tensor:
    q, k, v, attended, lse = attention(call, slab, x, full)
    feed_forward_backward(call, q, attended, grad, full + 1)
    ptrs = (slab.ptr, slab.ptr, slab.ptr_host, slab.ptr_host)
    dq, dk, dv = set_attention_backward(grad.to(x.dtype), q, k, v, attended, lse, *ptrs, call.heads)
    grads = ((grad + dq).to(x.dtype), dk, dv)
    w, total = call.weights["w_qkv"][full].chunk(3), None
    w_sum, b_sum = call.parts["w_qkv"][full].chunk(3), call.parts["b_qkv"][full].chunk(3)
    for part in range(3):
        w_sum[part].add_(product(grads[part].t(), x, call.acc))
        b_sum[part].add_(grads[part].sum(0, dtype=call.acc))
        by_part = product(grads[part], w[part], call.acc)
        total = by_part if total is None else total.add_(by_part)
    assert total is not None
    return total


def _scalar_backward(call: Staged, slab: Slab, grad: Tensor) -> Tensor:
    direct, attended, means = scalar_block(call, slab)
    feed_forward_backward(call, direct, attended, grad, 0)
    basis, x = call.weights["basis"].to(call.acc), slab.values.to(call.acc)
    call.parts["basis"][0] += x @ grad
    call.parts["basis"][1] += (grad.view(slab.rows, call.heads, -1) * means[:, :, None]).sum(0).flatten()
    call.parts["basis"][2] += grad.sum(0)
    values_grad = grad @ basis[0]
    means_grad = (grad * basis[1]).view(slab.rows, call.heads, -1).sum(-1)
    chunks = slab.last - slab.first
    scalar_means_backward_kernel[(min(chunks, call.parts["logit"].shape[0]),)](
        slab.values, slab.ptr, call.weights["logit"], means, means_grad, values_grad, call.parts["logit"], chunks,
        **call.scalar_options(slab),
    )  # fmt: skip
    return values_grad


def staged_backward(call: Staged, grad: Tensor, values_grad: Tensor, chunk_grad: Tensor) -> dict[str, Tensor]:
    """Fill ``values_grad (V,)`` and ``chunk_grad (N, h)`` (of the row codes); return the other gradients."""
    codes_count = call.weights["element_code"].shape[0]

    def zeros(*shape: int) -> Tensor:
        return values_grad.new_zeros(shape, dtype=call.acc)

    shapes = {name: tuple(t.shape) for name, t in call.weights.items() if name != "row_code"}
    summed = {"element_code": (0, ELEMENT_PARTS), "logit": (0, 4 * call.programs), "b_o": (1, call.programs),
              "norm": (1, call.programs)}  # fmt: skip
    for name, shape in shapes.items():
        if name in summed:
            axis, parts = summed[name]
            shape = (*shape[:axis], parts, *shape[axis:])
        call.parts[name] = zeros(*shape)
    for slab in call.slabs():
        inputs = forward_slab(call, slab)
        rows_grad = _pool_backward(call, slab, inputs[3], grad[slab.first : slab.last])
        for full in (2, 1, 0):
            rows_grad = _block_backward(call, slab, inputs[full], rows_grad, full)
            if full == 1:
                chunk_grad[slab.first : slab.last] = sum_over_sets(rows_grad, slab.ptr, slab.longest, call.acc)
                element_sum_kernel[(slab.longest, ELEMENT_PARTS)](
                    rows_grad, slab.ptr, call.parts["element_code"], slab.last - slab.first, codes_count,
                    TILE=CHUNK_TILE, WIDTH=call.width, ACC=triton_dtype(call.acc), num_warps=4, enable_fp_fusion=True,
                )  # fmt: skip
        values_grad[slab.start : slab.start + slab.rows] = _scalar_backward(call, slab, rows_grad)
    return {name: part.sum(summed[name][0]) if name in summed else part for name, part in call.parts.items()}

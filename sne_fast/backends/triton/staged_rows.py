"""Residual, norms and fc_o over packed rows in separate launches, for rows too wide for a tile.

The matrix products are torch's, the rest are the kernels of ``staged_rows_kernels``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from ...ops.schema import accumulate_dtype
from .launches import triton_dtype
from .staged_rows_kernels import add_normed_backward_kernel, add_normed_kernel

ROW_TILE = {32: 64, 64: 32, 128: 16, 256: 8}
"""Width -> rows of a tile of the row kernels."""


@dataclass
class StagedRows:
    """One call of a staged op.

    Attributes:
        weights: parameters by name; those of ``w_o``, ``b_o`` and ``norm`` by block.
        programs: number of programs that sum the gradients of ``b_o`` and ``norm``.
        parts: for a backward, sums of the parameters' gradients, of ``b_o`` and ``norm`` per program.
    """

    weights: dict[str, Tensor]
    programs: int
    parts: dict[str, Tensor]

    @property
    def acc(self) -> torch.dtype:
        """Dtype of softmax, norms and sums."""
        return accumulate_dtype(self.weights["w_o"].dtype)

    @property
    def width(self) -> int:
        """Width h."""
        return self.weights["w_o"].shape[2]

    def row_options(self) -> dict[str, Any]:
        """Return constants and options of the row kernels."""
        return {"LAYER_NORM": self.weights["norm"].shape[0] > 0, "ROWS": ROW_TILE[self.width], "WIDTH": self.width,
                "ACC": triton_dtype(self.acc), "num_warps": 4, "enable_fp_fusion": True}  # fmt: skip


def product(a: Tensor, b: Tensor, acc: torch.dtype) -> Tensor:
    """Compute a @ b, summed and returned in ``acc``."""
    if a.dtype == acc:
        return a @ b
    if a.device.type == "cuda":
        return torch.mm(a, b, out_dtype=acc)
    return a.to(acc) @ b.to(acc)


def affine(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """Compute x w^T + b."""
    return torch.addmm(b, x, w.t())


def _norm_rows(norm: Tensor, block: int, which: int) -> tuple[Tensor, Tensor]:
    """Return gain and bias of ln0 (which 0) or ln1 (1); any tensor where there is no layer norm."""
    return (norm[block, 2 * which], norm[block, 2 * which + 1]) if norm.shape[0] else (norm, norm)


def add_normed(call: StagedRows, a: Tensor, b: Tensor, block: int, which: int) -> Tensor:
    """Compute ln0(a + b) (which 0) or ln1(a + relu(b)) (1) of a block."""
    out = torch.empty_like(a, dtype=call.weights["w_o"].dtype)
    add_normed_kernel[(triton.cdiv(a.shape[0], ROW_TILE[call.width]),)](
        a, b, *_norm_rows(call.weights["norm"], block, which), out, a.shape[0], RELU=which == 1, **call.row_options()
    )
    return out


def add_normed_backward(
    call: StagedRows, a: Tensor, b: Tensor, grad: Tensor, relu_grad: Tensor, block: int, which: int
) -> None:
    """Turn ``grad`` of :func:`add_normed` into that of the sum, in place; fill ``relu_grad`` with b's (which 1)."""
    gain_part, bias_part = call.parts["norm"], call.parts["norm"]
    if call.weights["norm"].shape[0]:
        gain_part, bias_part = gain_part[block, :, 2 * which], bias_part[block, :, 2 * which + 1]
    tiles = triton.cdiv(a.shape[0], ROW_TILE[call.width])
    add_normed_backward_kernel[(min(tiles, call.programs),)](
        a, b, _norm_rows(call.weights["norm"], block, which)[0], grad, relu_grad, gain_part, bias_part,
        call.parts["b_o"][block], a.shape[0], tiles, RELU=which == 1, **call.row_options(),
    )  # fmt: skip


def feed_forward(call: StagedRows, a: Tensor, b: Tensor, block: int) -> Tensor:
    """Compute the feed-forward half of a block from the two summands of its residual."""
    o = add_normed(call, a, b, block, 0)
    return add_normed(call, o, affine(o, call.weights["w_o"][block], call.weights["b_o"][block]), block, 1)


def feed_forward_backward(call: StagedRows, a: Tensor, b: Tensor, grad: Tensor, block: int) -> None:
    """Turn ``grad (R, h)`` of :func:`feed_forward` into that of a + b, in place."""
    o = add_normed(call, a, b, block, 0)
    w_o = call.weights["w_o"][block]
    z, z_grad = affine(o, w_o, call.weights["b_o"][block]), torch.empty_like(o)
    add_normed_backward(call, o, z, grad, z_grad, block, 1)
    grad += product(z_grad, w_o, call.acc)
    call.parts["w_o"][block] += product(z_grad.t(), o, call.acc)
    if call.weights["norm"].shape[0]:
        add_normed_backward(call, a, b, grad, z_grad, block, 0)

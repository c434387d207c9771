"""``set_attention`` in Triton: sizes, allocation and launches."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from ...ops.backend import Arguments
from ...ops.precision import product_precision
from ...ops.schema import accumulate_dtype, named
from ...ops.supported_widths import width_reasons
from ..gpu_plans.lengths import Lengths
from . import set_attention_kernels as kernels
from .launches import Launch, architecture, launch, next_power_of_2, on_device, sum_dtype
from .pieces import piece_count, sum_pieces

# Sets with at most so many own rows and many inner rows have their inner rows split among programs.
FEW_ROWS = 64
MIN_BLOCK, MAX_BLOCK = 16, 128


def own_block(own: Lengths) -> int:
    """Return the length class of launches: 16, 32, 64 or 128 own rows per program."""
    return min(MAX_BLOCK, max(MIN_BLOCK, next_power_of_2(own.typical)))


@dataclass(frozen=True)
class Plan:
    """Launch of one kernel whose programs own rows of ``own`` and loop over rows of ``inner``."""

    sizes: Launch
    grid: tuple[int, ...]
    split: int
    pieces: int
    max_own_rows: int
    constants: dict[str, Any]

    @classmethod
    def make(
        cls, kernel: str, q: Tensor, own: Lengths, inner: Lengths, own_rows: int, inner_rows: int, heads: int,
        arch: int | None = None,
    ) -> Plan:  # fmt: skip
        """Choose the launch of ``kernel``; ``arch`` None asks for the device of q."""
        h, arch = q.shape[1], architecture(q.device) if arch is None else arch
        sizes = launch(
            "set_attention", kernel=kernel, h=h, heads=heads, length=own_block(own), dtype=q.dtype, arch=arch
        )  # fmt: skip
        block, split = sizes["BLOCK"], 0
        if own.longest <= FEW_ROWS and inner.longest >= 2 * sizes["SPLIT"]:
            split = sizes["SPLIT"]
        one_tile = own.longest <= block
        if split:
            pieces = piece_count(inner_rows, inner.sets, split)
        else:
            pieces = own.sets if one_tile else piece_count(own_rows, own.sets, block)
        tiles = triton.cdiv(own.longest, block) if split else 1
        constants = {
            "WIDTH": h, "HEADS": heads, "D": h // heads, "COLUMNS": max(16, h // heads), "SCALE": 1 / math.sqrt(h),
            "BLOCK": block, "INNER": MIN_BLOCK if inner.longest <= MIN_BLOCK else sizes["INNER"],
            "SPLIT": split, "ONE_TILE": one_tile, "ACC": sum_dtype(q.dtype), "PRECISION": product_precision(q.dtype),
        }  # fmt: skip
        return cls(sizes, (pieces * heads, tiles), split, pieces, own.longest, constants)

    def run(self, kernel: Any, *args: Any, **constants: Any) -> None:
        """Launch a kernel, unless there is nothing to do."""
        if min(self.grid):
            kernel[self.grid](*args, self.max_own_rows, **self.constants, **constants, **self.sizes.options)

    def result(self, final: Tensor, dtype: torch.dtype) -> Tensor:
        """Return ``final`` itself, or room for the partial results of the pieces."""
        shape = (self.pieces, self.max_own_rows, final.shape[1])
        return torch.empty(shape, dtype=dtype, device=final.device) if self.split else final


def set_attention(
    q: Tensor, k: Tensor, v: Tensor, q_ptr: Tensor, k_ptr: Tensor, q_ptr_host: Tensor, k_ptr_host: Tensor,
    num_heads: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Compute the op ``set_attention``, with arguments and results as in :mod:`sne_fast.ops.schema`."""
    q, k, v, q_ptr, k_ptr = (t.contiguous() for t in (q, k, v, q_ptr, k_ptr))
    acc = accumulate_dtype(q.dtype)
    out, lse = torch.empty_like(q), torch.empty((q.shape[0], num_heads), dtype=acc, device=q.device)
    queries, keys = Lengths.of_both(q_ptr_host, k_ptr_host)
    plan = Plan.make("forward", q, queries, keys, q.shape[0], k.shape[0], num_heads)
    with on_device(q):
        part, part_lse = plan.result(out, acc), plan.result(lse, acc)
        plan.run(kernels.forward_kernel, q, k, v, part, part_lse, q_ptr, k_ptr, queries.sets)
        if plan.split and queries.longest:
            rows, columns = 4, next_power_of_2(q.shape[1])
            kernels.combine_kernel[(queries.sets, triton.cdiv(queries.longest, rows))](
                part, part_lse, out, lse, q_ptr, k_ptr, plan.max_own_rows,
                WIDTH=q.shape[1], HEADS=num_heads, D=q.shape[1] // num_heads, COLUMNS=columns, ROWS=rows,
                SPLIT=plan.split, ACC=plan.constants["ACC"], num_warps=4, enable_fp_fusion=True,
            )  # fmt: skip
    return out, lse


def _query_grads(
    plan: Plan, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, q_ptr: Tensor, k_ptr: Tensor,
    sets: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the gradient of q and, per row, the mean of its weights' gradients."""
    grad_q, mean = torch.empty_like(q), torch.empty_like(lse)
    # Where ``out`` is as exact as the products, <grad, out> is that mean at no cost.
    mode = "out" if q.dtype == accumulate_dtype(q.dtype) and plan.constants["PRECISION"] == "ieee" else "keys"
    if plan.split:
        mode, part_mean = "read", plan.result(mean, lse.dtype)
        plan.run(kernels.mean_kernel, grad, q, k, v, lse, part_mean, q_ptr, k_ptr, sets)
        sum_pieces(part_mean, mean, k_ptr, q_ptr, plan.split)
    part = plan.result(grad_q, lse.dtype)
    plan.run(kernels.query_grad_kernel, grad, q, k, v, out, lse, mean, part, q_ptr, k_ptr, sets, MEAN=mode)
    if plan.split:
        sum_pieces(part, grad_q, k_ptr, q_ptr, plan.split)
    return grad_q, mean


def set_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, q_ptr: Tensor, k_ptr: Tensor,
    q_ptr_host: Tensor, k_ptr_host: Tensor, num_heads: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Compute the op ``set_attention_backward``, with arguments and results as in :mod:`sne_fast.ops.schema`."""
    grad, q, k, v, out, lse, q_ptr, k_ptr = (t.contiguous() for t in (grad, q, k, v, out, lse, q_ptr, k_ptr))
    queries, keys = Lengths.of_both(q_ptr_host, k_ptr_host)
    grad_k, grad_v = torch.empty_like(k), torch.empty_like(v)
    with on_device(q):
        plan = Plan.make("query_grad", q, queries, keys, q.shape[0], k.shape[0], num_heads)
        grad_q, mean = _query_grads(plan, grad, q, k, v, out, lse, q_ptr, k_ptr, queries.sets)
        plan = Plan.make("key_grad", q, keys, queries, k.shape[0], q.shape[0], num_heads)
        part_k, part_v = plan.result(grad_k, lse.dtype), plan.result(grad_v, lse.dtype)
        plan.run(kernels.key_grad_kernel, grad, q, k, v, lse, mean, part_k, part_v, q_ptr, k_ptr, keys.sets)
        if plan.split:
            sum_pieces(part_k, grad_k, q_ptr, k_ptr, plan.split)
            sum_pieces(part_v, grad_v, q_ptr, k_ptr, plan.split)
    return grad_q, grad_k, grad_v


def why_not(op: str, args: Arguments) -> list[str]:
    """Return why these kernels cannot run a call; empty if they can."""
    given = named(op, args)
    return width_reasons(given["q"].shape[1], given["num_heads"])

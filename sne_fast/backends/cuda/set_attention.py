"""Ragged attention between packed sets (SPEC 2): sizes, workspaces and launches of csrc/cuda/set_attention_*.cu."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...ops.supported_widths import width_reasons
from ..gpu_plans.lengths import Lengths
from . import library

ROWS_OF_WARP = 16
MOST_WARPS = 4
# Inner rows of a piece where sets have few own rows: no more than this, and fewer to give every multiprocessor work.
LONGEST_SPLIT, SHORTEST_SPLIT = 1024, 256
WARPS_OF_MULTIPROCESSOR = 8


@dataclass(frozen=True)
class Plan:
    """What the warps of one kernel own, rows of ``own``, and loop over, rows of ``inner``."""

    warps: int
    single: bool
    split: int
    pieces: int
    pages: int
    most: int

    @classmethod
    def make(
        cls, own: Lengths, inner: Lengths, own_rows: int, inner_rows: int, heads: int, multiprocessors: int
    ) -> Plan:
        split = LONGEST_SPLIT
        while split > SHORTEST_SPLIT and inner_rows * heads < split * WARPS_OF_MULTIPROCESSOR * multiprocessors:
            split //= 2
        if own.longest > MOST_WARPS * ROWS_OF_WARP or inner.longest < 2 * split:
            split = 0
        warps = 1
        while warps < MOST_WARPS and warps * ROWS_OF_WARP < (own.longest if split else own.typical):
            warps *= 2
        block = warps * ROWS_OF_WARP
        single = not split and own.longest <= block
        pieces = own.sets if single else (inner_rows // split if split else own_rows // block) + own.sets
        return cls(warps, single, split, pieces, inner_rows // split if split else 0, own.longest)

    def partial(self, like: Tensor, columns: int) -> Tensor:
        """Room for partial results: ``(2 (pages + 1), most, columns)``."""
        shape = (2 * (self.pages + 1), self.most, columns)
        return torch.empty(shape, dtype=torch.float32, device=like.device)


def _aligned(t: Tensor) -> Tensor:
    """``t`` contiguous, its start a multiple of 16 bytes."""
    t = t.contiguous()
    return t.clone() if t.data_ptr() % 16 else t


def _run(name: str, plan: Plan, q: Tensor, q_ptr: Tensor, num_heads: int, **tensors: Tensor) -> None:
    args = library.SetAttention(
        sets=q_ptr.shape[0] - 1, width=q.shape[1], heads=num_heads, precision=library.precision(q.dtype),
        warps=plan.warps, one_tile_per_set=plan.single, split_rows=plan.split, pieces=plan.pieces,
        aligned_splits=plan.pages, max_own_rows=plan.most,
        q=q.data_ptr(), q_ptr=q_ptr.data_ptr(), **{field: t.data_ptr() for field, t in tensors.items()},
    )  # fmt: skip
    library.run(name, q.device, ctypes.byref(args))


def set_attention(
    q: Tensor, k: Tensor, v: Tensor, q_ptr: Tensor, k_ptr: Tensor, q_ptr_host: Tensor, k_ptr_host: Tensor,
    num_heads: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """q ``(queries, h)``, k and v ``(keys, h)`` -> out ``(queries, h)``, lse ``(queries, H)`` in float32."""
    q, k, v, q_ptr, k_ptr = (_aligned(t) for t in (q, k, v, q_ptr, k_ptr))
    out = torch.empty_like(q)
    lse = torch.empty((q.shape[0], num_heads), dtype=torch.float32, device=q.device)
    queries, keys = Lengths.of_both(q_ptr_host, k_ptr_host)
    plan = Plan.make(
        queries, keys, q.shape[0], k.shape[0], num_heads, library.multiprocessors(q.device)
    )  # fmt: skip
    work = {}
    if plan.split:
        work = {"partial": plan.partial(lse, q.shape[1]), "partial_rows": plan.partial(lse, num_heads)}
    _run("set_attention", plan, q, q_ptr, num_heads, k=k, v=v, k_ptr=k_ptr, out=out, lse=lse, **work)
    return out, lse


def set_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, q_ptr: Tensor, k_ptr: Tensor,
    q_ptr_host: Tensor, k_ptr_host: Tensor, num_heads: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v, in their shapes and dtype."""
    grad, q, k, v, out, lse, q_ptr, k_ptr = (_aligned(t) for t in (grad, q, k, v, out, lse, q_ptr, k_ptr))
    grad_q, grad_k, grad_v, mean = (torch.empty_like(t) for t in (q, k, v, lse))
    queries, keys = Lengths.of_both(q_ptr_host, k_ptr_host)
    multiprocessors = library.multiprocessors(q.device)
    inputs = {"k": k, "v": v, "k_ptr": k_ptr, "lse": lse, "grad": grad, "mean": mean}

    plan = Plan.make(queries, keys, q.shape[0], k.shape[0], num_heads, multiprocessors)
    work = {}
    if plan.split:
        work["partial"] = plan.partial(lse, q.shape[1])
        if library.precision(q.dtype):  # what float32 products do not need
            work |= {"partial_second": plan.partial(lse, q.shape[1]), "partial_rows": plan.partial(lse, num_heads)}
    _run("set_attention_query_grad", plan, q, q_ptr, num_heads, **inputs, out=out, grad_q=grad_q, **work)

    plan = Plan.make(keys, queries, k.shape[0], q.shape[0], num_heads, multiprocessors)
    work = {}
    if plan.split:
        work = {"partial": plan.partial(lse, q.shape[1]), "partial_second": plan.partial(lse, q.shape[1])}
    _run("set_attention_key_grad", plan, q, q_ptr, num_heads, **inputs, grad_k=grad_k, grad_v=grad_v, **work)
    return grad_q, grad_k, grad_v


def why_not(op: str, args: tuple[Any, ...]) -> list[str]:
    """Why this backend cannot take the call; empty if it can."""
    q, heads = args[1 if op.endswith("_backward") else 0], args[-1]
    return width_reasons(q.shape[1], heads)

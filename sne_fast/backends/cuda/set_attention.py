"""``set_attention`` on the CUDA backend: division of the work, workspaces, launches of csrc/cuda/set_attention."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from ...ops.backend import Arguments
from ...ops.schema import named
from ...ops.supported_widths import width_reasons
from ..gpu_plans.lengths import Lengths
from . import library

ROWS_PER_WARP = 16
MAX_WARPS = 4
# Inner rows of a split, where sets have few own rows: at most the first, fewer to give every multiprocessor work.
MAX_SPLIT, MIN_SPLIT = 1024, 256
WARPS_PER_MULTIPROCESSOR = 8


@dataclass(frozen=True)
class Plan:
    """Division of one kernel's work: warps own rows of ``own`` (queries, say) and loop over rows of ``inner`` (keys).

    Attributes:
        warps: of a block, which together own a tile of ``16 warps`` rows.
        one_tile_per_set: whether every set's own rows fit one tile.
        split_rows: inner rows of a split where sets have few own rows; 0 for no splits.
        pieces: work items, tiles or splits.
        aligned_splits: full splits of all inner rows.
        max_own_rows: own rows of the largest set.
    """

    warps: int
    one_tile_per_set: bool
    split_rows: int
    pieces: int
    aligned_splits: int
    max_own_rows: int

    @classmethod
    def make(
        cls, own: Lengths, inner: Lengths, own_rows: int, inner_rows: int, heads: int, multiprocessors: int
    ) -> Plan:
        """Divide the work of a kernel on a GPU of so many multiprocessors."""
        split = MAX_SPLIT
        while split > MIN_SPLIT and inner_rows * heads < split * WARPS_PER_MULTIPROCESSOR * multiprocessors:
            split //= 2
        if own.longest > MAX_WARPS * ROWS_PER_WARP or inner.longest < 2 * split:
            split = 0
        warps = 1
        while warps < MAX_WARPS and warps * ROWS_PER_WARP < (own.longest if split else own.typical):
            warps *= 2
        tile = warps * ROWS_PER_WARP
        one_tile = not split and own.longest <= tile
        pieces = own.sets if one_tile else (inner_rows // split if split else own_rows // tile) + own.sets
        return cls(warps, one_tile, split, pieces, inner_rows // split if split else 0, own.longest)

    def partial(self, like: Tensor, columns: int) -> Tensor:
        """Allocate partial results, ``(2 (aligned_splits + 1), max_own_rows, columns)``."""
        shape = (2 * (self.aligned_splits + 1), self.max_own_rows, columns)
        return torch.empty(shape, dtype=torch.float32, device=like.device)


def _run(name: str, plan: Plan, q: Tensor, q_ptr: Tensor, num_heads: int, **tensors: Tensor) -> None:
    args = library.SetAttention(
        sets=q_ptr.shape[0] - 1, width=q.shape[1], heads=num_heads, precision=library.precision(q.dtype),
        warps=plan.warps, one_tile_per_set=plan.one_tile_per_set, split_rows=plan.split_rows, pieces=plan.pieces,
        aligned_splits=plan.aligned_splits, max_own_rows=plan.max_own_rows,
        q=q.data_ptr(), q_ptr=q_ptr.data_ptr(), **{field: t.data_ptr() for field, t in tensors.items()},
    )  # fmt: skip
    library.run(name, q.device, ctypes.byref(args))


def set_attention(
    q: Tensor, k: Tensor, v: Tensor, q_ptr: Tensor, k_ptr: Tensor, q_ptr_host: Tensor, k_ptr_host: Tensor,
    num_heads: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Compute the op ``set_attention``, with arguments and results as in :mod:`sne_fast.ops.schema`; lse is float32."""
    q, k, v, q_ptr, k_ptr = (library.aligned(t) for t in (q, k, v, q_ptr, k_ptr))
    out = torch.empty_like(q)
    lse = torch.empty((q.shape[0], num_heads), dtype=torch.float32, device=q.device)
    queries, keys = Lengths.of_both(q_ptr_host, k_ptr_host)
    plan = Plan.make(
        queries, keys, q.shape[0], k.shape[0], num_heads, library.multiprocessors(q.device)
    )  # fmt: skip
    work = {}
    if plan.split_rows:
        work = {"partial": plan.partial(lse, q.shape[1]), "partial_rows": plan.partial(lse, num_heads)}
    _run("set_attention", plan, q, q_ptr, num_heads, k=k, v=v, k_ptr=k_ptr, out=out, lse=lse, **work)
    return out, lse


def set_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, q_ptr: Tensor, k_ptr: Tensor,
    q_ptr_host: Tensor, k_ptr_host: Tensor, num_heads: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Compute the op ``set_attention_backward``, with arguments and results as in :mod:`sne_fast.ops.schema`."""
    grad, q, k, v, out, lse, q_ptr, k_ptr = (library.aligned(t) for t in (grad, q, k, v, out, lse, q_ptr, k_ptr))
    grad_q, grad_k, grad_v, mean = (torch.empty_like(t) for t in (q, k, v, lse))
    queries, keys = Lengths.of_both(q_ptr_host, k_ptr_host)
    multiprocessors = library.multiprocessors(q.device)
    inputs = {"k": k, "v": v, "k_ptr": k_ptr, "lse": lse, "grad": grad, "mean": mean}

    plan = Plan.make(queries, keys, q.shape[0], k.shape[0], num_heads, multiprocessors)
    work = {}
    if plan.split_rows:
        work["partial"] = plan.partial(lse, q.shape[1])
        if library.precision(q.dtype):  # float32 products do not need them
            work |= {"partial_second": plan.partial(lse, q.shape[1]), "partial_rows": plan.partial(lse, num_heads)}
    _run("set_attention_query_grad", plan, q, q_ptr, num_heads, **inputs, out=out, grad_q=grad_q, **work)

    plan = Plan.make(keys, queries, k.shape[0], q.shape[0], num_heads, multiprocessors)
    work = {}
    if plan.split_rows:
        work = {"partial": plan.partial(lse, q.shape[1]), "partial_second": plan.partial(lse, q.shape[1])}
    _run("set_attention_key_grad", plan, q, q_ptr, num_heads, **inputs, grad_k=grad_k, grad_v=grad_v, **work)
    return grad_q, grad_k, grad_v


def why_not(op: str, args: Arguments) -> list[str]:
    """Return why these kernels cannot run a call; empty if they can."""
    given = named(op, args)
    return width_reasons(given["q"].shape[1], given["num_heads"])

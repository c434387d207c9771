"""``segment_pool`` in Triton: sizes, allocation and launches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from ...ops.backend import Arguments
from ...ops.schema import accumulate_dtype, named
from ...ops.supported_widths import pool_width_reasons
from ..gpu_plans.lengths import Lengths
from . import segment_pool_kernels as kernels
from .launches import Launch, architecture, launch, next_power_of_2, on_device, sum_dtype
from .pieces import piece_count, sum_pieces

# Programs that a launch on long segments should have: several for each multiprocessor of the largest GPUs.
PROGRAMS = 1024
MIN_SPLIT, MAX_SPLIT = 128, 4096


@dataclass(frozen=True)
class Plan:
    """Launch of one kernel."""

    sizes: Launch
    programs: int
    pieces: int  # that write partial results, 0 for none
    constants: dict[str, Any]

    @classmethod
    def make(
        cls, kernel: str, x: Tensor, queries: int, lengths: Lengths, arch: int | None = None, rows: int | None = None
    ) -> Plan:
        """Choose sizes for segments of ``lengths``; a program holds about ELEMENTS sums in its registers."""
        rows, h = x.shape if rows is None else (rows, x.shape[1])
        sets, longest = lengths.sets, lengths.longest
        sizes = launch(
            "segment_pool", kernel=kernel, h=h, heads=queries, dtype=x.dtype,
            arch=architecture(x.device) if arch is None else arch,
        )  # fmt: skip
        elements, columns = sizes["ELEMENTS"], next_power_of_2(h)
        if kernel == "forward":
            columns = min(columns, 256)
        a_block = min(next_power_of_2(queries), max(1, elements // columns))
        lanes = max(1, min(32, elements // (a_block * columns)))
        one = longest > sizes["SHORT"]
        split = min(MAX_SPLIT, max(MIN_SPLIT, next_power_of_2(rows // PROGRAMS)))
        split = split if one and longest >= 2 * split else 0
        pieces = piece_count(rows, sets, split) if split else 0
        programs = pieces if split else sets if one else triton.cdiv(sets, lanes)
        constants = {
            "WIDTH": h, "A": queries, "COLUMNS": columns, "A_BLOCK": a_block, "LANES": lanes, "ONE": one,
            "SPLIT": split, "STAGES": sizes.num_stages, "ACC": sum_dtype(x.dtype),
        }  # fmt: skip
        return cls(sizes, programs, pieces, constants)

    def chosen(self, *names: str) -> dict[str, Any]:
        """Return some of the constants, and the options of the launch."""
        return {**{name: self.constants[name] for name in names}, **self.sizes.options}


def segment_pool(x: Tensor, logits: Tensor, ptr: Tensor, ptr_host: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the op ``segment_pool``, with arguments and results as in :mod:`sne_fast.ops.schema`."""
    x, logits, ptr = (t.contiguous() for t in (x, logits, ptr))
    (_, h), queries, sets, acc = x.shape, logits.shape[1], ptr.shape[0] - 1, accumulate_dtype(x.dtype)
    out = torch.empty((sets, queries, h), dtype=x.dtype, device=x.device)
    lse = torch.empty((sets, queries), dtype=acc, device=x.device)
    if not out.numel():
        return out, lse
    plan = Plan.make("forward", x, queries, Lengths.of(ptr_host))
    part, part_lse = out, lse
    if plan.pieces:
        part = torch.empty((plan.pieces, queries, h), dtype=acc, device=x.device)
        part_lse = torch.empty((plan.pieces, queries), dtype=acc, device=x.device)
    constants = plan.constants
    grid = (plan.programs, triton.cdiv(queries, constants["A_BLOCK"]), triton.cdiv(h, constants["COLUMNS"]))
    with on_device(x):
        kernels.forward_kernel[grid](
            x, logits, out, lse, part, part_lse, ptr, sets, **constants, **plan.sizes.options
        )  # fmt: skip
        if plan.pieces:
            columns = min(1024, next_power_of_2(queries * h))
            kernels.combine_kernel[(sets, triton.cdiv(queries * h, columns))](
                part, part_lse, out, lse, ptr,
                WIDTH=h, A=queries, COLUMNS=columns, SPLIT=constants["SPLIT"], ACC=constants["ACC"],
                num_warps=4, enable_fp_fusion=True,
            )  # fmt: skip
    return out, lse


def segment_pool_backward(
    grad: Tensor, x: Tensor, logits: Tensor, out: Tensor, lse: Tensor, ptr: Tensor, ptr_host: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute the op ``segment_pool_backward``, with arguments and results as in :mod:`sne_fast.ops.schema`."""
    grad, x, logits, lse, ptr = (t.contiguous() for t in (grad, x, logits, lse, ptr))
    queries, sets, acc = logits.shape[1], ptr.shape[0] - 1, accumulate_dtype(x.dtype)
    grad_logits = torch.empty_like(logits)
    if not x.numel() or not queries or not sets:
        return torch.zeros_like(x), grad_logits
    plan = Plan.make("backward", x, queries, Lengths.of(ptr_host))
    constants, a_block = plan.constants, plan.constants["A_BLOCK"]
    passes = range(0, queries, a_block)
    grad_x = torch.empty_like(x, dtype=x.dtype if len(passes) == 1 else acc)
    weights_grad = torch.empty_like(logits, dtype=acc)
    mean = torch.empty_like(lse)
    part = torch.empty((plan.pieces, 1, queries), dtype=acc, device=x.device) if plan.pieces else mean
    with on_device(x):
        for first in passes:
            kernels.backward_kernel[(plan.programs,)](
                grad, x, logits, lse, grad_x, weights_grad, part, ptr, sets, first,
                ADD=first > 0, **constants, **plan.sizes.options,
            )  # fmt: skip
        if plan.pieces:
            sum_pieces(part, mean, ptr, None, constants["SPLIT"])
        kernels.logits_grad_kernel[(plan.programs, len(passes))](
            logits, lse, weights_grad, mean, grad_logits, ptr, sets,
            **plan.chosen("A", "A_BLOCK", "LANES", "ONE", "SPLIT", "ACC"),
        )  # fmt: skip
    return grad_x.to(x.dtype), grad_logits


def why_not(op: str, args: Arguments) -> list[str]:
    """Return why these kernels cannot run a call; empty if they can."""
    return pool_width_reasons(named(op, args)["x"].shape[1])

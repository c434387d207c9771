"""``feed_forward`` in Triton: residual, ln0, fc_o, ReLU and ln1 in one kernel, or staged.

A launch table that gives ROWS 0 asks for the staged form: the row kernels of ``staged_rows`` and torch's products.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...ops.backend import Arguments
from ...ops.precision import product_precision
from ...ops.schema import accumulate_dtype, argument_names, named
from ...ops.supported_widths import width_reasons
from . import feed_forward_kernels as kernels
from . import staged_rows as staged
from .launches import Launch, architecture, launch, on_device, programs_of, sum_dtype
from .partial_sums import Part, PartialSums


def precision_class(dtype: torch.dtype, precision: str) -> str:
    """Return the length class of launches: "ieee" where products of float32 keep full precision, else ""."""
    return "ieee" if dtype == torch.float32 and precision == "ieee" else ""


@dataclass(frozen=True)
class Plan:
    """Launch of one kernel; ``programs`` per multiprocessor share out the tiles."""

    sizes: Launch
    constants: dict[str, Any]

    @classmethod
    def make(cls, kernel: str, attended: Tensor, layer_norm: bool, one_query: bool, arch: int | None = None) -> Plan:
        """Look up the sizes of ``kernel`` for rows like ``attended``; ``arch`` None asks for its device."""
        dtype, h = attended.dtype, attended.shape[1]
        precision = product_precision(dtype)
        sizes = launch(
            "feed_forward", kernel=kernel, h=h, length=precision_class(dtype, precision), dtype=dtype,
            arch=architecture(attended.device) if arch is None else arch,
        )  # fmt: skip
        constants = {
            "ONE_QUERY": one_query, "LAYER_NORM": layer_norm, "ROWS": sizes["ROWS"], "WIDTH": h,
            "PRECISION": precision, "ACC": sum_dtype(dtype), "STAGES": sizes.num_stages,
        }  # fmt: skip
        if kernel == "forward":
            constants["INNER"] = sizes["INNER"]
        return cls(sizes, constants)

    @property
    def is_staged(self) -> bool:
        """True if the launch table asks for the staged form."""
        return self.sizes["ROWS"] == 0

    def tiles(self, rows: int) -> int:
        """Return the number of tiles of so many rows."""
        return -(-rows // self.sizes["ROWS"])

    def programs(self, attended: Tensor) -> int:
        """Return the number of programs of a launch."""
        return min(self.tiles(attended.shape[0]), self.sizes["PROGRAMS"] * programs_of(attended.device))


def _ready(q: Tensor, *others: Tensor) -> tuple[Tensor, list[Tensor], bool]:
    """Return contiguous tensors, a query that is one row expanded to many as that row, and whether it is."""
    one_query = q.shape[0] > 1 and q.stride(0) == 0
    return (q[0] if one_query else q).contiguous(), [t.contiguous() for t in others], one_query


def _staged_rows(attended: Tensor, parameters: Sequence[Tensor], backward: bool) -> staged.StagedRows:
    """Return a call of the staged form; with ``backward``, with room for the sums of gradients."""
    names = argument_names("feed_forward")[2:]
    weights = {name: t[None] if t.shape[0] else t for name, t in zip(names, parameters, strict=True)}
    (_, h, _), programs = weights["w_o"].shape, programs_of(attended.device)
    acc = accumulate_dtype(attended.dtype)
    shapes = {"w_o": (1, h, h), "b_o": (1, programs, h), "norm": (1, programs, 4, h)}
    parts = {name: attended.new_zeros(shape, dtype=acc) for name, shape in shapes.items()} if backward else {}
    return staged.StagedRows(weights, programs, parts)


def feed_forward(q: Tensor, attended: Tensor, w_o: Tensor, b_o: Tensor, norm: Tensor) -> Tensor:
    """Compute the op ``feed_forward``, with arguments and results as in :mod:`sne_fast.ops.schema`."""
    q, (attended, *parameters), one_query = _ready(q, attended, w_o, b_o, norm)
    rows, out = attended.shape[0], torch.empty_like(attended)
    if not rows:
        return out
    plan = Plan.make("forward", attended, norm.shape[0] > 0, one_query)
    with on_device(attended):
        if plan.is_staged:
            call = _staged_rows(attended, parameters, backward=False)
            return staged.feed_forward(call, q.expand_as(attended).contiguous(), attended, 0)
        kernels.forward_kernel[(plan.programs(attended),)](
            q, attended, *parameters, out, rows, plan.tiles(rows), **plan.constants, **plan.sizes.options
        )
    return out


def feed_forward_backward(
    grad: Tensor, q: Tensor, attended: Tensor, w_o: Tensor, b_o: Tensor, norm: Tensor
) -> tuple[Tensor, ...]:
    """Run the op ``feed_forward_backward``: return the gradients of q + attended, w_o, b_o and norm."""
    q, (grad, attended, *parameters), one_query = _ready(q, grad, attended, w_o, b_o, norm)
    (rows, h), layer_norm, acc = attended.shape, norm.shape[0] > 0, accumulate_dtype(attended.dtype)
    sum_grad = torch.empty_like(attended)
    if not rows:
        return (sum_grad, *(torch.zeros_like(t) for t in parameters))
    plan = Plan.make("backward", attended, layer_norm, one_query)
    with on_device(attended):
        if plan.is_staged:
            call, rows_grad = _staged_rows(attended, parameters, backward=True), grad.to(acc, copy=True)
            staged.feed_forward_backward(call, q.expand_as(attended).contiguous(), attended, rows_grad, 0)
            sum_grad, w_grad = rows_grad.to(attended.dtype), call.parts["w_o"][0]
            b_part, norm_part = call.parts["b_o"][0], call.parts["norm"][0]
        else:
            programs = plan.programs(attended)
            shapes = zip(("w_o", "b_o", "norm"), parameters, strict=True)
            sums = PartialSums.make(((name, Part(tuple(t.shape), programs)) for name, t in shapes), attended, False)
            kernels.backward_kernel[(programs,)](
                grad, q, attended, *parameters, sum_grad, *sums.parts.values(), rows, plan.tiles(rows),
                **plan.constants, **plan.sizes.options,
            )  # fmt: skip
            return sum_grad, *sums.summed(attended.dtype).values()
        norm_grad = norm_part.sum(0) if layer_norm else norm_part.new_zeros((0, h))
        return sum_grad, *(t.to(attended.dtype) for t in (w_grad, b_part.sum(0), norm_grad))


def why_not(op: str, args: Arguments) -> list[str]:
    """Return why these kernels cannot run a call; empty if they can."""
    return width_reasons(named(op, args)["q"].shape[1])

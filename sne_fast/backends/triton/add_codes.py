"""``add_codes`` in Triton: one launch, and two backward."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from ...ops.backend import Arguments
from ...ops.pointer_facts import owners, places
from ...ops.schema import accumulate_dtype, named
from ...ops.supported_widths import width_reasons
from . import add_codes_kernels as kernels
from .launches import Launch, architecture, launch, on_device, programs_of, triton_dtype
from .partial_sums import Part, PartialSums


def _sizes(kernel: str, x: Tensor) -> Launch:
    return launch("add_codes", kernel=kernel, h=x.shape[1], dtype=x.dtype, arch=architecture(x.device))


def _call(ptr: Tensor, rows: int, codes: tuple[Tensor, ...], sizes: Launch) -> tuple[list[Tensor], dict[str, Any]]:
    """Return what both kernels read besides rows, and their constants and options."""
    level, table, scale, magnitude, gain = (t.contiguous() for t in codes)
    by_set, with_table = ptr.shape[0] > 0, table.shape[0] > 0
    owner = owners(ptr, rows) if by_set else ptr
    place = places(ptr, rows) if by_set and with_table else ptr
    constants = {
        "BY_SET": by_set, "WITH_TABLE": with_table, "WITH_SCALE": scale.shape[0] > 0, "ROWS": sizes["ROWS"],
        "WIDTH": level.shape[1], "ACC": triton_dtype(accumulate_dtype(level.dtype)), **sizes.options,
    }  # fmt: skip
    return [owner, place, level, table, scale, magnitude, gain], constants


def add_codes(x: Tensor, ptr: Tensor, ptr_host: Tensor, *codes: Tensor) -> Tensor:
    """Compute the op ``add_codes``, with arguments and results as in :mod:`sne_fast.ops.schema`."""
    x, rows = x.contiguous(), x.shape[0]
    out = torch.empty_like(x)
    if rows:
        with on_device(x):
            sizes = _sizes("forward", x)
            read, options = _call(ptr, rows, codes, sizes)
            kernels.forward_kernel[(triton.cdiv(rows, sizes["ROWS"]),)](x, *read, out, rows, **options)
    return out


def add_codes_backward(grad: Tensor, ptr: Tensor, ptr_host: Tensor, *codes: Tensor) -> tuple[Tensor, ...]:
    """Compute the op ``add_codes_backward``, with arguments and results as in :mod:`sne_fast.ops.schema`."""
    grad, rows, magnitude, gain = grad.contiguous(), grad.shape[0], *codes[3:]
    if not rows:
        return torch.zeros_like(magnitude), torch.zeros_like(gain)
    with on_device(grad):
        sizes = _sizes("backward", grad)
        read, options = _call(ptr, rows, codes, sizes)
        tiles = triton.cdiv(rows, sizes["ROWS"])
        programs = min(tiles, sizes["PROGRAMS"] * programs_of(grad.device))
        layout = (("magnitude", Part(tuple(magnitude.shape), programs)), ("gain", Part((), programs)))
        sums = PartialSums.make(layout, gain, zeros=False)
        kernels.backward_kernel[(programs,)](grad, *read, *sums.parts.values(), rows, tiles, **options)
        return tuple(sums.summed(gain.dtype).values())


def why_not(op: str, args: Arguments) -> list[str]:
    """Return why these kernels cannot run a call; empty if they can."""
    return width_reasons(named(op, args)["level"].shape[1])

"""Launches of kernels that compute whole blocks: ``set_block`` and ``pool_block``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from ...ops.precision import product_precision
from ..gpu_plans.lengths import Lengths
from .feed_forward import precision_class
from .launches import Launch, architecture, launch, next_power_of_2, programs_of, sum_dtype

SHORTEST, LONGEST = 8, 128

_Plan = TypeVar("_Plan", bound="BlockPlan")


def length_class(lengths: Lengths | None, dtype: torch.dtype) -> str:
    """Return the name of lengths in launch tables: "8", "16", "32", "64" or "128", and "pooled" for None.

    The power of two is the next one to the mean length of sets, weighted by rows. "ieee" stands before it where
    products of float32 keep full precision and so do without matrix units.
    """
    name = "pooled" if lengths is None else min(LONGEST, max(SHORTEST, next_power_of_2(lengths.typical)))
    return f"{precision_class(dtype, product_precision(dtype))}{name}"


@dataclass(frozen=True)
class BlockPlan:
    """Launch of one kernel; ``tile`` rows or sets are a tile."""

    sizes: Launch
    constants: dict[str, Any]
    tile: int

    @classmethod
    def of(
        cls: type[_Plan], op: str, kernel: str, x: Tensor, heads: int, lengths: Lengths | None, arch: int | None,
        tile: str, **more: Any,
    ) -> _Plan:  # fmt: skip
        """Look up the sizes of a kernel for rows like ``x (..., h)``.

        Args:
            op: name of the launch table.
            kernel: of the op.
            x: rows.
            heads: of the block.
            lengths: of the sets; None for rows that are pooled already.
            arch: architecture; None asks for the device of ``x``.
            tile: constant that counts what a tile has.
            more: constants of this op.
        """
        h = x.shape[-1]
        sizes = launch(
            op, kernel=kernel, h=h, heads=heads, length=length_class(lengths, x.dtype), dtype=x.dtype,
            arch=architecture(x.device) if arch is None else arch,
        )  # fmt: skip
        constants = {
            "HEADS": heads, tile: sizes[tile], "INNER": sizes["INNER"], "WIDTH": h,
            "PRECISION": product_precision(x.dtype), "ACC": sum_dtype(x.dtype), **more,
        }  # fmt: skip
        return cls(sizes, constants, sizes[tile])

    def tiles(self, count: int) -> int:
        """Return the number of tiles of so many rows or sets."""
        return -(-count // self.tile)

    def programs(self, count: int, x: Tensor) -> int:
        """Return the number of programs that share out the tiles of so many rows or sets."""
        return min(self.tiles(count), self.sizes["PROGRAMS"] * programs_of(x.device))

    @property
    def options(self) -> dict[str, Any]:
        """Constants and options of the launch."""
        return {**self.constants, **self.sizes.options}

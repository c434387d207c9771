"""Launches of kernels that compute whole blocks: ``set_block`` and ``pool_block``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor

from ...ops.precision import product_precision
from .feed_forward import precision_class
from .launches import Launch, architecture, launch, programs_of, sum_dtype

_Plan = TypeVar("_Plan", bound="BlockPlan")


@dataclass(frozen=True)
class BlockPlan:
    """Launch of one kernel; ``tile`` rows or sets are a tile."""

    sizes: Launch
    constants: dict[str, Any]
    tile: int

    @classmethod
    def of(
        cls: type[_Plan], op: str, kernel: str, x: Tensor, heads: int, arch: int | None, tile: str, **more: Any
    ) -> _Plan:
        """Look up the sizes of a kernel for rows like ``x (..., h)``.

        Args:
            op: name of the launch table.
            kernel: of the op.
            x: rows.
            heads: of the block.
            arch: architecture; None asks for the device of ``x``.
            tile: constant that counts what a tile has; of the sizes, where it is not among ``more``.
            more: constants of this op.
        """
        precision, h = product_precision(x.dtype), x.shape[-1]
        sizes = launch(
            op, kernel=kernel, h=h, heads=heads, length=precision_class(x.dtype, precision), dtype=x.dtype,
            arch=architecture(x.device) if arch is None else arch,
        )  # fmt: skip
        constants = {
            "HEADS": heads, "INNER": sizes["INNER"], "WIDTH": h, "PRECISION": precision, "ACC": sum_dtype(x.dtype),
            **more,
        }  # fmt: skip
        if tile not in constants:
            constants[tile] = sizes[tile]
        return cls(sizes, constants, constants[tile])

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

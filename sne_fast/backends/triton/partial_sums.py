"""Sums of parameters' gradients per program, and their sum over the programs, by one launch for all parameters."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...ops.schema import accumulate_dtype
from ..gpu_plans.device_tables import on_device_without_waiting
from .launches import architecture, launch, triton_dtype
from .partial_sums_kernels import sum_parts_kernel

RESULTS = 9
"""Gradients that one launch takes at most."""
ALIGNED = 16
"""Every part starts at a multiple of so many values, so that kernels read and write 16 bytes at a time."""


@dataclass(frozen=True)
class Part:
    """Partial sums of a gradient of ``shape``: ``(count, *shape)`` or, by block, ``(shape[0], count, *shape[1:])``."""

    shape: tuple[int, ...]
    count: int
    by_block: bool = False

    @property
    def stored(self) -> tuple[int, ...]:
        """Shape of the partial sums."""
        if self.by_block:
            return (self.shape[0], self.count, *self.shape[1:])
        return (self.count, *self.shape)


Layout = tuple[tuple[str, Part], ...]


def _aligned(size: int) -> int:
    return -(-size // ALIGNED) * ALIGNED


@functools.lru_cache(maxsize=256)
def _table(layout: Layout, columns: int) -> np.ndarray:
    """Return the table of :func:`sum_parts_kernel`, whose programs sum so many columns each."""
    entries, start = [], 0
    for which, (_, part) in enumerate(layout):
        blocks, size = (part.shape[0] if part.by_block else 1), math.prod(part.shape)
        size = size // blocks if blocks else 0
        for block in range(blocks):
            for column in range(0, size, columns):
                first, target = start + block * part.count * size + column, block * size + column
                entries.append((first, size, part.count, which, target, min(columns, size - column)))
        start += _aligned(math.prod(part.stored))
    return np.array(entries, np.int64).reshape(-1, 6)


@dataclass(frozen=True)
class PartialSums:
    """Partial sums of several gradients in one buffer.

    Attributes:
        layout: name and part of each gradient.
        buffer: of all of them.
        parts: views of it by name.
    """

    layout: Layout
    buffer: Tensor
    parts: Mapping[str, Tensor]

    @classmethod
    def make(cls, layout: Iterable[tuple[str, Part]], like: Tensor, zeros: bool) -> PartialSums:
        """Make a buffer on the device of ``like``, for gradients of its dtype; of zeros, if kernels add to it."""
        layout = tuple(layout)
        sizes = [_aligned(math.prod(part.stored)) for _, part in layout]
        make = like.new_zeros if zeros else like.new_empty
        buffer = make((sum(sizes),), dtype=accumulate_dtype(like.dtype))
        cut = zip(layout, buffer.split(sizes), strict=True)
        parts = {name: flat[: math.prod(part.stored)].view(part.stored) for (name, part), flat in cut}
        return cls(layout, buffer, parts)

    def summed(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return the gradients by name, in ``dtype``."""
        sizes = launch("partial_sums", dtype=dtype, arch=architecture(self.buffer.device))
        table = _table(self.layout, sizes["COLUMNS"])
        found = {name: self.buffer.new_empty(part.shape, dtype=dtype) for name, part in self.layout}
        if len(table):
            results = list(found.values())
            results += results[:1] * (RESULTS - len(results))
            on_device = on_device_without_waiting(table, self.buffer.device, repeats=True)
            sum_parts_kernel[(len(table),)](
                self.buffer, on_device, *results, ACC=triton_dtype(self.buffer.dtype), **sizes.blocks, **sizes.options
            )  # fmt: skip
        return found

"""Index tables that turn drawn permutations into one gather of packed values.

The value at position p comes from position `p + sum_k delta[column_k[p]]`. There is one `delta` per entry: a position
along a dimension, or along several dimensions where one permutation depends on a position in another. There are few
entries, so that for every network the permutations are turned into entries, and then two or so look-ups per value.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..data.cutting import packed_strides
from .boxes import AxisInfo, Box, box_coordinates, permuted_placements

STORED = "stored"
"""Chunking of tensors that stand row-major one after the other, as a state_dict holds them."""


@dataclass(frozen=True, eq=False)
class GatherIndex:
    """Index tables of one architecture in one memory layout.

    Entry e is `sum_j tables[pointer[j, e]] * stride[j, e] + shift[e]`; entry 0 is 0.

    Args:
        size: V, the number of values of a network.
        columns: K tensors `(V,)` int32 of entries.
        pointer: `(J, E)` int64, places in a row of permutation tables.
        stride: `(J, E)` int64.
        shift: `(E,)` int64.
    """

    size: int
    columns: tuple[Tensor, ...]
    pointer: Tensor
    stride: Tensor
    shift: Tensor

    def to(self, device: torch.device) -> GatherIndex:
        """Return these tables on a device."""
        moved = (t.to(device) for t in (self.pointer, self.stride, self.shift))
        return GatherIndex(self.size, tuple(c.to(device) for c in self.columns), *moved)

    def source(self, tables: Tensor, starts: Tensor) -> Tensor:
        """Return the positions that values come from.

        Args:
            tables: `(n, P)` int64, a row of permutation tables per network.
            starts: `(n,)` int64, the position of each network's first value.

        Returns:
            `(n, V)` int64.
        """
        source = torch.arange(self.size, device=tables.device) + starts[:, None]
        if not self.columns:
            return source
        delta = self.shift.expand(len(tables), -1)
        for pointer, stride in zip(self.pointer, self.stride, strict=True):
            delta = torch.addcmul(delta, tables[:, pointer], stride)
        for column in self.columns:
            source += delta.index_select(1, column)
        return source


def build_gather_index(
    axes: Sequence[AxisInfo], tensors: Sequence[tuple[tuple[int, ...], bool, Sequence[Box]]], chunking: str
) -> GatherIndex:
    """Return the index tables of tensors that stand one after the other.

    Args:
        axes: all axes of the symmetry.
        tensors: the shape of each, whether it was cut with kernel dimensions, and its boxes; no boxes for a tensor that
            stays as it is.
        chunking: of the batch, or `STORED`.
    """
    total = sum(math.prod(shape) for shape, _, _ in tensors)
    builder = _Builder(axes, total)
    offset = 0
    for shape, kernel, boxes in tensors:
        strides = packed_strides(shape, kernel, chunking)
        for box in boxes:
            builder.add(box, strides, offset)
        offset += math.prod(shape)
    return builder.finish()


class _Builder:
    """Collects entries and columns box by box."""

    def __init__(self, axes: Sequence[AxisInfo], total: int) -> None:
        self.axes = axes
        self.total = total
        self.columns: list[np.ndarray] = []
        self.count = 1
        self.pointers: list[list[np.ndarray]] = [[np.zeros(1, np.int64)]]
        self.strides: list[list[np.ndarray]] = [[np.zeros(1, np.int64)]]
        self.shifts: list[np.ndarray] = [np.zeros(1, np.int64)]

    def add(self, box: Box, strides: Sequence[int], offset: int) -> None:
        """Add the entries of a box in a tensor that starts at `offset`, and point its values at them."""
        permuted = permuted_placements(box, self.axes)
        if not permuted:
            return
        coordinates, positions = box_coordinates(box, self.axes, strides, offset)
        for k, together in enumerate(_tabulated_together(box, self.axes, permuted)):
            row = np.asarray(self._add_entries(box, strides, together))
            step = 1
            for i in reversed(together):
                row = row + coordinates[i] * step
                step *= self.axes[box.placements[i].axis].size
            if k == len(self.columns):
                self.columns.append(np.zeros(self.total, np.int32))
            self.columns[k][positions] = row

    def _add_entries(self, box: Box, strides: Sequence[int], together: list[int]) -> int:
        """Add one entry for each combination of positions along these placements; return the number of the first."""
        placements, axes = box.placements, self.axes
        extents = [axes[placements[i].axis].size for i in together]
        coordinates = dict(zip(together, np.indices(extents).reshape(len(together), -1), strict=True))
        shift = np.zeros(math.prod(extents), np.int64)
        pointers: list[np.ndarray] = []
        used: list[np.ndarray] = []
        for i in together:
            info = axes[placements[i].axis]
            if info.frozen is not None:
                continue
            table = np.zeros_like(shift)
            for other in info.within:
                at = next(j for j in together if placements[j].axis == other)
                table = table * axes[other].size + coordinates[at]
            stride = placements[i].step * strides[placements[i].dim]
            pointers.append(info.offset + table * info.size + coordinates[i])
            used.append(np.full(len(shift), stride, np.int64))
            shift -= coordinates[i] * stride
        first = self.count
        self.count += len(shift)
        self.pointers.append(pointers)
        self.strides.append(used)
        self.shifts.append(shift)
        return first

    def finish(self) -> GatherIndex:
        """Return the tables, entries that point at fewer permutations filled up with zeros."""
        depth = max(map(len, self.pointers))
        pointer, stride = (self._stacked(parts, depth) for parts in (self.pointers, self.strides))
        columns = tuple(torch.from_numpy(column) for column in self.columns)
        return GatherIndex(self.total, columns, pointer, stride, torch.from_numpy(np.concatenate(self.shifts)))

    def _stacked(self, parts: list[list[np.ndarray]], depth: int) -> Tensor:
        rows = []
        for j in range(depth):
            filled = (
                part[j] if j < len(part) else np.zeros(len(shift), np.int64)
                for part, shift in zip(parts, self.shifts, strict=True)
            )  # fmt: skip
            rows.append(np.concatenate(list(filled)))
        return torch.from_numpy(np.stack(rows))


def _tabulated_together(box: Box, axes: Sequence[AxisInfo], permuted: list[int]) -> list[list[int]]:
    """Group placements: those along one dimension, and with each the axes on which its permutation depends."""
    parts: list[set[int]] = []
    for i in permuted:
        placement = box.placements[i]
        part = {i} | {j for j in permuted if box.placements[j].dim == placement.dim}
        part |= {j for j, other in enumerate(box.placements) if other.axis in axes[placement.axis].within}
        for known in [p for p in parts if p & part]:
            parts.remove(known)
            part |= known
        parts.append(part)
    return [sorted(part) for part in parts]

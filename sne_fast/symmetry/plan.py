"""Index tables that turn drawn permutations into one gather of packed values.

A weight at position p comes from position `p + sum_k delta[column_k[p]]`. There is a `delta` per entry: a place along
a dimension (or along several, where one permutation depends on a position in another), of which there are few. So for
every network only the entries are computed from its permutations, and then two or so look-ups per weight.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from .core import Block, Symmetry

STORED = "stored"  # tensors row-major, as a state_dict holds them


@dataclass(frozen=True, eq=False)
class Plan:
    """Tables of one architecture in one layout.

    Entry e is `sum_j tables[pointer[j, e]] * stride[j, e] + shift[e]`; entry 0 is 0.

    Args:
        size: V, how many values a network has.
        columns: K tensors `(V,)` int32 of entries.
        pointer, stride: (J, E) int64.
        shift: (E,) int64.
    """

    size: int
    columns: tuple[Tensor, ...]
    pointer: Tensor
    stride: Tensor
    shift: Tensor

    def to(self, device: torch.device) -> Plan:
        moved = (t.to(device) for t in (self.pointer, self.stride, self.shift))
        return Plan(self.size, tuple(c.to(device) for c in self.columns), *moved)

    def source(self, tables: Tensor, firsts: Tensor) -> Tensor:
        """Where values come from: `(n, P)` tables to `(n, V)` positions, those of network i from `firsts[i]` on."""
        source = torch.arange(self.size, device=tables.device) + firsts[:, None]
        if not self.columns:
            return source
        delta = self.shift.expand(len(tables), -1)
        for pointer, stride in zip(self.pointer, self.stride, strict=True):
            delta = torch.addcmul(delta, tables[:, pointer], stride)
        for column in self.columns:
            source += delta.index_select(1, column)
        return source


def layout(shape: Sequence[int], chunking: str) -> list[int]:
    """How far apart neighbours along each dimension stand, in a tensor as `pack` lays it out (SPEC 1)."""
    dims = list(range(len(shape)))
    if len(shape) > 2 and chunking in ("flat", "neuron"):
        dims = [*dims[2:], 0, 1]  # kernel positions outermost
    steps = [0] * len(shape)
    step = 1
    for d in reversed(dims):
        steps[d] = step
        step *= shape[d]
    return steps


class _Entries:
    def __init__(self) -> None:
        self.count = 1
        self.pointers: list[list[np.ndarray]] = [[np.zeros(1, np.int64)]]
        self.strides: list[list[np.ndarray]] = [[np.zeros(1, np.int64)]]
        self.shifts: list[np.ndarray] = [np.zeros(1, np.int64)]

    def add(self, pointers: list[np.ndarray], strides: list[int], shift: np.ndarray) -> int:
        first = self.count
        self.count += len(shift)
        self.pointers.append(pointers)
        self.strides.append([np.full(len(shift), s, np.int64) for s in strides])
        self.shifts.append(shift)
        return first

    def stacked(self) -> tuple[Tensor, Tensor, Tensor]:
        depth = max(map(len, self.pointers))
        rows = []
        for parts in (self.pointers, self.strides):
            padded = [
                np.concatenate([p[j] if j < len(p) else np.zeros(len(s), np.int64) for p, s in zip(
                    parts, self.shifts, strict=True)])
                for j in range(depth)
            ]  # fmt: skip
            rows.append(torch.from_numpy(np.stack(padded)))
        return rows[0], rows[1], torch.from_numpy(np.concatenate(self.shifts))


def build_plan(symmetry: Symmetry, names: Sequence[str], shapes: Sequence[tuple[int, ...]], chunking: str) -> Plan:
    """The plan for tensors of these names and shapes, one after the other, laid out as `chunking` says."""
    total = sum(math.prod(shape) for shape in shapes)
    entries = _Entries()
    columns: list[np.ndarray] = []
    offset = 0
    for name, shape in zip(names, shapes, strict=True):
        first = symmetry.alias.get(name)
        for block in symmetry.blocks[first] if first is not None else ():
            _add_block(symmetry, block, layout(shape, chunking), offset, entries, columns, total)
        offset += math.prod(shape)
    pointer, stride, shift = entries.stacked()
    tables = tuple(torch.from_numpy(c) for c in columns)
    return Plan(total, tables, pointer, stride, shift)


def _add_block(
    symmetry: Symmetry,
    block: Block,
    steps: list[int],
    offset: int,
    entries: _Entries,
    columns: list[np.ndarray],
    total: int,
) -> None:
    axes, atoms = block.axes, symmetry.atoms
    moving = [i for i, axis in enumerate(axes) if atoms[axis.atom].frozen is None]
    if not moving:
        return
    sizes = [atoms[axis.atom].size for axis in axes]
    strides = [axis.step * steps[axis.dim] for axis in axes]
    grids = np.ogrid[tuple(slice(n) for n in sizes)]  # the coordinates of every element, each along its own axis
    place = offset + sum(s * step for s, step in zip(block.start, steps, strict=True))
    places = place + sum(g * s for g, s in zip(grids, strides, strict=True))
    for k, joint in enumerate(_joint(block, symmetry, moving)):
        extents = [sizes[i] for i in joint]
        coordinates = dict(zip(joint, np.indices(extents).reshape(len(joint), -1), strict=True))
        pointers, used = [], []
        shift = np.zeros(math.prod(extents), np.int64)
        for i in joint:
            info = atoms[axes[i].atom]
            if info.frozen is not None:
                continue
            table = np.zeros_like(shift)
            for other in info.within:
                at = next(j for j in joint if axes[j].atom == other)
                table = table * atoms[other].size + coordinates[at]
            pointers.append(info.offset + table * info.size + coordinates[i])
            used.append(strides[i])
            shift -= coordinates[i] * strides[i]
        row = np.asarray(entries.add(pointers, used, shift))
        step = 1
        for i in reversed(joint):
            row = row + grids[i] * step
            step *= sizes[i]
        if k == len(columns):
            columns.append(np.zeros(total, np.int32))
        columns[k][places] = row


def _joint(block: Block, symmetry: Symmetry, moving: list[int]) -> list[list[int]]:
    """Axes tabulated together: those of one dimension, and with each those on which its permutation depends."""
    parts: list[set[int]] = []
    for i in moving:
        axis = block.axes[i]
        part = {i} | {j for j in moving if block.axes[j].dim == axis.dim}
        part |= {j for j, other in enumerate(block.axes) if other.atom in symmetry.atoms[axis.atom].within}
        for known in [p for p in parts if p & part]:
            parts.remove(known)
            part |= known
        parts.append(part)
    return [sorted(part) for part in parts]

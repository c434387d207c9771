"""Where axes of units stand in tensors, as plain data: a tensor is made of boxes with one coordinate per axis."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class SymmetryError(ValueError):
    """A symmetry that does not hold, cannot be found, or does not fit the weights it is applied to."""


class AxisInfo(NamedTuple):
    """An axis of `size` units.

    `frozen` is the reason why it is not permuted, or None. `within` are the axes on whose position its permutation
    depends: it has one permutation for each of their positions together, `tables` in all. The first of them starts at
    `offset` in a row of permutation tables (-1 if frozen).
    """

    size: int
    frozen: str | None
    within: tuple[int, ...]
    tables: int
    offset: int


class Placement(NamedTuple):
    """Axis number `axis` along dimension `dim` of a tensor, its units `step` positions apart."""

    axis: int
    dim: int
    step: int


class Box(NamedTuple):
    """A part of a tensor that starts at the position `start` and has one coordinate per placement."""

    start: tuple[int, ...]
    placements: tuple[Placement, ...]


def permuted_placements(box: Box, axes: Sequence[AxisInfo]) -> list[int]:
    """Return the indices of the placements of a box whose axes are permuted."""
    return [i for i, placement in enumerate(box.placements) if axes[placement.axis].frozen is None]


def box_coordinates(
    box: Box, axes: Sequence[AxisInfo], strides: Sequence[int], offset: int
) -> tuple[list[np.ndarray], np.ndarray]:
    """Return the coordinates of a box along each of its axes, and the positions of its elements in memory.

    Args:
        box: a part of the tensor.
        axes: all axes of the symmetry.
        strides: of the tensor, as `sne_fast.data.cutting.packed_strides` gives them.
        offset: position of the tensor's first element.

    Returns:
        The coordinates, one array per placement, of extent 1 along the axes of the others; and the positions, an array
        with one dimension per placement.
    """
    coordinates = list(np.ogrid[tuple(slice(axes[p.axis].size) for p in box.placements)])
    first = offset + sum(s * stride for s, stride in zip(box.start, strides, strict=True))
    along = (c * p.step * strides[p.dim] for c, p in zip(coordinates, box.placements, strict=True))
    return coordinates, np.asarray(first + sum(along))

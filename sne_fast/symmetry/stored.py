"""Symmetries as JSON, for models that are saved with those of the architectures that they know."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from .boxes import AxisInfo, Box, Placement, SymmetryError
from .core import Symmetry

_KEYS = {"name", "shapes", "alias", "axes", "boxes"}


def to_json(symmetry: Symmetry) -> dict[str, Any]:
    """Return a symmetry as values that JSON can hold; `from_json` reads them.

    `axes` holds `[size, reason why frozen or null, axes on which the permutation depends]`, `boxes` by tensor
    `[start, [[axis, dimension, step], ...]]`, `alias` only the names of tied tensors that are not their first.
    """
    return {
        "name": symmetry.name,
        "shapes": {name: list(shape) for name, shape in symmetry.shapes.items()},
        "alias": {name: first for name, first in symmetry.alias.items() if name != first},
        "axes": [[info.size, info.frozen, list(info.within)] for info in symmetry.axes],
        "boxes": {
            name: [[list(box.start), [list(placement) for placement in box.placements]] for box in boxes]
            for name, boxes in symmetry.boxes.items()
        },
    }


def from_json(content: Any) -> Symmetry:
    """Return the symmetry that `to_json` described.

    Raises:
        SymmetryError: the content is of another form, or axes stand outside of their tensors.
    """
    try:
        return _parsed(content)
    except (TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
        if isinstance(error, SymmetryError):
            raise
        raise SymmetryError(f"is no symmetry as they are stored ({error!r:.80})") from error


def same_permutations(one: Symmetry, other: Symmetry) -> bool:
    """Return whether two symmetries permute the same units at the same places."""
    described = [{(group.units, group.tables, frozenset(group.uses)) for group in s.groups} for s in (one, other)]
    return described[0] == described[1]


def _parsed(content: Any) -> Symmetry:
    if not isinstance(content, Mapping) or set(content) != _KEYS:
        raise SymmetryError(f"must hold {', '.join(sorted(_KEYS))} and nothing else")
    shapes = {_text(name): tuple(_number(n, 0) for n in shape) for name, shape in content["shapes"].items()}
    alias = {name: name for name in shapes} | {_text(n): _text(first) for n, first in content["alias"].items()}
    if not set(alias.values()) <= set(shapes) or any(alias[name] != name for name in shapes):
        raise SymmetryError("alias must name tensors of shapes")
    axes = _axes(content["axes"])
    boxes = {
        _text(name): tuple(_box(box, shapes[name], axes, name) for box in found)
        for name, found in content["boxes"].items()
    }
    placed = {placement.axis for found in boxes.values() for box in found for placement in box.placements}
    if any(info.frozen is None and axis not in placed for axis, info in enumerate(axes)):
        raise SymmetryError("an axis of permuted units stands in no tensor")
    return Symmetry(_text(content["name"]), shapes, alias, axes, boxes)


def _axes(content: Sequence[Any]) -> tuple[AxisInfo, ...]:
    parsed = []
    for size, frozen, within in content:
        parsed.append((_number(size), None if frozen is None else _text(frozen), tuple(_number(a, 0) for a in within)))
    infos, offset = [], 0
    for number, (size, frozen, within) in enumerate(parsed):
        if len(set(within)) < len(within) or number in within or any(axis >= len(parsed) for axis in within):
            raise SymmetryError(
                f"axis {number} depends on axes {within!s:.80}, which are not others of the {len(parsed)}"
            )
        if frozen is not None:
            infos.append(AxisInfo(size, frozen, (), 1, -1))
            continue
        tables = math.prod(parsed[axis][0] for axis in within)
        infos.append(AxisInfo(size, None, within, tables, offset))
        offset += tables * size
    return tuple(infos)


def _box(content: Any, shape: tuple[int, ...], axes: tuple[AxisInfo, ...], name: str) -> Box:
    start, placements = content
    box = Box(
        tuple(_number(n, 0) for n in start),
        tuple(Placement(*(_number(n, low) for n, low in zip(p, (0, 0, 1), strict=True))) for p in placements),
    )
    last = list(box.start)
    for placement in box.placements:
        last[placement.dim] += placement.step * (axes[placement.axis].size - 1)
    if len(box.start) != len(shape) or any(at >= n for at, n in zip(last, shape, strict=True)):
        raise SymmetryError(f"a box of {name!r:.80} stands outside of its shape {shape!s:.80}")
    held = [placement.axis for placement in box.placements]
    if math.prod(axes[axis].size for axis in held) > math.prod(shape):
        raise SymmetryError(f"a box of {name!r:.80} has more elements than its shape {shape!s:.80}")
    for axis in set(held):
        within = axes[axis].within
        if within and any(held.count(other) != 1 for other in (axis, *within)):
            raise SymmetryError(f"a box of {name!r:.80} lacks an axis on which the permutation of axis {axis} depends")
    return box


def _number(value: Any, low: int = 1) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value < 2**48:
        raise SymmetryError(f"{value!r:.80} must be an integer of at least {low}")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise SymmetryError(f"{value!r:.80} must be text")
    return value

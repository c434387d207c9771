"""From labels to plain data: which axes are left, where they stand, and which permutations depend on which axes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, TypeAlias

from .boxes import AxisInfo, Box, Placement
from .terms import Axis, Label, Product, Term, collapse, resolve, size

_Placed: TypeAlias = tuple[Axis, int, int]  # an axis, the dimension along which it stands, and its step there


class Structure(NamedTuple):
    """Shapes and boxes of a symmetry's tensors by name, and all its axes."""

    shapes: dict[str, tuple[int, ...]]
    axes: tuple[AxisInfo, ...]
    boxes: dict[str, tuple[Box, ...]]


def assemble(labels: Mapping[str, Label], records: Sequence[Label], *, independent: bool = False) -> Structure:
    """Return the structure of tensors with these labels.

    Args:
        labels: of every tensor that may be permuted, by name.
        records: labels of all tensors ever seen, these included.
        independent: no permutation depends on a position in another axis.
    """
    seen: dict[tuple[int, ...], Label] = {}
    for label in records:
        seen.setdefault(tuple(id(term) for term in label), label)
    unique = list(seen.values())
    _settle(unique)
    beside = {} if independent else _always_beside(unique)

    expanded = {name: list(_expand(label)) for name, label in labels.items()}
    numbers: dict[Axis, int] = {}
    for boxes in expanded.values():
        for _, placed in boxes:
            for axis, _, _ in placed:
                numbers.setdefault(axis, len(numbers))
    return Structure(
        {name: tuple(size(term) for term in label) for name, label in labels.items()},
        _axis_infos(numbers, beside),
        {
            name: tuple(Box(start, tuple(Placement(numbers[a], d, step) for a, d, step in at)) for start, at in boxes)
            for name, boxes in expanded.items()
        },
    )


def _axis_infos(numbers: Mapping[Axis, int], beside: Mapping[Axis, set[Axis]]) -> tuple[AxisInfo, ...]:
    """Describe the numbered axes; of two that could depend on each other the later one depends on the earlier."""
    infos: list[AxisInfo] = []
    offset = 0
    axes = list(numbers)
    for axis, number in numbers.items():
        if axis.frozen is not None:
            infos.append(AxisInfo(axis.size, axis.frozen, (), 1, -1))
            continue
        others = [o for o in beside.get(axis, ()) if o in numbers]
        within = tuple(sorted(numbers[o] for o in others if axis not in beside[o] or numbers[o] < number))
        tables = math.prod(axes[other].size for other in within)
        infos.append(AxisInfo(axis.size, None, within, tables, offset))
        offset += tables * axis.size
    return tuple(infos)


class _StandsAloneError(Exception):
    """An axis whose permutation differs along its selector stands in a tensor without it, or twice beside it."""

    def __init__(self, axis: Axis) -> None:
        super().__init__(axis)
        self.axis = axis


def _expand(label: Label) -> Iterator[tuple[tuple[int, ...], list[_Placed]]]:
    """Yield the boxes of a tensor: the position where each starts, and its axes, outermost first.

    Every element of a box has one coordinate per axis; concatenations and families make several boxes.
    """
    todo = [(term, d, 1) for d, term in reversed(list(enumerate(label)))]
    yield from _expand_rest(todo, [], (0,) * len(label))


def _expand_rest(
    todo: Sequence[tuple[Term, int, int]], placed: Sequence[_Placed], start: tuple[int, ...]
) -> Iterator[tuple[tuple[int, ...], list[_Placed]]]:
    """Yield the boxes of the axes placed so far and the terms still to do, the last of these first."""
    todo, placed = list(todo), list(placed)
    while todo:
        term, d, step = todo.pop()
        term = resolve(term)
        if isinstance(term, Axis):
            placed.append((term, d, step))
        elif isinstance(term, Product):
            for factor in reversed(term.factors):  # innermost first, so that the outermost is taken up first
                todo.append((factor, d, step))
                step *= size(factor)
        else:
            offset = 0
            for part in term.parts:
                yield from _expand_rest([*todo, (part, d, step)], placed, _moved(start, d, offset * step))
                offset += size(part)
            return
    member = next((axis for axis, _, _ in placed if axis.family is not None), None)
    if member is None or member.family is None:
        yield start, placed
        return
    selector = resolve(member.family[0])
    found = [one for one in placed if one[0] is selector]
    if len(found) != 1 or not isinstance(selector, Axis):
        raise _StandsAloneError(member)
    _, dim, step = found[0]
    rest: list[_Placed] = []
    picked: list[_Placed] = []
    for one in placed:
        if one is not found[0]:
            (rest if one[0].family is None or resolve(one[0].family[0]) is not selector else picked).append(one)
    for t in range(selector.size):
        children = [(axis.family[1][t], d, inner) for axis, d, inner in picked if axis.family is not None]
        yield from _expand_rest(children, rest, _moved(start, dim, t * step))


def _moved(start: tuple[int, ...], dim: int, by: int) -> tuple[int, ...]:
    return (*start[:dim], start[dim] + by, *start[dim + 1 :])


def _settle(records: Sequence[Label]) -> None:
    """Undo families wherever their axis is used without the selector, until nothing changes."""
    changed = True
    while changed:
        changed = False
        for label in records:
            while True:
                try:
                    for _ in _expand(label):
                        pass
                except _StandsAloneError as error:
                    collapse(error.axis)
                    changed = True
                else:
                    break


def _always_beside(records: Sequence[Label]) -> dict[Axis, set[Axis]]:
    """Return for every axis those that always stand beside it, once: its permutation may depend on their positions."""
    beside: dict[Axis, set[Axis]] = {}
    for label in records:
        for _, placed in _expand(label):
            axes = [axis for axis, _, _ in placed]
            single = {axis for axis in axes if axes.count(axis) == 1}
            for axis in set(axes):
                here = single - {axis}
                beside[axis] = beside[axis] & here if axis in beside else here
    return beside

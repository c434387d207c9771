"""From labels to a `Symmetry`: which axes are left, where they stand, and which permutations depend on which axes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from .core import AtomInfo, Axis, Block, Symmetry
from .terms import Atom, Label, Prod, collapse, resolve, size

_Place = tuple[Atom, int, int]  # an atom, the dimension it stands in, and its step in that dimension


def expand(label: Label) -> Iterator[tuple[tuple[int, ...], list[_Place]]]:
    """A tensor as boxes: the position where each starts, and its axes, outermost first.

    Every element of a box has one coordinate per axis; concatenations and families make several boxes.
    """
    todo = [(term, d, 1) for d, term in reversed(list(enumerate(label)))]
    yield from _expand(todo, [], (0,) * len(label))


def _expand(todo: list, axes: list[_Place], start: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], list[_Place]]]:
    todo, axes = list(todo), list(axes)
    while todo:
        term, d, step = todo.pop()
        term = resolve(term)
        if isinstance(term, Atom):
            axes.append((term, d, step))
        elif isinstance(term, Prod):
            for factor in reversed(term.factors):  # innermost first, so that the outermost is taken up first
                todo.append((factor, d, step))
                step *= size(factor)
        else:
            offset = 0
            for part in term.parts:
                moved = list(start)
                moved[d] += offset * step
                yield from _expand([*todo, (part, d, step)], axes, tuple(moved))
                offset += size(part)
            return
    member = next((atom for atom, _, _ in axes if atom.family is not None), None)
    if member is None or member.family is None:
        yield start, axes
        return
    selector = resolve(member.family[0])
    found = [place for place in axes if place[0] is selector]
    if len(found) != 1 or not isinstance(selector, Atom):
        raise _Loose(member)
    place = found[0]
    rest: list[_Place] = []
    split: list[_Place] = []
    for one in axes:
        if one is not place:
            (rest if one[0].family is None or resolve(one[0].family[0]) is not selector else split).append(one)
    for t in range(selector.size):
        moved = list(start)
        moved[place[1]] += t * place[2]
        children = [(atom.family[1][t], d, step) for atom, d, step in split if atom.family is not None]
        yield from _expand(children, rest, tuple(moved))


class _Loose(Exception):
    """An axis whose permutation differs along another stands in a tensor where that other is not, or is twice."""

    def __init__(self, atom: Atom) -> None:
        self.atom = atom


def _settle(records: Sequence[Label]) -> None:
    """Undo families wherever their axis is used without the selector, until nothing changes."""
    changed = True
    while changed:
        changed = False
        for label in records:
            while True:
                try:
                    for _ in expand(label):
                        pass
                except _Loose as loose:
                    collapse(loose.atom)
                    changed = True
                else:
                    break


def _allowed(records: Sequence[Label]) -> dict[Atom, set[Atom]]:
    """For every axis the axes that always stand beside it, once: its permutation may depend on their positions."""
    allowed: dict[Atom, set[Atom]] = {}
    for label in records:
        for _, axes in expand(label):
            atoms = [atom for atom, _, _ in axes]
            single = {atom for atom in atoms if atoms.count(atom) == 1}
            for atom in set(atoms):
                here = single - {atom}
                allowed[atom] = allowed[atom] & here if atom in allowed else here
    return allowed


def assemble(
    name: str,
    labels: dict[str, Label],
    alias: dict[str, str],
    records: Sequence[Label],
    unsupported: tuple[str, ...] = (),
    independent: bool = False,
) -> Symmetry:
    """The symmetry of tensors with these labels.

    Args:
        labels: of every tensor that may be permuted, by its first name.
        alias: first name of every name.
        records: labels of all tensors ever seen, these included.
        independent: no permutation depends on a position in another axis.
    """
    seen: dict[tuple[int, ...], Label] = {}
    for label in records:
        seen.setdefault(tuple(id(term) for term in label), label)
    unique = list(seen.values())
    _settle(unique)
    allowed = {} if independent else _allowed(unique)

    boxes = {key: list(expand(label)) for key, label in labels.items()}
    atoms: dict[Atom, int] = {}
    for found in boxes.values():
        for _, axes in found:
            for atom, _, _ in axes:
                atoms.setdefault(atom, len(atoms))
    infos, offset, ordered = [], 0, list(atoms)
    for atom, number in atoms.items():
        within: tuple[int, ...] = ()
        if atom.frozen is None:
            mutual = [o for o in allowed.get(atom, ()) if o in atoms]
            within = tuple(sorted(atoms[o] for o in mutual if atom not in allowed[o] or atoms[o] < number))
        tables = math.prod(ordered[other].size for other in within)
        infos.append(AtomInfo(atom.size, atom.frozen, within, tables, -1 if atom.frozen is not None else offset))
        if atom.frozen is None:
            offset += tables * atom.size
    blocks = {
        key: tuple(Block(start, tuple(Axis(atoms[a], d, step) for a, d, step in axes)) for start, axes in found)
        for key, found in boxes.items()
    }
    shapes = {key: tuple(size(term) for term in label) for key, label in labels.items()}
    return Symmetry(name, shapes, dict(alias), tuple(infos), blocks, unsupported)

"""Loops of a flow graph, also those that are entered in several places and so have no header."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

Graph = Mapping[int, Collection[int]]
"""The blocks that may follow each block."""
Edge = tuple[int, int]


@dataclass(frozen=True)
class Cycle:
    """A loop: blocks that reach each other, those of them entered from outside, and the edges back to these."""

    body: frozenset[int]
    entries: frozenset[int]
    back: frozenset[Edge]


def cycles(after: Graph, start: int | None = None) -> Iterator[Cycle]:
    """Yield the loops of a graph that is entered at ``start``, each ahead of those inside of it.

    Those inside are what still goes round without the edges back.
    """
    for body in _strongly_connected(after):
        edges = {(number, to) for number, following in after.items() for to in following if to in body}
        entries = {to for number, to in edges if number not in body} | {number for number in body if number == start}
        back = frozenset((number, to) for number, to in edges if number in body and to in entries)
        if any(number in body for number, _ in edges):
            yield Cycle(body, frozenset(entries), back)
            yield from cycles(part_of(after, body, back))


def part_of(after: Graph, body: Collection[int], without: Collection[Edge] = ()) -> dict[int, list[int]]:
    """Return the part of a graph between the blocks of a body, without some edges."""
    return {number: [to for to in after[number] if to in body and (number, to) not in without] for number in body}


def is_acyclic(after: Graph) -> bool:
    """Return whether no way through a graph comes back."""
    return next(cycles(after), None) is None


def reaching(after: Graph, last: int, stop: int | None = None) -> frozenset[int]:
    """Return the blocks from which ``last`` is reached without passing ``stop``, and these two.

    Where ``stop`` is the only entry of a loop, that is the part of it which the edge from ``last`` to ``stop`` closes.
    """
    found, left = {last} if stop is None else {last, stop}, [last] if last != stop else []
    while left:
        here = left.pop()
        before = [number for number, following in after.items() if here in following and number not in found]
        found.update(before)
        left.extend(before)
    return frozenset(found)


def _strongly_connected(after: Graph) -> list[frozenset[int]]:
    numbers = sorted(after)
    place = {number: at for at, number in enumerate(numbers)}
    reached = np.eye(len(numbers), dtype=np.float32)
    for number, following in after.items():
        reached[place[number], [place[to] for to in following]] = 1
    for _ in range(len(numbers).bit_length()):  # by paths of 2, 4, 8, ... edges
        reached = np.minimum(reached @ reached, 1)
    mutual = (reached > 0) & (reached.T > 0)
    parts = {frozenset(numbers[at] for at in np.flatnonzero(row)) for row in mutual}
    return sorted(parts, key=min)

"""Duplicates: the same weights, the same with permuted units, and nearly the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import networkx
import numpy as np

from .distances import sharing, sketch_distances
from .sketches import NetworkSketch

Kind = Literal["exact", "reordered", "near"]


@dataclass(frozen=True)
class Duplicates:
    """Networks that are the same.

    Attributes:
        kind: "exact" for the same values in every tensor, "reordered" for the same values in another order, as when
            hidden units are permuted or tensors renamed, "near" for small differences.
        members: places of the networks, ascending.
        distance: largest relative distance of a member from the first, 0 for exact copies; NaN for reordered ones,
            whose weights are not compared in their order.
    """

    kind: Kind
    members: tuple[int, ...]
    distance: float


def find_duplicates(sketches: Sequence[NetworkSketch], *, tolerance: float = 0.02) -> list[Duplicates]:
    """Return the groups of networks that are copies of each other, exact ones first.

    Exact copies are known by the digests of their tensors, with names and order, and reordered ones by digests that do
    not depend on order or names. Near copies are at most `tolerance` apart, in tensors of the same names and shapes,
    which hold at least 95 % of the larger one's weights; groups are linked by pairs. Of exact copies one stands for all
    among the reordered ones, and so on.

    Args:
        sketches: of N networks.
        tolerance: largest relative distance of near copies. Weights stored as bfloat16 are 0.002 apart from the
            original, as int8 about 0.01, and ten steps of fine-tuning mostly more than 0.01.

    Raises:
        ValueError: a negative tolerance.

    Example:
        >>> from sne_fast.similarity import sketch
        >>> net = torch.nn.Linear(4, 3)
        >>> find_duplicates([sketch(torch.nn.Linear(4, 3)), sketch(net), sketch(net)])
        [Duplicates(kind='exact', members=(1, 2), distance=0.0)]
    """
    if not tolerance >= 0:
        raise ValueError(f"find_duplicates: tolerance must be at least 0, got {tolerance!r}")
    found: list[Duplicates] = []
    left = list(range(len(sketches)))
    keys: list[tuple[Kind, Callable[[NetworkSketch], object]]] = [("exact", _exact), ("reordered", _unordered)]
    for kind, key in keys:
        groups: dict[object, list[int]] = {}
        for k in left:
            groups.setdefault(key(sketches[k]), []).append(k)
        distance = 0.0 if kind == "exact" else float("nan")
        found += [Duplicates(kind, tuple(rows), distance) for rows in groups.values() if len(rows) > 1]
        left = [rows[0] for rows in groups.values()]
    if tolerance:
        for group in sharing([sketches[k] for k in left]):
            members = [left[k] for k in group]
            near = sketch_distances([sketches[k] for k in members], shared=0.95).distance
            graph = networkx.Graph(np.argwhere(np.triu(near <= tolerance, 1)).tolist())
            for linked in networkx.connected_components(graph):
                rows = sorted(linked)
                found.append(Duplicates("near", tuple(members[k] for k in rows), float(near[rows[0], rows].max())))
    return found


def _exact(sketch: NetworkSketch) -> object:
    return tuple((name, t.digest) for name, t in sketch.tensors.items())


def _unordered(sketch: NetworkSketch) -> object:
    return tuple(sorted((t.size, t.unordered) for t in sketch.tensors.values()))

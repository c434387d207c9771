"""Distances of the weights of networks, from their sketches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import networkx
import numpy as np

from .sketches import SKETCH, NetworkSketch

SHARED = 0.5
"""Least share of weights in tensors of the same name and shape that two networks must have to be compared."""


@dataclass(frozen=True)
class SketchDistances:
    """Relative distances of N networks.

    Attributes:
        distance: `(N, N)`, `|a - b| / sqrt((|a|^2 + |b|^2) / 2)`, where a tensor that one of them lacks counts as zero
            there; infinity where they share too little. Independent networks are at about 1.41, a network is at 0 from
            itself.
        shared: `(N, N)`, share of the larger network's weights in tensors that both have.
    """

    distance: np.ndarray
    shared: np.ndarray


def sketch_distances(sketches: Sequence[NetworkSketch], *, shared: float = SHARED) -> SketchDistances:
    """Return how far the weights of networks are apart, by tensors of the same name and shape.

    Vectors (biases, norms) do not count, unless a network has nothing else: those of strangers are often alike.

    Args:
        sketches: of N networks.
        shared: networks that share a smaller part of their weights are at infinity.

    Returns:
        Distances in [0, 2], or infinity. Those of different weights have a relative standard deviation of at most 0.06.

    Example:
        >>> from sne_fast.similarity import sketch
        >>> nets = [torch.nn.Linear(40, 30) for _ in range(2)]
        >>> found = sketch_distances([sketch(net) for net in [*nets, nets[0]]])
        >>> float(found.distance[0, 2]), bool(found.distance[0, 1] > 1)
        (0.0, True)
    """
    # NaN and infinities give NaN, and are near nothing.
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        return _distances(sketches, shared)


def _distances(sketches: Sequence[NetworkSketch], shared: float) -> SketchDistances:
    count = len(sketches)
    members: dict[tuple[str, tuple[int, ...]], list[int]] = {}
    for k, one in enumerate(sketches):
        for name, tensor in one.compared.items():
            members.setdefault((name, tensor.shape), []).append(k)
    apart, squares, common = (np.zeros((count, count)) for _ in range(3))  # squares: of the row's shared tensors
    for (name, shape), rows in members.items():
        tensors = [sketches[k].compared[name] for k in rows]
        values = np.stack([t.values for t in tensors])
        own = np.array([t.squares for t in tensors])
        norms = (values**2).sum(1)
        found = np.maximum(norms[:, None] + norms - 2 * values @ values.T, 0)
        # A difference of large numbers is exact to their rounding alone; equal tensors are known by their digests.
        found[found < 1e-12 * (norms[:, None] + norms)] = 0
        digests = np.array([t.digest for t in tensors])
        found[digests[:, None] == digests] = 0
        place = np.ix_(rows, rows)
        apart[place] += found
        squares[place] += own[:, None]
        common[place] += float(np.prod(shape, dtype=np.int64))
    sizes = np.array([sum(t.size for t in one.compared.values()) for one in sketches], np.float64)
    part = common / np.maximum(np.maximum(sizes[:, None], sizes), 1)
    total = np.array([sum(t.squares for t in one.compared.values()) for one in sketches])
    missing = np.maximum(total[:, None] - squares, 0)
    missing[missing < 1e-12 * total[:, None]] = 0
    scale = (total[:, None] + total) / 2
    distance = np.sqrt((apart + missing + missing.T) / scale)
    distance[(scale == 0) & (common > 0)] = 0
    distance[(part < shared) | (common == 0) | np.isnan(distance)] = np.inf
    np.fill_diagonal(distance, 0)
    return SketchDistances(np.minimum(distance, np.where(np.isinf(distance), np.inf, 2.0)), part)


def sharing(sketches: Sequence[NetworkSketch]) -> list[list[int]]:
    """Return groups of networks, places ascending, such that networks that share a compared tensor are in one group."""
    graph: networkx.Graph[object] = networkx.Graph()
    graph.add_nodes_from(range(len(sketches)))
    for k, one in enumerate(sketches):
        graph.add_edges_from((k, (name, tensor.shape)) for name, tensor in one.compared.items())
    groups = [sorted(k for k in group if isinstance(k, int)) for group in networkx.connected_components(graph)]
    return sorted(groups)


def joined(sketch: NetworkSketch, names: Sequence[str]) -> np.ndarray:
    """Return the sketches of some tensors one after the other, `(128 len(names),)`."""
    if not names:
        return np.zeros(0)
    return np.concatenate([sketch.tensors[name].values for name in names]).reshape(len(names) * SKETCH)

"""`lineage`: which network was made of which, from the distances of their weights and the traces that making leaves.

Distances of weights tell which networks are related (Horwitz et al. 2025, arXiv 2405.18432): independent ones are at
about 1.41, what was made of a network is far nearer. The direction of an edge is told by

- zeros: pruning adds them, and what is left are the parent's weights;
- levels: rounding leaves few different values;
- norm and kurtosis: further training lets both grow, more often than not;
- place: a parent is nearer to the rest of its family.

The tree is the directed spanning tree of least cost, where an edge costs its distance, somewhat less with weak evidence
for its direction and more with weak evidence against it. No edge leads from a pruned or rounded network to one that is
not, and a network without a near one is a root. A pruned network's distance from a parent is that of the weights that
are left. A mean of two networks is known exactly, since sketches are linear.
"""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import networkx
import numpy as np

from .distances import joined, sharing, sketch_distances
from .edges import Edge
from .pages import tree_page
from .sketches import NetworkSketch

UNRELATED = 0.9
"""Relative distance from which on networks count as unrelated; independent ones are at about 1.41."""
_ZEROS, _LEVELS = 0.02, 0.05
_WEAK, _STRONG = 0.3, 0.9
_MERGED = 0.05
_TIE = 0.2  # candidates this much dearer than the cheapest one are as good
_LEAST = 1e-4  # added to distances, so that evidence decides among equal networks
_NEIGHBOURS = 12


@dataclass(frozen=True)
class Lineage:
    """The trees of some networks.

    Attributes:
        names: of all networks.
        edges: in the order of the children; a child has one parent, two if it is the mean of them, or none.
    """

    names: tuple[str, ...]
    edges: tuple[Edge, ...]

    @property
    def roots(self) -> tuple[str, ...]:
        """Networks without a parent."""
        children = {edge.child for edge in self.edges}
        return tuple(name for name in self.names if name not in children)

    @property
    def families(self) -> tuple[tuple[str, ...], ...]:
        """Networks that are related to each other, the largest families first; networks alone are left out."""
        graph = networkx.Graph([(edge.parent, edge.child) for edge in self.edges])
        place = {name: k for k, name in enumerate(self.names)}
        groups = [tuple(sorted(group, key=place.__getitem__)) for group in networkx.connected_components(graph)]
        return tuple(sorted(groups, key=lambda group: (-len(group), place[group[0]])))

    def table(self) -> str:
        """Return the edges as CSV: child, parent, relation, distance, evidence; roots have an empty parent."""
        text = io.StringIO()
        writer = csv.writer(text)
        writer.writerow(["child", "parent", "relation", "distance", "evidence"])
        by_child: dict[str, list[Edge]] = {}
        for edge in self.edges:
            by_child.setdefault(edge.child, []).append(edge)
        for name in self.names:
            for edge in by_child.get(name, []):
                writer.writerow([name, edge.parent, edge.relation, f"{edge.distance:.4f}", f"{edge.evidence:.2f}"])
            if name not in by_child:
                writer.writerow([name, "", "", "", ""])
        return text.getvalue()

    def dot(self) -> str:
        """Return the families as a graph in the language of Graphviz; networks alone are left out."""
        number = {name: k for k, name in enumerate(self.names)}
        shown = sorted({number[name] for edge in self.edges for name in (edge.parent, edge.child)})
        lines = ["digraph lineage {", "  rankdir=LR; node [shape=box];"]
        lines += [f"  n{k} [label={_quoted(self.names[k])}];" for k in shown]
        for edge in self.edges:
            style = ", style=dashed" if edge.evidence < _WEAK else ""
            label = _quoted(f"{edge.relation} {edge.distance:.3g}")
            lines.append(f"  n{number[edge.parent]} -> n{number[edge.child]} [label={label}{style}];")
        return "\n".join([*lines, "}", ""])

    def html(self, title: str = "Lineage of networks") -> str:
        """Return the trees as an HTML page, one file that needs no network.

        Trees can be folded and searched by name. Each step shows its relation, distance and evidence; directions that
        are guesses are marked. Networks alone are a list of their own. A network of two parents stands below both.
        """
        return tree_page(self.names, self.edges, sure=_WEAK, title=title)


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'


def lineage(sketches: Sequence[NetworkSketch], *, unrelated: float = UNRELATED) -> Lineage:
    """Return which networks were made of which.

    Networks are compared in tensors of the same name and shape, see :func:`sne_fast.similarity.sketch_distances`.
    Networks whose units were permuted, or whose tensors were renamed, have no near ones.

    Args:
        sketches: of N networks, with names of their own.
        unrelated: networks that are not nearer than this to any other are roots.

    Raises:
        ValueError: two networks of one name, or `unrelated` outside of (0, 1.4].

    Example:
        >>> from sne_fast.similarity import sketch
        >>> net = torch.nn.Linear(20, 20)
        >>> pruned = {name: t * (t.abs() > 0.1) for name, t in net.state_dict().items()}
        >>> found = lineage([sketch(pruned, name="pruned"), sketch(net, name="net")])
        >>> found.edges[0].parent, found.edges[0].child, found.edges[0].relation
        ('net', 'pruned', 'prune')
    """
    names = tuple(sketch.name for sketch in sketches)
    if len(set(names)) < len(names):
        twice = next(name for k, name in enumerate(names) if name in names[:k])
        raise ValueError(f"lineage: networks must have names of their own, got {twice!r} twice")
    if not 0 < unrelated <= 1.4:
        raise ValueError(f"lineage: unrelated must lie in (0, 1.4], got {unrelated!r}")
    edges: list[tuple[int, Edge]] = []
    for group in sharing(sketches):
        own = [sketches[k] for k in group]
        edges += [(group[child], edge) for child, edge in _edges(own, unrelated)]
    return Lineage(names, tuple(edge for _, edge in sorted(edges, key=lambda pair: pair[0])))


def _edges(sketches: Sequence[NetworkSketch], unrelated: float) -> list[tuple[int, Edge]]:
    """Return the edges among networks, each with the place of its child."""
    distance, evidence = sketch_distances(sketches).distance, _evidence(sketches)
    parents: dict[int, list[int]] = {}
    graph = networkx.Graph(np.argwhere(np.triu(distance < unrelated, 1)).tolist())
    for members in networkx.connected_components(graph):
        rows = sorted(members)
        merged = _merged(rows, distance, sketches)
        parents.update(_tree(rows, distance, evidence, unrelated, merged, sketches))
        parents.update(merged)
    edges = []
    for child in sorted(parents):
        own = parents[child]
        for parent in own:
            one, other, apart = sketches[parent], sketches[child], float(distance[parent, child])
            relation = "merge" if len(own) > 1 else _relation(one, other, apart)
            sure = 1.0 if len(own) > 1 else max(0.0, float(evidence[parent, child]))
            edges.append((child, Edge(one.name, other.name, relation, apart, sure)))
    return edges


def _evidence(sketches: Sequence[NetworkSketch]) -> np.ndarray:
    """Return how much speaks for row being the parent of column, `(N, N)` in [-1, 1], antisymmetric."""
    zeros, levels, norm, kurtosis = (
        np.array([getattr(sketch, of) for sketch in sketches]) for of in ("zeros", "levels", "norm", "kurtosis")
    )
    strong = np.sign(_further(zeros, _ZEROS)) - np.sign(_further(levels, _LEVELS))
    with np.errstate(divide="ignore", invalid="ignore"):
        weak = _WEAK * np.sign(norm - norm[:, None]) + _WEAK * np.sign(kurtosis - kurtosis[:, None])
    weak = np.nan_to_num(weak)
    return np.where(strong != 0, _STRONG * np.clip(strong, -1, 1), weak)


def _further(values: np.ndarray, least: float) -> np.ndarray:
    apart = values - values[:, None]
    return np.where(np.abs(apart) > least, apart, 0.0)


def _tree(
    rows: list[int],
    distance: np.ndarray,
    evidence: np.ndarray,
    unrelated: float,
    merged: dict[int, list[int]],
    sketches: Sequence[NetworkSketch],
) -> dict[int, list[int]]:
    """Return the parent of every network of a family that has one: the spanning tree of least cost from outside."""
    costs: dict[tuple[int, int], float] = {}
    inside = distance[np.ix_(rows, rows)]
    finest = max(sketches[k].levels for k in rows)
    rounded = {k for k in rows if sketches[k].levels < finest - _LEVELS}  # nothing trained is rounded still
    spread = dict(zip(rows, np.median(inside, axis=1).tolist(), strict=True))
    for v in rows:
        for u in rows:
            near = u != v and distance[u, v] < unrelated
            if not near or evidence[u, v] <= -_STRONG or v in merged.get(u, ()) or {u, v} <= rounded:
                continue
            apart = distance[u, v]
            if sketches[v].zeros - sketches[u].zeros > _ZEROS:
                apart = min(apart, _left_apart(sketches[u], sketches[v]))
            sure = min(evidence[u, v], 2 * _WEAK) + _WEAK * float(np.sign(spread[v] - spread[u]))
            # A mean stands half-way between its parents, and so nearer to what was made of them than their parent.
            costs[u, v] = (apart + _LEAST) * (1 - sure / 2) * (2 if u in merged else 1)
    # Children of one parent are about as far from each other as from it, so that of nearly equal candidates the one
    # that many networks are near to is the parent.
    least: dict[int, float] = {}
    for (_, v), cost in costs.items():
        least[v] = min(cost, least.get(v, np.inf))
    votes = Counter(u for (u, v), cost in costs.items() if cost <= (1 + _TIE) * least[v])
    most = max(votes.values(), default=1)
    graph = networkx.DiGraph()
    for v in rows:
        graph.add_edge(-1, v, weight=unrelated)
    for (u, v), cost in costs.items():
        graph.add_edge(u, v, weight=cost * (1 + _TIE * (1 - votes[u] / most)))
    tree = networkx.minimum_spanning_arborescence(graph)
    return {v: [u] for u, v in tree.edges if u >= 0}


def _left_apart(parent: NetworkSketch, child: NetworkSketch) -> float:
    """Return the relative distance of the sampled weights of which the child's are not zero."""
    apart = whole = 0.0
    for name in sorted(_alike(parent, child)):
        one, other = parent.tensors[name], child.tensors[name]
        share = one.size / len(one.sample)
        left = other.sample != 0
        apart += share * float(((one.sample - other.sample)[left].astype(np.float64) ** 2).sum())
        whole += share * float((other.sample.astype(np.float64) ** 2).sum())
    missing = sum(t.squares for name, t in child.compared.items() if name not in _alike(parent, child))
    apart, whole = apart + missing, whole + missing
    return (apart / whole) ** 0.5 if whole > 0 else 0.0


def _merged(rows: list[int], distance: np.ndarray, sketches: Sequence[NetworkSketch]) -> dict[int, list[int]]:
    """Return both parents of the networks that are the means of two others."""
    found: dict[int, list[int]] = {}
    for v in rows:
        near = [u for u in sorted(rows, key=lambda u: distance[u, v])[: _NEIGHBOURS + 1] if u != v]
        best = (_MERGED, -1, -1)
        for i, a in enumerate(near):
            for b in near[i + 1 :]:
                names = sorted(_alike(sketches[v], sketches[a]) & _alike(sketches[v], sketches[b]))
                whole, one, other = (joined(sketches[k], names) for k in (v, a, b))
                apart = np.linalg.norm(one - other)
                if apart > 1e-6 * np.linalg.norm(whole):
                    best = min(best, (float(np.linalg.norm(whole - (one + other) / 2) / apart), a, b))
        if best[1] >= 0:
            found[v] = [best[1], best[2]]
    return found


def _alike(one: NetworkSketch, other: NetworkSketch) -> set[str]:
    theirs = other.compared
    return {name for name, t in one.compared.items() if name in theirs and theirs[name].shape == t.shape}


def _relation(parent: NetworkSketch, child: NetworkSketch, distance: float) -> str:
    shapes: list[Any] = [{name: t.shape for name, t in sketch.tensors.items()} for sketch in (parent, child)]
    if shapes[0] != shapes[1]:
        return "head"
    if distance == 0:
        return "copy"
    if child.zeros - parent.zeros > _ZEROS:
        return "prune"
    if parent.levels - child.levels > _LEVELS:
        return "round"
    return "train"

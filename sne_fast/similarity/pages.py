"""HTML pages of many networks: one file each, which fetches nothing and shows names as they are.

A page is `templates/page.html` around the body and the script of its kind. What is known of the networks stands in it
as JSON, which the script reads and shows as text. The page's security policy allows that script and style alone, by
their digests, so that a name which got into the markup could neither run code nor load anything.
"""

from __future__ import annotations

import base64
import hashlib
import html
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.resources import files
from string import Template
from typing import Any

import numpy as np

from ..atomic_files import to_json
from ..failures import utf8
from ..zoo.csv_table import one_type
from .edges import Edge

_DEEPEST = 100
"""Depth from which on the networks of a tree are no longer nested, but follow each other."""
_LARGEST_EXACT = 2**53
_ESCAPES = str.maketrans({character: f"\\u{ord(character):04x}" for character in "<>&"})


class _Template(Template):
    delimiter = "@@"


def page(kind: str, title: str, data: Any) -> str:
    """Return an HTML page.

    Args:
        kind: "map" or "tree", whose body and script are beside this module.
        title: as plain text.
        data: what `to_json` takes.
    """
    script, style = _template("page.js") + _template(f"{kind}.js"), _template("page.css")
    return _Template(_template("page.html")).substitute(
        kind=kind,
        title=html.escape(utf8(title)),
        policy=f"default-src 'none'; script-src {_digest(script)}; style-src {_digest(style)}; base-uri 'none'; "
        "form-action 'none'",
        style=style,
        body=_template(f"{kind}.html"),
        data=to_json(data, indent=None).translate(_ESCAPES),
        script=script,
    )


def _template(name: str) -> str:
    return (files(__package__) / "templates" / name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def map_page(
    positions: Any,
    names: Sequence[str],
    columns: Mapping[str, Sequence[Any]] | None = None,
    *,
    title: str = "Map of networks",
    colour: str | None = None,
    neighbours: Any = None,
) -> str:
    """Return an interactive map of networks as an HTML page, one file that needs no network.

    It shows the name and the columns of a network, colours networks by any column, finds them by name, and zooms.

    Args:
        positions: `(N, 2)`, as :func:`sne_fast.similarity.layout` returns them.
        names: of the N networks.
        columns: what is known of the networks by the name of the column, N values each: numbers are colours of a scale,
            anything else groups. None and NaN are values that are not known.
        title: of the page.
        colour: the column that colours them at first; None takes the first one.
        neighbours: places of the nearest networks of each, `(N, k)`, as :func:`sne_fast.similarity.nearest` returns
            them; None shows none.

    Raises:
        ValueError: positions, columns or neighbours that are not those of N networks, or an unknown `colour`.

    Example:
        >>> z = torch.randn(20, 8)
        >>> text = map_page(layout(z), [f"net{i}" for i in range(20)], {"accuracy": torch.rand(20).tolist()})
        >>> text.startswith("<!doctype html>")
        True
    """
    places, near = np.asarray(positions, np.float64), None if neighbours is None else np.asarray(neighbours)
    known = {name: _listed(values) for name, values in (columns or {}).items()}
    if places.shape != (len(names), 2) or not np.isfinite(places).all():
        raise ValueError(f"map_page: positions must be finite, ({len(names)}, 2) for as many names, got {places.shape}")
    for name, values in known.items():
        if len(values) != len(names):
            raise ValueError(f"map_page: the column {name!r} must have {len(names)} values, has {len(values)}")
    if near is not None and (near.ndim != 2 or len(near) != len(names)):
        raise ValueError(f"map_page: neighbours must be ({len(names)}, k), got {near.shape}")
    if near is not None and near.size and not (near.dtype.kind in "iu" and 0 <= near.min() <= near.max() < len(names)):
        raise ValueError(f"map_page: neighbours must be places of the {len(names)} networks")
    if colour is not None and colour not in known:
        raise ValueError(f"map_page: colour must be a column, one of {', '.join(known)}; got {colour!r}")
    data = {
        "names": [utf8(name) for name in names],
        "x": _rounded(places[:, 0]),
        "y": _rounded(places[:, 1]),
        "columns": [_column(name, values) for name, values in known.items()],
        "colour": list(known).index(colour) if colour is not None else 0 if known else -1,
        "near": None if near is None else near.tolist(),
    }
    return page("map", title, data)


def _listed(values: Any) -> list[Any]:
    """Return the values of a sequence, an array or a tensor."""
    return list(values.tolist() if hasattr(values, "tolist") else values)


def _rounded(values: np.ndarray) -> list[float]:
    return [float(f"{value:.6g}") for value in values]


def plain_column(values: Sequence[Any]) -> list[Any]:
    """Return values of one type, numbers or text, None for what is not known.

    Truth values are text, and so are integers that the numbers of JavaScript would round.
    """
    plain = [value.item() if isinstance(value, np.generic) else value for value in values]
    plain = [value if isinstance(value, bool | int | float | str | None) else str(value) for value in plain]
    found = one_type(plain)
    if any(isinstance(value, int) and abs(value) > _LARGEST_EXACT for value in found):
        return [None if value is None else str(value) for value in found]
    return [str(value).lower() if isinstance(value, bool) else value for value in found]


def _column(name: str, values: Sequence[Any]) -> dict[str, Any]:
    """Return a column as the page reads it; of groups, the largest first, each network has the place."""
    plain = plain_column(values)
    if not any(isinstance(value, str) for value in plain):
        return {"name": utf8(name), "kind": "number", "values": plain}
    counts = Counter(value for value in plain if value is not None)
    groups = sorted(counts, key=lambda group: (-counts[group], group))
    place = {group: k for k, group in enumerate(groups)}
    codes = [None if value is None else place[value] for value in plain]
    return {"name": utf8(name), "kind": "group", "groups": [utf8(group) for group in groups], "values": codes}


def tree_page(names: Sequence[str], edges: Sequence[Edge], *, sure: float, title: str = "Lineage of networks") -> str:
    """Return the trees of networks as an HTML page, one file that needs no network; see `Lineage.html`.

    Args:
        names: of all networks.
        edges: between them.
        sure: the evidence below which the direction of an edge is shown as a guess.
        title: of the page.
    """
    rows = _rows(names, edges)
    shown = {row["network"] for row in rows}
    alone = [k for k in range(len(names)) if k not in shown]
    families = sum(row["edge"] is None for row in rows)
    data = {
        "names": [utf8(name) for name in names],
        "edges": [
            {"relation": edge.relation, "distance": edge.distance, "evidence": edge.evidence,
             "guess": edge.evidence < sure}
            for edge in edges
        ],
        "rows": rows,
        "alone": alone,
        "summary": f"{families:,} tree{'s' * (families != 1)} of {len(shown):,} networks, {len(alone):,} without "
        "relatives",
    }  # fmt: skip
    return page("tree", title, data)


def _rows(names: Sequence[str], edges: Sequence[Edge]) -> list[dict[str, Any]]:
    """Return the networks that have relatives, each followed by its children one level deeper.

    Edges are named by their places. A network of two parents is below both, and its own children below the first
    alone: `again` marks the second. Trees are in order of their sizes.
    """
    place = {name: k for k, name in enumerate(names)}
    children: dict[int, list[tuple[int, int]]] = {}
    for k, edge in enumerate(edges):
        children.setdefault(place[edge.parent], []).append((place[edge.child], k))
    made = {place[edge.child] for edge in edges}
    # Means of two networks might close a circle, which is entered at any of its networks.
    starts = [k for k in children if k not in made] + sorted(children)
    seen: set[int] = set()
    trees: list[list[dict[str, Any]]] = []
    for start in starts:
        if start in seen:
            continue
        rows: list[dict[str, Any]] = []
        left: list[tuple[int, int, int | None]] = [(start, 0, None)]
        while left:
            network, depth, at = left.pop()
            rows.append({"network": network, "depth": depth, "edge": at, "again": network in seen})
            if network not in seen:
                seen.add(network)
                below = min(depth + 1, _DEEPEST)
                left += [(child, below, k) for child, k in reversed(children.get(network, []))]
        trees.append(rows)
    return [row for rows in sorted(trees, key=len, reverse=True) for row in rows]

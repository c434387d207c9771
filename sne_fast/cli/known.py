"""What is known of networks besides their vectors: from a table of the user, from zoos, and from their paths."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path, PurePath
from typing import Any, NamedTuple

TABLE_KEYS = ("uri", "file", "path", "checkpoint", "filename", "name")


class Known(NamedTuple):
    """Columns of a table, in the order of some networks.

    Args:
        columns: values of every network, None where it is not known.
        missing: number of networks that the table does not name.
    """

    columns: dict[str, list[Any]]
    missing: int


def known_in_table(file: Path, names: Sequence[str]) -> Known:
    """Return the columns of a CSV table for networks.

    The first of the columns `TABLE_KEYS` names the networks, by paths as they are, relative to the table or to the
    working folder, or by the names of their files, with or without suffix, where one network alone has that name.

    Args:
        file: the table, `.csv` or `.csv.gz`.
        names: paths of the networks.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a damaged table, one without such a column, or that names a network twice or none of them.
    """
    from ..zoo.csv_table import read_csv

    table = read_csv(file, text=TABLE_KEYS)
    key = next((key for key in TABLE_KEYS if key in table), None)
    if key is None:
        raise ValueError(
            f"{file}: must have a column that names the networks, one of {', '.join(TABLE_KEYS)}; it has "
            f"{', '.join(table)}"
        )
    row_of: dict[str, int] = {}
    for row, cell in enumerate(table[key]):
        if not cell:
            continue
        if cell in row_of:
            raise ValueError(f"{file}: the column {key!r} names {cell!r} twice")
        row_of[cell] = row
    for cell, row in list(row_of.items()):
        row_of.setdefault(os.path.abspath(file.parent / cell), row)
        row_of.setdefault(os.path.abspath(cell), row)
    files, stems = (Counter(of(name) for name in names) for of in (_file, _stem))
    rows = []
    for name in names:
        spellings = [name, os.path.abspath(name)]
        spellings += [of(name) for of, counts in ((_file, files), (_stem, stems)) if counts[of(name)] == 1]
        rows.append(next((row_of[one] for one in spellings if one in row_of), None))
    missing = rows.count(None)
    if missing == len(names):
        raise ValueError(f"{file}: the column {key!r} names none of the networks, such as {names[0]!r}")
    columns = {name: values for name, values in table.items() if name != key}
    return Known({name: [None if r is None else values[r] for r in rows] for name, values in columns.items()}, missing)


def _file(name: str) -> str:
    return PurePath(name).name


def _stem(name: str) -> str:
    return PurePath(name).stem


def known_in_zoos(names: Sequence[str]) -> dict[str, list[Any]]:
    """Return the columns of the zoos that networks are from, without name and weights.

    Raises:
        ValueError: the index of a zoo is damaged.
    """
    from ..embedding.manifests import network_at
    from ..zoo.table import ZooNetwork

    columns: dict[str, list[Any]] = {}
    for i, name in enumerate(names):
        network = network_at(name)
        row = network.row if isinstance(network, ZooNetwork) else {}
        for column, value in row.items():
            if column not in ("name", "weights"):
                columns.setdefault(column, [None] * len(names))[i] = value
    return columns


def within(names: Sequence[str]) -> tuple[str, list[str]]:
    """Return the folder that all networks are in, "" for none, and their paths inside it.

    Example:
        >>> from sne_fast.cli.known import within
        >>> within(["/data/zoo/a/net.pt", "/data/zoo/b/net.pt"])
        ('/data/zoo', ['a/net.pt', 'b/net.pt'])
    """
    parts = [name.split("/") for name in names]
    levels = zip(*(own[:-1] for own in parts), strict=False)
    depth = sum(1 for _ in takewhile(lambda level: len(set(level)) == 1, levels))
    return "/".join(parts[0][:depth]), ["/".join(own[depth:]) for own in parts]

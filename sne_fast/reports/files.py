"""Tables of results as files."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..atomic_files import replacing


def write_csv(path: Path, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Write a CSV file with a header line, whole or not at all."""
    with replacing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(columns)
        writer.writerows(rows)


def distinct_columns(columns: Sequence[str]) -> list[str]:
    """Return the names of a table's columns, those that would be there twice numbered.

    Example:
        >>> distinct_columns(["name", "accuracy", "name"])
        ['name', 'accuracy', 'name (2)']
    """
    found: list[str] = []
    for i, column in enumerate(columns):
        number, label = 1, column
        while label in found or (number > 1 and label in columns[i:]):
            number += 1
            label = f"{column} ({number})"
        found.append(label)
    return found

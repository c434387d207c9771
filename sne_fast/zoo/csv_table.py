"""Reading of CSV files as columns of plain values."""

from __future__ import annotations

import csv
import gzip
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_UNKNOWN = {"", "nan", "none", "null", "na", "n/a", "inf", "-inf"}


def parse_cell(text: str) -> int | float | str | None:
    """Return the value of a cell: an int, a float or the text; None if it is empty or not finite."""
    if text.strip().lower() in _UNKNOWN:
        return None
    for kind in (int, float):
        try:
            value = kind(text)
        except ValueError:
            continue
        return value if math.isfinite(value) else None
    return text


def one_type(values: Sequence[Any]) -> list[Any]:
    """Return a column with values of one type: text if any value is text, else floats if any value is a float."""
    known = [value for value in values if value is not None]
    if any(isinstance(value, str) for value in known):
        return [None if value is None else str(value) for value in values]
    if any(isinstance(value, float) for value in known):
        return [None if value is None else float(value) for value in values]
    return list(values)


def read_csv(file: Path, text: Sequence[str] = ()) -> dict[str, list[Any]]:
    """Read the columns of a `.csv` or `.csv.gz` file; a column without a name (row numbers of pandas) is left out.

    Args:
        file: the file.
        text: columns that stay text, also where they look like numbers.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no header, or a line that does not have one cell per column.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file}: there is no such file")
    opener = gzip.open if file.suffix == ".gz" else open
    try:
        with opener(file, "rt", newline="", encoding="utf-8") as stream:  # type: ignore[operator]
            reader = csv.reader(stream)
            header = next(reader, None)
            if not header:
                raise ValueError(f"{file}: holds no header line")
            cells: list[list[str]] = [[] for _ in header]
            for line in reader:
                if not line:
                    continue
                if len(line) != len(header):
                    raise ValueError(f"{file}: line {reader.line_num} does not have one cell per column")
                for column, cell in zip(cells, line, strict=True):
                    column.append(cell)
    except (gzip.BadGzipFile, EOFError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: is damaged or no CSV file: {error}") from error
    return {
        name: list(column) if name in text else one_type([parse_cell(cell) for cell in column])
        for name, column in zip(header, cells, strict=True)
        if name
    }

"""Reading of CSV files as columns of plain values, each column of one type."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..regular_files import FileError, decode, read_bytes, read_gzip
from .index import MAX_CELLS

MAX_CSV_BYTES = 2**30
"""Largest CSV file that is read, decompressed."""

# The spellings of a missing number that pandas and pyarrow read as one, and numbers that are not finite.
_MISSING = {"", "NA", "N/A", "#N/A", "#N/A N/A", "#NA", "n/a", "<NA>", "NULL", "null"}
_NOT_FINITE = re.compile(r"[+-]?(nan|inf|infinity)", re.IGNORECASE)
# A number whose text can be had back from it: 007 and 12345678901234567890 are names made of digits.
_INTEGER = re.compile(r"0|-?[1-9][0-9]*")
_NUMBER = re.compile(r"[+-]?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?")


def column_of(cells: Sequence[str]) -> list[int] | list[float] | list[str] | list[Any]:
    """Return a column of cells as values of one type, as read_csv describes it.

    Example:
        >>> from sne_fast.zoo.csv_table import column_of
        >>> column_of(["1", "", "3"]), column_of(["0.5", "NA", "nan"]), column_of(["12", "x", "NA"])
        ([1, None, 3], [0.5, None, None], ['12', 'x', 'NA'])
    """
    stripped = [cell.strip(" \t") for cell in cells]
    known = [cell for cell in stripped if cell not in _MISSING]
    finite = [cell for cell in known if not _NOT_FINITE.fullmatch(cell)]
    if known or not any(stripped):
        if len(finite) == len(known) and all(map(_is_int64, finite)):
            return [None if cell in _MISSING else int(cell) for cell in stripped]
        if all(map(_is_float64, finite)):
            missing = (cell in _MISSING or _NOT_FINITE.fullmatch(cell) for cell in stripped)
            return [None if skip else float(cell) for skip, cell in zip(missing, stripped, strict=True)]
    return [cell or None for cell in cells]


def _is_int64(cell: str) -> bool:
    return len(cell) <= 20 and _INTEGER.fullmatch(cell) is not None and -(2**63) <= int(cell) < 2**63


def _is_float64(cell: str) -> bool:
    if len(cell) > 400 or not _NUMBER.fullmatch(cell) or not math.isfinite(float(cell)):
        return False
    return not _INTEGER.fullmatch(cell) or int(cell) == float(cell)


def one_type(values: Sequence[Any]) -> list[Any]:
    """Return values with one type: text if any value is text, else floats if any value is a float, else integers.

    Truth values stay such among their like, and are numbers among numbers; a number that is not finite is None.
    """
    finite = [None if isinstance(value, float) and not math.isfinite(value) else value for value in values]
    known = [value for value in finite if value is not None]
    for kind in (str, float):
        if any(isinstance(value, kind) for value in known):
            return [None if value is None else kind(value) for value in finite]
    if all(isinstance(value, bool) for value in known):
        return finite
    return [None if value is None else int(value) for value in finite]


def read_csv(file: Path, text: Sequence[str] = (), *, max_bytes: int = MAX_CSV_BYTES) -> dict[str, list[Any]]:
    """Read the columns of a `.csv` or `.csv.gz` file, in UTF-8 with or without a byte order mark.

    A column whose cells are all integers of 64 bits, or all finite decimal numbers, holds those; in it None stands for
    an empty cell, NA or null as pandas writes them, and a number that is not finite. If one cell is anything else,
    every cell of the column is text as it is written (an empty one None): also names that look like numbers but could
    not be had back from them, such as 0012345 and 12e4567. A first column without a name (row numbers of pandas) is
    left out.

    Args:
        file: the file.
        text: columns that stay text as it is written, also where all of it looks like numbers.
        max_bytes: the greatest size of the file, decompressed.

    Raises:
        FileNotFoundError: no such file.
        FileError: no regular file, too large or damaged; no header, a column without a name or a name used twice; a
            quote that is not closed, or a line that does not have one cell per column.
    """
    if not file.exists():
        raise FileNotFoundError(f"{file}: there is no such file")
    read = read_gzip if file.suffix == ".gz" else read_bytes
    stream = io.StringIO(decode(read(file, max_bytes=max_bytes), str(file)), newline="")
    reader = csv.reader(stream, strict=True)
    try:
        header = next(reader, None)
        if not header:
            raise FileError(f"{file}: holds no header line")
        _check_header(header, file)
        cells: list[list[str]] = [[] for _ in header]
        left = MAX_CELLS
        for line in reader:
            if not line:
                continue
            if len(line) != len(header):
                raise FileError(f"{file}: line {reader.line_num} does not have one cell per column")
            left -= len(line)
            if left < 0:
                raise FileError(f"{file}: holds more than the limit of {MAX_CELLS} cells")
            for column, cell in zip(cells, line, strict=True):
                column.append(cell)
    except csv.Error as error:
        raise FileError(f"{file}: line {reader.line_num} is damaged or no CSV: {error}") from error
    return {
        name: column if name in text else column_of(column) for name, column in zip(header, cells, strict=True) if name
    }


def _check_header(header: Sequence[str], file: Path) -> None:
    seen = set()
    for k, name in enumerate(header):
        if name.strip() == "" and (k or name or len(header) == 1):
            raise FileError(f"{file}: column {k + 1} has no name in the header line")
        if name in seen:
            raise FileError(f"{file}: two columns are called {name!r}")
        seen.add(name)

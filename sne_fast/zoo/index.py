"""The index of a zoo on disk, a parquet file with one row per network, and the description beside it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..atomic_files import replacing
from ..extras import require
from ..regular_files import FileError, open_regular, read_json

INDEX = "index.parquet"
ABOUT = "zoo.json"
PLACE = ("shard", "position")
MAX_CELLS = 50_000_000
"""Most cells of a table that is read; as Python values they take a few gigabytes."""


def _parquet() -> Any:
    require("pyarrow.parquet", extra="parquet", why="the index of a zoo, a parquet file,")
    import pyarrow.parquet

    return pyarrow


def write_index(columns: Mapping[str, list[Any]], file: Path) -> None:
    """Write columns of plain values as a parquet file, whole or not at all.

    Raises:
        ValueError: a column that mixes numbers and text.
    """
    arrow = _parquet()
    arrays = {}
    for name, values in columns.items():
        try:
            arrays[name] = arrow.array(values)
        except (arrow.ArrowInvalid, arrow.ArrowTypeError, OverflowError) as error:
            raise ValueError(f"zoo: the column {name!r} must hold values of one type: {error}") from error
    with replacing(file) as temporary:
        arrow.parquet.write_table(arrow.table(arrays), temporary)


def read_index(file: Path) -> dict[str, list[Any]]:
    """Read the columns of an index that `write_index` wrote.

    Raises:
        FileError: the file is damaged, too large, or no regular file.
        ModuleNotFoundError: pyarrow is missing.
    """
    arrow = _parquet()
    try:
        with open_regular(file) as stream, arrow.parquet.ParquetFile(stream) as opened:
            names = opened.schema_arrow.names
            if opened.metadata.num_rows * len(names) > MAX_CELLS:
                raise FileError(f"it holds more than the limit of {MAX_CELLS} cells")
            if len(set(names)) < len(names):
                raise FileError("it has two columns of one name")
            # Threads of Arrow that still hold bytes of a Python stream when the interpreter ends abort the process.
            return opened.read(use_threads=False).to_pydict()
    # A damaged file also shows as errors of Python's own conversions, of text that is not UTF-8 and of dates.
    except (arrow.ArrowException, OSError, ValueError, TypeError, LookupError, ArithmeticError) as error:
        raise FileError(f"Zoo.open: {file} is damaged or no parquet file: {error}") from error


def check_columns(file: Path, columns: Mapping[str, list[Any]]) -> None:
    """Check that an index has what every zoo's has, of plain values, and names shards inside its folder.

    Raises:
        FileError: a column is missing, a name or number is none, a shard is no plain name, or a value is not plain.
    """
    missing = {"name", "weights", *PLACE} - set(columns)
    if missing:
        raise FileError(f"Zoo.open: {file} lacks the column(s) {', '.join(sorted(missing))}")
    for shard in set(columns["shard"]):
        if not isinstance(shard, str) or not shard or any(c in shard for c in "/\\:\0") or shard.startswith("."):
            raise FileError(f"Zoo.open: {file} names the shard {shard!r}, which is no plain name")
    for column in ("position", "weights"):
        if not all(type(number) is int and 0 <= number < 2**63 for number in columns[column]):
            raise FileError(f"Zoo.open: {file}, column {column!r} must hold integers of at least 0")
    if not all(isinstance(name, str) for name in columns["name"]):
        raise FileError(f"Zoo.open: {file}, column 'name' must hold text")
    for column, values in columns.items():
        odd = next((value for value in values if not isinstance(value, str | int | float | None)), None)
        if odd is not None:
            raise FileError(
                f"Zoo.open: {file}, column {column!r} must hold numbers or text, holds a {type(odd).__name__}"
            )


def read_about(file: Path) -> dict[str, Any]:
    """Read the description of a zoo; one without a file has none.

    Raises:
        FileError: the file is damaged, or lists columns otherwise than by their names.
    """
    try:
        about: dict[str, Any] = read_json(file, dict)
    except FileNotFoundError:
        return {}
    for key in ("targets", "hyperparameters"):
        names = about.get(key, [])
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise FileError(f"{file}: {key!r} must list names of columns, got {names!r:.80}")
    return about

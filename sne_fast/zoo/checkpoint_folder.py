"""Your own networks as a zoo: a folder of checkpoints and a CSV file with what is known of each."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path

from ..data.checkpoints import CheckpointError
from .csv_table import read_csv
from .table import FileSource, Zoo

FILE_COLUMNS = ("file", "path", "checkpoint", "filename")


def load_checkpoints(
    folder: str | PathLike[str],
    table: str = "index.csv",
    *,
    file_column: str | None = None,
    targets: Sequence[str] = (),
) -> Zoo:
    """Read a folder of checkpoints with a CSV table, one row per network, as a zoo.

    A checkpoint is anything that :func:`sne_fast.data.checkpoints.load_state_dict` reads: a file of safetensors or
    of `torch.save`, an index of shards, or a folder with one of these. No code of a file runs.

    Args:
        folder: the folder of the files that the table names.
        table: the CSV (or `.csv.gz`) file, relative to `folder` or absolute.
        file_column: the column with the files, relative to `folder`; by default the first of `file`, `path`,
            `checkpoint`, `filename` that the table has.
        targets: columns to predict, kept in `zoo.about`.

    Returns:
        A zoo whose rows hold the columns of the table and a `name`: its column `name` where that is unique, else the
        path of the file with "-" for "/". A column is numbers if every cell of it is one, with None where a cell is
        empty or NaN; else it is text as it is written. `verify` needs `build`, `measure` and `column`.

    Raises:
        FileNotFoundError: the table, or a file that it names, is missing.
        ValueError: a damaged table, one without rows, no column with files, or a target that is not a column.

    Example:
        >>> zoo = load_checkpoints("runs", "results.csv", targets=["accuracy"])
        >>> zoo.rows[2]
        {'name': 'net2.safetensors', 'width': 4, 'accuracy': 0.2}
    """
    folder = Path(folder)
    columns = read_csv(folder / table, text=("name", *FILE_COLUMNS, *((file_column,) if file_column else ())))
    chosen = file_column or next((name for name in FILE_COLUMNS if name in columns), None)
    if chosen is None or chosen not in columns:
        raise ValueError(
            f"{folder / table}: must have a column with the files ({file_column or ', '.join(FILE_COLUMNS)}); it has "
            f"{', '.join(columns)}"
        )
    if not columns[chosen]:
        raise ValueError(f"{folder / table}: holds no rows")
    absent = [target for target in targets if target not in columns]
    if absent:
        raise ValueError(f"{folder / table}: has no column {absent[0]!r} for a target; it has {', '.join(columns)}")
    if any(not file.strip() for file in columns[chosen]):
        raise ValueError(f"{folder / table}: the column {chosen!r} must name a file in every row")
    files = [folder / file for file in columns[chosen]]
    for file in files:
        if not file.exists():
            raise FileNotFoundError(f"{folder / table} names {file!s:.300}, which is missing")
    if "name" not in columns or len(set(columns["name"])) < len(files) or any("/" in n for n in columns["name"]):
        columns["name"] = [str(file).replace("/", "-").replace("\\", "-") for file in columns[chosen]]
        if len(set(columns["name"])) < len(files):
            raise ValueError(f"{folder / table}: every file may appear in one row only")
    others = {name: values for name, values in columns.items() if name not in ("name", chosen, "weights")}
    about = {"source": "checkpoints", "targets": list(targets), "hyperparameters": []}
    return Zoo({"name": columns["name"], **others}, FileSource(files), about, folder)


def refuse_dataset(file: Path, advice: str) -> CheckpointError:
    """Return the error for a pickled data set, which would run code of its classes if it were loaded."""
    return CheckpointError(
        f"{file}: refused, a pickled data set holds objects of foreign classes besides tensors, and a pickle's code "
        f"would run on loading; {advice}"
    )

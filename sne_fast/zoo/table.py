"""A zoo on disk: one safetensors file per network, and `index.csv` saying what each of them is."""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    import numpy as np

INDEX = "index.csv"
ABOUT = "zoo.json"


def _cell(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


class Zoo:
    """Networks in a folder with a table of what is known about each.

    `rows` is a list with one dict per network: `name`, `file` (relative to the folder), and whatever the maker
    recorded; numbers are numbers. `about` is the maker's own description of the whole.

        zoo = Zoo.open("zoo")
        batch = encoder.pack(zoo.paths)
        accuracy = zoo.column("test_accuracy")
    """

    def __init__(self, folder: str | PathLike[str], rows: Sequence[dict[str, Any]], about: dict[str, Any]) -> None:
        self.folder = Path(folder)
        self.rows = list(rows)
        self.about = dict(about)

    @classmethod
    def open(cls, folder: str | PathLike[str]) -> Zoo:
        """Read the table of a zoo; networks are read when asked for.

        Raises:
            FileNotFoundError: no zoo in `folder`.
            ValueError: the table lacks `name` or `file`, or a row is cut short.
        """
        folder = Path(folder)
        if not (folder / INDEX).is_file():
            raise FileNotFoundError(f"Zoo.open: {folder} holds no {INDEX}")
        with open(folder / INDEX, newline="", encoding="utf-8") as stream:
            reader = csv.DictReader(stream)
            missing = {"name", "file"} - set(reader.fieldnames or ())
            if missing:
                raise ValueError(f"Zoo.open: {folder / INDEX} lacks the column(s) {', '.join(sorted(missing))}")
            rows = []
            for line, raw in enumerate(reader, start=2):
                if None in raw or None in raw.values():
                    raise ValueError(f"Zoo.open: {folder / INDEX} line {line} does not have one cell per column")
                rows.append({k: v if k in ("name", "file") else _cell(v) for k, v in raw.items()})
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8")) if (folder / ABOUT).is_file() else {}
        return cls(folder, rows, about)

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        return f"Zoo({str(self.folder)!r}, {len(self)} networks)"

    @property
    def paths(self) -> list[Path]:
        """The file of every network, in the order of the table."""
        return [self.folder / row["file"] for row in self.rows]

    def state_dict(self, i: int) -> dict[str, Tensor]:
        """The weights of network `i` in their module's order."""
        from ..checkpoints import load_state_dict

        return load_state_dict(self.folder / self.rows[i]["file"])

    def column(self, name: str) -> np.ndarray:
        """One column of the table, float64 where it holds numbers only, else objects.

        Raises:
            KeyError: no such column.
        """
        import numpy as np

        if self.rows and name not in self.rows[0]:
            raise KeyError(f"{self.folder / INDEX} has no column {name!r}; it has {', '.join(self.rows[0])}")
        values = [row[name] for row in self.rows]
        numeric = all(isinstance(v, (int, float)) for v in values)
        return np.array(values, dtype=np.float64 if numeric else object)


class ZooWriter:
    """Writes networks one by one and the table last, so that a folder with a table is a whole zoo.

    A context manager; when the block raises, no table is written.
    """

    def __init__(self, folder: str | PathLike[str], **about: Any) -> None:
        self.folder = Path(folder)
        if (self.folder / INDEX).exists():
            raise FileExistsError(f"{self.folder} holds a zoo already; choose another folder or remove it")
        (self.folder / "networks").mkdir(parents=True, exist_ok=True)
        self.about = about
        self.rows: list[dict[str, Any]] = []

    def add(self, name: str, state_dict: dict[str, Tensor], row: dict[str, Any]) -> None:
        """Write one network and remember its row; `name` becomes the file's name.

        Raises:
            ValueError: a number in the row is not finite, or the columns differ from the first network's.
        """
        from ..checkpoints import save_state_dict

        entry = {"name": name, "file": f"networks/{name}.safetensors", **row}
        for key, value in entry.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"zoo: {key} of {name} must be finite, got {value}")
        if self.rows and list(entry) != list(self.rows[0]):
            raise ValueError(f"zoo: {name} must have the columns {list(self.rows[0])}, got {list(entry)}")
        save_state_dict(state_dict, self.folder / entry["file"])
        self.rows.append(entry)

    def __enter__(self) -> ZooWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None or not self.rows:
            return
        about = {**self.about, "torch": torch.__version__}
        (self.folder / ABOUT).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
        partial = self.folder / f".{INDEX}.partial"
        try:
            with open(partial, "w", newline="", encoding="utf-8") as stream:
                writer = csv.DictWriter(stream, fieldnames=list(self.rows[0]))
                writer.writeheader()
                writer.writerows(self.rows)
            os.replace(partial, self.folder / INDEX)
        finally:
            partial.unlink(missing_ok=True)

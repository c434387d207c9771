"""What lies beside a checkpoint, of which a folder of thousands is looked at once."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

from ..remote.paths import RemotePath

__all__ = ["beside", "files_in", "folders_in"]

_ENDINGS = (".json", ".data", "_data")
_SETTLED = 2_000_000_000
"""Nanoseconds after which a folder's time of change tells what is in it: two changes at once may have one time."""


def beside(file: Path, names: Iterable[str]) -> list[Path]:
    """Return the files of these names in the folder of a file.

    Args:
        file: in that folder; need not be there.
        names: those that end in `.json`, `.data` or `_data`.
    """
    if isinstance(file, RemotePath):
        names = list(names)
        file.parent.look_at(names)
        return [other for name in names if (other := file.parent / name).is_file()]
    folder = os.path.dirname(file)
    try:
        changed = os.stat(folder or ".").st_mtime_ns
    except OSError:
        return []
    if time.time_ns() - changed > _SETTLED:
        there = _names(folder, changed)
        names = [name for name in names if name in there]
    return [other for name in names if (other := file.parent / name).is_file()]


def files_in(folder: Path) -> list[str]:
    """Return the names of what is in a folder and no folder, in no order; raises OSError where it cannot be listed."""
    if isinstance(folder, RemotePath):
        return [entry.name for entry in folder.iterdir() if not entry.is_dir()]
    with os.scandir(folder) as entries:  # which knows what they are without asking for each
        return [entry.name for entry in entries if not entry.is_dir()]


def folders_in(folder: Path) -> list[Path]:
    """Return the folders in a folder in order of their names, without links and hidden ones; raises as `files_in`."""
    if isinstance(folder, RemotePath):
        found = [entry for entry in folder.iterdir() if entry.is_dir()]
    else:
        with os.scandir(folder) as entries:
            found = [folder / entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
    return sorted(entry for entry in found if not entry.name.startswith("."))


@lru_cache(maxsize=64)
def _names(folder: str, changed: int) -> frozenset[str]:
    """Return the names in a folder that anything is looked for, as they were at a time of change."""
    return frozenset(name for name in os.listdir(folder or ".") if name.endswith(_ENDINGS))

"""Files that appear whole or not at all: written under a temporary name in the same folder, then renamed."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path that becomes ``path`` when the block ends, and is removed when it raises.

    The temporary file lies in the folder of ``path``, since a rename cannot cross file systems, and is flushed to the
    disk before the rename. Readers of ``path`` see the old content or all of the new. The temporary name is hidden and
    ends in ``.tmp`` instead of the suffix of ``path``, so that no search for files takes a leftover for a result;
    writers that choose a format by the suffix must be told the format.

    Args:
        path: the file to write or to replace; its folder must exist.

    Raises:
        OSError: the folder cannot be written, or ``path`` is a folder.

    Example::

        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> with replacing(folder / "numbers.txt") as temporary:
        ...     _ = temporary.write_text("1 2 3")
        >>> [file.name for file in folder.iterdir()]
        ['numbers.txt']
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as created:
            mode = os.fstat(created.fileno()).st_mode & 0o777
        yield temporary
        os.chmod(temporary, mode)  # some writers, safetensors for one, leave files that only their owner may read
        with open(temporary, "rb+") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def filling(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder whose files move into ``folder`` when the block ends; it is removed when it raises.

    A ``folder`` that does not exist appears whole, by one rename; files of one that exists are replaced one by one
    after all new ones are on the disk, and its other files stay.

    Args:
        folder: the folder to make or to fill; its parent must exist.

    Raises:
        OSError: the folder or its parent cannot be written.
    """
    exists = folder.exists()
    stage = (folder if exists else folder.parent) / f".{folder.name}.{secrets.token_hex(4)}.tmp"
    stage.mkdir()
    try:
        yield stage
        files = sorted(stage.iterdir())
        for file in files:
            with open(file, "rb+") as written:
                os.fsync(written.fileno())
        if exists:
            for file in files:
                os.replace(file, folder / file.name)
        else:
            os.rename(stage, folder)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Write ``content`` to ``path``, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` in UTF-8, whole or not at all."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, content: Any) -> None:
    """Write ``content`` to ``path`` as indented JSON with a final newline, whole or not at all.

    Raises:
        TypeError: ``content`` holds what JSON cannot; ``path`` is left as it was.
    """
    write_text(path, json.dumps(content, indent=2) + "\n")

"""Files that appear whole or not at all: written under a temporary name in the same folder, then renamed."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .file_locks import close, take

TEMPORARY = re.compile(r"\..*\.[0-9a-f]{8}\.tmp")
"""Names of the hidden folders in which files are written before they are renamed."""
_CONTENT, _LOCK = "content", "lock"
_LONGEST = 200
"""Bytes of a file's name that go into a temporary one; file systems allow 255."""

_MANY = 1000
"""Files in a folder from which on it is not searched for leftovers at every write."""

_next_look: dict[str, float] = {}


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path that becomes ``path`` when the block ends, and is removed when it raises.

    The temporary file lies in a hidden folder beside ``path``, since a rename cannot cross file systems, and is flushed
    to the disk before the rename, the folder of ``path`` after it. Readers of ``path`` see the old content or all of
    the new. The temporary file has no suffix, so that no search for files takes a leftover for a result; writers that
    choose a format by the suffix must be told the format. What writers that were killed have left beside ``path`` is
    removed.

    Args:
        path: the file to write or to replace; its folder must exist.

    Raises:
        OSError: the folder cannot be written, the disk is full, or ``path`` is there and no regular file; the error
            names ``path``.

    Example::

        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> with replacing(folder / "numbers.txt") as temporary:
        ...     _ = temporary.write_text("1 2 3")
        >>> [file.name for file in folder.iterdir()]
        ['numbers.txt']
    """
    if path.exists() and not path.is_file():
        kind, code = ("a folder", errno.EISDIR) if path.is_dir() else ("no regular file", errno.EINVAL)
        raise OSError(code, f"cannot be written, it is {kind}", str(path))
    with _staging(path.parent, path) as temporary:
        with open(temporary, "xb") as created:
            mode = os.fstat(created.fileno()).st_mode & 0o777
        yield temporary
        os.chmod(temporary, mode)  # some writers, safetensors for one, leave files that only their owner may read
        _sync_file(temporary)
        os.replace(temporary, path)
        sync_folder(path.parent)


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
    with _staging(folder if exists else folder.parent, folder) as stage:
        stage.mkdir()
        yield stage
        files = sorted(stage.iterdir())
        for file in files:
            _sync_file(file)
        if exists:
            for file in files:
                os.replace(file, folder / file.name)
            sync_folder(folder)
        else:
            sync_folder(stage)
            os.rename(stage, folder)
            sync_folder(folder.parent)


@contextmanager
def _staging(beside: Path, target: Path) -> Iterator[Path]:
    """Yield a path in a hidden folder in `beside` that other writers leave alone while this process lives.

    Errors about the path are turned into ones about `target`.
    """
    remove_leftovers(beside)
    name = os.fsdecode(os.fsencode(target.name)[:_LONGEST])
    stage: Path | None = None
    try:
        while True:
            stage = beside / f".{name}.{secrets.token_hex(4)}.tmp"
            stage.mkdir()
            try:
                lock = take(stage / _LOCK)
            except FileNotFoundError:  # another writer took it for a leftover, before it was locked
                continue
            if lock is not None:
                break
        try:
            yield stage / _CONTENT
        finally:
            shutil.rmtree(stage, ignore_errors=True)
            close(lock)
    except OSError as error:
        if error.errno is not None and (error.filename is None or _inside(error.filename, stage)):
            error.filename, error.filename2 = str(target), None
        raise


def _inside(path: Any, stage: Path | None) -> bool:
    return stage is not None and isinstance(path, (str, bytes, os.PathLike)) and str(stage) in os.fsdecode(path)


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files in a folder whose writers have died; every write in that folder does it too.

    In a folder of very many files looking is put off for a while, so that it takes at most a hundredth of the time.
    """
    key, start = os.fspath(folder), time.monotonic()
    if start < _next_look.get(key, 0.0):
        return
    try:
        names = os.listdir(folder)
    except OSError:  # whoever writes there is told
        return
    for stage in (Path(folder, name) for name in names if TEMPORARY.fullmatch(name)):
        try:
            lock = take(stage / _LOCK, certain=True)
        except OSError:
            continue
        if lock is not None:
            shutil.rmtree(stage, ignore_errors=True)
            close(lock)
    if len(names) > _MANY:
        now = time.monotonic()
        _next_look[key] = now + 100 * (now - start)


def _sync_file(path: Path) -> None:
    with open(path, "rb+") as written:
        os.fsync(written.fileno())


def sync_folder(folder: Path) -> None:
    """Flush the names of a folder's files to the disk, where the platform can."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:  # a folder that may be written but not read, or Windows
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


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
        TypeError, ValueError: as `to_json`; ``path`` is left as it was.
    """
    write_text(path, to_json(content) + "\n")


def to_json(content: Any, indent: int | None = 2, default: Callable[[Any], Any] | None = None) -> str:
    """Return ``content`` as JSON that every reader takes: NaN and infinities, which JSON does not have, are null.

    Args:
        content: dicts, lists, strings, numbers, truth values and None.
        indent: spaces of each level; None writes one line.
        default: turns anything else into one of these.

    Raises:
        TypeError: ``content`` holds what JSON cannot.
        ValueError: ``content`` is nested too deeply, or holds itself.

    Example::

        >>> to_json({"r2": float("nan"), "mae": 0.5}, indent=None)
        '{"r2": null, "mae": 0.5}'
    """
    try:
        return json.dumps(_finite(content), indent=indent, allow_nan=False, default=default)
    except RecursionError:
        raise ValueError("to_json: the content is nested too deeply, or holds itself") from None


def _finite(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content

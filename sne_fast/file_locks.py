"""Locks on files, which the kernel releases when their process ends, in whatever way it ends."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path

from .regular_files import read_json

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_held: set[int] = set()


def _forget() -> None:
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    # A child shares the locks of its parent, and would keep them after the parent's death.
    os.register_at_fork(after_in_child=_forget)


def take(path: Path, *, certain: bool = False) -> int | None:
    """Make a lock file if it is missing, lock it, and return its descriptor; None if another one holds the lock.

    Two calls exclude each other also in one process. `release` removes the file while it is locked, so a file that is
    there without a lock was left by a process that died.

    Args:
        path: the lock file; its folder must exist.
        certain: count the lock as held where the file system or the platform has no locks; without it, as free.

    Raises:
        OSError: the file cannot be made.
    """
    while True:
        # O_NONBLOCK for a FIFO of that name, which would be waited for.
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NONBLOCK", 0), 0o666)
        try:
            free = _lock(descriptor)
            if free is None:
                free = not certain
            if not free:
                os.close(descriptor)
                return None
            there = os.path.samestat(os.fstat(descriptor), os.stat(path))
        except FileNotFoundError:
            there = False
        except BaseException:
            os.close(descriptor)
            raise
        if there:
            _held.add(descriptor)
            return descriptor
        os.close(descriptor)  # the former holder removed the file between opening and locking


def release(path: Path, descriptor: int) -> None:
    """Remove a lock file that `take` returned, and release its lock."""
    if descriptor in _held:
        path.unlink(missing_ok=True)
        close(descriptor)


def close(descriptor: int) -> None:
    """Release a lock whose file is removed already."""
    if descriptor in _held:  # not in a child after a fork
        _held.discard(descriptor)
        os.close(descriptor)


def _lock(descriptor: int) -> bool | None:
    """Lock an open file and return True, False if another one holds it, or None where there are no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


@contextmanager
def holding(lock: Path, what: str, remedy: str) -> Iterator[None]:
    """Hold a lock for the `with` block, and say in its file who holds it.

    Args:
        lock: the lock file, removed at the end; its folder is made.
        what: the subject of the error's sentence, such as "fit: checkpoint 'fit.pt'".
        remedy: what else can be done than to wait, such as "give another path".

    Raises:
        BlockingIOError: another process, or another thread of this one, holds it; the message names the holder.
        OSError: the lock file cannot be written.

    Example::

        >>> import tempfile
        >>> lock = Path(tempfile.mkdtemp()) / ".lock"
        >>> with holding(lock, "the folder", "give another"):
        ...     print(lock.exists())
        True
        >>> lock.exists()
        False
    """
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        descriptor = take(lock)
        if descriptor is not None:
            _sign(lock, descriptor)
    except OSError as error:
        failed = type(error)(f"{what} cannot be written: {error.strerror or error}; {remedy}")
        failed.errno = error.errno
        raise failed from error
    if descriptor is None:
        raise BlockingIOError(f"{what} is in use by {_holder(lock)}; wait until that ends, or {remedy}")
    try:
        yield
    finally:
        release(lock, descriptor)


def _sign(lock: Path, descriptor: int) -> None:
    since = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")
    signature = {"pid": os.getpid(), "host": socket.gethostname(), "since": since}
    try:
        os.ftruncate(descriptor, 0)
        os.write(descriptor, json.dumps(signature).encode())
    except BaseException:
        release(lock, descriptor)
        raise


def _holder(lock: Path) -> str:
    try:
        found = read_json(lock, dict, max_bytes=4096)
        return f"process {int(found['pid'])} on {str(found['host'])!r:.80} since {found['since']!s:.40}"
    except (OSError, ValueError, KeyError, TypeError):  # it is being written, or has just been removed
        return "another process"

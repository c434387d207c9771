"""The error of every reader, and values of files shown in messages."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...regular_files import FileError
from ..remote.failures import StoreError

__all__ = ["CheckpointError", "Unreachable", "reading", "shown", "shown_list"]

_MAX_SHOWN = 60  # characters of a name from a file


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, refused, or holds no weights; the message names the file."""


class Unreachable(CheckpointError):
    """A file elsewhere that may be whole, and could not be read."""


def shown(value: Any) -> str:
    """Return a name from a file for a message: in quotes, on one line and of bounded length."""
    if isinstance(value, bytes):
        value = value[: _MAX_SHOWN + 1].decode("latin1")
    if isinstance(value, str):
        return repr(value if len(value) <= _MAX_SHOWN else value[:_MAX_SHOWN] + "...")
    if isinstance(value, int | float | None) and (not isinstance(value, int) or value.bit_length() < 64):
        return repr(value)
    return f"a key of type {type(value).__name__}"


def shown_list(values: Iterable[Any], limit: int = 8) -> str:
    """Return names from a file for a message, the first few of them."""
    names = list(values)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(shown(name) for name in names[:limit]) + more


@contextmanager
def reading(file: Path) -> Iterator[None]:
    """Turn what the system says of a file, and files that are no regular ones, into a `CheckpointError`."""
    try:
        yield
    except StoreError as error:
        raise Unreachable(str(error)) from error
    except FileError as error:
        raise CheckpointError(str(error)) from error
    except FileNotFoundError as error:
        raise CheckpointError(f"{file}: there is no such file") from error
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror or error}") from error

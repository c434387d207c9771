"""Reading of files from outside: regular files only, of bounded size, with errors that name the file.

A path that a user or another file names may be a FIFO, on which an ordinary `open` waits for ever, a device without an
end, or a file whose damage shows as any exception of a parser. The functions here open nothing but regular files,
read no more than a limit, and raise `FileError`, or the `OSError` of the system (`FileNotFoundError`,
`PermissionError`), which also names the file.
"""

from __future__ import annotations

import gzip
import io
import json
import math
import os
import stat
import zlib
from os import PathLike
from typing import IO, Any, Literal, cast, overload

__all__ = [
    "MAX_BYTES",
    "FileError",
    "ForeignFile",
    "check_regular",
    "decode",
    "open_regular",
    "parse_json",
    "read_bytes",
    "read_gzip",
    "read_json",
    "read_small",
    "read_text",
]

MAX_BYTES = 64 * 2**20
"""Largest text or JSON file that is read, unless a call says otherwise."""
MAX_DEPTH = 64
"""Deepest nesting of arrays and objects in JSON."""
_MAX_DIGITS = 300  # of an integer in JSON; a float64 ends at 309
_PIECE = 2**20  # bytes decompressed at once

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)
_JSON_NAMES: dict[type, str] = {dict: "a JSON object", list: "a JSON list", str: "a JSON string"}


class FileError(ValueError):
    """A file that is no regular file, too large, damaged or of another form; the message names it."""


class ForeignFile(PathLike[str]):
    """Base of paths of files that are not on this machine, and open themselves."""

    def open_bytes(self) -> IO[bytes]:
        """Open the file for reading; raises FileError, or FileNotFoundError."""
        raise NotImplementedError


@overload
def open_regular(path: str | PathLike[str], mode: Literal["rb"] = "rb", *, encoding: None = None) -> IO[bytes]: ...
@overload
def open_regular(
    path: str | PathLike[str], mode: Literal["r"], *, encoding: str = "utf-8", newline: str | None = None
) -> IO[str]: ...


def open_regular(
    path: str | PathLike[str],
    mode: Literal["rb", "r"] = "rb",
    *,
    encoding: str | None = None,
    newline: str | None = None,
) -> IO[Any]:
    """Open a regular file for reading, without ever waiting for it.

    Links are followed; a `ForeignFile` opens itself. A FIFO, device, socket or folder is refused before it is opened,
    and once more after, in case it took the file's place in between.

    Args:
        path: the file.
        mode: "rb", or "r" for text.
        encoding: of text, UTF-8 by default.
        newline: as of the built-in `open`.

    Raises:
        FileError: `path` is no regular file.
        OSError: the file is missing or may not be read.

    Example:
        >>> from sne_fast.regular_files import FileError, open_regular
        >>> try:
        ...     open_regular("/dev/zero")
        ... except FileError as error:
        ...     print(error)
        /dev/zero: must be a regular file, is a device
    """
    if mode not in ("rb", "r"):
        raise ValueError(f"open_regular: mode must be 'rb' or 'r', got {mode!r}")
    name = os.fsdecode(path)
    if isinstance(path, ForeignFile):
        opened = path.open_bytes()
        if mode == "rb":
            return opened
        return io.TextIOWrapper(io.BufferedReader(cast(io.RawIOBase, opened)), encoding=encoding, newline=newline)

    def opener(file: str, flags: int) -> int:
        descriptor = os.open(file, flags | os.O_NONBLOCK | os.O_NOCTTY)
        try:
            _check_kind(os.fstat(descriptor), name)
        except FileError:
            os.close(descriptor)
            raise
        return descriptor

    check_regular(name)
    if mode == "rb":
        return open(name, "rb", opener=opener)
    return open(name, encoding=encoding or "utf-8", newline=newline, opener=opener)


def check_regular(path: str | PathLike[str]) -> None:
    """Check that a path is a regular file, for libraries that open files themselves.

    Raises:
        FileError: it is something else.
        OSError: there is nothing, or it may not be looked at.
    """
    name = os.fsdecode(path)
    if isinstance(path, ForeignFile):
        raise FileError(f"{name}: must be a file on this machine; download it")
    try:
        _check_kind(os.stat(name), name)
    except FileError:
        raise
    except ValueError as error:  # a path with a NUL character, or with one that no file system can name
        raise FileError(f"{name!r}: cannot be the path of a file: {error}") from error


def _check_kind(found: os.stat_result, name: str) -> None:
    if not stat.S_ISREG(found.st_mode):
        kind = next((text for is_kind, text in _KINDS if is_kind(found.st_mode)), "something else")
        raise FileError(f"{name}: must be a regular file, is {kind}")


def read_bytes(path: str | PathLike[str], *, max_bytes: int = MAX_BYTES) -> bytes:
    """Return the content of a regular file of at most `max_bytes`.

    Raises:
        FileError: `path` is no regular file, or larger.
        OSError: the file is missing or cannot be read.
    """
    with open_regular(path) as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise FileError(f"{os.fsdecode(path)}: is larger than the limit of {max_bytes} bytes")
    return content


def read_small(path: str, max_bytes: int) -> bytearray | None:
    """Return the content of a regular file by as few calls of the system as there can be; None for any other.

    Args:
        path: the file.
        max_bytes: its greatest size.

    Returns:
        None too for a file that is larger, empty, missing or changes meanwhile: a reader with messages says what of it.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            return None
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except (OSError, ValueError):
        return None
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode) or not 0 < found.st_size <= max_bytes:
            return None
        content = bytearray(found.st_size)
        view, done = memoryview(content), 0
        while done < len(content):
            piece = os.readv(descriptor, [view[done:]])
            if not piece:
                return None
            done += piece
        return content
    except OSError:
        return None
    finally:
        os.close(descriptor)


def read_gzip(path: str | PathLike[str], *, max_bytes: int = MAX_BYTES) -> bytes:
    """Return the decompressed content of a regular gzip file, at most `max_bytes` of it in memory.

    Raises:
        FileError: `path` is no regular file, is damaged or truncated, or decompresses to more.
        OSError: the file is missing or cannot be read.
    """
    name = os.fsdecode(path)
    pieces, size = [], 0
    with open_regular(path) as file:
        try:
            with gzip.GzipFile(fileobj=file, mode="rb") as stream:
                while piece := stream.read(_PIECE):
                    size += len(piece)
                    if size > max_bytes:
                        raise FileError(f"{name}: decompresses to more than the limit of {max_bytes} bytes")
                    pieces.append(piece)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise FileError(f"{name}: is damaged or no gzip file: {error}") from error
    return b"".join(pieces)


def read_text(path: str | PathLike[str], *, max_bytes: int = MAX_BYTES) -> str:
    """Return the text of a regular file in UTF-8, without the byte order mark that it may begin with.

    Raises:
        FileError: `path` is no regular file, larger than `max_bytes`, or not UTF-8.
        OSError: the file is missing or cannot be read.
    """
    return decode(read_bytes(path, max_bytes=max_bytes), os.fsdecode(path))


def decode(content: bytes, where: str) -> str:
    """Return bytes in UTF-8 as text, without a byte order mark.

    Raises:
        FileError: the bytes are not UTF-8; the message begins with `where`.
    """
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise FileError(f"{where}: is not text in UTF-8, byte {error.start} is no character of it") from error


def read_json(
    path: str | PathLike[str],
    kind: type | tuple[type, ...] = object,
    *,
    max_bytes: int = MAX_BYTES,
    max_depth: int = MAX_DEPTH,
    nonfinite: bool = False,
) -> Any:
    """Read a regular file of JSON in UTF-8, with or without a byte order mark.

    Args:
        path: the file.
        kind: what it must hold: `dict`, `list`, or several types.
        max_bytes: its greatest size.
        max_depth: the deepest nesting of arrays and objects in it.
        nonfinite: accept NaN and Infinity, which Python writes and JSON does not have, and numbers above float64.

    Raises:
        FileError: `path` is no regular file, too large, no JSON or of another kind; a number that is not finite; a
            name that an object has twice, of which one value would be lost; half of a surrogate pair in a string.
        OSError: the file is missing or cannot be read.

    Example:
        >>> import pathlib
        >>> from sne_fast.regular_files import read_json
        >>> _ = pathlib.Path("numbers.json").write_text("[1, 2.5]")
        >>> read_json("numbers.json", list)
        [1, 2.5]
    """
    name = os.fsdecode(path)
    text = read_text(path, max_bytes=max_bytes)
    return parse_json(text, name, kind, max_depth=max_depth, nonfinite=nonfinite)


def parse_json(
    text: str,
    where: str,
    kind: type | tuple[type, ...] = object,
    *,
    max_depth: int = MAX_DEPTH,
    nonfinite: bool = False,
) -> Any:
    """Parse JSON that is part of a file, such as one of its lines; see `read_json`.

    Args:
        text: the JSON.
        where: the file, and the place in it, with which messages begin.
        kind: what it must hold.
        max_depth: the deepest nesting of arrays and objects.
        nonfinite: accept NaN, Infinity, and numbers above float64.

    Raises:
        FileError: as `read_json`.
    """

    def number(digits: str) -> float:
        value = float(digits)
        if not math.isfinite(value):
            raise ValueError(f"{digits[:40]} is no finite number")
        return value

    def integer(digits: str) -> int:
        if len(digits) > _MAX_DIGITS:
            raise ValueError(f"a number has {len(digits)} digits")
        return int(digits)

    parsers: dict[str, Any] = {} if nonfinite else {"parse_float": number, "parse_constant": number}
    try:
        content = json.loads(text, object_pairs_hook=_object, parse_int=integer, **parsers)
    except RecursionError:
        raise FileError(f"{where}: is nested too deeply, more than {max_depth} levels") from None
    except ValueError as error:
        raise FileError(f"{where}: is not valid JSON: {error}") from error
    _check_depth(content, where, max_depth)
    if "\\u" in text:
        try:
            json.dumps(content, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError as error:
            raise FileError(f"{where}: is not valid JSON: a string has half of a surrogate pair") from error
    if not isinstance(content, kind):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        wanted = " or ".join(_JSON_NAMES.get(one, one.__name__) for one in kinds)
        raise FileError(f"{where}: must hold {wanted}, holds {_shown_kind(content)}")
    return content


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for name, value in pairs:
        if name in content:
            raise ValueError(f"an object has the name {name!r:.80} twice")
        content[name] = value
    return content


def _check_depth(content: Any, where: str, max_depth: int) -> None:
    level = [content]
    for _ in range(max_depth):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return
    raise FileError(f"{where}: is nested too deeply, more than {max_depth} levels")


def _shown_kind(content: Any) -> str:
    if content is None or isinstance(content, bool):
        return json.dumps(content)
    return "a number" if isinstance(content, int | float) else _JSON_NAMES[type(content)]

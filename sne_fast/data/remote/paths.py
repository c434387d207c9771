"""Paths of files elsewhere, with what of `pathlib.Path` the readers of checkpoints use."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import IO, Any, cast
from urllib.parse import unquote, urlsplit

from ...regular_files import ForeignFile
from .failures import StoreError, refuse_credentials, scrubbed
from .files import Content, RemoteFile
from .http_store import HttpStore
from .hub_store import forget_repositories, hub_store
from .ranges import RANGES
from .remembered import Remembered
from .stores import Entry, FsspecStore, Store

__all__ = ["RemotePath", "forget", "is_remote", "place"]

_URL = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]+)://(?P<rest>.*)", re.DOTALL)
_CHAIN = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*::.*://", re.DOTALL)  # other names with :: are those of files
_ROOT = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://[^/]*")
_MOST_FILES = 16  # of a folder that are fetched ahead
_DEEPEST = 32  # folder inside others; a link to a folder around it has no end
_LARGEST = 2**50  # bytes of a file; the number of its weights must fit into an int64

_stores: Remembered[Store] = Remembered(256)


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Return whether a path is a URL of something that is not on this machine."""
    text = os.fsdecode(path)
    found = _URL.match(text)
    local = found is None or found["scheme"].lower() in ("file", "local")
    return not local or _CHAIN.match(text) is not None


def place(path: str | os.PathLike[str]) -> Path:
    """Return the path of a source: a `Path` for one on this machine, a `RemotePath` for a URL.

    A `RemotePath` is no `Path`, but has what of it the readers here use, so it is one to the checker of types.

    Raises:
        StoreError: a URL that cannot be read or has credentials in it, a repository or revision that is not there.
        ModuleNotFoundError: a package is missing.
    """
    text = os.fsdecode(path)
    if isinstance(path, RemotePath):
        return cast(Path, path)
    found = _URL.match(text)
    if _CHAIN.match(text) or (found is not None and "::" in text):
        raise StoreError(f"{scrubbed(text)}: refused, chains of stores are not read; give the URL of the file itself")
    if found is None:
        return Path(text)
    scheme = found["scheme"].lower()
    if scheme in ("file", "local"):
        if scheme == "file" and urlsplit(text).netloc not in ("", "localhost"):
            raise StoreError(f"{text}: must be a path on this machine from its root, as file:///folder/file")
        return Path(unquote(urlsplit(text).path) if scheme == "file" else found["rest"])
    refuse_credentials(text)
    if scheme == "hf":
        return cast(Path, RemotePath(*hub_store(text)))
    root = _ROOT.match(text)
    assert root is not None
    if scheme in ("http", "https"):
        text, mark, query = text.partition("?")
        inside = text[len(root[0]) :].lstrip("/")
        return cast(Path, RemotePath(_stores.get(root[0], lambda: HttpStore(root[0])), inside, mark + query))
    inside = text[len(root[0]) :].strip("/")
    return cast(Path, RemotePath(_stores.get(root[0], lambda: FsspecStore(root[0])), inside))


def forget() -> None:
    """Look at all stores anew from here on."""
    forget_repositories()
    _stores.forget()


def _start_anew() -> None:
    """Make a forked process ask for itself: requests of its parent end there, and locks may be held for ever."""
    forget_repositories()
    _stores.forget()
    RANGES.forget()


os.register_at_fork(after_in_child=_start_anew)


class RemotePath(ForeignFile):
    """A file or folder of a store.

    Args:
        store: where it is.
        inside: its path there; a folder of a web server ends with a slash.
        query: the parameters of a web address.
    """

    def __init__(self, store: Store, inside: str, query: str = "") -> None:
        self.store, self.inside, self.query = store, inside, query

    def __str__(self) -> str:
        return self.store.url(self.inside) + self.query

    def __fspath__(self) -> str:
        return str(self)

    def __repr__(self) -> str:
        return f"RemotePath({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemotePath) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))

    def __lt__(self, other: RemotePath) -> bool:
        return str(self) < str(other)

    def __truediv__(self, name: str | os.PathLike[str]) -> RemotePath:
        parts = [part for part in os.fsdecode(name).split("/") if part not in ("", ".")]
        if ".." in parts:
            raise StoreError(f"{self}: has no {os.fsdecode(name)!r} inside")
        return RemotePath(self.store, "/".join([*filter(None, [self.inside.rstrip("/")]), *parts]))

    @property
    def name(self) -> str:
        """Last part."""
        return self.inside.rstrip("/").rpartition("/")[2]

    @property
    def suffix(self) -> str:
        """Ending of the name."""
        return PurePosixPath(self.name).suffix

    @property
    def parent(self) -> RemotePath:
        """Folder that it is in; the root is its own."""
        folder, slash, _ = self.inside.rstrip("/").rpartition("/")
        return RemotePath(self.store, folder + ("" if self.store.lists else slash))

    def exists(self) -> bool:
        """Return whether there is something."""
        return self._is_folder() is not None

    def is_file(self) -> bool:
        """Return whether it is a file."""
        return self._is_folder() is False

    def is_dir(self) -> bool:
        """Return whether it is a folder."""
        return self._is_folder() is True

    def is_symlink(self) -> bool:
        """Return False: stores have no links."""
        return False

    def stat(self) -> Any:
        """Return an object with `st_size`."""
        return SimpleNamespace(st_size=self._found().size)

    def etag(self) -> str:
        """Return a text that changes when the file does, by its size and what the store says of its version."""
        return self._found().etag

    def iterdir(self) -> Iterator[RemotePath]:
        """Yield what is in the folder, in order of the names; raises StoreError for one that is too deep in others."""
        if self.inside.count("/") > _DEEPEST:
            raise StoreError(f"{self}: refused, is more than {_DEEPEST} folders deep; does a link lead back?")
        for name, entry in sorted(self.store.listing(self.inside.rstrip("/")).items()):
            inside = (self / name).inside
            yield RemotePath(self.store, f"{inside}/" if entry.is_folder and not self.store.lists else inside)

    def rglob(self, pattern: str) -> Iterator[RemotePath]:
        """Yield all that is in the folder and in folders inside it; the pattern must be "*"."""
        assert pattern == "*"
        for entry in self.iterdir():
            yield entry
            if entry.is_dir():
                yield from entry.rglob(pattern)

    def look_at(self, names: Iterable[str]) -> None:
        """Find out at once which files of these names are in the folder."""
        self.store.look_at([(self / name).inside for name in names])

    def list_tree(self) -> None:
        """Ask the store once for all folders inside this one, for what is asked of them after."""
        self.store.list_tree(self.inside.rstrip("/"))

    def relative_to(self, other: RemotePath) -> PurePosixPath:
        """Return the path inside a folder that it is in."""
        return PurePosixPath(self.inside).relative_to(PurePosixPath(other.inside))

    def open_bytes(self) -> IO[bytes]:
        """Open the file for reading by ranges.

        Raises:
            FileNotFoundError: there is no such file.
            StoreError: it is a folder, or the store cannot be reached.
        """
        entry = self._found()
        if entry.is_folder:
            raise StoreError(f"{self}: must be a file, is a folder")
        return cast(IO[bytes], RemoteFile(Content(self.store, self.inside + self.query, entry)))

    def fetch_small(self) -> None:
        """Fetch the beginning of a file, or all of a small one, for who reads it next; list a folder.

        Raises:
            FileNotFoundError, StoreError: as `open_bytes`.
        """
        entry = self._found()
        if entry.is_folder:
            files = (file for file in self.iterdir() if file.suffix == ".safetensors")
            for file in itertools.islice(files, _MOST_FILES):
                file.fetch_small()
        else:
            Content(self.store, self.inside + self.query, entry).fetch_small()

    def _is_folder(self) -> bool | None:
        return self.store.is_folder(self.inside + self.query)

    def _entry(self) -> Entry | None:
        return self.store.entry(self.inside + self.query)

    def _found(self) -> Entry:
        entry = self._entry()
        if entry is None:
            raise FileNotFoundError(f"{self}: there is no such file")
        if entry.size < 0:
            raise StoreError(f"{self}: the store does not say how large the file is")
        if entry.size > _LARGEST:
            raise StoreError(f"{self}: refused, the store says that it holds more than {_LARGEST:,} bytes")
        return entry

"""Stores of files elsewhere: what is in a folder, how large and how old it is, and ranges of bytes of it."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterable, Sequence
from threading import Lock
from typing import Any, NamedTuple

from ...extras import require
from .failures import StoreError, Truncated, attempt
from .remembered import Remembered

__all__ = ["HEAD", "Entry", "FsspecStore", "Store", "need"]

HEAD = 2**18
"""Bytes that are read of a file at first: all of a small network, the header of most others."""
_SECONDS = 60.0  # for which a listing counts
_MOST_LISTINGS = 100_000
# What stores say by which a change is seen, the content before times.
_VERSIONS = (
    "ETag", "etag", "sha256", "md5Hash", "md5", "content_md5", "generation", "LastModified", "last_modified",
    "modified", "mtime", "updated", "created",
)  # fmt: skip


def need(*modules: str) -> None:
    """Check that packages which the extra `remote` installs are there."""
    require(*modules, extra="remote", why="reading from elsewhere")


class Entry(NamedTuple):
    """A file or folder of a store: its size in bytes, -1 if not known, and a text that changes when it does."""

    size: int
    etag: str
    is_folder: bool = False


FOLDER = Entry(0, "", True)
Listing = dict[str, Entry]


class Store:
    """A place with files, each known by its path inside.

    Attributes:
        root: the URL of the place, without a slash at the end.
        lists: whether folders can be listed; where they cannot, files are asked for one by one.
    """

    lists = True

    def __init__(self, root: str) -> None:
        self.root = root
        self.listings: Remembered[Listing] = Remembered(_MOST_LISTINGS, _SECONDS)

    def url(self, path: str) -> str:
        """Return the URL of a path, for messages and manifests."""
        return f"{self.root}/{path}" if path else self.root

    def entry(self, path: str) -> Entry | None:
        """Return what is at a path, None if there is nothing.

        Raises:
            StoreError: the store cannot be asked.
        """
        folder, _, name = path.rpartition("/")
        if not path:
            return self.root_entry()
        try:
            return self.listing(folder).get(name)
        except FileNotFoundError:
            return None

    def look_at(self, paths: Sequence[str]) -> None:
        """Find out what is at some paths, at once where each takes a request; errors are left to who asks next."""

    def is_folder(self, path: str) -> bool | None:
        """Return whether there is a folder at a path, None if there is nothing; raises as `entry`."""
        entry = self.entry(path)
        return None if entry is None else entry.is_folder

    def root_entry(self) -> Entry | None:
        """Return what the root itself is."""
        return FOLDER

    def listing(self, folder: str) -> Listing:
        """Return what is in a folder, by name.

        Raises:
            FileNotFoundError: there is no such folder.
            StoreError: the store cannot be asked.
        """
        return self.listings.get(folder, lambda: attempt(self.url(folder), lambda: self.find_listing(folder)))

    def list_tree(self, folder: str) -> None:
        """Look at a folder and all folders inside it at once, for the listings that follow.

        Raises:
            FileNotFoundError, StoreError: as `listing`.
        """
        for inside, listing in attempt(self.url(folder), lambda: self.find_tree(folder)).items():
            self.listings.put(inside, listing)

    def find_listing(self, folder: str) -> Listing:
        """Ask the store for the files and folders in a folder."""
        raise NotImplementedError

    def find_tree(self, folder: str) -> dict[str, Listing]:
        """Ask the store for the listings of a folder and of all inside it."""
        raise NotImplementedError

    def read(self, path: str, entry: Entry, start: int, count: int) -> bytes:
        """Return `count` bytes of a file from `start` on.

        Raises:
            StoreError: the store cannot be reached, or sends other bytes than it should.
            FileNotFoundError: the file is gone.
        """
        url = self.url(path)

        def checked() -> bytes:
            found = self.find_range(path, entry, start, count)
            if len(found) < count:
                raise Truncated(f"{url}: is cut short: the store sent {len(found)} of {count} bytes")
            if len(found) > count:
                raise StoreError(f"{url}: the store sent {len(found)} bytes where {count} were asked for")
            return found

        return attempt(url, checked)

    def find_range(self, path: str, entry: Entry, start: int, count: int) -> bytes:
        """Ask the store for a range of a file."""
        raise NotImplementedError


class FsspecStore(Store):
    """A store that fsspec knows: S3, Google Cloud Storage, Azure, SFTP, memory and others.

    Args:
        root: scheme and first name of the URL.

    Raises:
        ModuleNotFoundError: fsspec, or the package for this scheme, is missing; the message says which.
        StoreError: a scheme that fsspec does not have, or settings that are missing.
    """

    def __init__(self, root: str) -> None:
        need("fsspec")
        import fsspec

        super().__init__(root)
        scheme = root.partition("://")[0]
        try:
            self.fs, self.inside = fsspec.core.url_to_fs(root)
        except ImportError as error:
            raise ModuleNotFoundError(f"{scheme}:// needs a package of its own: {error}") from error
        except ValueError as error:
            raise StoreError(f"{root}: cannot be opened: {error}") from error
        # Stores without a loop of their own may have one connection, which threads must not share.
        self._alone: Any = contextlib.nullcontext() if getattr(self.fs, "async_impl", False) else Lock()

    def root_entry(self) -> Entry | None:
        """Return what the root itself is: the first name of a URL may be a file."""

        def found() -> Listing:
            with self._alone:
                return {"": self._entry(self.fs.info(self.inside))}

        try:
            return self.listings.get(None, lambda: attempt(self.root, found))[""]
        except FileNotFoundError:
            return None

    def find_listing(self, folder: str) -> Listing:
        """Ask the store, past what fsspec remembers."""
        place = self._place(folder)
        with self._alone:
            self.fs.invalidate_cache()
            infos = self.fs.ls(place, detail=True)
        own = place.strip("/")
        named = [(str(info["name"]).strip("/"), info) for info in infos]
        return {name.rpartition("/")[2]: self._entry(info) for name, info in named if name != own}

    def find_tree(self, folder: str) -> dict[str, Listing]:
        """Ask for all files below a folder, whose paths say which folders there are."""
        place = self._place(folder)
        with self._alone:
            self.fs.invalidate_cache()
            infos = self.fs.find(place, detail=True)
        own = place.strip("/")
        names = [(str(name).strip("/"), info) for name, info in infos.items()]
        inside = [(name[len(own) :].strip("/"), info) for name, info in names if name.startswith(f"{own}/") or not own]
        return tree_of(folder, [(name, self._entry(info)) for name, info in inside])

    def find_range(self, path: str, entry: Entry, start: int, count: int) -> bytes:
        """Ask the store."""
        with self._alone:
            return bytes(self.fs.cat_file(self._place(path), start=start, end=start + count))

    def _place(self, path: str) -> str:
        return f"{self.inside.rstrip('/')}/{path}" if path else self.inside

    def _entry(self, info: dict[str, Any]) -> Entry:
        if info.get("type") == "directory":
            return FOLDER
        size = info.get("size")
        size = size if isinstance(size, int) and size >= 0 else -1
        version = next((f"{key} {info[key]}" for key in _VERSIONS if info.get(key) is not None), "")
        return Entry(size, etag_of(size, version))


def etag_of(size: int, version: object) -> str:
    """Return a short text for a size and what a store says of a version."""
    return hashlib.sha256(f"{size}\0{version}".encode("utf-8", "surrogateescape")).hexdigest()[:24]


def tree_of(folder: str, files: Iterable[tuple[str, Entry]]) -> dict[str, Listing]:
    """Return the listings of a folder and of those in it, from the files in it by their paths inside it."""
    found: dict[str, Listing] = {folder: {}}
    for path, entry in files:
        place = folder
        *folders, name = path.split("/")
        for part in folders:
            found[place].setdefault(part, FOLDER)
            place = f"{place}/{part}" if place else part
            found.setdefault(place, {})
        if name:
            found[place][name] = entry
    return found

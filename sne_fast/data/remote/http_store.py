"""Files of web servers, read by requests for ranges."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from concurrent.futures import wait
from functools import partial
from html.parser import HTMLParser
from typing import Any, NamedTuple
from urllib.parse import urljoin

from .failures import Forbidden, RangesIgnored, StoreError, attempt
from .ranges import RANGES, fetched
from .remembered import Remembered
from .stores import FOLDER, HEAD, Entry, Listing, Store, etag_of, need

__all__ = ["HttpStore", "Ranges"]

_PIECE = 2**22
_BUFFER = 2**21  # bytes that a connection takes in before they are read
_IDLE = 60.0  # seconds without a byte after which a connection counts as broken
_CONTENT_RANGE = re.compile(r"bytes (?:(\d+)-(\d+)|\*)/(\d+|\*)")
_MOST_FILES = 100_000
_MOST_PAGE = 2**26


class Answer(NamedTuple):
    """What a server sent: bytes, the size of the whole file (None if it does not say), and its version by headers."""

    body: bytes
    size: int | None
    version: str


class Ranges:
    """Requests for ranges of files, over connections that stay open.

    Args:
        headers: of each request, instead of those that fsspec's settings for http have.
    """

    def __init__(self, headers: Mapping[str, str] | None = None) -> None:
        need("fsspec", "aiohttp")
        import fsspec

        self.fs: Any = fsspec.filesystem("http")
        self.headers = dict(headers or {})

    def get(self, url: str, start: int, count: int) -> Answer:
        """Return bytes of a file from `start` on, at most `count`, as many as it has.

        Raises:
            FileNotFoundError: there is no such file.
            RangesIgnored: the server would send the file from its beginning.
            Exception: those of aiohttp.
        """
        from fsspec.asyn import sync

        found: Answer = sync(self.fs.loop, self._get, url, start, count)
        return found

    async def _get(self, url: str, start: int, count: int) -> Answer:
        import aiohttp

        session = await self.fs.set_session()
        options = dict(self.fs.kwargs)
        # Bytes as they are stored: of compressed ones neither size nor places would fit.
        headers = {**(self.headers or options.pop("headers", {})), "Accept-Encoding": "identity"}
        options.pop("headers", None)
        headers["Range"] = f"bytes={start}-{start + count - 1}"
        options.setdefault("timeout", aiohttp.ClientTimeout(total=None, sock_connect=_IDLE, sock_read=_IDLE))
        options.setdefault("read_bufsize", _BUFFER)
        async with session.get(self.fs.encode_url(url), headers=headers, **options) as answer:
            if answer.status in (404, 410):
                raise FileNotFoundError(url)
            said = _CONTENT_RANGE.fullmatch(answer.headers.get("Content-Range", ""))
            version = answer.headers.get("ETag") or answer.headers.get("Last-Modified") or ""
            if answer.status == 416:
                return Answer(b"", int(said[3]) if said and said[3] != "*" else None, version)
            answer.raise_for_status()
            if answer.headers.get("Content-Encoding", "identity") not in ("identity", ""):
                raise RangesIgnored(f"{url}: the server compresses the file, so that ranges of it cannot be read")
            if answer.status == 206:
                if said is None or said[1] is None or int(said[1]) != start:
                    raise RangesIgnored(f"{url}: the server sent another range than was asked for")
                size = None if said[3] == "*" else int(said[3])
            else:
                if start > 0:
                    raise RangesIgnored(f"{url}: the server ignores ranges; download the file and give its path")
                length = answer.headers.get("Content-Length", "")
                size = int(length) if length.isdecimal() else None
            body = bytearray()
            while len(body) < count and (piece := await answer.content.read(min(count - len(body), _PIECE))):
                body += piece
        return Answer(bytes(body), size, version)


class _Links(HTMLParser):
    """Collect the links of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Take the address of a link."""
        self.found += [value for name, value in attrs if tag == "a" and name == "href" and value]


class HttpStore(Store):
    """A web server: files are asked for one by one, and the pages of folders say which there are."""

    lists = False

    def __init__(self, root: str) -> None:
        super().__init__(root)
        self.ranges = Ranges()
        self.files: Remembered[Entry | Forbidden | None] = Remembered(_MOST_FILES, 60.0)

    def entry(self, path: str) -> Entry | None:
        """Return what is at a path: a folder if it ends with a slash, else what the answer to a request says."""
        if not path or path.endswith("/"):
            return FOLDER
        kind = self._listed_as(path)
        if kind in ("folder", "nothing"):
            return FOLDER if kind == "folder" else None
        found = self._file(path)
        if isinstance(found, Forbidden):
            raise found
        return found

    def look_at(self, paths: Sequence[str]) -> None:
        """Ask for files of which nothing is known, at once."""
        asked = [path for path in paths if self._listed_as(path) == "unknown" and self.files.known(path) is None]
        wait([fetched(partial(self._file, path)) for path in asked])

    def is_folder(self, path: str) -> bool | None:
        """Return it without a request where the page of the folder around it was looked at.

        What may not be read counts as nothing, since servers answer so for files that are not there.
        """
        kind = self._listed_as(path)
        if kind != "unknown":
            return None if kind == "nothing" else kind == "folder"
        try:
            return super().is_folder(path)
        except Forbidden:
            return None

    def _listed_as(self, path: str) -> str:
        """Return what a path is by the page of the folder around it, "unknown" if that was not looked at."""
        folder, _, name = path.partition("?")[0].rpartition("/")
        listed = self.listings.known(folder)
        if listed is None or not name:
            return "unknown"
        if name not in listed:
            return "nothing"
        return "folder" if listed[name].is_folder else "file"

    def _file(self, path: str) -> Entry | Forbidden | None:
        url = self.url(path)

        def find() -> Entry | Forbidden | None:
            try:
                head = attempt(url, lambda: self.ranges.get(url, 0, HEAD))
            except FileNotFoundError:
                return None
            except Forbidden as error:
                return error
            if head.size is None:
                raise StoreError(f"{url}: the server does not say how large the file is")
            if len(head.body) > head.size:
                raise StoreError(f"{url}: the server sent more than the {head.size} bytes that it said")
            entry = Entry(head.size, etag_of(head.size, head.version))
            if len(head.body) == min(entry.size, HEAD):
                RANGES.put((url, entry, -1), head.body)
            return entry

        return self.files.get(path, find)

    def find_range(self, path: str, entry: Entry, start: int, count: int) -> bytes:
        """Ask the server, and check that the file is the one that was described."""
        url = self.url(path)
        found = self.ranges.get(url, start, count)
        if found.size is not None and Entry(found.size, etag_of(found.size, found.version)) != entry:
            raise StoreError(f"{url}: has changed while it was read")
        return found.body

    def find_listing(self, folder: str) -> Listing:
        """Return the files and folders that the page of a folder links to."""
        url = self.url(folder).rstrip("/") + "/"
        page = self.ranges.get(url, 0, _MOST_PAGE + 1).body
        if len(page) > _MOST_PAGE:
            raise StoreError(f"{url}: the page of this folder is larger than the limit of {_MOST_PAGE} bytes")
        links = _Links()
        links.feed(page.decode("utf-8", "replace"))
        found: Listing = {}
        for link in links.found:
            address = urljoin(url, link).partition("?")[0].partition("#")[0]
            name = address.removeprefix(url)
            if name != address and name.rstrip("/") and "/" not in name.rstrip("/"):
                found[name.rstrip("/")] = FOLDER if name.endswith("/") else Entry(-1, "")
        return found

    def find_tree(self, folder: str) -> dict[str, Listing]:
        """Return the listing of the folder alone; each folder inside it has a page of its own."""
        return {folder: self.find_listing(folder)}

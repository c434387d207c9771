"""Files elsewhere as open files: what is read is fetched by ranges, ahead of who reads on."""

from __future__ import annotations

import io
from collections import deque
from concurrent.futures import Future
from functools import partial
from typing import Any

from ...free_memory import available_bytes
from .ranges import RANGES, fetched
from .stores import HEAD, Entry, Store

__all__ = ["Content", "RemoteFile"]

_BLOCK = 2**20
_BLOCKS_AHEAD = 4
_PIECE = 2**22
_PIECES_AHEAD = 4
_SMALL = 2**21  # bytes of a file that is fetched as a whole before it is read


class RemoteFile(io.RawIOBase):
    """A file of a store that is open for reading; nothing is written to disk.

    Args:
        content: of the file.
    """

    def __init__(self, content: Content) -> None:
        super().__init__()
        self.content = content
        self._place = 0

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def tell(self) -> int:
        """Return the place from which `read` goes on."""
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Set the place from which `read` goes on; the end is known without a request."""
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self.content.size}[whence]
        if start + offset < 0:
            raise ValueError(f"seek: place must be at least 0, got {start + offset}")
        self._place = start + offset
        return self._place

    def at(self, place: int) -> RemoteFile:
        """Return another open file of the same content, which reads from a place on."""
        other = RemoteFile(self.content)
        other.seek(place)
        return other

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer as far as the file goes, and return the number of bytes; raises as `Content.read_into`."""
        count = self.content.read_into(self._place, memoryview(buffer).cast("B"))
        self._place += count
        return count

    def readall(self) -> bytes:
        """Return the rest of the file.

        Raises:
            MemoryError: it does not fit into memory.
        """
        count = max(0, self.content.size - self._place)
        if 2 * count > available_bytes():
            raise MemoryError
        rest = bytearray(count)
        self.readinto(rest)
        return bytes(rest)


class Content:
    """The bytes of a file of a store, for several open files and threads at once.

    The first 256 KiB are fetched together. Small reads behind them fetch blocks of 1 MiB, and where one follows another
    the next four too; large reads fetch pieces of 4 MiB, four at a time.

    Args:
        store: where the file is.
        path: of the file in it.
        entry: what the store says of it.
    """

    def __init__(self, store: Store, path: str, entry: Entry) -> None:
        self.store, self.path, self.entry = store, path, entry

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self.entry.size

    def read_into(self, start: int, view: memoryview) -> int:
        """Fill a buffer with the bytes from `start` on as far as the file goes, and return their number.

        Raises:
            StoreError: the store cannot be reached, or sends other bytes than it should.
            FileNotFoundError: the file is gone.
        """
        end = min(start + len(view), self.size)
        place = start
        while place < end:
            if place >= HEAD and end - place > _PIECE:
                self._read_pieces(place, end, view[place - start : end - start])
                return end - start
            number, offset = (-1, place) if place < HEAD else divmod(place - HEAD, _BLOCK)
            held = self._block(number).result()[offset : offset + end - place]
            view[place - start : place - start + len(held)] = held
            place += len(held)
        return max(0, end - start)

    def fetch_small(self) -> None:
        """Fetch the beginning of the file, and all of a small one, so that reading it needs no request."""
        futures = [self._block(-1)] if self.size else []
        if HEAD < self.size <= _SMALL:
            futures += [self._block(i, ahead=0) for i in range(-(-(self.size - HEAD) // _BLOCK))]
        for future in futures:
            future.result()

    def _read_pieces(self, start: int, end: int, view: memoryview) -> None:
        waiting: deque[tuple[int, Future[bytes]]] = deque()
        try:
            for place in range(start, end, _PIECE):
                waiting.append((place, fetched(partial(self._read, place, min(_PIECE, end - place)))))
                if len(waiting) == _PIECES_AHEAD:
                    self._take(waiting, start, view)
            while waiting:
                self._take(waiting, start, view)
        finally:
            for _, future in waiting:
                future.cancel()

    @staticmethod
    def _take(waiting: deque[tuple[int, Future[bytes]]], start: int, view: memoryview) -> None:
        place, future = waiting.popleft()
        piece = future.result()
        view[place - start : place - start + len(piece)] = piece

    def _block(self, number: int, ahead: int = _BLOCKS_AHEAD) -> Future[bytes]:
        """Return a block, -1 for the beginning; where it follows one that was read, the next ones are fetched too."""
        if number < 0:
            return self._range(number, 0, min(self.size, HEAD))
        last = (self.size - HEAD - 1) // _BLOCK
        follows = number == 0 or self._key(number - 1) in RANGES
        starts = {i: HEAD + i * _BLOCK for i in range(number, min(number + (ahead if follows else 0), last) + 1)}
        found = [self._range(i, start, min(_BLOCK, self.size - start)) for i, start in starts.items()]
        return found[0]

    def _range(self, number: int, start: int, count: int) -> Future[bytes]:
        return RANGES.get(self._key(number), count, partial(self._read, start, count))

    def _key(self, number: int) -> tuple[str, Entry, int]:
        return self.store.url(self.path), self.entry, number

    def _read(self, start: int, count: int) -> bytes:
        return self.store.read(self.path, self.entry, start, count)

"""A check of HDF5 files before the library opens them: over some damaged heaps of texts it loops for ever."""

from __future__ import annotations

import io
import struct
from typing import IO

__all__ = ["check_heaps"]

_BEGINNING = b"GCOL\x01\0\0\0"
_PIECE = 2**24
_LARGEST = 2**30  # bytes of one heap; the library makes them of 4 KiB, or as large as one text


def check_heaps(opened: IO[bytes]) -> None:
    """Check the sizes of all objects in the global heaps of a file, in which texts of any length are.

    Raises:
        ValueError: an object that does not fit into its heap, or takes no place in it.
    """
    size = opened.seek(0, io.SEEK_END)
    place, kept = 0, b""
    while place < size:
        opened.seek(place)
        piece = opened.read(min(_PIECE, size - place))
        if not piece:
            return
        held, start = kept + piece, place - len(kept)
        found = held.find(_BEGINNING)
        while found >= 0:
            if (start + found) % 8 == 0:
                _check_heap(opened, start + found, size)
            found = held.find(_BEGINNING, found + 1)
        kept = held[-len(_BEGINNING) + 1 :]
        place += len(piece)


def _check_heap(opened: IO[bytes], begin: int, size: int) -> None:
    opened.seek(begin + 8)
    head = opened.read(8)
    length = int.from_bytes(head, "little")
    if len(head) < 8 or not 16 <= length <= min(_LARGEST, size - begin):
        raise ValueError("one of its heaps does not fit into it")
    held = opened.read(length - 16)
    place = 0
    while place + 16 <= len(held):
        index, _, own = struct.unpack_from("<HHxxxxQ", held, place)
        taken = own if index == 0 else 16 + -(-own // 8) * 8
        if not 0 < taken <= len(held) - place:
            raise ValueError("one of its heaps holds an object that does not fit into it")
        place += taken

"""Arrays of numpy: `.npz` archives, single `.npy` files, and folders of these. No pickles are read from them."""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch

from ...regular_files import open_regular
from .contents import Contents, array_tensor, lazy_array, reading_format
from .errors import CheckpointError, shown
from .stored import MAX_DIMENSIONS, read_into

__all__ = ["read_npy_files", "read_npz"]

_MOST_RATIO = 1100  # deflate makes at most 1032 bytes out of one
_VERSIONS = ((1, 0), (2, 0), (3, 0))
_PICKLED = "an array of Python objects, which are pickled"


class _Header(NamedTuple):
    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype[Any]

    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def read_npz(file: Path) -> Contents:
    """Return the arrays of an `.npz` archive under their names, in the order in which they were saved.

    Raises:
        CheckpointError: a damaged archive, or one whose entries are larger than they can be.
    """
    found = Contents(keeps_order=True)
    with reading_format(file, "archive of numpy"), open_regular(file) as opened, zipfile.ZipFile(opened) as archive:
        for entry in archive.infolist():
            name = entry.filename.removesuffix(".npy")
            if name == entry.filename:
                found.left_out[name] = "no array"
                continue
            if entry.file_size > _MOST_RATIO * max(entry.compress_size, 1) or entry.flag_bits & 1:
                raise ValueError(f"its entry {shown(entry.filename)} is encrypted or larger than it can be")
            with archive.open(entry) as member:
                header = _header(member, entry.file_size)
            _add(found, _dotted(name), header, partial(_from_archive, file, entry.filename), file)
    return found


def read_npy_files(file: Path, beside: Iterable[Path] | None = None) -> Contents:
    """Return the array of an `.npy` file, or those of several, each under its file's name.

    Args:
        file: one file, or the folder of several.
        beside: all files of the folder.

    Raises:
        CheckpointError: a damaged file.
    """
    found = Contents()
    for one in [file] if beside is None else beside:
        with reading_format(one, "array of numpy"), open_regular(one) as opened:
            size = opened.seek(0, io.SEEK_END)
            opened.seek(0)
            _add(found, one.stem, _header(opened, size), partial(_from_file, one), one)
    return found


def _dotted(name: str) -> str:
    return name.replace("/", ".")


def _add(found: Contents, name: str, header: _Header, values: Any, file: Path) -> None:
    if header.dtype.hasobject:
        found.left_out[name] = _PICKLED
    elif header.dtype.kind not in "biufc":
        found.left_out[name] = f"no array of numbers ({header.dtype})"
    else:
        dtype = array_tensor(np.empty(0, header.dtype)).dtype
        found.add(name, lazy_array(header.shape, dtype, values, None, partial(reading_format, file, "array of numpy")))


def _header(opened: IO[bytes], size: int) -> _Header:
    """Return what the header of an array says, checked against the size of its file."""
    version = np.lib.format.read_magic(opened)
    if version not in _VERSIONS:
        raise ValueError(f"the version {version} of an array is not known")
    reader = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    header = _Header(*reader(opened))
    whole = all(type(n) is int and 0 <= n < 2**62 for n in header.shape) and len(header.shape) <= MAX_DIMENSIONS
    if not whole or (not header.dtype.hasobject and header.nbytes() > size):
        raise ValueError(f"an array of shape {header.shape} and dtype {header.dtype} does not fit into its file")
    return header


def _values(opened: IO[bytes], size: int) -> np.ndarray[Any, Any]:
    header = _header(opened, size)
    if header.dtype.hasobject:
        raise CheckpointError(f"holds {_PICKLED}")
    held = read_into(opened, header.nbytes()) if header.nbytes() else torch.empty(0, dtype=torch.uint8)
    flat = held.numpy().view(header.dtype)
    return flat.reshape(header.shape, order="F" if header.fortran else "C")


def _from_archive(file: Path, entry: str) -> np.ndarray[Any, Any]:
    with open_regular(file) as opened, zipfile.ZipFile(opened) as archive, archive.open(entry) as member:
        return _values(member, archive.getinfo(entry).file_size)


def _from_file(file: Path) -> np.ndarray[Any, Any]:
    with open_regular(file) as opened:
        size = opened.seek(0, io.SEEK_END)
        opened.seek(0)
        return _values(opened, size)

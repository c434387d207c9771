"""Files of safetensors: a header of JSON, and the bytes of each tensor behind it.

They are read, not mapped as the library does: a mapped file that is written to or cut short changes the tensors or ends
the process, and its pages count as memory beside a copy.
"""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor

from ...regular_files import open_regular, parse_json
from .errors import CheckpointError, reading, shown
from .lazy_tensors import LazyTensor, OpenFile
from .stored import MAX_DIMENSIONS, read_at

__all__ = ["Entry", "SafetensorsFile", "header_length", "open_safetensors", "parse_header", "read_header"]

_MAX_HEADER = 100_000_000  # bytes, the format's own limit
_METADATA = "__metadata__"
_NAMES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2", "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu", "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U64": "uint64",
    "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool", "C64": "complex64",
}  # fmt: skip
_DTYPES = {name: getattr(torch, own) for name, own in _NAMES.items() if hasattr(torch, own)}


class Entry(NamedTuple):
    """A tensor of a file: its dtype and shape, and where its bytes begin and end behind the header."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


class SafetensorsFile(NamedTuple):
    """The header of a file: its tensors by name, its metadata, and where the bytes of tensors begin."""

    entries: dict[str, Entry]
    metadata: dict[str, str]
    start: int


def open_safetensors(file: Path) -> tuple[dict[str, LazyTensor], dict[str, str]]:
    """Return the tensors of a file in the order of their bytes, and its metadata; the file stays open for them.

    Raises:
        CheckpointError: a file that is missing, damaged or no safetensors file; the message names it.
    """
    with reading(file):
        held = OpenFile(file)
        header = _header(held.opened, file)
        return {name: _lazy(held, file, header.start, name, e) for name, e in header.entries.items()}, header.metadata


def _lazy(source: OpenFile, file: Path, start: int, name: str, entry: Entry) -> LazyTensor:
    def read() -> Tensor:
        with reading(file):
            try:
                held = read_at(source, start + entry.begin, entry.end - entry.begin)
            except CheckpointError as error:
                raise CheckpointError(f"{file}: {error}") from error
            except (MemoryError, RuntimeError) as error:
                raise CheckpointError(f"{file}: needs more memory than there is for {shown(name)}") from error
        return held.view(entry.dtype).view(entry.shape)

    return LazyTensor(entry.dtype, entry.shape, read)


def read_header(file: Path) -> SafetensorsFile:
    """Return the header of a file without reading its tensors.

    Raises:
        CheckpointError: as `open_safetensors`.
    """
    with reading(file), open_regular(file) as opened:
        return _header(opened, file)


def _header(opened: IO[bytes], file: Path) -> SafetensorsFile:
    def damaged(reason: ValueError) -> CheckpointError:
        return CheckpointError(f"{file}: is damaged or no safetensors file: {reason}; fetch or write it again")

    size = opened.seek(0, io.SEEK_END)
    opened.seek(0)
    head = opened.read(8)
    try:
        length = header_length(head, size)
    except ValueError as error:
        raise damaged(error) from error
    header = opened.read(length)
    try:
        return parse_header(header, size)
    except ValueError as error:
        raise damaged(error) from error


def header_length(head: bytes, size: int) -> int:
    """Return the length of the header of a file of `size` bytes by its first eight; raises ValueError where it lies."""
    length = int.from_bytes(head, "little")
    if len(head) < 8 or length > min(size - 8, _MAX_HEADER):
        raise ValueError("its header does not fit into it")
    return length


def parse_header(header: bytes, size: int) -> SafetensorsFile:
    """Return what the header of a file of `size` bytes says; raises ValueError with what is wrong with it."""
    try:
        content = parse_json(header.decode("utf-8"), "its header", dict, max_depth=4)
    except ValueError as error:
        raise ValueError(str(error).partition("\n")[0][:200]) from error
    metadata = content.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its metadata are not strings")
    entries = {}
    for name, said in content.items():
        try:
            entries[name] = _entry(said)
        except ValueError as error:
            raise ValueError(f"its tensor {shown(name)} {error}") from error
    entries = dict(sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)))
    place = 0
    for name, entry in entries.items():
        if entry.begin != place:
            raise ValueError(f"its tensor {shown(name)} does not begin where the one before it ends")
        place = entry.end
    start = 8 + len(header)
    if start + place != size:
        raise ValueError(f"its tensors take {place} bytes, it holds {size - start}")
    return SafetensorsFile(entries, metadata, start)


def _entry(said: Any) -> Entry:
    if not isinstance(said, dict) or set(said) != {"dtype", "shape", "data_offsets"}:
        raise ValueError("must have dtype, shape and data_offsets")
    dtype, shape, offsets = said["dtype"], said["shape"], said["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise ValueError(f"has dtype {shown(dtype)}, which is not read")
    for numbers in (shape, offsets):
        if not isinstance(numbers, list) or any(type(n) is not int or not 0 <= n < 2**62 for n in numbers):
            raise ValueError("has a shape or offsets that are no sizes")
    if len(shape) > MAX_DIMENSIONS or len(offsets) != 2:
        raise ValueError("has a shape or offsets that are no sizes")
    begin, end = offsets
    if end - begin != math.prod(shape) * _DTYPES[dtype].itemsize:
        raise ValueError("does not have as many bytes as its shape takes")
    return Entry(_DTYPES[dtype], tuple(shape), begin, end)

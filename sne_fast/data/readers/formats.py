"""Formats of files, told by their first bytes and not by their names."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Literal

from ...regular_files import open_regular
from .errors import CheckpointError, reading

__all__ = ["READABLE", "Format", "format_of"]

Format = Literal["safetensors", "index", "torch"]
READABLE = "safetensors, an index of shards, files of torch.save, or a folder of these"

_PICKLE_PROTOCOLS = range(2, 6)
_TAR_PLACE = 257
# Formats that are told from each other only to say which one a file has.
_OTHERS = (
    (b"GGUF", "a GGUF file"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
    (b"\x93NUMPY", "an array of numpy"),
    (b"\x1f\x8b", "compressed by gzip; decompress it first"),
    (b"BZh", "compressed by bzip2; decompress it first"),
    (b"\xfd7zXZ", "compressed by xz; decompress it first"),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd; decompress it first"),
    (b"7z\xbc\xaf", "a 7z archive; unpack it first"),
    (b"Rar!", "a RAR archive; unpack it first"),
    (b"version https://git-lfs", "a pointer of Git LFS and not the file; fetch it with git lfs pull"),
    (b"<!DOCTYPE", "a web page, perhaps the answer to a download that failed"),
    (b"<html", "a web page, perhaps the answer to a download that failed"),
)


def format_of(file: Path) -> Format:
    """Return the format of a file.

    Raises:
        CheckpointError: a file that is missing, empty, or of no format that is read; the message names it.
    """
    with reading(file), open_regular(file) as opened:
        size = opened.seek(0, io.SEEK_END)
        opened.seek(0)
        beginning = opened.read(512)
    if not beginning:
        raise CheckpointError(f"{file}: is damaged or no {_claimed(file)}: it is empty")
    # First, for the length of a header can be the first bytes of any other format: 640 those of a pickle of protocol 2,
    # 35,615 those of gzip. No other format has the zeros that follow, and a brace.
    if beginning[8:9] == b"{" and 0 < int.from_bytes(beginning[:8], "little") <= size - 8:
        return "safetensors"
    for first, what in _OTHERS:
        if beginning.startswith(first):
            raise CheckpointError(f"{file}: is {what}; readable are {READABLE}")
    if beginning[_TAR_PLACE : _TAR_PLACE + 5] == b"ustar":
        raise CheckpointError(f"{file}: is a tar archive; unpack it and give the path of a file in it")
    if beginning.startswith(b"PK") or (beginning[0] == 0x80 and beginning[1:2] and beginning[1] in _PICKLE_PROTOCOLS):
        return "torch"
    if file.suffix == ".safetensors":
        return "safetensors"
    if beginning.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"{":
        return "index"
    if beginning[:1] in (b"(", b"]", b"}", b"c", b"l", b"d"):  # pickles of protocols 0 and 1 have no mark
        return "torch"
    raise CheckpointError(
        f"{file}: is damaged or no {_claimed(file)}: cannot tell what it is by its first bytes; readable are {READABLE}"
    )


def _claimed(file: Path) -> str:
    """Return what a file should be by its name, for messages."""
    name = file.name.lower()
    if name.endswith(".safetensors"):
        return "safetensors file"
    return "index of shards" if name.endswith(".json") else "checkpoint of torch"

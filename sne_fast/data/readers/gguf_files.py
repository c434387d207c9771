"""Files of GGUF, of llama.cpp: a header that is read here, and quantised blocks that the package `gguf` decodes.

The package's own reader maps the file and believes the lengths in its header, so the header is read with bounds here.
"""

from __future__ import annotations

import io
import math
import struct
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .contents import Contents, need, reading_format
from .errors import CheckpointError, shown
from .lazy_tensors import LazyTensor, OpenFile
from .stored import read_at

__all__ = ["read_gguf"]

_FORMAT = "GGUF file"
_STRING, _ARRAY = 8, 9
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes of single values by their type
_MOST_NAME = 1024
_MOST_TENSORS = 1_000_000
_MOST_DIMENSIONS = 4
# Types of ggml that are plain numbers, which numpy reads.
_PLAIN = {"F32": np.float32, "F16": np.float16, "F64": np.float64, "I8": np.int8, "I16": np.int16, "I32": np.int32,
          "I64": np.int64}  # fmt: skip
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64, "I8": torch.int8,
           "I16": torch.int16, "I32": torch.int32, "I64": torch.int64}  # fmt: skip


class _Entry(NamedTuple):
    """A tensor of a file: its shape as `(out, in)`, its type in ggml, where its bytes begin and their number."""

    shape: tuple[int, ...]
    kind: Any
    begin: int
    nbytes: int


def read_gguf(file: Path) -> Contents:
    """Return the tensors of a GGUF file under their names; quantised ones are decoded to float32 when they are read.

    Raises:
        CheckpointError: `gguf` is missing, or the file is damaged or has a type of tensors that `gguf` does not decode.
    """
    need(file, "a GGUF file", "gguf", extra="gguf")
    found = Contents()
    with reading_format(file, _FORMAT):
        held = OpenFile(file)
        for name, entry in _Header(held.opened).entries().items():
            dtype = _DTYPES.get(entry.kind.name, torch.float32)
            found.add(name, LazyTensor(dtype, entry.shape, partial(_read, held, file, name, entry)))
    return found


class _Header:
    """The header of a file, read from its beginning on."""

    def __init__(self, opened: IO[bytes]) -> None:
        self.size = opened.seek(0, io.SEEK_END)
        opened.seek(4)
        self.opened = opened
        version = opened.read(4)
        self.order = ">" if version[:2] == b"\0\0" else "<"
        (number,) = struct.unpack(f"{self.order}I", version)
        if number not in (2, 3):
            raise ValueError(f"its version is {number}, and 2 and 3 are read")
        if self.order == ">":
            raise CheckpointError("is a GGUF file of a big-endian machine; convert it with gguf-convert-endian")
        self.tensors, self.fields = self._number("Q"), self._number("Q")
        if self.tensors > _MOST_TENSORS:
            raise ValueError(f"it says that it has {self.tensors} tensors")
        self.alignment = 32

    def entries(self) -> dict[str, _Entry]:
        """Return the tensors by name, each within the file."""
        import gguf

        for _ in range(self.fields):
            key, kind = self._text(), self._number("I")
            if key == "general.alignment" and kind == 4:
                self.alignment = self._number("I")
            else:
                self._skip(kind)
        if self.alignment < 1 or self.alignment & (self.alignment - 1):
            raise ValueError("its alignment is no power of two")
        said = []
        for _ in range(self.tensors):
            name, count = self._text(), self._number("I")
            if count > _MOST_DIMENSIONS:
                raise ValueError(f"its tensor {shown(name)} has {count} dimensions")
            shape = tuple(self._number("Q") for _ in range(count))[::-1]
            said.append((name, shape, self._number("I"), self._number("Q")))
        start = -(-self.opened.tell() // self.alignment) * self.alignment
        found: dict[str, _Entry] = {}
        kinds: set[Any] = set()
        for name, shape, number, offset in said:
            kind = gguf.GGMLQuantizationType(number)
            block, nbytes = gguf.GGML_QUANT_SIZES[kind]
            total, last = math.prod(shape), shape[-1] if shape else 1
            if last % block or start + offset + total // block * nbytes > self.size:
                raise ValueError(f"its tensor {shown(name)} does not fit into it")
            if kind not in kinds:
                kinds.add(_decoded(kind, nbytes, name))
            if name in found:
                raise ValueError(f"it has two tensors that are called {shown(name)}")
            found[name] = _Entry(shape, kind, start + offset, total // block * nbytes)
        if sum(entry.nbytes for entry in found.values()) > self.size:
            raise ValueError("its tensors overlap")
        return found

    def _number(self, code: str) -> int:
        return int(struct.unpack(f"<{code}", self._bytes(struct.calcsize(code)))[0])

    def _bytes(self, count: int) -> bytes:
        held = self.opened.read(count)
        if len(held) < count:
            raise ValueError("it ends within its header")
        return held

    def _text(self) -> str:
        length = self._number("Q")
        if length > _MOST_NAME:
            raise ValueError(f"it has a name of {length} bytes")
        return self._bytes(length).decode()

    def _skip(self, kind: int) -> None:
        """Pass over a value of the metadata."""
        count = 1
        if kind == _ARRAY:
            kind, count = self._number("I"), self._number("Q")
        if kind in _SIZES:
            self._forward(count * _SIZES[kind])
            return
        if kind != _STRING:
            raise ValueError(f"its metadata have a value of the unknown type {kind}")
        for _ in range(count):  # ends at the latest where the file does
            self._forward(self._number("Q"))

    def _forward(self, count: int) -> None:
        if self.opened.tell() + count > self.size:
            raise ValueError("it ends within its header")
        self.opened.seek(count, io.SEEK_CUR)


def _decoded(kind: Any, nbytes: int, name: str) -> Any:
    """Return a type of tensors that can be read, of which a block has this many bytes."""
    import gguf

    if kind.name not in _DTYPES:
        try:
            gguf.quants.dequantize(np.zeros((1, nbytes), np.uint8), kind)
        except NotImplementedError:
            raise CheckpointError(
                f"its tensor {shown(name)} has the type {kind.name}, which gguf does not decode"
            ) from None
    return kind


def _read(source: OpenFile, file: Path, name: str, entry: _Entry) -> Tensor:
    import gguf

    with reading_format(file, _FORMAT):
        held = read_at(source, entry.begin, entry.nbytes)
        plain = _PLAIN.get(entry.kind.name)
        if plain is not None or entry.kind.name == "BF16":
            return held.view(_DTYPES[entry.kind.name]).reshape(entry.shape)
        rows = max(math.prod(entry.shape[:-1]), 1)
        blocks = held.numpy().reshape(rows, -1)
        values = torch.from_numpy(np.ascontiguousarray(gguf.quants.dequantize(blocks, entry.kind), dtype=np.float32))
        if values.numel() != math.prod(entry.shape):
            raise ValueError(f"its tensor {shown(name)} was decoded to {values.numel()} numbers")
        return values.reshape(entry.shape)

"""Folders of torch.distributed.checkpoint: `.metadata`, a pickle, and files that hold pieces of tensors.

The pickle says for every tensor its shape and pieces, and for every piece the file and place where `torch.save` wrote
it. Both are read by the readers of this package, which make no objects.
"""

from __future__ import annotations

import io
import itertools
import math
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...regular_files import open_regular
from .chosen_weights import Weights, choose_weights
from .content_tree import MAX_DEPTH, RefusedContent
from .errors import CheckpointError, reading, shown
from .folders import METADATA
from .lazy_tensors import LazyTensor, OpenFile
from .pickled_values import Placeholder
from .stored import BadTensor, Storage, StoredTensor, open_tensors, read_tensors
from .torch_files import damage_of, read_content, reading_torch

__all__ = ["distributed_folder", "open_distributed"]

_SHARD = ".distcp"
_MODULE = "torch.distributed.checkpoint."
_MAX_PIECES = 4096  # of one tensor, which are compared with each other


@dataclass(frozen=True)
class _Piece:
    """A piece of a tensor: its place in the tensor, and that of its bytes."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    length: int

    def apart(self, other: _Piece) -> bool:
        """Return whether two pieces share no element."""
        return any(
            a + m <= b or b + n <= a
            for a, m, b, n in zip(self.offsets, self.sizes, other.offsets, other.sizes, strict=True)
        )


@dataclass(frozen=True)
class _Whole:
    """A tensor of the checkpoint: its form and its pieces."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: tuple[_Piece, ...]


def distributed_folder(path: Path) -> Path | None:
    """Return the folder of a distributed checkpoint that a path names, itself or by a file in it; else None.

    Raises:
        CheckpointError: a file of one that lacks its `.metadata`.
    """
    is_folder = path.is_dir()
    folder = path if is_folder else path.parent
    if (is_folder or path.name == METADATA or path.suffix == _SHARD) and (folder / METADATA).is_file():
        return folder
    if path.suffix == _SHARD and path.is_file():
        raise CheckpointError(
            f"{path}: is a part of a checkpoint of torch.distributed without its {METADATA}; fetch it into {folder}"
        )
    return None


def open_distributed(folder: Path, key: str | None) -> tuple[dict[str, Tensor | LazyTensor], Weights]:
    """Return the tensors of a folder, which are put together when they are read, and what was chosen.

    Args:
        folder: as `distributed_folder` returns it.
        key: the place of the weights in the state that was saved, names joined by dots.

    Raises:
        CheckpointError: a folder that is damaged, whose parts are missing, or without weights; the message names it.
    """
    file = folder / METADATA

    with reading_torch(file):
        held = OpenFile(file)
        source = _Pieces(folder, read_content(held.opened))
        weights = choose_weights(source.tree(), key)
        return open_tensors(weights.tensors, held, partial(reading_torch, file)), weights


class _Pieces:
    """The tensors of a folder, as storages that are put together from pieces."""

    def __init__(self, folder: Path, metadata: Any) -> None:
        said = _state(metadata, "Metadata")
        entries, places = said.get("state_dict_metadata"), said.get("storage_data")
        if not isinstance(entries, dict) or not isinstance(places, dict):
            raise RefusedContent("it is no metadata of torch.distributed.checkpoint")
        self.folder = folder
        self.paths = said.get("planner_data") if isinstance(said.get("planner_data"), dict) else {}
        self.entries = entries
        self.infos: dict[Any, Any] = {}
        for index, info in places.items():
            at = _state(index, "MetadataIndex")
            self.infos[at.get("fqn"), _sizes(at.get("offset") or ())] = _state(info, "_StorageInfo")
        self.file_sizes: dict[str, int] = {}
        self.wholes: dict[str, _Whole] = {}

    def tree(self) -> dict[str, Any]:
        """Return what was saved, with `StoredTensor`s; values that are no tensors are there by name alone."""
        root: dict[str, Any] = {}
        for name, entry in self.entries.items():
            if not isinstance(name, str):
                raise RefusedContent("it has a tensor whose name is no text")
            value = self._tensor(name, entry) if _is(entry, "TensorStorageMetadata") else b""
            inside, last = root, name
            path = (self.paths or {}).get(name)
            if isinstance(path, tuple) and 0 < len(path) <= MAX_DEPTH and all(isinstance(p, str | int) for p in path):
                *outer, last = map(str, path)
                for part in outer:
                    inside = inside.setdefault(part, {})
                    if not isinstance(inside, dict):
                        raise RefusedContent(f"it has an entry {shown(name)} inside a tensor")
            if last in inside:
                raise RefusedContent(f"it has two entries that are called {shown(name)}")
            inside[last] = value
        return root

    def _tensor(self, name: str, entry: Placeholder) -> StoredTensor:
        said = _state(entry, "TensorStorageMetadata")
        form = said["properties"].state if isinstance(said.get("properties"), Placeholder) else None
        chunks = said.get("chunks")
        if not isinstance(form, tuple) or not form or not isinstance(chunks, list) or len(chunks) > _MAX_PIECES:
            raise RefusedContent(f"it describes the tensor {shown(name)} in another way than torch's own")
        dtype, shape = form[0], _sizes(said.get("size"))
        if not isinstance(dtype, torch.dtype) or str(dtype).startswith(("torch.q", "torch.bits")):
            raise RefusedContent(f"its tensor {shown(name)} has a dtype that is not read")
        pieces = tuple(self._piece(name, chunk, shape) for chunk in chunks)
        count = math.prod(shape)
        whole = sum(math.prod(piece.sizes) for piece in pieces) == count
        if not whole or not all(a.apart(b) for a, b in itertools.combinations(pieces, 2)):
            raise RefusedContent(f"the pieces of its tensor {shown(name)} do not make up its shape {shape[:6]}")
        if count * dtype.itemsize > sum(piece.length for piece in pieces):
            raise RefusedContent(f"its tensor {shown(name)} is larger than what is stored of it")
        self.wholes[name] = _Whole(dtype, shape, pieces)
        strides = tuple(math.prod(shape[d + 1 :]) for d in range(len(shape)))
        return StoredTensor(Storage(self, name, dtype, count), dtype, 0, shape, strides)

    def _piece(self, name: str, chunk: Any, shape: tuple[int, ...]) -> _Piece:
        said = _state(chunk, "ChunkStorageMetadata")
        offsets, sizes = _sizes(said.get("offsets")), _sizes(said.get("sizes"))
        info = self.infos.get((name, offsets))
        if info is None:
            raise RefusedContent(f"it does not say where a piece of its tensor {shown(name)} is")
        if not len(offsets) == len(sizes) == len(shape) or any(
            a + n > total for a, n, total in zip(offsets, sizes, shape, strict=True)
        ):
            raise RefusedContent(f"a piece of its tensor {shown(name)} is not inside it")
        if info.get("transform_descriptors"):
            raise RefusedContent(f"its tensor {shown(name)} was written through an extension, as a compressed one")
        file = info.get("relative_path")
        (start,), (length,) = _sizes((info.get("offset"),)), _sizes((info.get("length"),))
        if start + length > self._file_size(file):
            raise RefusedContent(f"{shown(file)} ends before a piece of its tensor {shown(name)}")
        return _Piece(offsets, sizes, file, start, length)

    def _file_size(self, file: Any) -> int:
        if not isinstance(file, str):
            raise RefusedContent("it names a file in another way than torch's own")
        if file not in self.file_sizes:
            parts = re.split(r"[/\\]", file)
            if ".." in parts or parts[0] == "" or ":" in parts[0] or "\0" in file:
                raise RefusedContent(f"its part {shown(file)} is not a file inside its folder")
            place = self.folder / file
            if not place.exists():
                raise CheckpointError(f"{self.folder}: its part {shown(file)} is missing; fetch it into {self.folder}")
            if place.suffix == ".safetensors":
                raise CheckpointError(
                    f"{self.folder}: its parts are files of safetensors ({file}); join them with "
                    f"torch.distributed.checkpoint's consolidate_safetensors_files first"
                )
            with reading(place), open_regular(place) as opened:
                self.file_sizes[file] = opened.seek(0, io.SEEK_END)
        return self.file_sizes[file]

    def declare(self, storage: Storage) -> None:
        """Do nothing: the pieces of a tensor were checked when it was found."""

    def read(self, storage: Storage) -> Tensor:
        """Return a whole tensor as uint8 `(n,)`."""
        whole = self.wholes[storage.key]
        values = torch.empty(whole.shape, dtype=whole.dtype)
        for piece in whole.pieces:
            file = self.folder / piece.file
            with reading(file), open_regular(file) as opened, damage_of(file):
                opened.seek(piece.start)
                stored = read_content(io.BytesIO(opened.read(piece.length)))
                if not isinstance(stored, StoredTensor) or (stored.dtype, stored.shape) != (whole.dtype, piece.sizes):
                    raise BadTensor(f"a piece of its tensor {shown(storage.key)} has another form than it should have")
                place = tuple(slice(a, a + n) for a, n in zip(piece.offsets, piece.sizes, strict=True))
                values[place] = read_tensors({storage.key: stored})[storage.key]
        return values.reshape(-1).view(torch.uint8)


def _is(value: Any, kind: str) -> bool:
    named = isinstance(value, Placeholder) and value.path.startswith(_MODULE)
    return named and value.path.rpartition(".")[2] == kind and isinstance(value.state, dict)


def _state(value: Any, kind: str) -> dict[Any, Any]:
    """Return the attributes of an object of torch.distributed.checkpoint, which was not made."""
    if not _is(value, kind):
        raise RefusedContent("it is no metadata of torch.distributed.checkpoint as torch writes it")
    state: dict[Any, Any] = value.state
    return state


def _sizes(value: Any) -> tuple[int, ...]:
    if not isinstance(value, tuple) or any(type(n) is not int or not 0 <= n < 2**62 for n in value):
        raise RefusedContent("it has shapes or places that are no sizes")
    return value

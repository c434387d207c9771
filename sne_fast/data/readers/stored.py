"""Tensors of a file that have not been read yet: where their bytes lie, checked before any memory is taken."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import IO, Any, Protocol, cast

import torch
from torch import Tensor

from ..remote.files import RemoteFile
from .errors import CheckpointError
from .lazy_tensors import LazyTensor, OpenFile

__all__ = [
    "BadTensor",
    "Bytes",
    "Quantised",
    "Storage",
    "StoredTensor",
    "open_tensors",
    "read_at",
    "read_into",
    "read_tensors",
]

MAX_DIMENSIONS = 64
_MAX_VIEWS = 64  # times that distinct tensors may cover the storage which they share
_PIECE = 2**24


class BadTensor(Exception):
    """A tensor that its file cannot hold; the message ends a sentence."""


class Bytes(Protocol):
    """Where the bytes of storages are read from."""

    def declare(self, storage: Storage) -> None:
        """Take note of a storage that the pickle names, and refuse one that is larger than the file says."""

    def read(self, storage: Storage) -> Tensor:
        """Return a whole storage as uint8 `(n,)` in memory of its own, in this machine's order of bytes."""


@dataclass(frozen=True, eq=False)
class Storage:
    """Elements of one dtype in a file: `count` of them from `start` on, of `total` that the storage has."""

    source: Bytes
    key: str
    dtype: torch.dtype
    count: int
    start: int = 0
    total: int = -1  # as many as `count`


@dataclass(frozen=True)
class Quantised:
    """What a quantised tensor's integers mean: one scale and zero point, or one per index of dimension `axis`."""

    dtype: torch.dtype
    scale: Any
    zero_point: Any
    axis: int | None


_INTEGERS = {torch.qint8: torch.int8, torch.quint8: torch.uint8, torch.qint32: torch.int32}


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """A tensor of a file: its storage and the part of it that it shows.

    `storage` is None for a tensor of the meta device, which has no values; `indices` are those of a sparse tensor, and
    then this holds no storage and `values` is its part with one.
    """

    storage: Storage | None
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    quantised: Quantised | None = None
    conjugated: bool = False
    negated: bool = False
    sparse: tuple[StoredTensor, StoredTensor] | None = field(default=None)

    def __post_init__(self) -> None:
        for numbers in (self.shape, self.stride, (self.offset,)):
            if any(type(n) is not int or not 0 <= n < 2**63 for n in numbers):
                raise BadTensor("it holds a tensor whose shape, strides or offset are no sizes")
        if len(self.shape) > MAX_DIMENSIONS or (self.sparse is None and len(self.shape) != len(self.stride)):
            raise BadTensor(f"it holds a tensor of {len(self.shape)} dimensions and {len(self.stride)} strides")
        if self.count() >= 2**62:
            raise BadTensor(f"it holds a tensor of shape {self.shown_shape()}, which is larger than any memory")
        if self.storage is None or self.count() == 0:
            return
        last = self.offset + sum((n - 1) * step for n, step in zip(self.shape, self.stride, strict=True))
        if self.count() > self.storage.count or last >= self.storage.count:
            raise BadTensor(
                f"it holds a tensor of shape {self.shown_shape()} over {self.storage.count} stored elements; "
                f"save a copy of its own with .clone()"
            )

    def count(self) -> int:
        """Return the number of elements."""
        return math.prod(self.shape)

    def shown_shape(self) -> str:
        """Return the shape for a message."""
        return f"({', '.join(map(str, self.shape[:6]))}{', ...' if len(self.shape) > 6 else ''})"

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    def same_place(self) -> tuple[Any, ...]:
        """Return what is equal for tensors that show the same bytes in the same way."""
        where = (id(self.storage.source), self.storage.key, self.storage.start) if self.storage else id(self)
        return where, self.dtype, self.offset, self.shape, self.stride

    def _shown(self, storages: dict[Any, Tensor]) -> Tensor:
        if self.sparse is not None:
            indices, values = (part._shown(storages) for part in self.sparse)
            return torch.sparse_coo_tensor(indices, values, self.shape, check_invariants=True)
        if self.storage is None:
            return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device="meta")
        integers = _INTEGERS.get(self.dtype, self.dtype)
        key = (id(self.storage.source), self.storage.key)
        if key not in storages:
            storages[key] = self.storage.source.read(self.storage)
        held = storages[key]
        size = integers.itemsize
        elements = held[: held.numel() // size * size].view(integers)
        tensor = elements.as_strided(self.shape, self.stride, self.storage.start + self.offset)
        if self.conjugated:
            tensor = tensor.conj().resolve_conj()
        if self.negated:
            tensor = tensor.neg()
        return tensor if self.quantised is None else _quantise(tensor, self.quantised, storages)


def _quantise(tensor: Tensor, how: Quantised, storages: dict[Any, Tensor]) -> Tensor:
    if how.axis is None:
        return torch._make_per_tensor_quantized_tensor(tensor, how.scale, how.zero_point)
    scale, zero_point = how.scale._shown(storages), how.zero_point._shown(storages)
    count = tensor.shape[how.axis] if how.axis < tensor.ndim else -1
    if scale.shape != (count,) or zero_point.shape != (count,):
        raise BadTensor(f"it holds a quantised tensor with {tuple(scale.shape)} scales for dimension {how.axis}")
    return torch._make_per_channel_quantized_tensor(tensor, scale, zero_point, how.axis)


def read_tensors(tensors: Mapping[str, StoredTensor | Tensor]) -> dict[str, Tensor]:
    """Read tensors into memory; those of one storage share its memory, as they did when they were saved.

    Raises:
        BadTensor: tensors that a small file would make out of shared bytes, and other tensors that cannot be.
        CheckpointError: the file ends before the values do.
        OSError: the file cannot be read.
    """
    _check_shared(tensor for tensor in tensors.values() if isinstance(tensor, StoredTensor))
    storages: dict[Any, Tensor] = {}
    read = {}
    for name, tensor in tensors.items():
        try:
            read[name] = tensor if isinstance(tensor, Tensor) else tensor._shown(storages)
        except CheckpointError:  # which says it itself
            raise
        except (RuntimeError, ValueError, TypeError) as error:
            reason = str(error).partition("\n")[0][:120]
            raise BadTensor(f"its tensor {name!r:.80} cannot be made: {reason}") from error
    return read


def open_tensors(
    tensors: Mapping[str, StoredTensor | Tensor], held: OpenFile, failing: Callable[[], AbstractContextManager[None]]
) -> dict[str, Tensor | LazyTensor]:
    """Return tensors that are read when they are asked for, while their file is open.

    Those that share a storage with others, and those that are more than a part of one storage, are read at once.

    Args:
        tensors: those of one file.
        held: the file, which stays open for them.
        failing: makes the context in which a tensor is read later, which turns failures into `CheckpointError`.

    Raises:
        BadTensor: as `read_tensors`.
        OSError: the file cannot be read.
    """
    places: dict[Any, set[Any]] = {}
    for tensor in tensors.values():
        if isinstance(tensor, StoredTensor) and tensor.storage is not None:
            places.setdefault(tensor.same_place()[0], set()).add(tensor.same_place())

    def is_lazy(tensor: StoredTensor | Tensor) -> bool:
        if isinstance(tensor, Tensor) or tensor.storage is None or tensor.quantised is not None:
            return False
        return len(places[tensor.same_place()[0]]) == 1

    at_once = read_tensors({name: tensor for name, tensor in tensors.items() if not is_lazy(tensor)})

    def lazy(name: str, stored: StoredTensor) -> LazyTensor:
        def read() -> Tensor:
            with failing(), held.lock:  # which also keeps the file open
                return read_tensors({name: stored})[name]

        return LazyTensor(stored.dtype, stored.shape, read, stored.same_place())

    return {
        name: lazy(name, tensor) if isinstance(tensor, StoredTensor) and name not in at_once else at_once[name]
        for name, tensor in tensors.items()
    }


def _check_shared(tensors: Iterable[StoredTensor]) -> None:
    """Refuse many distinct views of one storage, of which a copy each could be larger than any memory."""
    seen, covered = set(), dict[Any, int]()
    for tensor in tensors:
        place = tensor.same_place()
        if tensor.storage is None or place in seen:
            continue
        seen.add(place)
        covered[place[0]] = covered.get(place[0], 0) + tensor.count()
        if covered[place[0]] > _MAX_VIEWS * tensor.storage.count:
            raise BadTensor(
                f"it holds tensors that overlap more than {_MAX_VIEWS} times in one storage; "
                f"save a copy of each with .clone()"
            )


def read_at(held: OpenFile, place: int, count: int) -> Tensor:
    """Read `count` bytes from a place of an open file on, as `read_into`; several threads may do so at once."""
    if isinstance(held.opened, RemoteFile):  # which has no place to share
        return read_into(cast(IO[bytes], held.opened.at(place)), count)
    with held.lock:
        held.opened.seek(place)
        return read_into(held.opened, count)


def read_into(file: IO[bytes], count: int) -> Tensor:
    """Read `count` bytes from the file's place on, as uint8 `(count,)` without a second copy.

    Raises:
        CheckpointError: the file ends before.
        OSError: the file cannot be read.
    """
    held = torch.empty(count, dtype=torch.uint8)
    view = memoryview(held.numpy())  # type: ignore[arg-type]
    done = 0
    while done < count:
        piece = file.readinto(view[done : done + _PIECE])  # type: ignore[attr-defined]
        if not piece:
            raise CheckpointError(f"is damaged: it ends {count - done} bytes too early")
        done += piece
    return held

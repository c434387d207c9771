"""Files of `torch.save`, new (a zip) and old (pickles one after the other), and plain pickles that hold tensors."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor

from ..remote.failures import StoreError
from . import numpy_values
from .content_tree import RefusedContent
from .errors import CheckpointError, Unreachable, reading
from .numpy_values import RefusedArray
from .pickled_values import BadPickle, Bounded, RefusedName, read_pickle
from .script_programs import SCRIPT_NAMES, Script
from .stored import BadTensor, Storage, read_into
from .torch_values import known_names, storage_maker

__all__ = ["damage_of", "read_content", "reading_torch"]

_MAGIC = torch.serialization.MAGIC_NUMBER
_PROTOCOL = torch.serialization.PROTOCOL_VERSION
_MAX_SOURCE = 64 * 2**20  # of a program, decompressed
_MAX_NESTED = 2  # files inside files: a storage in the bytes of a pickle


# What the parsers of the standard library make of damaged files.
_DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, struct.error, NotImplementedError, ValueError, LookupError,
           OverflowError)  # fmt: skip


def read_content(opened: IO[bytes], *, strict: bool = False, arrays: bool = False) -> Any:
    """Return what a pickled checkpoint holds, with `StoredTensor`s, which can be read while the file is open.

    Of a TorchScript program it is a `Script`.

    Args:
        opened: the checkpoint.
        strict: refuse a file that holds anything but tensors and plain data; objects are placeholders otherwise.
        arrays: with `strict`, accept numpy's arrays and numbers too: arrays as values for `as_array`.

    Raises:
        Exception: for a damaged or refused file, those that `damage_of` turns into `CheckpointError`.
    """
    return _content(opened, strict, numpy_values.KNOWN if arrays else {}, 0)


@contextmanager
def reading_torch(file: Path) -> Iterator[None]:
    """Turn all that the system and the readers of pickles say of a file into errors that name it."""
    with reading(file), damage_of(file):
        yield


@contextmanager
def damage_of(file: Path) -> Iterator[None]:
    """Turn what a damaged or refused file makes of its reader into errors that name it."""
    try:
        yield
    except (StoreError, Unreachable):
        raise
    except CheckpointError as error:
        told = str(error)
        raise CheckpointError(told if told.startswith(f"{file}: ") else f"{file}: {told}") from error
    except (RefusedArray, BadTensor, RefusedContent) as error:
        raise CheckpointError(f"{file}: refused, {error}") from error
    except RefusedName as error:
        raise CheckpointError(
            f"{file}: refused, it holds code or objects ({error}) besides tensors, and a pickle's code would run on "
            f"loading; save the model's state_dict() alone, best as safetensors"
        ) from error
    except BadPickle as error:
        raise CheckpointError(f"{file}: is damaged or no checkpoint of torch: {error}") from error
    except RecursionError:
        raise CheckpointError(f"{file}: refused, its values are nested too deeply") from None
    except _DAMAGE as error:
        reason = str(error).partition("\n")[0][:120]
        raise CheckpointError(f"{file}: is damaged or no checkpoint of torch: {reason}") from error
    except MemoryError as error:
        raise CheckpointError(f"{file}: needs more memory than there is") from error


def _content(opened: IO[bytes], strict: bool, extra: Mapping[str, Any], depth: int) -> Any:
    if depth > _MAX_NESTED:
        raise BadPickle("it holds files inside files")

    def nested(data: bytes) -> Any:
        return _content(io.BytesIO(data), strict, {}, depth + 1)

    known = {**known_names(nested), **extra}
    beginning = opened.read(4)
    opened.seek(0)
    if beginning == b"PK\x03\x04":
        zipped = _Zip(opened)
        if zipped.is_script:
            return _script(zipped, known, strict)
        return read_pickle(io.BytesIO(zipped.pickle()), known, storage_maker(zipped), strict=strict)
    size = opened.seek(0, io.SEEK_END)
    opened.seek(0)
    stream = cast(IO[bytes], Bounded(opened, size))
    first = read_pickle(stream, known, strict=strict)
    if first != _MAGIC or isinstance(first, float):
        return first
    if read_pickle(stream, {}, strict=True) != _PROTOCOL:
        raise BadPickle("its version is unknown")
    system = read_pickle(stream, {}, strict=True)
    little = system.get("little_endian") if isinstance(system, dict) else None
    old = _Old(opened, size, little is not False)
    value = read_pickle(stream, known, storage_maker(old), strict=strict)
    old.locate(read_pickle(stream, {}, strict=True))
    return value


def _script(zipped: _Zip, known: Mapping[str, Any], strict: bool) -> Script:
    if strict:
        raise CheckpointError("refused, it is a TorchScript program and not weights; save its state_dict()")
    constants = zipped.of("constants")
    root, values = (
        read_pickle(io.BytesIO(part.pickle()), {**known, **SCRIPT_NAMES}, storage_maker(part))
        for part in (zipped, constants)
    )
    return Script(root, values, dict(zipped.sources()))


class _Zip:
    """The storages of a file of `torch.save`: entries of a zip, stored as they are.

    A TorchScript program is such a file too. It has two pickles, `data` and `constants`, each with its storages, and
    beside them its source, which may be compressed.
    """

    part = "data"

    def __init__(self, opened: IO[bytes]) -> None:
        size = opened.seek(0, io.SEEK_END)
        self.archive = zipfile.ZipFile(opened)
        entries = self.archive.infolist()
        found = [
            e.filename for e in entries if e.filename.rpartition("/")[2] == "data.pkl" and e.filename.count("/") < 2
        ]
        if len(found) != 1:
            raise CheckpointError("is a zip file but no checkpoint of torch, which has one data.pkl; unpack it first")
        self.folder = found[0][: -len("data.pkl")]
        self.is_script = any(e.filename == f"{self.folder}constants.pkl" for e in entries)
        self.code = [e for e in entries if self.is_script and e.filename.startswith(f"{self.folder}code/")]
        entries = [e for e in entries if e not in self.code]
        if any(e.compress_type != zipfile.ZIP_STORED or e.flag_bits & 1 for e in entries):
            raise CheckpointError("refused, it is a compressed or encrypted zip, which torch.save never writes")
        if sum(e.file_size for e in entries) > size:
            raise CheckpointError("is damaged: its entries are larger than the file")
        self.entries = {e.filename: e for e in entries}
        order = self.folder + "byteorder"
        self.little = order not in self.entries or self._bytes(order, 16) != b"big"

    def _bytes(self, name: str, limit: int) -> bytes:
        with self._open(name) as entry:
            return entry.read(limit)

    def _open(self, name: str) -> IO[bytes]:
        entry = self.entries[name]
        if entry.CRC == 0:  # torch writes no checksums where set_crc32_options(False) asked for that
            entry.CRC = None  # type: ignore[assignment]
        return self.archive.open(entry)

    def of(self, part: str) -> _Zip:
        """Return the same file for the storages of another pickle in it."""
        other = copy(self)
        other.part = part
        return other

    def sources(self) -> Iterator[tuple[str, str]]:
        """Yield the paths and texts of a program's source."""
        sources = [entry for entry in self.code if entry.filename.endswith(".py")]
        if sum(entry.file_size for entry in sources) > _MAX_SOURCE:
            raise CheckpointError("refused, the source of its TorchScript program is larger than any")
        for entry in sources:
            text = self.archive.read(entry).decode("utf-8", "replace")
            yield entry.filename.removeprefix(f"{self.folder}code/"), text

    def pickle(self) -> bytes:
        name = f"{self.folder}{self.part}.pkl"
        return self._bytes(name, self.entries[name].file_size)

    def declare(self, storage: Storage) -> None:
        name = f"{self.folder}{self.part}/{storage.key}"
        if name not in self.entries:
            raise BadPickle(f"it lacks the values of storage {storage.key!r:.40}")
        if max(storage.count, storage.total) * storage.dtype.itemsize > self.entries[name].file_size:
            raise BadPickle(f"storage {storage.key!r:.40} has fewer values than its pickle says")

    def read(self, storage: Storage) -> Tensor:
        name = f"{self.folder}{self.part}/{storage.key}"
        with self._open(name) as entry:
            read = read_into(entry, self.entries[name].file_size)
            entry.read(1)  # the end, where the checksum is compared
        return read if self.little else _swapped(read, storage.dtype)


class _Old:
    """The storages of a file of `torch.save` before it wrote zips: each behind its number of elements, in one row."""

    def __init__(self, opened: IO[bytes], size: int, little: bool) -> None:
        self.opened, self.end, self.little = opened, size, little
        self.places: dict[str, tuple[int, int]] = {}
        self.declared: dict[str, tuple[int, int]] = {}

    def declare(self, storage: Storage) -> None:
        wanted, width = max(storage.count, storage.total), storage.dtype.itemsize
        before, other_width = self.declared.get(storage.key, (0, width))
        if other_width != width:
            raise BadPickle(f"storage {storage.key!r:.40} has two dtypes")
        self.declared[storage.key] = max(before, wanted), width

    def locate(self, keys: Any) -> None:
        """Find each storage; `keys` is the pickle that stands before them."""
        if not isinstance(keys, list):
            raise BadPickle("it does not say in which order its storages stand")
        for key in map(str, keys):
            head = self.opened.read(8)
            if key not in self.declared or len(head) < 8 or key in self.places:
                raise BadPickle("its storages do not stand as its pickle says, or it ends too early")
            wanted, width = self.declared[key]
            count = int.from_bytes(head, "little" if self.little else "big", signed=True)
            place = self.opened.tell()
            if count < wanted or place + count * width > self.end:
                raise BadPickle("it ends before its last storage, or has one that is too short")
            self.places[key] = place, count * width
            self.opened.seek(place + count * width)
        if len(self.places) != len(self.declared):
            raise BadPickle("it lacks values of its storages")

    def read(self, storage: Storage) -> Tensor:
        place, size = self.places[storage.key]
        self.opened.seek(place)
        read = read_into(self.opened, size)
        return read if self.little else _swapped(read, storage.dtype)


def _swapped(held: Tensor, dtype: torch.dtype) -> Tensor:
    width = dtype.itemsize // (2 if dtype.is_complex else 1)
    return held if width == 1 else held.view(-1, width).flip(1).reshape(-1)

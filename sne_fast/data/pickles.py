"""Pickles of torch, read with no callable of numpy among the names that they may call.

`torch.load(weights_only=True)` calls nothing but the names on its list, with arguments from the file. numpy's callables
must not be on that list, since they trust their arguments: an array of dtype `object` over bytes of the file takes them
for addresses of Python objects. Here numpy's names stand for the classes and functions below, which take the form that
numpy writes, check all of it, and hold bytes until an array is asked for.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NoReturn

import numpy as np
import torch

__all__ = ["RefusedArray", "as_array", "load_plain"]

_DTYPES: dict[str, np.dtype[Any]] = {
    "f4": np.dtype("<f4"),
    "f8": np.dtype("<f8"),
    "i4": np.dtype("<i4"),
    "i8": np.dtype("<i8"),
}
_DTYPE_STATE = (3, "<", None, None, None, -1, -1, 0)  # little-endian, and no fields, subarray or metadata
_MOST_DIMENSIONS = 8
_READABLE = f"read are arrays of {', '.join(_DTYPES)} with as many bytes as their shape takes"


class RefusedArray(Exception):
    """A numpy value in a pickle that is not of the few forms that are read; the message ends a sentence."""


def load_plain(
    file: Path | IO[bytes], *, device: torch.device | str = "cpu", mmap: bool = False, arrays: bool = False
) -> Any:
    """Return the content of a checkpoint of `torch.save` that holds tensors and plain data, running no code of it.

    This is the only place of the package that reads pickles. Names of numpy that the program has put on torch's list
    by `torch.serialization.add_safe_globals` are off the list meanwhile.

    Args:
        file: the checkpoint, by its path or opened.
        device: where tensors go.
        mmap: whether tensors are mapped, not read, until they are used; of a zipped file only.
        arrays: whether numpy's arrays and scalars are read too: arrays as values for `as_array`, scalars as numbers.

    Raises:
        RefusedArray: a numpy value of another dtype than f4, f8, i4, i8, of another length than its shape, or made in
            another way than numpy's own.
        Exception: whatever torch raises for a damaged or refused file.
    """
    with _names_of_numpy_as(_STAND_INS if arrays else []):
        return torch.load(file, map_location=device, weights_only=True, mmap=mmap)


def as_array(value: Any) -> Any:
    """Return a numpy array of its own memory for an array that `load_plain` read, and any other value as it is.

    Raises:
        RefusedArray: the pickle never filled the array.
    """
    return value.copy() if isinstance(value, _Array) else value


class _DType:
    """The stand-in for `numpy.dtype`."""

    __slots__ = ("dtype",)

    dtype: np.dtype[Any]

    def __new__(cls, *arguments: Any) -> _DType:
        kind = arguments[0] if arguments else None
        if type(kind) is not str or kind not in _DTYPES:
            raise RefusedArray(f"it holds a numpy value of dtype {kind!r:.40}; {_READABLE}")
        if arguments[1:] != (False, True):
            _refuse("a dtype")
        made = super().__new__(cls)
        made.dtype = _DTYPES[kind]
        return made

    def __setstate__(self, state: Any) -> None:
        if type(state) is not tuple or state != _DTYPE_STATE:
            raise RefusedArray(f"it holds a numpy dtype that is not plain and little-endian; {_READABLE}")


class _Array:
    """The stand-in for `numpy.ndarray`; it keeps the bytes of the pickle, so that many arrays can share them."""

    __slots__ = ("_view",)

    _view: np.ndarray

    def __new__(cls, *arguments: Any) -> _Array:
        _refuse("an array")

    def __setstate__(self, state: Any) -> None:
        if hasattr(self, "_view") or type(state) is not tuple or len(state) != 5 or state[0] != 1:
            _refuse("an array")
        _, shape, dtype, column_major, data = state
        if type(dtype) is not _DType or type(column_major) is not bool:
            _refuse("an array")
        if type(shape) is not tuple or len(shape) > _MOST_DIMENSIONS or any(type(n) is not int or n < 1 for n in shape):
            raise RefusedArray(f"it holds a numpy array of a shape that cannot be; {_READABLE}")
        self._view = _view(dtype, math.prod(shape), data).reshape(shape, order="F" if column_major else "C")

    def copy(self) -> np.ndarray:
        if not hasattr(self, "_view"):
            _refuse("an array")
        copied: np.ndarray = self._view.copy()
        return copied


def _reconstruct(*arguments: Any) -> _Array:
    """Return an array that waits for its state, for `numpy.core.multiarray._reconstruct`."""
    if len(arguments) != 3 or arguments[0] is not _Array or arguments[1:] != ((0,), b"b"):
        _refuse("an array")
    return object.__new__(_Array)


def _scalar(*arguments: Any) -> float | int:
    """Return a number, for `numpy.core.multiarray.scalar`."""
    if len(arguments) != 2 or type(arguments[0]) is not _DType:
        _refuse("a scalar")
    number: float | int = _view(arguments[0], 1, arguments[1])[0].item()
    return number


def _view(dtype: _DType, count: int, data: Any) -> np.ndarray:
    wanted = count * dtype.dtype.itemsize
    if type(data) is not bytes or len(data) != wanted:
        held = f"{len(data)} bytes" if type(data) is bytes else f"an object of type {type(data).__name__}"
        raise RefusedArray(f"it holds a numpy value with {held} where its shape takes {wanted} bytes; {_READABLE}")
    return np.frombuffer(data, dtype.dtype)


def _refuse(what: str) -> NoReturn:
    raise RefusedArray(f"it makes {what} of numpy in another way than numpy's own; {_READABLE}")


# numpy 2 renamed the module; files name the one of the numpy that wrote them.
_STAND_INS: list[Any] = [(_Array, "numpy.ndarray"), (_DType, "numpy.dtype")] + [
    (function, f"numpy.{core}.multiarray.{name}")
    for core in ("core", "_core")
    for function, name in ((_reconstruct, "_reconstruct"), (_scalar, "scalar"))
]

# torch has one list per process: one thread at a time changes it, and no child is forked while it is changed.
_CHANGING = threading.Lock()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_CHANGING.acquire, after_in_parent=_CHANGING.release, after_in_child=_CHANGING.release)


@contextmanager
def _names_of_numpy_as(stand_ins: list[Any]) -> Iterator[None]:
    """Let names of numpy in pickles stand for `stand_ins`, and for nothing else, whatever the program has allowed."""
    with _CHANGING:
        set_aside = [entry for entry in torch.serialization.get_safe_globals() if _is_of_numpy(entry)]
        if set_aside:
            kept = [entry for entry in torch.serialization.get_safe_globals() if entry not in set_aside]
            torch.serialization.clear_safe_globals()
            torch.serialization.add_safe_globals(kept)
        try:
            with torch.serialization.safe_globals(stand_ins):
                yield
        finally:
            torch.serialization.add_safe_globals(set_aside)


def _is_of_numpy(entry: Any) -> bool:
    called, name = entry if isinstance(entry, tuple) else (entry, "")
    named = (str(name), str(getattr(called, "__module__", "")), type(called).__module__)
    bases = (np.ndarray, np.generic, np.dtype)
    return any(path.partition(".")[0] == "numpy" for path in named) or (
        isinstance(called, type) and issubclass(called, bases)
    )

"""Arrays and numbers of numpy in pickles, read with no callable of numpy.

numpy's callables trust their arguments: an array of dtype `object` over bytes of a file takes them for addresses of
Python objects. Its names in pickles stand for the classes and functions below, which take the form that numpy writes,
check all of it, and hold bytes until an array is asked for.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from torch import Tensor

from .pickled_values import Name, Placeholder

__all__ = ["KNOWN", "Array", "RefusedArray", "array_form", "as_array"]

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


def as_array(value: Any) -> Any:
    """Return a numpy array of its own memory for an array that was read, and any other value as it is.

    Raises:
        RefusedArray: the pickle never filled the array.
    """
    return value.copy() if isinstance(value, Array) else value


class DType:
    """The stand-in for `numpy.dtype`."""

    __slots__ = ("dtype",)

    dtype: np.dtype[Any]

    @classmethod
    def made(cls, *arguments: Any) -> DType:
        """Return the dtype for what numpy gives to `numpy.dtype`."""
        kind = arguments[0] if arguments else None
        if type(kind) is not str or kind not in _DTYPES:
            raise RefusedArray(f"it holds a numpy value of dtype {kind!r:.40}; {_READABLE}")
        if arguments[1:] != (False, True):
            _refuse("a dtype")
        made = cls()
        made.dtype = _DTYPES[kind]
        return made

    def set_state(self, state: Any) -> None:
        """Check the rest of what numpy says of a dtype."""
        if type(state) is not tuple or state != _DTYPE_STATE:
            raise RefusedArray(f"it holds a numpy dtype that is not plain and little-endian; {_READABLE}")


class Array:
    """The stand-in for `numpy.ndarray`; it keeps the bytes of the pickle, so that many arrays can share them."""

    __slots__ = ("_view",)

    _view: np.ndarray

    @classmethod
    def made(cls, *arguments: Any) -> Array:
        """Refuse: numpy itself makes arrays by `_reconstruct`."""
        _refuse("an array")

    def set_state(self, state: Any) -> None:
        """Take shape, dtype and bytes."""
        if hasattr(self, "_view") or type(state) is not tuple or len(state) != 5 or state[0] != 1:
            _refuse("an array")
        _, shape, dtype, column_major, data = state
        if type(dtype) is not DType or type(column_major) is not bool:
            _refuse("an array")
        if type(shape) is not tuple or len(shape) > _MOST_DIMENSIONS or any(type(n) is not int or n < 1 for n in shape):
            raise RefusedArray(f"it holds a numpy array of a shape that cannot be; {_READABLE}")
        self._view = _view(dtype, math.prod(shape), data).reshape(shape, order="F" if column_major else "C")

    def copy(self) -> np.ndarray:
        """Return the array in memory of its own."""
        if not hasattr(self, "_view"):
            _refuse("an array")
        copied: np.ndarray = self._view.copy()
        return copied


def _reconstruct(*arguments: Any) -> Array:
    """Return an array that waits for its state, for `numpy.core.multiarray._reconstruct`."""
    if len(arguments) != 3 or not isinstance(arguments[0], Name) or arguments[0].path != "numpy.ndarray":
        _refuse("an array")
    if arguments[1:] != ((0,), b"b"):
        _refuse("an array")
    return Array()


def scalar(*arguments: Any) -> float | int:
    """Return a number, for `numpy.core.multiarray.scalar`."""
    if len(arguments) != 2 or type(arguments[0]) is not DType:
        _refuse("a scalar")
    number: float | int = _view(arguments[0], 1, arguments[1])[0].item()
    return number


def _view(dtype: DType, count: int, data: Any) -> np.ndarray:
    wanted = count * dtype.dtype.itemsize
    if type(data) is not bytes or len(data) != wanted:
        held = f"{len(data)} bytes" if type(data) is bytes else f"an object of type {type(data).__name__}"
        raise RefusedArray(f"it holds a numpy value with {held} where its shape takes {wanted} bytes; {_READABLE}")
    return np.frombuffer(data, dtype.dtype)


def _refuse(what: str) -> NoReturn:
    raise RefusedArray(f"it makes {what} of numpy in another way than numpy's own; {_READABLE}")


# numpy 2 renamed the module; files name the one of the numpy that wrote them.
KNOWN: dict[str, Any] = {"numpy.ndarray": Array.made, "numpy.dtype": DType.made} | {
    f"numpy.{core}.multiarray.{function.__name__}": function
    for core in ("core", "_core")
    for function in (_reconstruct, scalar)
}


# Kinds of elements that are tensors too; numpy's name of each begins with its order of bytes.
_TENSOR_KINDS = ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "b1", "c8", "c16")


class ArrayForm(NamedTuple):
    """An array of numbers that a placeholder stands for: its bytes, exactly as many as its shape takes."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    column_major: bool
    data: bytes

    def tensor(self) -> Tensor:
        """Return the array as a tensor in memory of its own."""
        array = np.frombuffer(self.data, self.dtype).reshape(self.shape, order="F" if self.column_major else "C")
        return torch.from_numpy(np.array(array, self.dtype.newbyteorder("=")))


def array_form(value: Any) -> ArrayForm | None:
    """Return the array that a placeholder stands for, None for anything else."""
    if not isinstance(value, Placeholder):
        return None
    try:
        if value.path in ("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct"):
            _, shape, dtype, column_major, data = value.state
        elif value.path in ("numpy.core.numeric._frombuffer", "numpy._core.numeric._frombuffer"):
            data, dtype, shape, order = value.arguments
            column_major = order == "F"
        else:
            return None
        kind, order = dtype.arguments[0], dtype.state[1]
        if dtype.path != "numpy.dtype" or kind not in _TENSOR_KINDS or order not in ("<", ">", "|", "="):
            return None
    except (TypeError, ValueError, AttributeError, LookupError):
        return None
    if isinstance(data, Placeholder) and data.path == "builtins.bytearray" and data.arguments:
        data = data.arguments[0]
    data = data.encode("latin1", "replace") if isinstance(data, str) else data  # bytes of Python 2
    if not isinstance(data, bytes) or not isinstance(shape, tuple) or len(shape) > _MOST_DIMENSIONS:
        return None
    plain = np.dtype(kind).newbyteorder(order)
    if any(type(n) is not int or n < 0 for n in shape) or math.prod(shape) * plain.itemsize != len(data):
        return None
    return ArrayForm(plain, shape, bool(column_major), data)

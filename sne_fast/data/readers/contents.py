"""Contents of a file that an optional library reads, and the errors that all readers of such files share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ... import extras
from .errors import CheckpointError, Unreachable, reading, shown
from .lazy_tensors import LazyTensor

__all__ = ["Contents", "array_tensor", "lazy_array", "need", "reading_format"]

_RAW = {"bfloat16": torch.bfloat16, "float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2,
        "float8_e4m3fnuz": torch.float8_e4m3fnuz, "float8_e5m2fnuz": torch.float8_e5m2fnuz}  # fmt: skip


@dataclass
class Contents:
    """The tensors of a file by name, each read when it is asked for.

    Attributes:
        tensors: by name, matrices as `(out, in)`, weights of convolutions as `(out, in, *kernel)`.
        keeps_order: whether they are in the order in which the network was defined.
        left_out: what else the file holds, by its name there, with the reason why it is not part of the weights.
    """

    tensors: dict[str, LazyTensor] = field(default_factory=dict)
    keeps_order: bool = False
    left_out: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, tensor: LazyTensor) -> None:
        """Add a tensor.

        Raises:
            ValueError: there is one of this name.
        """
        if name in self.tensors:
            raise ValueError(f"it has two tensors that are called {shown(name)}")
        self.tensors[name] = tensor


def need(file: Path, what: str, *modules: str, extra: str) -> None:
    """Check that the library for a format is installed.

    Args:
        file: the file to be read.
        what: its format with an article, such as "an ONNX file".
        modules: of the library.
        extra: the extra of this package that installs it.

    Raises:
        CheckpointError: it is missing; the message names the command that installs it.
    """
    try:
        extras.require(*modules, extra=extra, why=f"{file}: is {what}, and reading it")
    except ModuleNotFoundError as error:
        raise CheckpointError(str(error)) from error


@contextmanager
def reading_format(file: Path, what: str) -> Iterator[None]:
    """Turn whatever a library raises over a damaged file into a `CheckpointError` that names the file.

    Args:
        file: the file that is read.
        what: its format, such as "ONNX file".
    """
    try:
        with reading(file):
            try:
                yield
            except OSError as error:
                if error.errno is not None:
                    raise
                raise ValueError(str(error)) from error  # of h5py, over what the file holds
    except Unreachable:
        raise
    except CheckpointError as error:
        told = str(error)
        raise CheckpointError(told if told.startswith(f"{file}") else f"{file}: {told}") from error
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise CheckpointError(f"{file}: needs more memory than there is") from error
    except RecursionError:
        raise CheckpointError(f"{file}: refused, its values are nested too deeply") from None
    except Exception as error:  # parsers of other packages raise anything over damaged files
        reason = str(error).partition("\n")[0][:160] or type(error).__name__
        raise CheckpointError(f"{file}: is damaged or no {what}: {reason}; fetch or write it again") from error


def array_tensor(array: np.ndarray[Any, Any]) -> Tensor:
    """Return an array of numbers as a tensor in memory of its own.

    Raises:
        ValueError: a dtype that torch does not have, such as text.
    """
    name = array.dtype.name
    if name in _RAW:
        width = np.uint16 if array.dtype.itemsize == 2 else np.uint8
        return torch.from_numpy(np.array(array.view(width), order="C", copy=True)).view(_RAW[name])
    if array.dtype.kind not in "biufc":
        raise ValueError(f"an array of {array.dtype} is no array of numbers")
    native = array.dtype.newbyteorder("=")
    if native.name in ("float128", "complex256", "longdouble", "clongdouble"):
        native = np.dtype(np.complex128 if native.kind == "c" else np.float64)
    return torch.from_numpy(np.array(array, dtype=native, order="C", copy=True))


def lazy_array(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    values: Callable[[], np.ndarray[Any, Any]],
    place: Any = None,
    damage: Callable[[], Any] | None = None,
) -> LazyTensor:
    """Return a tensor whose values a function returns as an array.

    Args:
        shape: of the tensor.
        dtype: of the tensor, into which other numbers are converted.
        values: returns an array of as many elements; it is reshaped.
        place: of `LazyTensor`.
        damage: returns the context in which the values are read, such as that of `reading_format`.
    """

    def read() -> Tensor:
        def made() -> Tensor:
            tensor = array_tensor(np.asarray(values()))
            if tensor.numel() != math.prod(shape):
                raise ValueError(f"a tensor has {tensor.numel()} elements where its shape {shape} is said")
            return tensor.to(dtype).reshape(shape)

        if damage is None:
            return made()
        with damage():
            return made()

    return LazyTensor(dtype, shape, read, place)

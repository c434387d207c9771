"""Files of msgpack that Flax writes: nested maps of arrays, such as `flax_model.msgpack` of transformers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ...regular_files import open_regular
from .contents import Contents, array_tensor, lazy_array, need, reading_format
from .errors import shown
from .stored import MAX_DIMENSIONS

__all__ = ["read_flax"]

_FORMAT = "file of Flax"
_ARRAY, _COMPLEX, _SCALAR = 1, 2, 3  # ext types of flax.serialization
_CHUNKED = "__msgpack_chunked_array__"
_MAX_DEPTH = 64
_HALF = ("bfloat16", b"bfloat16", "V2")
# Names at the top of a state of training that lead to what is no weights.
_BESIDE = {"opt_state": "an optimiser's state", "step": "bookkeeping of the training", "tx": "an optimiser's state",
           "optimizer": "an optimiser's state", "rng": "a random state", "dropout_rng": "a random state"}  # fmt: skip
_WRAPPERS = ("params", "model", "target")  # names that lead to all parameters
_STATISTICS = {"mean": "running_mean", "var": "running_var"}


class _Stored(NamedTuple):
    """An array of the file: its shape, its dtype in numpy or "bfloat16", and its bytes, or those of its pieces."""

    shape: tuple[int, ...]
    dtype: str
    data: tuple[bytes, ...]

    def torch_dtype(self) -> torch.dtype:
        """Return the dtype of the tensor."""
        return torch.bfloat16 if self.dtype == "bfloat16" else array_tensor(np.empty(0, self.dtype)).dtype

    def values(self) -> np.ndarray[Any, Any]:
        """Return the array, of bfloat16 as float32."""
        data = self.data[0] if len(self.data) == 1 else b"".join(self.data)
        if self.dtype == "bfloat16":
            wide = np.frombuffer(data, np.uint16).astype(np.uint32) << 16
            return wide.view(np.float32).reshape(self.shape)
        return np.frombuffer(data, self.dtype).reshape(self.shape)


def read_flax(file: Path) -> Contents:
    """Return the arrays of a file by the names that lead to them, as the parameters of torch.

    A `kernel` becomes `weight` with its output first, `scale` and `embedding` become `weight`, `mean` and `var` of
    `batch_stats` the running ones.

    Raises:
        CheckpointError: `msgpack` is missing, or the file is damaged.
    """
    need(file, "a file of msgpack", "msgpack", extra="flax")
    import msgpack

    found = Contents()
    with reading_format(file, _FORMAT):
        with open_regular(file) as opened:
            content = msgpack.unpackb(opened.read(), ext_hook=_extension, raw=False, strict_map_key=False)
        if not isinstance(content, dict):
            raise ValueError("it is no map")
        arrays: dict[tuple[str, ...], Any] = {}
        _gather(content, (), arrays, found, 0)
        for cell, gates in _cells(arrays):
            for own, stored in _of_cell(cell, gates, arrays).items():
                place = (*cell, own)
                arrays[place] = stored
            for path in [path for path in arrays if path[:-2] == cell and path[-1] in ("kernel", "bias")]:
                del arrays[path]
        for path, stored in arrays.items():
            name, shape, values = _as_parameter(path, stored, arrays)
            damage = partial(reading_format, file, _FORMAT)
            found.add(name, lazy_array(shape, stored.torch_dtype(), values, None, damage))
    return found


def _extension(code: int, data: bytes) -> Any:
    """Return what Flax packs as an extension: an array, a number of numpy, or a complex number."""
    import msgpack

    if code == _COMPLEX:
        return complex(*msgpack.unpackb(data))
    if code not in (_ARRAY, _SCALAR):
        return msgpack.ExtType(code, data)
    shape, dtype, held = msgpack.unpackb(data, raw=True)
    dtype = "bfloat16" if dtype in _HALF else dtype.decode("ascii")
    shape = tuple(shape)
    known = dtype == "bfloat16" or (np.dtype(dtype).kind in "biufc" and not np.dtype(dtype).hasobject)
    if not known or len(shape) > MAX_DIMENSIONS or any(type(n) is not int or n < 0 for n in shape):
        raise ValueError(f"it has an array of {shown(dtype)} that is not read")
    if math.prod(shape) * (2 if dtype == "bfloat16" else np.dtype(dtype).itemsize) != len(held):
        raise ValueError(f"it has an array of shape {shape} with {len(held)} bytes")
    return _Stored(shape, dtype, (held,))


def _gather(content: Mapping[Any, Any], path: tuple[str, ...], arrays: Any, found: Contents, depth: int) -> None:
    if depth > _MAX_DEPTH:
        raise ValueError("its maps are nested too deeply")
    for key, value in content.items():
        here = (*path, str(key))
        if depth == 0 and key in _BESIDE:
            found.left_out[str(key)] = _BESIDE[key]
        elif isinstance(value, dict) and _CHUNKED in value:
            arrays[here] = _chunked(value)
        elif isinstance(value, dict):
            _gather(value, here, arrays, found, depth + 1)
        elif isinstance(value, list) and any(isinstance(one, dict | _Stored) for one in value):
            _gather(dict(enumerate(value)), here, arrays, found, depth + 1)
        elif isinstance(value, _Stored):
            arrays[here] = value
        else:
            found.left_out[".".join(here)] = f"no array ({type(value).__name__})"


def _chunked(value: Mapping[Any, Any]) -> _Stored:
    """Return an array that Flax has cut because msgpack takes no larger ones."""
    shape, chunks = value.get("shape"), value.get("chunks")
    shape, pieces = (list(one.values()) if isinstance(one, dict) else one for one in (shape, chunks))
    if not isinstance(shape, list) or not isinstance(pieces, list) or not pieces:
        raise ValueError("it has an array in pieces without a shape")
    if not all(isinstance(piece, _Stored) and piece.dtype == pieces[0].dtype for piece in pieces):
        raise ValueError("it has an array in pieces that are no arrays of one dtype")
    if any(type(n) is not int or n < 0 for n in shape) or math.prod(shape) != sum(math.prod(p.shape) for p in pieces):
        raise ValueError(f"it has an array of shape {tuple(shape)} whose pieces do not make it up")
    return _Stored(tuple(shape), pieces[0].dtype, tuple(data for piece in pieces for data in piece.data))


def _as_parameter(path: tuple[str, ...], stored: _Stored, arrays: Mapping[tuple[str, ...], _Stored]) -> Any:
    """Return name, shape and values of an array as a parameter of torch."""
    parts = list(path)
    statistic = parts[0] == "batch_stats"
    if len(parts) > 2 and (statistic or parts[0] in _WRAPPERS):
        parts.pop(0)
        if parts[0] in _WRAPPERS and len(parts) > 2:
            parts.pop(0)
    own, shape, values = parts[-1], stored.shape, stored.values
    base = ".".join(parts[:-1])
    name = f"{base}." if base else ""
    if own == "kernel":
        shape, values = _kernel(stored, path, arrays)
        return f"{name}weight", shape, values
    if own in ("scale", "embedding"):
        return f"{name}weight", shape, values
    if own == "bias" and len(shape) > 1:
        return f"{name}bias", (math.prod(shape),), lambda: values().reshape(-1)
    return f"{name}{_STATISTICS.get(own, own)}", shape, values


def _kernel(
    stored: _Stored, path: tuple[str, ...], arrays: Mapping[tuple[str, ...], _Stored]
) -> tuple[tuple[int, ...], Any]:
    """Return shape and values of a kernel with the output first, and that of a transposed convolution with the input.

    That of a DenseGeneral has several dimensions of outputs or inputs, as its bias and its place in attention tell.
    """
    shape, values = stored.shape, stored.values
    if len(shape) < 2:
        return shape, values
    if len(shape) == 2:
        return shape[::-1], lambda: values().T
    bias = arrays.get((*path[:-1], "bias"))
    attention = (*path[:-2], "query", "kernel") in arrays
    many_outputs = bias is not None and len(bias.shape) > 1 and bias.shape == shape[-len(bias.shape) :]
    if attention or many_outputs:
        outputs = bias.shape if bias is not None else shape[-1:] if path[-2].startswith("out") else shape[1:]
        rows = math.prod(outputs)
        columns = math.prod(shape) // max(rows, 1)
        return (rows, columns), lambda: values().reshape(columns, rows).T
    kernel = tuple(range(len(shape) - 2))
    if len(path) > 1 and path[-2].startswith("ConvTranspose"):  # torch has its kernel the other way round
        order = (len(shape) - 2, len(shape) - 1, *kernel)
        return tuple(shape[i] for i in order), lambda: np.flip(values(), kernel).transpose(order)
    order = (len(shape) - 1, len(shape) - 2, *kernel)
    return tuple(shape[i] for i in order), lambda: values().transpose(order)


# The parts of recurrent cells of Flax in the order of torch's gates; biases are with the states or with the inputs.
_CELLS = (("i", "f", "g", "o"), ("r", "z", "n"))


def _cells(arrays: Mapping[tuple[str, ...], _Stored]) -> list[tuple[tuple[str, ...], tuple[str, ...]]]:
    """Return the paths of recurrent cells, which Flax keeps gate by gate, with their gates."""
    parts: dict[tuple[str, ...], set[str]] = {}
    for path in arrays:
        if len(path) > 2 and path[-1] == "kernel":
            parts.setdefault(path[:-2], set()).add(path[-2])
    return [
        (cell, gates)
        for cell, held in parts.items()
        for gates in _CELLS
        if held == {side + gate for side in "ih" for gate in gates}
    ]


def _of_cell(
    cell: tuple[str, ...], gates: tuple[str, ...], arrays: Mapping[tuple[str, ...], _Stored]
) -> dict[str, _Stored]:
    """Return weights and biases of a recurrent cell as torch has them."""
    made: dict[str, _Stored] = {}
    for side in "ih":
        places = [(*cell, side + gate, "kernel") for gate in gates]
        kernels = [arrays[place] for place in places]
        if len({(k.dtype, k.shape) for k in kernels}) != 1 or len(kernels[0].shape) != 2:
            raise ValueError(f"its cell {shown('.'.join(cell))} has gates of several shapes")
        inputs, units = kernels[0].shape
        turned = [np.ascontiguousarray(_words(kernel).T).tobytes() for kernel in kernels]
        made[f"weight_{side}h_l0"] = _Stored((units * len(gates), inputs), kernels[0].dtype, tuple(turned))
        biases = [arrays.get((*cell, side + gate, "bias")) for gate in gates]
        if any(bias is not None for bias in biases):
            zeros = bytes(_words(kernels[0]).dtype.itemsize * units)
            data = tuple(b"".join(bias.data) if bias is not None else zeros for bias in biases)
            made[f"bias_{side}h_l0"] = _Stored((units * len(gates),), kernels[0].dtype, data)
    return made


def _words(stored: _Stored) -> np.ndarray[Any, Any]:
    """Return an array with bfloat16 as integers of two bytes."""
    dtype = "uint16" if stored.dtype == "bfloat16" else stored.dtype
    return np.frombuffer(b"".join(stored.data), dtype).reshape(stored.shape)

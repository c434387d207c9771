"""Constants of an ONNX graph: tensors of the file, what nodes make of them, and the numbers that integers stand for."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...regular_files import open_regular
from .contents import array_tensor
from .errors import CheckpointError, shown
from .stored import MAX_DIMENSIONS, read_into

__all__ = ["Constant", "constant_of_tensor", "dequantised", "fold", "many_bits"]

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, eq=False)
class Constant:
    """A tensor of the file, or what nodes make of it.

    Attributes:
        name: of the tensor in the file.
        shape: of the values.
        dtype: of the values.
        values: returns them.
        source: the same for all that is made of one tensor of the file.
        made: what nodes make of the tensor of the file, in words that are equal for equal results.
        outside: whether the values are in another file.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    values: Callable[[], Array]
    source: int
    made: tuple[Any, ...] = ()
    outside: bool = False

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    @property
    def count(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def permuted(self, order: Sequence[int]) -> Constant:
        """Return this with its dimensions in another order."""
        order = tuple(order)
        if order == tuple(range(self.ndim)):
            return self
        if sorted(order) != list(range(self.ndim)):
            raise ValueError(f"a node permutes {shown(self.name)} of {self.ndim} dimensions by {order}")
        values, made = self.values, (*self.made, ("permute", order))
        if self.made and self.made[-1] == ("permute", tuple(np.argsort(order).tolist())):
            made = self.made[:-1]
        shape = tuple(self.shape[i] for i in order)
        return replace(self, shape=shape, values=lambda: values().transpose(order), made=made)

    def transposed(self) -> Constant:
        """Return a matrix transposed."""
        return self.permuted((1, 0))

    def reshaped(self, shape: Sequence[int]) -> Constant:
        """Return this with another shape of as many elements."""
        shape = tuple(shape)
        if shape == self.shape:
            return self
        if math.prod(shape) != self.count:
            raise ValueError(f"a node reshapes {shown(self.name)} of shape {self.shape} to {shape}")
        values = self.values
        return replace(self, shape=shape, values=lambda: values().reshape(shape), made=(*self.made, ("reshape", shape)))

    def taken(self, rows: Sequence[int], first: int | None = None) -> Constant:
        """Return rows of a matrix, or of the one at the place `first` of a stack of them."""
        values, index = self.values, list(rows)
        below = self.shape[1:] if first is None else self.shape[2:]

        def chosen() -> Array:
            held = values()
            return (held if first is None else held[first])[index]

        made = (*self.made, ("rows", first, tuple(index[:1]), len(index)))
        return replace(self, shape=(len(index), *below), values=chosen, made=made)


def constant_of_tensor(tensor: Any, folder: Path, source: int, name: str = "") -> Constant | None:
    """Return a tensor of the file as a constant, None for one of text.

    Args:
        tensor: a `TensorProto`.
        folder: where files with external data lie.
        source: of `Constant`.
        name: instead of the tensor's own.

    Raises:
        ValueError: values that do not fit the shape, an unknown type.
        CheckpointError: external data that are missing or outside the folder.
    """
    import onnx

    name = name or tensor.name
    shape = tuple(tensor.dims)
    if tensor.data_type == onnx.TensorProto.STRING:
        return None
    if tensor.HasField("segment"):
        raise CheckpointError(f"keeps {shown(name)} in segments, which are not read")
    if len(shape) > MAX_DIMENSIONS or any(n < 0 for n in shape) or math.prod(shape) >= 2**62:
        raise ValueError(f"its tensor {shown(name)} has a shape that is no size")
    numpy_dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type))
    dtype = torch.int8 if "int" in numpy_dtype.name and numpy_dtype.kind not in "iu" else _torch_dtype(numpy_dtype)
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        where = _external(tensor, folder, name, math.prod(shape), numpy_dtype)
        return Constant(name, shape, dtype, lambda: _from_outside(where, numpy_dtype, shape), source, outside=True)
    return Constant(name, shape, dtype, lambda: _own_width(onnx.numpy_helper.to_array(tensor)), source)


def _torch_dtype(dtype: np.dtype[Any]) -> torch.dtype:
    return array_tensor(np.empty(0, dtype)).dtype


def _own_width(values: Array) -> Array:
    """Return integers of less than a byte as int8."""
    return values.astype(np.int8) if "int" in values.dtype.name and values.dtype.kind not in "iu" else values


def _external(tensor: Any, folder: Path, name: str, count: int, dtype: np.dtype[Any]) -> tuple[Path, int, int]:
    """Return the file, the place and the number of bytes of a tensor that is kept beside the ONNX file."""
    said = {entry.key: entry.value for entry in tensor.external_data}
    location = said.get("location", "")
    parts = re.split(r"[/\\]", location)
    if not location or ".." in parts or parts[0] == "" or ":" in parts[0] or "\0" in location:
        raise CheckpointError(f"refused, its external data {shown(location)} is not a file inside its folder")
    file = folder / location
    if not file.exists():
        raise CheckpointError(
            f"keeps {shown(name)} in the file {shown(location)} beside it, which is missing; fetch it into {folder}"
        )
    four_bits = "4" in dtype.name and dtype.name.endswith("int4")
    nbytes = -(-count // 2) if four_bits else count * dtype.itemsize
    offset = int(said.get("offset", "0"))
    length = int(said.get("length", nbytes))
    if offset < 0 or length != nbytes or offset + nbytes > file.stat().st_size:
        raise ValueError(f"its tensor {shown(name)} does not fit into {shown(location)} beside it")
    if four_bits:
        raise CheckpointError(f"keeps {shown(name)} of four bits outside of it, which is not read")
    return file, offset, nbytes


def _from_outside(where: tuple[Path, int, int], dtype: np.dtype[Any], shape: tuple[int, ...]) -> Array:
    file, offset, nbytes = where
    with open_regular(file) as opened:
        opened.seek(offset)
        return read_into(opened, nbytes).numpy().view(dtype).reshape(shape)


# ---------------------------------------------------------------------------------------------------------------------
# Nodes that make constants of constants


def fold(node: Any, attributes: dict[str, Any], inputs: list[Constant | None]) -> Constant | None:
    """Return what a node makes of a constant, None where it is nothing that keeps a weight a weight.

    Args:
        node: its `op_type` is looked at.
        attributes: of the node.
        inputs: its inputs, None for those that are not constant.
    """
    first = inputs[0] if inputs else None
    if first is None:
        return None
    second = inputs[1] if len(inputs) > 1 else None
    if node.op_type == "Identity":
        return first
    if node.op_type == "Transpose":
        return first.permuted(attributes.get("perm") or range(first.ndim)[::-1])
    if node.op_type == "Cast" and first.dtype.is_floating_point and attributes.get("to") in (1, 10, 11, 16):
        return first
    if node.op_type == "DequantizeLinear":
        return _dequantise_linear(first, second, inputs[2] if len(inputs) > 2 else None, attributes)
    if node.op_type == "QuantizeLinear" and first.dtype.is_floating_point:
        return first  # followed by its inverse: the weights of a training with fake quantisation
    if node.op_type in ("Squeeze", "Unsqueeze"):
        axes = attributes.get("axes") or (second.values().reshape(-1).tolist() if second else None)
        return _with_axes(first, axes, node.op_type == "Squeeze")
    if node.op_type == "Reshape" and second is not None and second.count <= MAX_DIMENSIONS:
        wanted = [int(n) for n in second.values().reshape(-1)]
        shape = [first.shape[i] if n == 0 and i < first.ndim else n for i, n in enumerate(wanted)]
        if shape.count(-1) == 1:
            known = math.prod(n for n in shape if n != -1)
            shape[shape.index(-1)] = first.count // known if known else 0
        return first.reshaped(shape)
    return None


def _with_axes(constant: Constant, axes: list[int] | None, squeeze: bool) -> Constant:
    shape = list(constant.shape)
    if squeeze:
        drop = {a % max(len(shape), 1) for a in axes} if axes else {i for i, n in enumerate(shape) if n == 1}
        return constant.reshaped([n for i, n in enumerate(shape) if i not in drop])
    total = len(shape) + len(axes or ())
    for axis in sorted(a % max(total, 1) for a in axes or ()):
        shape.insert(axis, 1)
    return constant.reshaped(shape)


def _dequantise_linear(
    constant: Constant, scale: Constant | None, zero: Constant | None, attributes: dict[str, Any]
) -> Constant | None:
    if constant.dtype.is_floating_point and "float8" not in str(constant.dtype):
        return constant  # the inverse of a QuantizeLinear of floats
    if scale is None:
        return None
    return dequantised(constant, scale, zero, attributes.get("axis", 1), attributes.get("block_size", 0))


def dequantised(constant: Constant, scale: Constant, zero: Constant | None, axis: int = 0, block: int = 0) -> Constant:
    """Return `(values - zero) * scale`, with one scale, or one per index of dimension `axis`, or per block of it."""

    def spread(held: Array) -> Array:
        held = held.astype(np.float32)
        if held.size == 1:
            return held.reshape(())
        place = axis % max(constant.ndim, 1)
        if block:
            return np.repeat(held, block, axis=place)[tuple(slice(0, n) for n in constant.shape)]
        if held.ndim == 1:
            return held.reshape([-1 if i == place else 1 for i in range(constant.ndim)])
        return held

    def values() -> Array:
        held = constant.values().astype(np.float32)
        if zero is not None:
            held = held - spread(zero.values())
        held = held * spread(scale.values())
        if held.shape != constant.shape:
            raise ValueError(f"the scale of {shown(constant.name)} does not fit its shape {constant.shape}")
        return held

    name = re.sub(r"(_Transposed)?_(quantized|quant|q)$", "", constant.name)
    made = (*constant.made, "dequantised")
    return replace(constant, name=name, dtype=torch.float32, values=values, made=made)


def many_bits(packed: Constant, scale: Constant, zero: Constant | None, attributes: dict[str, Any]) -> Constant:
    """Return the matrix `(N, K)` of a MatMulNBits, whose blocks of 4 or 8 bits are packed into bytes."""
    rows, columns = int(attributes.get("N", 0)), int(attributes.get("K", 0))
    bits, block = int(attributes.get("bits", 4)), int(attributes.get("block_size", 0))
    blocks = -(-columns // block) if block > 0 else 0
    if bits not in (4, 8) or packed.dtype != torch.uint8 or packed.count != rows * blocks * block * bits // 8:
        raise CheckpointError(f"has {shown(packed.name)} of {bits} bits in a layout that is not read")

    def values() -> Array:
        held = _unpacked(packed.values().reshape(rows, -1), bits).reshape(rows, blocks, block).astype(np.float32)
        middle: Any = np.float32(1 << (bits - 1))
        if zero is not None:
            points = zero.values()
            points = _unpacked(points.reshape(rows, -1), bits) if points.dtype == np.uint8 else points
            middle = points.reshape(rows, -1)[:, :blocks, None].astype(np.float32)
        scaled = (held - middle) * scale.values().reshape(rows, blocks, 1).astype(np.float32)
        return scaled.reshape(rows, -1)[:, :columns]  # type: ignore[no-any-return]

    name = re.sub(r"(_Q\dG?\d*|_quantized|_Q4|_DQ_Q4)$", "", packed.name)
    made = (*packed.made, "dequantised")
    return Constant(name, (rows, columns), torch.float32, values, packed.source, made)


def _unpacked(held: Array, bits: int) -> Array:
    if bits == 8:
        return held
    return np.stack([held & 15, held >> 4], axis=-1).reshape(held.shape[0], -1)

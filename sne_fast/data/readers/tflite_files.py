"""Files of TFLite: constants of the graph that its operators take as weights, in the layout of torch."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ...regular_files import open_regular
from .contents import Contents, lazy_array, need, reading_format
from .errors import CheckpointError, shown
from .onnx_names import dotted
from .stored import MAX_DIMENSIONS

__all__ = ["read_tflite"]

Array = np.ndarray[Any, Any]

_FORMAT = "file of TFLite"
_DTYPES: dict[int, Any] = {
    0: np.float32, 1: np.float16, 2: np.int32, 3: np.uint8, 4: np.int64, 6: np.bool_, 7: np.int16, 8: np.complex64,
    9: np.int8, 10: np.float64, 12: np.uint64, 15: np.uint32, 16: np.uint16,
}  # fmt: skip
_FLOATS = {0: torch.float32, 1: torch.float16, 10: torch.float64}
_FOUR_BITS, _BFLOAT16 = 17, 18
_ANONYMOUS = re.compile(r"(arith\.constant|tfl\.pseudo_q?const|constant|cst|pseudo_const|const|tensor_?)?\d*")


class _Constant(NamedTuple):
    """A constant of the file: its name, its place in the file, its shape, its dtype, and what reads it."""

    name: str
    place: Any
    shape: tuple[int, ...]
    dtype: torch.dtype | None  # None for integers without a scale
    values: Callable[[], Array]

    def turned(self, order: Sequence[int], shape: tuple[int, ...] | None = None) -> _Constant:
        """Return this with its dimensions in another order, and then in another shape."""
        values, made = self.values, shape or tuple(self.shape[i] for i in order)
        return self._replace(shape=made, values=lambda: values().transpose(order).reshape(made))


def read_tflite(file: Path) -> Contents:
    """Return the weights of a TFLite model; integers are the numbers that their scales make of them.

    Raises:
        CheckpointError: `tflite` is missing, or the file is damaged or has sparse weights.
    """
    need(file, "a file of TFLite", "tflite", extra="tflite")
    with reading_format(file, _FORMAT):
        with open_regular(file) as opened:
            data = opened.read()
        return _Reader(file, data).read()


class _Reader:
    def __init__(self, file: Path, data: bytes) -> None:
        import tflite

        self.file, self.data = file, data
        self.model = tflite.Model.GetRootAs(data, 0)
        self.operators = {
            number: name for name, number in vars(tflite.BuiltinOperator).items() if isinstance(number, int)
        }
        self.found = Contents()
        self.added: set[Any] = set()
        self.counts: dict[str, int] = {}

    def read(self) -> Contents:
        for i in range(self.model.SubgraphsLength()):
            self._graph(self.model.Subgraphs(i), f"subgraph_{i}." if i else "")
        return self.found

    def _graph(self, graph: Any, prefix: str) -> None:
        constants: dict[int, _Constant] = {}
        for i in range(graph.TensorsLength()):
            constant = self._constant(graph.Tensors(i))
            if constant is not None:
                constants[i] = constant
        rest = dict(constants)
        for i in range(graph.OperatorsLength()):
            operator = graph.Operators(i)
            code = self.model.OperatorCodes(operator.OpcodeIndex())
            kind = self.operators.get(max(code.BuiltinCode(), code.DeprecatedBuiltinCode()), "CUSTOM")
            inputs = [operator.Inputs(j) for j in range(operator.InputsLength())]
            if kind in ("DEQUANTIZE", "QUANTIZE", "RESHAPE") and inputs and inputs[0] in constants:
                made = constants[inputs[0]]
                target = graph.Tensors(operator.Outputs(0))
                shape = tuple(target.Shape(j) for j in range(target.ShapeLength()))
                if math.prod(shape) == math.prod(made.shape) and made.dtype is not None:
                    constants[operator.Outputs(0)] = made.turned(range(len(made.shape)), shape)
                    continue
            held = [constants.get(j) for j in inputs]
            uses = _uses(kind, held, operator)
            if not uses:
                continue
            output = graph.Tensors(operator.Outputs(0)).Name() or b""
            base = self._base(uses[0][1].name, output.decode("utf-8", "replace"), kind)
            for role, constant in uses:
                self._add(f"{prefix}{base}.{role}", constant)
        for constant in rest.values():
            if constant.place not in self.added:
                self._rest(prefix, constant)

    def _base(self, weight: str, output: str, kind: str) -> str:
        """Return the name of an operator's layer: that of its weight, else of its output."""
        for name in (weight, output):
            if not _ANONYMOUS.fullmatch(name.partition(";")[0]):
                return dotted(name)
        self.counts[kind] = self.counts.get(kind, 0) + 1
        return f"{kind.lower()}_{self.counts[kind]}"

    def _add(self, name: str, constant: _Constant) -> None:
        if constant.place in self.added:
            return
        self.added.add(constant.place)
        for part in constant.place if isinstance(constant.place, tuple) else ():
            self.added.add(part)
        base, dot, own = name.rpartition(".")
        number = 1
        while name in self.found.tensors:
            number += 1
            name = f"{base}_{number}{dot}{own}"
        assert constant.dtype is not None
        damage = partial(reading_format, self.file, _FORMAT)
        self.found.add(name, lazy_array(constant.shape, constant.dtype, constant.values, None, damage))

    def _rest(self, prefix: str, constant: _Constant) -> None:
        """Add a constant that no operator takes as a known weight, or say why it is none."""
        name = prefix + (dotted(constant.name) or "constant")
        if constant.dtype is None:
            self.found.left_out[prefix + constant.name] = "integers: a shape, an index or a table"
        elif math.prod(constant.shape) < 2:
            self.found.left_out[prefix + constant.name] = "a number of the graph"
        else:
            self._add(name if not _ANONYMOUS.fullmatch(name) else f"constants.{name}", constant)

    def _constant(self, tensor: Any) -> _Constant | None:
        """Return a tensor with values in the file, checked against their bytes; None for one without."""
        buffer = self.model.Buffers(tensor.Buffer())
        name = (tensor.Name() or b"").decode("utf-8", "replace")
        shape = tuple(tensor.Shape(i) for i in range(min(tensor.ShapeLength(), MAX_DIMENSIONS + 1)))
        if any(n < 0 for n in shape) or len(shape) > MAX_DIMENSIONS:
            raise ValueError(f"its tensor {shown(name)} has a shape that is no size")
        data: Any = None
        if buffer.DataLength():
            data = buffer.DataAsNumpy()
        elif hasattr(buffer, "Offset") and buffer.Offset() > 1:
            data = np.frombuffer(self.data, np.uint8, buffer.Size(), buffer.Offset())
        kind = tensor.Type()
        if data is None or (kind not in _DTYPES and kind not in (_FOUR_BITS, _BFLOAT16)):
            return None
        if tensor.Sparsity() is not None:
            raise CheckpointError(
                f"has the sparse tensor {shown(name)}, which is not read; convert it without sparsity"
            )
        count = math.prod(shape)
        widths = {_FOUR_BITS: 1, _BFLOAT16: 2}
        wanted = count * (widths.get(kind) or np.dtype(_DTYPES[kind]).itemsize)
        if kind == _FOUR_BITS:
            wanted = -(-count // 2)
        if len(data) != wanted:
            raise ValueError(f"its tensor {shown(name)} has {len(data)} bytes for a shape of {shape}")
        stored = partial(_stored, data, kind, shape)
        place = tensor.Buffer()
        if kind in _FLOATS or kind == _BFLOAT16:
            return _Constant(name, place, shape, _FLOATS.get(kind, torch.float32), stored)
        quantised = tensor.Quantization()
        scales = quantised.ScaleLength() if quantised is not None else 0
        if scales == 0 and kind in (3, 9, _FOUR_BITS) and len(shape) > 1:
            raise CheckpointError(f"has the quantised weight {shown(name)} without a scale; give the model before it")
        if scales == 0:
            return _Constant(name, place, shape, None, stored)
        scale = np.asarray(quantised.ScaleAsNumpy(), np.float32)
        zero = np.asarray(quantised.ZeroPointAsNumpy() if quantised.ZeroPointLength() else 0, np.float32)
        axis = quantised.QuantizedDimension()
        if scales > 1 and (not 0 <= axis < len(shape) or shape[axis] != scales or zero.size not in (1, scales)):
            raise ValueError(f"its tensor {shown(name)} has {scales} scales for a shape of {shape}")
        spread = tuple(-1 if i == axis else 1 for i in range(len(shape))) if scales > 1 else ()

        def values() -> Array:
            points = zero.reshape(spread) if zero.size > 1 else zero.reshape(())
            return (stored().astype(np.float32) - points) * scale.reshape(spread)

        return _Constant(name, place, shape, torch.float32, values)


def _stored(data: Array, kind: int, shape: tuple[int, ...]) -> Array:
    """Return the values of a tensor, integers of four bits as int8 and bfloat16 as float32."""
    if kind == _FOUR_BITS:
        low, high = data & 15, data >> 4
        both = np.stack([low, high], axis=-1).reshape(-1)[: math.prod(shape)].astype(np.int8)
        return np.where(both > 7, both - 16, both).reshape(shape)
    if kind == _BFLOAT16:
        return (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(shape)
    held: Array = data.view(_DTYPES[kind]).reshape(shape)
    return held


# Operators with the places of weight and bias, and the number of the weight's dimensions.
_LAYERS = {
    "FULLY_CONNECTED": (1, 2, 2), "CONV_2D": (1, 2, 4), "DEPTHWISE_CONV_2D": (1, 2, 4), "TRANSPOSE_CONV": (1, 3, 4),
    "CONV_3D": (1, 2, 5), "CONV_3D_TRANSPOSE": (1, 3, 5), "EMBEDDING_LOOKUP": (1, None, 2), "GATHER": (0, None, 2),
    "BATCH_MATMUL": (1, None, 2), "PRELU": (1, None, None),
}  # fmt: skip
_ORDERS = {
    "CONV_2D": (0, 3, 1, 2), "TRANSPOSE_CONV": (3, 0, 1, 2), "CONV_3D": (4, 3, 0, 1, 2),
    "CONV_3D_TRANSPOSE": (4, 3, 0, 1, 2),
}  # fmt: skip


def _uses(kind: str, inputs: Sequence[_Constant | None], operator: Any) -> list[tuple[str, _Constant]]:
    """Return the weights of an operator by their roles, in the layout of torch."""
    if kind == "UNIDIRECTIONAL_SEQUENCE_LSTM":
        return _lstm(inputs)
    if kind == "UNIDIRECTIONAL_SEQUENCE_RNN":
        named = zip(("weight_ih_l0", "weight_hh_l0", "bias_ih_l0"), inputs[1:4], strict=False)
        return [(role, held) for role, held in named if held is not None and held.dtype is not None]
    if kind not in _LAYERS:
        return []
    first, second, dimensions = _LAYERS[kind]
    weight = inputs[first] if first < len(inputs) else None
    if weight is None or weight.dtype is None or (dimensions is not None and len(weight.shape) != dimensions):
        return []
    if kind in _ORDERS:
        weight = weight.turned(_ORDERS[kind])
    elif kind == "DEPTHWISE_CONV_2D":
        weight = weight.turned((3, 0, 1, 2))
    elif kind == "PRELU":
        weight = weight.turned(range(len(weight.shape)), (math.prod(weight.shape),))
    elif kind == "BATCH_MATMUL" and not _adjoint(operator):
        weight = weight.turned((1, 0))
    found = [("weight", weight)]
    bias = inputs[second] if second is not None and second < len(inputs) else None
    return [*found, ("bias", bias)] if bias is not None and bias.dtype is not None else found


def _adjoint(operator: Any) -> bool:
    """Return whether a product takes its second matrix transposed."""
    import tflite

    table = operator.BuiltinOptions()
    if table is None:
        return False
    options = tflite.BatchMatMulOptions()
    options.Init(table.Bytes, table.Pos)
    return bool(options.AdjY())


def _lstm(inputs: Sequence[_Constant | None]) -> list[tuple[str, _Constant]]:
    """Return the weights of an LSTM, of which TFLite keeps each gate apart in torch's order."""
    found = []
    for role, first in (("weight_ih_l0", 1), ("weight_hh_l0", 5), ("bias_ih_l0", 12)):
        gates = [held for held in inputs[first : first + 4] if held is not None and held.dtype is not None]
        if len(gates) != 4:  # coupled gates, or no bias
            continue
        rows = sum(gate.shape[0] for gate in gates)
        reads = [gate.values for gate in gates]
        joined = partial(_joined, reads)
        place = tuple(gate.place for gate in gates)
        found.append((role, _Constant(gates[0].name, place, (rows, *gates[0].shape[1:]), gates[0].dtype, joined)))
    for role, place_of in (("weight_hr_l0", 16),):
        held = inputs[place_of] if place_of < len(inputs) else None
        if held is not None and held.dtype is not None and found:
            found.append((role, held))
    return found


def _joined(reads: Sequence[Callable[[], Array]]) -> Array:
    return np.concatenate([read() for read in reads])

"""Weights of an ONNX graph: which constants its nodes take as weights, and how these are laid out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .errors import CheckpointError, shown
from .onnx_constants import Constant, dequantised, fold, many_bits

__all__ = ["SETTINGS", "Graph", "Use", "no_scale", "subgraphs"]

_MAX_DEPTH = 32


@dataclass
class Use:
    """A constant that a node takes as one of its weights.

    Attributes:
        constant: in the layout of torch.
        role: what the parameter is called in its layer, such as "weight".
    """

    constant: Constant
    role: str


@dataclass
class Graph:
    """The nodes of a graph or of one inside it, with the constants that they see.

    Attributes:
        nodes: in the order of the graph.
        constants: by the name of the value.
        consumers: nodes that take a value, and the places of it among their inputs.
        prefix: what names of layers begin with.
        spent: constants that are no weights because a node writes a layer in several steps, with the reason.
    """

    nodes: list[Any]
    constants: dict[str, Constant]
    prefix: str = ""
    consumers: dict[str, list[tuple[Any, int]]] = field(default_factory=dict)
    attributes: dict[int, dict[str, Any]] = field(default_factory=dict)
    producers: dict[str, Any] = field(default_factory=dict)

    spent: list[tuple[Constant, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        for node in self.nodes:
            self.attributes[id(node)] = {a.name: _value(a) for a in node.attribute}
            for i, name in enumerate(node.input):
                if name:
                    self.consumers.setdefault(name, []).append((node, i))
            self.producers.update({name: node for name in node.output if name})

    def fold_all(self) -> None:
        """Add what nodes make of constants."""
        for node in self.nodes:
            if node.op_type == "Constant" or len(node.output) != 1 or node.output[0] in self.constants:
                continue
            made = fold(node, self.attributes[id(node)], [self.constants.get(name) for name in node.input])
            if made is not None:
                self.constants[node.output[0]] = made

    def input(self, node: Any, place: int) -> Constant | None:
        """Return the constant at one place among a node's inputs."""
        return self.constants.get(node.input[place]) if place < len(node.input) else None

    def uses(self, node: Any) -> list[Use]:
        """Return the weights of a node.

        Raises:
            CheckpointError: integers that are weights and whose scale is not found.
        """
        special = _SPECIAL.get(node.op_type)
        if special is not None:
            return [use for use in special(self, node) if use.constant.count]
        found = []
        for place, role in _PLACES.get(node.op_type, {}).items():
            constant = self.input(node, place)
            if constant is not None and constant.count and _is_floating(constant):
                found.append(Use(constant, role))
        if node.op_type in ("Conv", "FusedConv", "ConvTranspose") and [use.role for use in found] == ["weight"]:
            groups = self.attributes[id(node)].get("group", 1)
            shape = found[0].constant.shape
            found += self.bias_behind(node, shape[1] * groups if node.op_type == "ConvTranspose" else shape[0])
        return found

    # ------------------------------------------------------------------------------------------------------- helpers

    def behind(self, name: str, *passing: str) -> list[tuple[Any, int]]:
        """Return the consumers of a value, or those of what single nodes of the given operations make of it."""
        for _ in range(4):
            found = self.consumers.get(name, [])
            if len(found) != 1 or found[0][0].op_type not in passing:
                return found
            name = found[0][0].output[0]
        return []

    def bias_behind(self, node: Any, size: int, *passing: str) -> list[Use]:
        """Return the vector of `size` that the next node adds to a node's output, if it does nothing else with it."""
        following = self.behind(node.output[0], *passing)
        if len(following) != 1 or following[0][0].op_type not in ("Add", "BiasGelu", "FastGelu"):
            return []
        added, place = following[0]
        bias = self.input(added, 1 - place)
        if bias is None or bias.count != size or not _is_floating(bias) or max(bias.shape, default=1) != size:
            return []
        return [Use(bias.reshaped((size,)), "bias")]


_Special = Callable[[Graph, Any], list[Use]]

_NORM = {1: "weight", 2: "bias"}
_PLACES: dict[str, dict[int, str]] = {
    "Conv": {1: "weight", 2: "bias"},
    "FusedConv": {1: "weight", 2: "bias"},
    "ConvTranspose": {1: "weight", 2: "bias"},
    "BatchNormalization": {1: "weight", 2: "bias", 3: "running_mean", 4: "running_var"},
    "LayerNormalization": _NORM,
    "GroupNormalization": _NORM,
    "RMSNormalization": {1: "weight"},
    "SimplifiedLayerNormalization": {1: "weight"},
    "SkipLayerNormalization": {2: "weight", 3: "bias"},
    "SkipSimplifiedLayerNormalization": {2: "weight"},
}
# Constants at these places are settings of a node and no weights; None for all places.
SETTINGS: dict[str, tuple[int, ...] | None] = {
    "Resize": None, "Upsample": None, "Range": None, "OneHot": None, "TopK": None, "NonMaxSuppression": None,
    "Less": None, "LessOrEqual": None, "Greater": None, "GreaterOrEqual": None, "Equal": None, "Max": None,
    "Min": None, "Pad": (1, 2, 3), "Clip": (1, 2), "Pow": (1,), "Where": (1, 2), "Slice": (1, 2, 3, 4), "Tile": (1,),
    "Expand": (1,), "Dropout": (1, 2), "QuantizeLinear": (1, 2), "DequantizeLinear": (1, 2), "Reshape": (1,),
    "QLinearConv": (1, 2, 4, 5, 6, 7), "QLinearMatMul": (1, 2, 4, 5, 6, 7), "QGemm": (1, 2, 4, 5, 7, 8),
    "MatMulInteger": (2, 3), "ConvInteger": (2, 3), "QLinearAdd": (1, 2, 4, 5, 6, 7), "QLinearMul": (1, 2, 4, 5, 6, 7),
    "QLinearSigmoid": None, "QLinearLeakyRelu": None, "QLinearGlobalAveragePool": None, "QLinearConcat": None,
    "DynamicQuantizeMatMul": (2, 3), "QAttention": (3, 4, 6, 7), "MatMulNBits": (2, 3, 4),
    "DynamicQuantizeLSTM": (4, 5, 6, 8, 9, 10, 11), "LSTM": (4, 5, 6), "GRU": (4, 5, 6), "RNN": (4, 5, 6),
    "ScatterND": None, "ConstantOfShape": None, "Loop": None, "EyeLike": None,
}  # fmt: skip


def _value(attribute: Any) -> Any:
    """Return an attribute's value; None for tensors and graphs."""
    kind = attribute.type
    if kind == 1:
        return attribute.f
    if kind == 2:
        return attribute.i
    if kind == 3:
        return attribute.s.decode("utf-8", "replace")
    if kind == 6:
        return list(attribute.floats)
    return list(attribute.ints) if kind == 7 else None


def _is_floating(constant: Constant) -> bool:
    return constant.dtype.is_floating_point


def _matrix(constant: Constant, stored_in_out: bool) -> Constant:
    return constant.transposed() if stored_in_out and constant.ndim == 2 else constant


def _matmul(graph: Graph, node: Any) -> list[Use]:
    attributes = graph.attributes[id(node)]
    weight = graph.input(node, 1)
    in_out = not attributes.get("transB", 0)
    if weight is None or weight.ndim < 2:  # a weight that stands in front
        weight, in_out = graph.input(node, 0), bool(attributes.get("transA", 0))
    if weight is None or not _is_floating(weight) or weight.ndim < 2:
        return []
    found = [Use(_matrix(weight, in_out), "weight")]
    return found + (graph.bias_behind(node, found[0].constant.shape[0]) if weight.ndim == 2 else [])


def _gemm(graph: Graph, node: Any) -> list[Use]:
    attributes = graph.attributes[id(node)]
    weight, bias = graph.input(node, 1), graph.input(node, 2)
    in_out = not attributes.get("transB", 0)
    if weight is None:
        weight, in_out = graph.input(node, 0), bool(attributes.get("transA", 0))
    if weight is None or not _is_floating(weight) or weight.ndim != 2:
        return []
    found = [Use(_matrix(weight, in_out), "weight")]
    size = found[0].constant.shape[0]
    if bias is not None and bias.count == size:
        return [*found, Use(bias.reshaped((size,)), "bias")]
    return found if bias is not None else found + graph.bias_behind(node, size)


def _gather(graph: Graph, node: Any) -> list[Use]:
    table = graph.input(node, 0)
    if table is not None and not _is_floating(table):  # rows of integers, which are decoded behind
        behind = [other for other, place in graph.behind(node.output[0]) if place == 0]
        scale = graph.input(behind[0], 1) if behind and behind[0].op_type == "DequantizeLinear" else None
        table = dequantised(table, scale, graph.input(behind[0], 2)) if scale is not None and scale.count == 1 else None
    if table is None or not _is_floating(table) or table.ndim != 2 or graph.attributes[id(node)].get("axis", 0) != 0:
        return []
    return [Use(table, "weight")]


def _instance_norm(graph: Graph, node: Any) -> list[Use]:
    """Return weight and bias of the node, or those of a group normalisation that it is a step of."""
    own = [graph.input(node, place) for place in (1, 2)]
    multiplied = graph.behind(node.output[0], "Reshape")
    if len(multiplied) == 1 and multiplied[0][0].op_type == "Mul":
        product, place = multiplied[0]
        weight = graph.input(product, 1 - place)
        if weight is not None and _is_floating(weight) and max(weight.shape, default=0) == weight.count:
            graph.spent += [(held, "ones and zeros of a group normalisation") for held in own if held is not None]
            uses = [Use(weight.reshaped((weight.count,)), "weight")]
            return uses + graph.bias_behind(product, weight.count)
    return [
        Use(held, role)
        for held, role in zip(own, ("weight", "bias"), strict=True)
        if held is not None and _is_floating(held)
    ]


def _prelu(graph: Graph, node: Any) -> list[Use]:
    slope = graph.input(node, 1)
    return [Use(slope.reshaped((slope.count,)), "weight")] if slope is not None and _is_floating(slope) else []


def _attention(graph: Graph, node: Any) -> list[Use]:
    """Return the fused projection of the attention of ONNX Runtime; that of ONNX itself has no weights."""
    weight, bias = graph.input(node, 1), graph.input(node, 2)
    if node.domain != "com.microsoft" or weight is None or weight.ndim != 2 or not _is_floating(weight):
        return []
    uses = [Use(weight.transposed(), "weight")]
    return uses + ([Use(bias, "bias")] if bias is not None and _is_floating(bias) else [])


# ---------------------------------------------------------------------------------------------------------------------
# Quantised


def _integer_product(graph: Graph, node: Any) -> list[Use]:
    """Return the weight of MatMulInteger and ConvInteger, whose output is converted and multiplied by the scales."""
    weight = graph.input(node, 1)
    if weight is None:
        return []
    scale = None
    for multiplied, place in graph.behind(node.output[0], "Cast"):
        if multiplied.op_type == "Mul":
            scale = graph.input(multiplied, 1 - place) or _scale_of_product(graph, multiplied.input[1 - place])
    if scale is None:
        raise no_scale(weight)
    graph.spent.append((scale, "the scale of a quantised weight"))
    is_matrix = node.op_type == "MatMulInteger"
    decoded = dequantised(weight, scale, graph.input(node, 3), weight.ndim - 1 if is_matrix else 0)
    found = [Use(_matrix(decoded, is_matrix), "weight")]
    return found + graph.bias_behind(node, found[0].constant.shape[0], "Cast", "Mul")


def _scale_of_product(graph: Graph, name: str) -> Constant | None:
    """Return the constant of the two scales that a node multiplies."""
    node = graph.producers.get(name)
    if node is None or node.op_type != "Mul":
        return None
    return graph.input(node, 0) or graph.input(node, 1)


def no_scale(weight: Constant) -> CheckpointError:
    """Return the error for integers that are a weight and whose scale is not found."""
    return CheckpointError(
        f"has the quantised weight {shown(weight.name)} without a constant scale; give the model before quantisation"
    )


def _quantised(weight: int, scale: int, zero: int, bias: int | None, per: int, in_out: bool) -> _Special:
    """Return a function for nodes that take a weight, its scale, its zero point and a bias at these places.

    `per` is the dimension of the weight that has a scale for each index.
    """

    def found(graph: Graph, node: Any) -> list[Use]:
        held, by = graph.input(node, weight), graph.input(node, scale)
        if held is None:
            return []
        if by is None:
            raise no_scale(held)
        transposed = bool(graph.attributes[id(node)].get("transB", 0)) if node.op_type == "QGemm" else not in_out
        axis = per if in_out and not transposed else 0
        decoded = dequantised(held, by, graph.input(node, zero), axis)
        uses = [Use(_matrix(decoded, in_out and not transposed), "weight")]
        added = graph.input(node, bias) if bias is not None else None
        if added is not None and not _is_floating(added):
            inputs = graph.input(node, 1)  # a bias of integers has the scale of the products
            if inputs is None:
                raise no_scale(added)
            added = dequantised(added, _product(by, inputs), None)
        if added is not None:
            uses.append(Use(added, "bias"))
        return uses if added is not None else uses + _integers_added(graph, node, uses[0].constant.shape[0])

    return found


def _integers_added(graph: Graph, node: Any, size: int) -> list[Use]:
    """Return the bias of integers that a QLinearAdd adds to a node's output."""
    following = graph.behind(node.output[0])
    if len(following) != 1 or following[0][0].op_type != "QLinearAdd":
        return []
    added, place = following[0]
    bias, by, zero = (graph.input(added, (3 if place == 0 else 0) + i) for i in range(3))
    return [Use(dequantised(bias, by, zero), "bias")] if bias and by and bias.shape == (size,) else []


def _product(one: Constant, other: Constant) -> Constant:
    values, factors = one.values, other.values
    return Constant(one.name, one.shape, one.dtype, lambda: values() * factors(), one.source, (*one.made, "product"))


def _blocks(graph: Graph, node: Any) -> list[Use]:
    packed, scale = graph.input(node, 1), graph.input(node, 2)
    if packed is None or scale is None:
        return []
    uses = [Use(many_bits(packed, scale, graph.input(node, 3), graph.attributes[id(node)]), "weight")]
    bias = graph.input(node, 5)
    return [*uses, Use(bias, "bias")] if bias else uses + graph.bias_behind(node, uses[0].constant.shape[0])


# ---------------------------------------------------------------------------------------------------------------------
# Recurrent

# The place in ONNX of each gate of torch: i f g o, r z n.
_GATES = {"LSTM": (0, 2, 3, 1), "GRU": (1, 0, 2), "RNN": (0,), "DynamicQuantizeLSTM": (0, 2, 3, 1)}


def _recurrent(graph: Graph, node: Any) -> list[Use]:
    gates = _GATES[node.op_type]
    inputs, states, bias = (graph.input(node, place) for place in (1, 2, 3))
    if node.op_type == "DynamicQuantizeLSTM":
        pairs = [(inputs, 8, 9), (states, 10, 11)]
        inputs, states = (_stack(graph, node, held, scale, zero) for held, scale, zero in pairs)
    if inputs is None or states is None or inputs.ndim != 3 or states.ndim != 3 or inputs.shape[1] % len(gates):
        return []
    hidden = inputs.shape[1] // len(gates)
    rows = np.concatenate([np.arange(hidden) + gate * hidden for gate in gates]).tolist()
    found = []
    for place, reverse in enumerate(("", "_reverse")[: inputs.shape[0]]):
        found.append(Use(inputs.taken(rows, place), f"weight_ih_l0{reverse}"))
        found.append(Use(states.taken(rows, place), f"weight_hh_l0{reverse}"))
        if bias is not None and bias.shape == (inputs.shape[0], 2 * inputs.shape[1]):
            behind = [row + inputs.shape[1] for row in rows]
            found.append(Use(bias.taken(rows, place), f"bias_ih_l0{reverse}"))
            found.append(Use(bias.taken(behind, place), f"bias_hh_l0{reverse}"))
    peepholes = graph.input(node, 7)
    return [*found, Use(peepholes, "weight_peephole")] if peepholes is not None else found


def _stack(graph: Graph, node: Any, held: Constant | None, scale: int, zero: int) -> Constant | None:
    """Return the decoded weights `(directions, rows, in)` of a quantised LSTM, which keeps them as `in x rows`."""
    by = graph.input(node, scale)
    if held is None or by is None or held.ndim != 3:
        return None
    points = graph.input(node, zero)
    per_row = by.ndim == 2 and by.count > held.shape[0]
    shape = (held.shape[0], 1, held.shape[2]) if per_row else (held.shape[0], 1, 1)
    if points is not None:
        points = points.reshaped(shape)
    return dequantised(held, by.reshaped(shape), points).permuted((0, 2, 1))


_SPECIAL: dict[str, _Special] = {
    "MatMul": _matmul, "FusedMatMul": _matmul, "Gemm": _gemm, "FusedGemm": _gemm, "Gather": _gather, "PRelu": _prelu,
    "InstanceNormalization": _instance_norm,
    "Attention": _attention, "MatMulInteger": _integer_product, "ConvInteger": _integer_product,
    "QLinearConv": _quantised(3, 4, 5, 8, 0, False), "QLinearMatMul": _quantised(3, 4, 5, None, 1, True),
    "QGemm": _quantised(3, 4, 5, 6, 1, True), "DynamicQuantizeMatMul": _quantised(1, 2, 3, 4, 1, True),
    "QAttention": _quantised(1, 4, 7, 2, 1, True), "MatMulNBits": _blocks, "LSTM": _recurrent, "GRU": _recurrent,
    "RNN": _recurrent, "DynamicQuantizeLSTM": _recurrent,
}  # fmt: skip


def subgraphs(node: Any) -> Iterator[tuple[str, Any]]:
    """Yield the graphs inside a node with the names of their attributes."""
    for attribute in node.attribute:
        if attribute.type == 5:
            yield attribute.name, attribute.g
        for i, graph in enumerate(attribute.graphs):
            yield f"{attribute.name}.{i}", graph

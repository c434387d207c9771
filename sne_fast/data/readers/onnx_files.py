"""Files of ONNX: initialisers and constants of the graph, named and laid out as the modules that they came from."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...regular_files import open_regular
from .contents import Contents, array_tensor, lazy_array, need, reading_format
from .errors import CheckpointError
from .onnx_constants import Constant, constant_of_tensor
from .onnx_graphs import SETTINGS, Graph, Use, no_scale, subgraphs
from .onnx_names import (
    dotted,
    is_anonymous,
    is_other_module,
    is_parameter_name,
    layer_of,
    lone_parameter,
    node_path,
    sibling,
)

__all__ = ["read_onnx"]

_FORMAT = "ONNX file"
_MAX_DEPTH = 16
_MOST_LOOKED_AT = 2**26  # elements of a constant that could be a mask
_MASKED = -1e4
_LARGE = 1024  # elements of a vector of bytes that may be packed weights
_MOST_COPIES = 100_000  # nodes of functions, once each is written out wherever it is called


def read_onnx(file: Path) -> Contents:
    """Return the weights of an ONNX model, also of its subgraphs, in the order in which its nodes take them.

    Matrices of MatMul, Gemm and of recurrent nodes are `(out, in)`, and gates are in torch's order. Integers are the
    numbers that they stand for. A weight that the exporter gave a number is named after the other parameters of its
    node, else after the node.

    Raises:
        CheckpointError: `onnx` is missing, the file is damaged or lacks external data, a quantised weight whose scale
            is not constant.
    """
    need(file, "an ONNX file", "onnx", extra="onnx")
    import onnx
    import onnx.inliner

    with reading_format(file, _FORMAT):
        with open_regular(file) as opened:
            model = onnx.ModelProto.FromString(opened.read())
        if model.functions and _written_out(model) <= _MOST_COPIES:
            model = onnx.inliner.inline_local_functions(model)
        return _Reader(file, model).read()


class _Reader:
    def __init__(self, file: Path, model: Any) -> None:
        self.file, self.model = file, model
        self.found = Contents()
        self.sources = 0
        self.initialisers: list[tuple[Constant, Graph]] = []
        self.taken: set[int] = set()  # sources of which a weight was made
        self.said: dict[int, str] = {}
        self.places: dict[Any, str] = {}  # the layer of each constant that was added
        self.by_shape: dict[Any, list[Constant]] = {}  # matrices that were added
        self.stacked: dict[str, list[int]] = {}  # recurrent nodes of one module
        self.unnamed = 0

    def read(self) -> Contents:
        self._graph(self.model.graph, {}, "", 0)
        for function in self.model.functions:
            for constant in self._constants_of(function.node, {}).values():
                self.found.left_out[f"{function.name}.{constant.name}"] = "a constant of a function"
        for constant, graph in self.initialisers:
            if constant.source not in self.taken:
                self._rest(constant, graph)
        return self.found

    def _constants_of(self, nodes: Any, seen: dict[str, Constant]) -> dict[str, Constant]:
        for node in nodes:
            if node.op_type != "Constant" or not node.output:
                continue
            for attribute in node.attribute:
                if attribute.name == "value":
                    self._add_constant(attribute.t, node.output[0], seen)
                elif attribute.name in ("value_float", "value_floats"):
                    floats: Any = attribute.f if attribute.name == "value_float" else list(attribute.floats)
                    self._add_values(np.asarray(floats, np.float32), node.output[0], seen)
                elif attribute.name in ("value_int", "value_ints"):
                    integers: Any = attribute.i if attribute.name == "value_int" else list(attribute.ints)
                    self._add_values(np.asarray(integers, np.int64), node.output[0], seen)
        return seen

    def _add_constant(self, tensor: Any, name: str, seen: dict[str, Constant]) -> None:
        self.sources += 1
        made = constant_of_tensor(tensor, self.file.parent, self.sources, name)
        if made is None:
            self.found.left_out[name] = "text"
        else:
            seen[name] = made

    def _add_values(self, held: np.ndarray[Any, Any], name: str, seen: dict[str, Constant]) -> None:
        self.sources += 1
        seen[name] = Constant(name, held.shape, array_tensor(held).dtype, lambda: held, self.sources)

    def _graph(self, proto: Any, outer: dict[str, Constant], prefix: str, depth: int) -> None:
        if depth > _MAX_DEPTH:
            raise CheckpointError("refused, its graphs are nested too deeply")
        own: dict[str, Constant] = {}
        for tensor in proto.initializer:
            self._add_constant(tensor, tensor.name, own)
        for sparse in proto.sparse_initializer:
            self.found.left_out[sparse.values.name] = "a sparse tensor"
        self._constants_of(proto.node, own)
        graph = Graph(list(proto.node), {**outer, **own}, prefix)
        self.initialisers += [(constant, graph) for constant in own.values()]
        self._copies(graph)
        graph.fold_all()
        for i, node in enumerate(graph.nodes):
            uses = graph.uses(node)
            if uses:
                self._layer(graph, node, uses)
            for constant, reason in graph.spent:
                self.taken.add(constant.source)
                self.found.left_out[prefix + constant.name] = reason
            graph.spent.clear()
            for attribute, inner in subgraphs(node):
                path = node_path(node) or (node.name if not is_anonymous(node.name) else "") or f"{node.op_type}_{i}"
                self._graph(
                    inner, graph.constants, f"{prefix}{path.strip('/').replace('/', '.')}.{attribute}.", depth + 1
                )

    def _copies(self, graph: Graph) -> None:
        """Add vectors that an exporter wrote once because other parameters have the same values, as all biases of 0."""
        for node in graph.nodes:
            held = graph.input(node, 0) if node.op_type == "Identity" else None
            if held is None or not node.output or held.ndim != 1 or not is_parameter_name(dotted(node.output[0])):
                continue
            self.sources += 1
            own = replace(held, name=node.output[0], source=self.sources)
            graph.constants[node.output[0]] = own
            self.initialisers.append((own, graph))

    # ------------------------------------------------------------------------------------------------ names of weights

    def _layer(self, graph: Graph, node: Any, uses: list[Use]) -> None:
        """Add the weights of one node that no other node has brought."""
        path = node_path(node)
        fresh = [use for use in uses if self._key(use.constant) not in self.places]
        # Exporters write equal vectors once, as all biases of 0. Those of another module are its own.
        copies = [
            use
            for use in uses
            if use not in fresh
            and use.constant.ndim == 1
            and is_other_module(path, self.places[self._key(use.constant)])
        ]
        self.taken |= {use.constant.source for use in uses}
        names = [dotted(use.constant.name) for use in uses]
        known = [
            name
            for name, use in zip(names, uses, strict=True)
            if use not in copies and not is_anonymous(use.constant.name) and is_parameter_name(name)
        ]
        recurrent = any(use.role.startswith("weight_ih") for use in uses)
        for use, name in zip(uses, names, strict=True):
            if use in copies:
                key = (*self._key(use.constant), path)
                if key not in self.places:
                    self._add(
                        graph.prefix,
                        sibling(known[0], use.role) if known else f"{path}.{use.role}",
                        use.constant,
                        node,
                        key,
                    )
                continue
            if use not in fresh:
                continue
            if use.role == "bias" and uses[0] not in fresh and not use.constant.values().any():
                self.found.left_out[graph.prefix + use.constant.name] = "zeros beside a weight that is used once more"
                continue
            if recurrent:
                full = self._recurrent_name(graph, node, use, name)
            elif name in known:
                # Of a normalisation that was folded into a convolution without bias.
                full = name.removesuffix("weight_bias") + "bias" if name.endswith(".weight_bias") else name
            elif known:
                full = sibling(known[0], use.role)
            else:
                full = f"{self._base(graph, node, uses, names)}.{use.role}"
            self._add(graph.prefix, full, use.constant, node)

    def _base(self, graph: Graph, node: Any, uses: list[Use], names: list[str]) -> str:
        """Return the name of a node's layer where no name of a tensor tells it."""
        path = node_path(node)
        weight = names[0]
        if path:
            return path
        if not is_anonymous(uses[0].constant.name):
            return layer_of(weight)
        if node.name and not is_anonymous(node.name):
            return str(node.name).strip("/").replace("/", ".")
        self.unnamed += 1
        return f"{self.unnamed}.{node.op_type.lower()}"

    def _recurrent_name(self, graph: Graph, node: Any, use: Use, name: str) -> str:
        """Return the name of a recurrent weight: layers of one module of torch are nodes one behind the other."""
        path = node_path(node)
        if path:
            nodes = self.stacked.setdefault(graph.prefix + path, [])
            if id(node) not in nodes:
                nodes.append(id(node))
            role = use.role.replace("_l0", f"_l{nodes.index(id(node))}")
        else:
            role, path = use.role, name.rpartition(".")[0] or str(node.name) or node.op_type.lower()
        return f"{path}.{role}"

    def _add(self, prefix: str, name: str, constant: Constant, node: Any, key: tuple[Any, ...] = ()) -> None:
        key = key or self._key(constant)
        place = self._same_values(constant) or key
        full = prefix + name
        if full in self.found.tensors:
            base, dot, own = full.rpartition(".")
            operation = str(node.name).rpartition("/")[2] or node.op_type.lower()
            full = f"{base}{dot}{operation}.{own}"
            number = 1
            while full in self.found.tensors:
                number += 1
                full = f"{base}{dot}{operation}_{number}.{own}"
        self.places[key] = node_path(node)
        damage = partial(reading_format, self.file, _FORMAT)
        self.found.add(
            full, lazy_array(constant.shape, constant.dtype, constant.values, (str(self.file), place), damage)
        )

    def _same_values(self, constant: Constant) -> tuple[Any, ...] | None:
        """Return the key of a matrix that a folded copy has the values of, as exporters make one for each use."""
        if constant.ndim < 2 or constant.outside or "dequantised" in constant.made:
            return None
        alike = self.by_shape.setdefault((constant.shape, constant.dtype), [])
        if is_anonymous(constant.name):
            values = constant.values()
            for other in alike:
                held = other.values()
                if np.array_equal(held[0], values[0]) and np.array_equal(held, values):
                    return self._key(other)
        alike.append(constant)
        return None

    def _key(self, constant: Constant) -> tuple[Any, ...]:
        return constant.source, constant.made

    # ----------------------------------------------------------------------------------------- constants of other nodes

    def _rest(self, constant: Constant, graph: Graph) -> None:
        """Add a constant that no node takes as a known weight, or say why it is none."""
        name = constant.name
        consumers = graph.consumers.get(name, [])
        if not constant.dtype.is_floating_point:
            reason = "integers: a shape, an index or a table" if constant.dtype.itemsize > 1 else "integers"
            decoded = self._decoded(constant, graph)
            setting = all(_is_setting(graph, node, place) for node, place in consumers)
            large = constant.ndim > 1 or constant.count >= _LARGE
            if decoded is None and constant.dtype in (torch.int8, torch.uint8) and large and not setting:
                raise no_scale(constant)
            if decoded is None:
                self.found.left_out[graph.prefix + name] = reason
                return
            constant = decoded
        elif consumers and all(_is_setting(graph, node, place) for node, place in consumers):
            self.found.left_out[graph.prefix + name] = f"a setting of {consumers[0][0].op_type}"
            return
        folded = _folded(constant)
        if constant.count == 0:
            self.found.left_out[graph.prefix + name] = "empty tensor"
        elif folded is not None:
            self.found.left_out[graph.prefix + name] = folded
        elif constant.count == 1 and (is_anonymous(constant.name) or (constant.ndim == 0 and "/" in constant.name)):
            self.found.left_out[graph.prefix + name] = "a number of the graph"
        else:
            path = node_path(consumers[0][0]) if consumers and is_anonymous(constant.name) else ""
            own = lone_parameter(dotted(constant.name))
            if is_anonymous(constant.name):
                own = own.replace("::", "_").replace(".", "_").replace("/", "_")
            self._add(graph.prefix, f"{path}.{own}" if path else own, constant, consumers[0][0] if consumers else _NONE)

    def _decoded(self, constant: Constant, graph: Graph) -> Constant | None:
        """Return what a DequantizeLinear makes of integers that no known node takes."""
        for node, place in graph.consumers.get(constant.name, []):
            made = graph.constants.get(node.output[0]) if node.output else None
            if place == 0 and node.op_type == "DequantizeLinear" and made is not None and made.count > 1:
                return made
        return None


def _folded(constant: Constant) -> str | None:
    """Return what a constant is that an exporter has computed, by its values; None if it may be a weight."""
    if is_parameter_name(dotted(constant.name)) or not 1 < constant.count <= _MOST_LOOKED_AT or constant.outside:
        return None
    values = constant.values().reshape(-1)
    low, high = values.min(), values.max()
    if low == high:
        return "one number over and over"
    if low < _MASKED and bool(((values == low) | (values == high)).all()):
        return "mask"
    return None


def _is_setting(graph: Graph, node: Any, place: int, depth: int = 0) -> bool:
    """Return whether a constant at one place among a node's inputs is a setting, also once it was cut or spread."""
    places = SETTINGS.get(node.op_type, ())
    if places is None or place in places:
        return True
    if node.op_type not in ("Slice", "Expand", "Concat", "Squeeze", "Unsqueeze", "Transpose", "Cast") or depth > 4:
        return False
    following = graph.consumers.get(node.output[0], []) if node.output else []
    return bool(following) and all(_is_setting(graph, other, at, depth + 1) for other, at in following)


class _NoNode:
    """Stands for the node of a constant that no node takes."""

    name = ""
    op_type = "constant"


_NONE = _NoNode()


def _written_out(model: Any) -> int:
    """Return the number of nodes that a model has once its functions are written out, at most one above the limit."""
    bodies = {(f.domain, f.name): f.node for f in model.functions}
    sizes: dict[tuple[str, str], int] = {}

    def size(nodes: Any, depth: int) -> int:
        if depth > _MAX_DEPTH:
            return _MOST_COPIES + 1
        total = 0
        for node in nodes:
            key = (node.domain, node.op_type)
            if key in bodies:
                if key not in sizes:
                    sizes[key] = size(bodies[key], depth + 1)
                total += sizes[key]
            total += 1
            if total > _MOST_COPIES:
                return _MOST_COPIES + 1
        return total

    return size(model.graph.node, 0)

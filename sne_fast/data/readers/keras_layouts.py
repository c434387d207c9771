"""Variables of Keras' layers as parameters of torch: names, and the order of dimensions and gates."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

__all__ = ["Parameter", "Variable", "layer_class", "parameters", "variable_names"]

Array = np.ndarray[Any, Any]

# What the variables of a layer are called, in the order in which Keras 3 numbers them.
_VARIABLES: tuple[tuple[str, tuple[str, ...]], ...] = (
    (r"separable_?conv\dd", ("depthwise_kernel", "pointwise_kernel", "bias")),
    (r"depthwise_?conv\dd", ("depthwise_kernel", "bias")),
    (r"(conv\dd(_?transpose)?|dense|einsum_?dense)", ("kernel", "bias")),
    (r"(sync)?batch_?normalization(v1|v2)?", ("gamma", "beta", "moving_mean", "moving_variance")),
    (r"(layer|group)_?normalization", ("gamma", "beta")),
    (r"rms_?normalization", ("gamma",)),
    (r"(reversible_?|position_?)?embedding", ("embeddings",)),
    (r"(lstm|gru|simple_?rnn)(_?cell)?", ("kernel", "recurrent_kernel", "bias")),
    (r"p_?re_?lu", ("alpha",)),
)
_NAMES = {"gamma": "weight", "beta": "bias", "moving_mean": "running_mean", "moving_variance": "running_var",
          "running_std": "running_var", "embeddings": "weight", "alpha": "weight", "bias": "bias", "W": "weight",
          "b": "bias"}  # fmt: skip
_GRU = (1, 0, 2)  # the place in Keras of each gate of torch: r z n
_FROM_HEADS = re.compile(r"_?(attention_)?output(_dense)?|o_proj|out_proj")


class Variable(NamedTuple):
    """A variable of a layer: its own name, its shape as it is stored, and what reads it."""

    name: str
    shape: tuple[int, ...]
    values: Callable[[], Array]


class Parameter(NamedTuple):
    """A parameter of torch: its own name, its shape, and what reads it."""

    name: str
    shape: tuple[int, ...]
    values: Callable[[], Array]


def layer_class(*names: str) -> str:
    """Return the class of a layer by the first of its names that tells it: "conv2d" for `Conv2D` and `conv2d_3`."""
    for name in names:
        plain = re.sub(r"_\d+$", "", name).lower()
        if _pattern(plain) is not None:
            return plain
    return ""


def _pattern(kind: str) -> tuple[str, ...] | None:
    return next((own for pattern, own in _VARIABLES if re.fullmatch(pattern, kind)), None)


def variable_names(kind: str, shapes: Sequence[tuple[int, ...]], config: Mapping[str, Any]) -> list[str]:
    """Return the names of a layer's variables, which Keras 3 only numbers.

    Args:
        kind: what `layer_class` returned, "" where nothing tells it; then the shapes have to.
        shapes: of the variables in their order.
        config: of the layer, or empty.
    """
    names = list(_pattern(kind) or _by_shapes(shapes))
    if "normalization" in kind:
        names = [n for n in names if not (n == "gamma" and config.get("scale") is False)]
        names = [n for n in names if not (n == "beta" and config.get("center") is False)]
        if len(shapes) == 3 and names[:2] == ["gamma", "beta"] and not config:
            names = names[1:]  # without its scale, as networks have it that end in an activation
    return [names[i] if i < len(names) else f"variable_{i}" for i in range(len(shapes))]


def _by_shapes(shapes: Sequence[tuple[int, ...]]) -> tuple[str, ...]:
    dims = [len(shape) for shape in shapes]
    if dims == [1, 1, 1, 1]:
        return ("gamma", "beta", "moving_mean", "moving_variance")
    if dims == [1, 1] and shapes[0] == shapes[1]:
        return ("gamma", "beta")
    if (
        dims[:2] == [2, 2]
        and len(dims) <= 3
        and shapes[0][1] == shapes[1][1]
        and shapes[1][1] % max(shapes[1][0], 1) == 0
    ):
        return ("kernel", "recurrent_kernel", "bias")
    if len(dims) == 2 and 2 <= dims[0] <= 5 and shapes[1] in (shapes[0][-1:], shapes[0][-2:-1], shapes[0][1:]):
        return ("kernel", "bias")
    return ()


def parameters(path: Sequence[str], kind: str, variables: Sequence[Variable]) -> list[tuple[str, Parameter]]:
    """Return the parameters of a layer, each with the name of its layer.

    Matrices become `(out, in)`, kernels of convolutions `(out, in, *kernel)`, those of transposed ones
    `(in, out, *kernel)`, depthwise ones `(in * multiplier, 1, *kernel)`, and gates stand in torch's order.

    Args:
        path: names that lead to the layer.
        kind: its class, as `layer_class` returns it.
        variables: its variables by Keras' names.
    """
    held = {variable.name: variable for variable in variables}
    if "recurrent_kernel" in held and "kernel" in held:
        return _recurrent(path, held)
    layer = ".".join(path)
    found = []
    for variable in variables:
        base = layer
        if variable.name in ("depthwise_kernel", "pointwise_kernel") and "pointwise_kernel" in held:
            base = f"{layer}.{variable.name.removesuffix('_kernel')}"
        elif variable.name == "bias" and "pointwise_kernel" in held:
            base = f"{layer}.pointwise"
        found.append((base, _parameter(variable, kind, path, held.get("bias"))))
    return found


def _parameter(variable: Variable, kind: str, path: Sequence[str], bias: Variable | None) -> Parameter:
    name, shape, values = variable
    if name in ("kernel", "W", "depthwise_kernel", "pointwise_kernel"):
        return _kernel(variable, kind, path[-1] if path else "", bias)
    if name == "alpha" or (name == "bias" and len(shape) > 1):
        return Parameter(_NAMES[name], (math.prod(shape),), lambda: values().reshape(-1))
    if name == "running_std":
        return Parameter("running_var", shape, values)
    return Parameter(_NAMES.get(name, name), shape, values)


def _kernel(variable: Variable, kind: str, layer: str, bias: Variable | None) -> Parameter:
    name, shape, values = variable
    if len(shape) < 2:
        return Parameter("weight", shape, values)
    if len(shape) == 2:
        return Parameter("weight", shape[::-1], lambda: values().T)
    many_heads = bias is not None and len(bias.shape) > 1 and bias.shape == shape[-len(bias.shape) :]
    if many_heads or "einsum" in kind or (not kind and _FROM_HEADS.fullmatch(layer)):
        ends = len(bias.shape) if bias is not None else (1 if _FROM_HEADS.fullmatch(layer) else len(shape) - 1)
        rows, columns = math.prod(shape[-ends:]), math.prod(shape[:-ends])
        return Parameter("weight", (rows, columns), lambda: values().reshape(columns, rows).T)
    order = (len(shape) - 1, len(shape) - 2, *range(len(shape) - 2))
    depthwise = name == "depthwise_kernel" or (
        kind == "" and bias is not None and bias.shape == (shape[-1] * shape[-2],) and shape[-2] > 1
    )
    if depthwise:
        order = (len(shape) - 2, len(shape) - 1, *range(len(shape) - 2))
        wide = (shape[-2] * shape[-1], 1, *shape[:-2])
        return Parameter("weight", wide, lambda: values().transpose(order).reshape(wide))
    return Parameter("weight", tuple(shape[i] for i in order), lambda: values().transpose(order))


def _recurrent(path: Sequence[str], held: dict[str, Variable]) -> list[tuple[str, Parameter]]:
    """Return the parameters of a recurrent layer; two directions of one layer are one module."""
    parts = list(path)
    if parts and re.fullmatch(r"(\w+_)?cell(_\d+)?", parts[-1]):
        parts.pop()
    ending = ""
    if len(parts) > 1 and (match := re.fullmatch(r"(forward|backward)_\w+", parts[-1])):
        ending = "_reverse" if match[1] == "backward" else ""
        parts.pop()
    layer, units = ".".join(parts), held["recurrent_kernel"].shape[0]
    gates = held["kernel"].shape[-1] // max(units, 1)
    order = _GRU if gates == 3 else range(gates)
    rows = np.concatenate([np.arange(units) + gate * units for gate in order]).tolist() if gates else []
    found = []
    for name, own in (("kernel", "weight_ih"), ("recurrent_kernel", "weight_hh")):
        _, shape, values = held[name]
        found.append(Parameter(f"{own}_l0{ending}", shape[::-1], lambda values=values: values().T[rows]))  # type: ignore[misc]
    if "bias" in held:
        _, shape, values = held["bias"]
        two = math.prod(shape) == 2 * len(rows)
        for i, own in enumerate(("bias_ih", "bias_hh")[: 2 if two else 1]):
            found.append(
                Parameter(
                    f"{own}_l0{ending}",
                    (len(rows),),
                    lambda i=i, values=values: values().reshape(-1, len(rows))[i][rows],  # type: ignore[misc]
                )
            )
    others = [v for name, v in held.items() if name not in ("kernel", "recurrent_kernel", "bias")]
    return [(layer, parameter) for parameter in [*found, *(Parameter(*other) for other in others)]]

"""Names of layers in ONNX graphs, from what exporters call tensors and nodes."""

from __future__ import annotations

import re
from typing import Any

__all__ = [
    "dotted",
    "is_anonymous",
    "is_other_module",
    "is_parameter_name",
    "layer_of",
    "lone_parameter",
    "node_path",
    "sibling",
]

_ANONYMOUS = re.compile(
    r"(.*/)?(Constant@\d+|onnx::\w+?_\d+|\d+|val_\d+|_val_\d+|t_\d+|tmp_\d+|Constant(_\d+)?(_output_\d+|_value)?|constant_?\d*"
    r"|(.*_)?const_fold_opt__\d+|Const(_\d+)?:\d+|new_shape__\d+|const_\w*__\d+|ortshared_\w+|scalar_\w+|lifted_tensor_\d+"
    r"|_?inlfunc_\w*|(Add|Sub|Mul|Div|Pow|Unsqueeze|Concat|Slice|Cast|Transpose|Reshape)_\d+|x\d+|p2o\.\w+|\w+_output_\d+)?"
)
_PARAMETER = re.compile(
    r"(.*\.)?(\w+_)?(weight|bias|gamma|beta|running_mean|running_var|moving_mean|moving_variance)(_\w+)?"
)
_OPERATION = re.compile(
    r"(ReadVariableOp|convolution|conv_transpose|depthwise|MatMul|BiasAdd|Conv\w*|Depthwise\w*|Tensordot|Cast|Gemm|FusedBatchNorm\w*"
    r"|Read|Identity|Reshape|Transpose|ExpandDims|resource|batchnorm|Squeeze|add|mul|Add|Mul|LSTM|GRU|RNN|Gather\w*"
    r"|embedding_lookup)(_\d+|__\d+)?"
)
_PRODUCT = re.compile(
    r".*/(MatMul|BiasAdd|Conv\w*|[Dd]epthwise\w*|convolution|separable_conv\dd|conv\w*transpose)(_\d+)?", re.DOTALL
)
# How Paddle calls the parameters of a layer, whose names it puts in front.
_PADDLE = re.compile(r"(?P<layer>.+?)(\.[wb]_\d+|_(weights|scale|offset|mean|variance))")
_PADDLE_ROLES = {"w": "weight", "b": "bias"}
_OUTER = ("StatefulPartitionedCall", "PartitionedCall")


def is_anonymous(name: str) -> bool:
    """Return whether a tensor's name is a number that an exporter gave it."""
    return _ANONYMOUS.fullmatch(name.removesuffix(":0")) is not None


def is_parameter_name(name: str) -> bool:
    """Return whether the last part of a dotted name is one that parameters of modules have."""
    return _PARAMETER.fullmatch(name) is not None


def sibling(name: str, role: str) -> str:
    """Return the name of another parameter of a parameter's layer: its weight for its bias, and so on."""
    base, dot, own = name.rpartition(".")
    kept = own.replace("bias", "weight") if role == "weight" else own.replace("weight", "bias")
    fits = role in ("weight", "bias") and role in kept and ("bias" in own or "weight" in own)
    return f"{base}{dot}{kept if fits else role}"


def dotted(name: str) -> str:
    """Return a tensor's name as exporters give it, with the separators and additions of TensorFlow taken out."""
    if "/" not in name:
        return name.removesuffix(":0")
    return ".".join(_without_operations(_split(name.removesuffix(":0"))))


def _split(name: str) -> list[str]:
    """Return the parts of a name; one that stands for several operations has their names one behind the other."""
    several = name.split(";")
    name = next((one for one in several if _PRODUCT.fullmatch(one)), several[0])
    return [part for part in name.split("/") if part and part not in _OUTER]


def _without_operations(parts: list[str]) -> list[str]:
    """Return the parts of a name without the operations behind a layer's own name."""

    def is_operation(part: str, before: str) -> bool:
        named = re.fullmatch(r"(separable_)?(conv|depthwise)\w*", part) is not None and before.startswith(part)
        return named or _OPERATION.fullmatch(part) is not None

    kept = list(parts)
    while len(kept) > 1 and is_operation(kept[-1], kept[-2]):
        kept.pop()
    return kept


def layer_of(name: str) -> str:
    """Return the name of a layer by that of one of its weights, which does not end as those of torch do."""
    found = _PADDLE.fullmatch(name)
    return found["layer"] if found else name


def lone_parameter(name: str) -> str:
    """Return the name of a parameter that stands for itself, as those of a normalisation in several steps."""
    found = re.fullmatch(r"(.+)\.([wb])_0", name)
    return f"{found[1]}.{_PADDLE_ROLES[found[2]]}" if found else name


def is_other_module(path: str, first: str) -> bool:
    """Return whether the paths of two nodes are of two modules; a second call of one has a number behind."""
    return path != "" and re.fullmatch(rf"{re.escape(first)}(_\d+)?", path) is None


def node_path(node: Any) -> str:
    """Return the layer that a node belongs to by its name or metadata, "" where they do not tell."""
    for entry in getattr(node, "metadata_props", ()):
        if entry.key == "pkg.torch.onnx.name_scopes" and len(entry.value) < 10_000:
            scopes = re.findall(r"'([^']*)'", entry.value)
            if len(scopes) > 1:
                return str(scopes[-2])
    name = str(node.name)
    if "/" not in name:
        return ""
    parts = _split(name)[:-1]
    if not name.startswith("/"):  # as torch has them, whose modules may be called as operations are
        parts = _without_operations(parts)
    # Lists of modules are called by the path that leads to them: /layer/layer.0/layer.0.conv1
    kept: list[str] = []
    for part in parts:
        if kept and part.startswith(f"{kept[-1]}."):
            kept.pop()
        kept.append(part)
    return ".".join(kept)

"""Tensor types `8 * kind + role`: kinds from the module where there is one, else inferred from names and shapes.

Adapters are layers of the kind "other" with roles of their own.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping
from typing import Any

from torch import nn

__all__ = ["ADAPTER_ROLES", "KINDS", "ROLES", "infer_kind", "kind_id", "kind_of_module", "role_of"]

KINDS = (
    "linear",
    "convolution",
    "transposed convolution",
    "normalisation",
    "embedding",
    "recurrent",
    "attention projection",
    "other",
)
ROLES = ("weight", "bias", "running mean", "running variance", "other")
ADAPTER_ROLES = {"lora_A": 5, "lora_B": 6, "lora_magnitude_vector": 7, "ia3_l": 7}
"""Roles of the tensors of adapters, by their own names; in layers of the kind "other" alone."""
LINEAR, CONVOLUTION, TRANSPOSED, NORMALISATION, EMBEDDING, RECURRENT, ATTENTION, OTHER = range(8)

_SYNONYMS = {
    "conv": CONVOLUTION,
    "conv transpose": TRANSPOSED,
    "convtranspose": TRANSPOSED,
    "norm": NORMALISATION,
    "normalization": NORMALISATION,
    "attention": ATTENTION,
    "adapter": OTHER,
}
# Subclasses before their bases: a transposed convolution is a _ConvNd too.
_CLASSES: tuple[tuple[type | tuple[type, ...], int], ...] = (
    (nn.modules.conv._ConvTransposeNd, TRANSPOSED),
    (nn.modules.conv._ConvNd, CONVOLUTION),
    (nn.Linear, LINEAR),
    ((nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm), NORMALISATION),
    ((nn.Embedding, nn.EmbeddingBag), EMBEDDING),
    ((nn.RNNBase, nn.RNNCellBase), RECURRENT),
    (nn.MultiheadAttention, ATTENTION),
)
_RECURRENT_NAME = re.compile(r"(weight|bias)_(ih|hh|hr)(_l\d+(_reverse)?)?$")
_ATTENTION_NAMES = {"in_proj_weight", "in_proj_bias", "q_proj_weight", "k_proj_weight", "v_proj_weight"}
_EMBEDDING_NAME = re.compile(
    r"embed|(^|_)emb(s|\d*)(_|$)|^wte$|^wpe$|^shared$|_tokens?$|^relative_attention_bias$|^reference_points$"
    r"|^quer(y_feat|ies_features)$|^codebook$|^(toks?|pos|tokens?|positions?|words?|vocab)$"
)
_ACTIVATION_NAME = re.compile(r"(relu|(^|[._])act(ivation)?(_fn)?)\d*$")
# pruning, spectral and weight normalisation keep the weight under the last two
_WEIGHT_NAMES = ("weight", "weight_orig", "weight_v")
_CONVOLUTION_NAME = re.compile(r"conv|patch|stem|downsample|upsample|shortcut|^dw$|^pw$")
_STACKED_NAME = re.compile(r"(^|[._])(experts?|moe|bilinear|mixture)([._]|$)|bilinear|experts$")
_LINEAR_NAME = re.compile(
    r"^(w[123qkvo]?|[qkvo]|wi(_[01])?|wo|fc\d*|c_fc|lin\d*|linear\d*|dense\d*|(lm_)?head)$|(gate|up|down|[qkvo])_proj$"
)
_LINEAR_BEHIND = re.compile(r"(head|decoder|classifier|projector|proj|proj_out|lm_loss)$")
_TABLE_NAME = re.compile(r"pos|token|table|codebook|quer(y|ies)|memory|relative")
_LONGEST_KERNEL = 64
_NOT_EMBEDDING_NAME = re.compile(r"patch|(proj|projection|projector|out|output|linear|fc|dense|mapping)\d*$")


def kind_id(kind: Any) -> int:
    """Return the id of a kind given by name ("linear", "transposed convolution", ...) or id; else raise ValueError."""
    if isinstance(kind, str):
        name = kind.lower().replace("_", " ").replace("-", " ").strip()
        if name in KINDS:
            return KINDS.index(name)
        if name in _SYNONYMS:
            return _SYNONYMS[name]
    elif not isinstance(kind, bool):
        try:
            if 0 <= operator.index(kind) < len(KINDS):
                return operator.index(kind)
        except TypeError:
            pass
    raise ValueError(
        f"pack: kinds must map to one of {', '.join(f'{i} {k!r}' for i, k in enumerate(KINDS))}, got {kind!r}"
    )


def role_of(name: str, kind: int | None = None) -> int:
    """Return the role of a tensor by its own name: weight 0, bias 1, running_mean 2, running_var 3, other 4.

    In a normalisation, gamma is the weight and beta the bias. In a layer of the kind "other", the tensors of adapters
    have roles of their own: lora_A 5, lora_B 6, lora_magnitude_vector and ia3_l 7.
    """
    if kind == OTHER and name in ADAPTER_ROLES:
        return ADAPTER_ROLES[name]
    if kind == NORMALISATION and name in ("gamma", "beta"):
        return int(name == "beta")
    if name == "running_mean":
        return 2
    if name == "running_var":
        return 3
    return 0 if "weight" in name else 1 if "bias" in name else 4


def infer_kind(layer: str, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Infer the kind of a layer from its name and the names and shapes of its tensors."""
    dims = {name: len(shape) for name, shape in shapes.items()}
    if not ADAPTER_ROLES.keys().isdisjoint(dims):
        return OTHER
    if "running_mean" in dims or "running_var" in dims:
        return NORMALISATION
    if any(_RECURRENT_NAME.match(name) for name in dims):
        return RECURRENT
    if not _ATTENTION_NAMES.isdisjoint(dims):
        return ATTENTION
    dim = next((dims[name] for name in _WEIGHT_NAMES if name in dims), 0)
    if dim == 0 and "bias" in dims:  # its weight is tied or parametrised, and counts elsewhere
        last = layer.rpartition(".")[2].lower()
        linear = _LINEAR_NAME.search(last) or _LINEAR_BEHIND.search(last)
        return CONVOLUTION if "conv" in last else LINEAR if linear else OTHER
    if set(dims) == {"gamma", "beta"} and set(dims.values()) == {1}:
        return NORMALISATION
    if dim == 1:
        return OTHER if _ACTIVATION_NAME.search(layer.lower()) else NORMALISATION
    if dim == 2:
        words = [part for part in layer.lower().split(".") if not part.isdigit()]  # of a list its name counts
        last = words[-1] if words else ""
        named = _EMBEDDING_NAME.search(last) and not _NOT_EMBEDDING_NAME.search(last)
        return EMBEDDING if named and len(dims) == 1 else LINEAR
    return CONVOLUTION if 3 <= dim <= 5 and _may_be_convolution(layer.lower(), shapes) else OTHER


def _may_be_convolution(layer: str, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Return whether neither name nor shape speak against a weight of 3 to 5 dimensions being one of a convolution."""
    last = layer.rpartition(".")[2]
    weight = next(shapes[name] for name in _WEIGHT_NAMES if name in shapes)
    bias = shapes.get("bias")
    # one bias per output: the first dimension, or the second of a transposed convolution, times its groups
    if bias is not None and (len(bias) != 1 or (bias[0] != weight[0] and bias[0] % max(weight[1], 1) != 0)):
        return False
    if _CONVOLUTION_NAME.search(last):
        return True
    if _STACKED_NAME.search(layer) or (len(weight) == 3 and weight[-1] > 1 and _LINEAR_NAME.search(last)):
        return False
    if bias is None and (_EMBEDDING_NAME.search(last) or _TABLE_NAME.search(last)):
        return False
    return max(weight[2:]) <= _LONGEST_KERNEL


def kind_of_module(module: nn.Module) -> int | None:
    """Return the kind of a module by its class.

    Every class of torch.nn has a kind; a class from elsewhere has one if it derives from a class with one, else None.
    """
    for classes, kind in _CLASSES:
        if isinstance(module, classes):
            return kind
    if type(module).__module__.startswith("torch.ao."):  # a quantised class has the name of the one it stands for
        plain = getattr(nn, type(module).__name__, None)
        return next((kind for classes, kind in _CLASSES if plain and issubclass(plain, classes)), None)
    return OTHER if type(module).__module__.startswith("torch.nn.") else None

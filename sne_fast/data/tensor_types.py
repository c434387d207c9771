"""Tensor types `8 * kind + role`: kinds from the module where there is one, else inferred from names and shapes."""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping
from typing import Any

from torch import nn

__all__ = ["KINDS", "ROLES", "infer_kind", "kind_id", "kind_of_module", "role_of"]

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
LINEAR, CONVOLUTION, TRANSPOSED, NORMALISATION, EMBEDDING, RECURRENT, ATTENTION, OTHER = range(8)

_SYNONYMS = {
    "conv": CONVOLUTION,
    "conv transpose": TRANSPOSED,
    "convtranspose": TRANSPOSED,
    "norm": NORMALISATION,
    "normalization": NORMALISATION,
    "attention": ATTENTION,
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
_EMBEDDING_NAME = re.compile(r"embed|(^|_)emb(s|\d*)(_|$)|^wte$|^wpe$")
_NOT_EMBEDDING_NAME = re.compile(r"(proj|projection|out|output|linear|fc|dense|mapping)\d*$")


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


def role_of(name: str) -> int:
    """Return the role of a tensor by its own name: weight 0, bias 1, running_mean 2, running_var 3, other 4."""
    if name == "running_mean":
        return 2
    if name == "running_var":
        return 3
    return 0 if "weight" in name else 1 if "bias" in name else 4


def infer_kind(layer: str, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Infer the kind of a layer from its name and the names and shapes of its tensors."""
    dims = {name: len(shape) for name, shape in shapes.items()}
    if "running_mean" in dims or "running_var" in dims:
        return NORMALISATION
    if any(_RECURRENT_NAME.match(name) for name in dims):
        return RECURRENT
    if not _ATTENTION_NAMES.isdisjoint(dims):
        return ATTENTION
    # weight_orig and weight_v: pruning, spectral and weight normalisation keep the weight under these names
    dim = next((dims[name] for name in ("weight", "weight_orig", "weight_v") if name in dims), 0)
    if dim == 1:
        return NORMALISATION
    if dim == 2:
        last = layer.rpartition(".")[2].lower()
        named = _EMBEDDING_NAME.search(last) and not _NOT_EMBEDDING_NAME.search(last)
        return EMBEDDING if named and len(dims) == 1 else LINEAR
    return CONVOLUTION if 3 <= dim <= 5 else OTHER


def kind_of_module(module: nn.Module) -> int | None:
    """Return the kind of a module by its class.

    Every class of torch.nn has a kind; a class from elsewhere has one if it derives from a class with one, else None.
    """
    for classes, kind in _CLASSES:
        if isinstance(module, classes):
            return kind
    return OTHER if type(module).__module__.startswith("torch.nn.") else None

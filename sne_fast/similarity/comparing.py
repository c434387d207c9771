"""Two networks compared layer by layer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from os import PathLike
from typing import Any

import torch
from torch import Tensor

from ..data.layer_stream import LayerStream


@dataclass(frozen=True)
class LayerChange:
    """What became of a layer of network a in network b.

    Attributes:
        layer: its name.
        status: "same", "changed", "reordered" (the same values in another order), "resized", "removed" or "added".
        weights: number of weights, in a or, of an added layer, in b.
        distance: `|a - b| / sqrt((|a|^2 + |b|^2) / 2)` over its tensors, 1.41 for independent ones; None where shapes
            differ, one lacks it, or weights that are not finite leave it undefined.
        cosine: of the angle between both, None likewise or where one is zero.
        norm_ratio: `|b| / |a|`, None where one is missing or a is zero.
        zeros: share of zeros in a and in b.
    """

    layer: str
    status: str
    weights: int
    distance: float | None
    cosine: float | None
    norm_ratio: float | None
    zeros: tuple[float | None, float | None]


def compare(a: Any, b: Any, *, key: str | None = None) -> list[LayerChange]:
    """Return what changed in every layer from network a to network b, in the order of a, added layers last.

    Both are read layer by layer, so only one layer of each is in memory.

    Args:
        a: a path, module or state_dict, as :func:`sne_fast.pack` takes it.
        b: likewise.
        key: the place of the weights in files that hold several.

    Raises:
        ValueError: what cannot be read; the message names it.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 3))
        >>> other = copy.deepcopy(net)
        >>> other[1] = torch.nn.Linear(8, 2)
        >>> [(change.layer, change.status) for change in compare(net, other)]
        [('0', 'same'), ('1', 'resized')]
    """
    streams = [
        LayerStream(network, key=key if isinstance(network, str | PathLike) else None, nonfinite="keep")
        for network in (a, b)
    ]
    places = [{layer.name: i for i, layer in enumerate(stream.network.layers)} for stream in streams]
    changes = []
    for name, i in places[0].items():
        one = _tensors(streams[0], i)
        other = _tensors(streams[1], places[1][name]) if name in places[1] else None
        changes.append(_change(name, one, other))
    for name, i in places[1].items():
        if name not in places[0]:
            found = _tensors(streams[1], i)
            changes.append(LayerChange(name, "added", _size(found), None, None, None, (None, _zeros(found))))
    return changes


def _tensors(stream: LayerStream, i: int) -> dict[str, Tensor]:
    layer = stream.read(i)
    return {own: t.detach().double().cpu() for own, (_, t) in zip(layer.own, layer.tensors, strict=True)}


def _size(tensors: dict[str, Tensor]) -> int:
    return sum(t.numel() for t in tensors.values())


def _zeros(tensors: dict[str, Tensor]) -> float:
    return sum(int((t == 0).sum()) for t in tensors.values()) / max(1, _size(tensors))


def _change(name: str, one: dict[str, Tensor], other: dict[str, Tensor] | None) -> LayerChange:
    if other is None:
        return LayerChange(name, "removed", _size(one), None, None, None, (_zeros(one), None))
    norms = [sum(float(t.square().sum()) for t in tensors.values()) ** 0.5 for tensors in (one, other)]
    finite = all(math.isfinite(norm) for norm in norms)
    ratio = norms[1] / norms[0] if finite and norms[0] > 0 else None
    zeros = (_zeros(one), _zeros(other))
    if {own: t.shape for own, t in one.items()} != {own: t.shape for own, t in other.items()}:
        return LayerChange(name, "resized", _size(one), None, None, ratio, zeros)
    product = sum(float((t * other[own]).sum()) for own, t in one.items())
    apart = sum(float((t - other[own]).square().sum()) for own, t in one.items())
    scale = (norms[0] ** 2 + norms[1] ** 2) / 2
    distance = None if not finite else (apart / scale) ** 0.5 if scale > 0 else 0.0
    cosine = product / (norms[0] * norms[1]) if finite and norms[0] > 0 and norms[1] > 0 else None
    if all(torch.equal(t, other[own]) for own, t in one.items()):
        status, distance = "same", 0.0
    elif all(torch.equal(t.flatten().sort().values, other[own].flatten().sort().values) for own, t in one.items()):
        status = "reordered"
    else:
        status = "changed"
    return LayerChange(name, status, _size(one), distance, cosine, ratio, zeros)

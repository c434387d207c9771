"""The options `kinds=` and `layer_level=` of `pack`, which override what is inferred about layers."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from fnmatch import fnmatchcase
from itertools import chain, pairwise
from typing import Any

import numpy as np
from torch import Tensor

from .layers import Network
from .tensor_types import kind_id


def resolve_kinds(networks: list[Network], kinds: Any) -> list[int]:
    """Return `8 * kind + role` of every tensor."""
    chosen = given_kinds(networks, kinds)
    return [
        tensor_type
        for network, given in zip(networks, chosen, strict=True)
        for i, layer in enumerate(network.layers)
        for tensor_type in layer.types(given.get(i))
    ]


def given_kinds(networks: list[Network], kinds: Any) -> list[dict[int, int]]:
    """Return per network the kinds of the layers, by their places, for which `kinds` says one."""
    if kinds is not None and not isinstance(kinds, Mapping) and not hasattr(kinds, "__len__"):
        raise TypeError(
            f"pack: kinds must be 'names', a mapping, or one mapping or None per network, got {type(kinds).__name__}"
        )
    rules = [kinds] * len(networks) if kinds is None or isinstance(kinds, Mapping) else list(kinds)
    if isinstance(kinds, str) or any(rule is not None and not isinstance(rule, Mapping) for rule in rules):
        raise TypeError(f"pack: kinds must be 'names', a mapping, or one mapping or None per network, got {kinds!r}")
    if len(rules) != len(networks):
        raise ValueError(f"pack: kinds must have one entry per network, got {len(rules)} for {len(networks)}")
    for rule in rules:
        for kind in (rule or {}).values():
            kind_id(kind)
    chosen = _apply(networks, rules, "kinds")
    return [{i: kind_id(kind) for i, kind in given.items()} for given in chosen]


def resolve_levels(networks: list[Network], layer_level: Any) -> list[int]:
    """Return the level of every layer: its position in its network, unless `layer_level` says otherwise."""
    counts = [len(network.layers) for network in networks]
    levels = [list(range(count)) for count in counts]
    if layer_level is None:
        return list(chain.from_iterable(levels))
    if isinstance(layer_level, Mapping):
        layer_level = [layer_level] * len(networks)
    elif isinstance(layer_level, (Tensor, np.ndarray)) and layer_level.ndim == 1:
        layer_level = layer_level.tolist()
    if isinstance(layer_level, str) or not hasattr(layer_level, "__iter__"):
        raise TypeError(f"pack: layer_level must be a sequence or a mapping, got {type(layer_level).__name__}")
    given = list(layer_level)
    plain = all(not isinstance(entry, Mapping) and not hasattr(entry, "__len__") for entry in given)
    if plain and any(entry is not None for entry in given):  # numbers: (L,), one per layer of the batch
        if len(given) != sum(counts):
            raise ValueError(
                f"pack: layer_level must have one entry per layer ({sum(counts)}) or be nested with one entry per "
                f"network ({len(networks)}), got {len(given)} numbers"
            )
        given = [given[a:b] for a, b in pairwise(np.cumsum([0, *counts]).tolist())]
    if len(given) != len(networks):
        raise ValueError(f"pack: layer_level must have one entry per network, got {len(given)} for {len(networks)}")
    chosen = _apply(networks, [entry if isinstance(entry, Mapping) else None for entry in given], "layer_level")
    for network, entry, level, named in zip(networks, given, levels, chosen, strict=True):
        if entry is None:
            continue
        if not isinstance(entry, Mapping):
            if len(entry) != len(level):
                raise ValueError(
                    f"pack: layer_level must have one entry per layer, got {len(entry)} for the {len(level)} layers "
                    f"of {network.label}"
                )
            named = dict(enumerate(entry.tolist() if isinstance(entry, (Tensor, np.ndarray)) else entry))
        for i, value in named.items():
            level[i] = _level(value, network, network.layers[i].name)
    return list(chain.from_iterable(levels))


def _level(value: Any, network: Network, layer: str) -> int:
    try:
        if not isinstance(value, bool) and 0 <= operator.index(value) < 1 << 63:
            return operator.index(value)
    except TypeError:
        pass
    raise ValueError(
        f"pack: layer_level must be integers of at least 0, got {value!r} for {network.label}, layer {layer!r}"
    )


def _apply(networks: list[Network], rules: list[Mapping[str, Any] | None], option: str) -> list[dict[int, Any]]:
    """Return per network the values of layers that its mapping names: by exact name, else by the first pattern."""
    chosen: list[dict[int, Any]] = []
    unused = {key for rule in rules if rule is not None for key in rule}
    for key in unused:
        if not isinstance(key, str):
            raise TypeError(f"pack: {option} must map layer names or patterns, got the key {key!r}")
    for network, rule in zip(networks, rules, strict=True):
        found: dict[int, Any] = {}
        for i, layer in enumerate(network.layers if rule else ()):
            fits = [key for key in rule or () if key == layer.name or fnmatchcase(layer.name, key)]
            unused.difference_update(fits)
            if fits:
                found[i] = (rule or {})[layer.name if layer.name in fits else fits[0]]
        chosen.append(found)
    if unused:
        names = ", ".join(repr(layer.name) for layer in networks[0].layers[:8])
        raise ValueError(
            f"pack: {option} has {sorted(unused)[0]!r}, which fits no layer; {networks[0].label} has the layers {names}"
        )
    return chosen

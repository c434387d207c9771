"""Configs of Keras: which layers a model has, in which order, and of which classes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ["classes", "configured_name", "keys_of_layers", "listed", "places"]

_MAX_DEPTH = 48


def listed(layers: Any) -> list[dict[str, Any]]:
    """Return the layers that a config lists, without those that stand for inputs."""
    entries = [entry for entry in layers if isinstance(entry, dict)] if isinstance(layers, list) else []
    return [entry for entry in entries if entry.get("class_name") != "InputLayer"]


def keys_of_layers(layers: Any) -> dict[str, str]:
    """Return the names of a model's layers by the names of their groups, which are those of classes with a number."""
    found: dict[str, str] = {}
    counts: dict[str, int] = {}
    for entry in layers if isinstance(layers, list) else ():
        if isinstance(entry, dict):
            kind = re.sub(r"(.)([A-Z][a-z]+)", r"\1_\2", re.sub(r"\W+", "", str(entry.get("class_name", ""))))
            kind = re.sub(r"([a-z])([A-Z])", r"\1_\2", kind).lower()
            number = counts.get(kind, 0)
            counts[kind] = number + 1
            found[f"{kind}_{number}" if number else kind] = configured_name(entry)
    return found


def classes(config: Any, depth: int) -> Iterator[tuple[str, str]]:
    """Yield the classes of all layers in a config by their names."""
    if depth > _MAX_DEPTH:
        return
    if isinstance(config, list):
        for entry in config:
            yield from classes(entry, depth + 1)
    elif isinstance(config, dict):
        inner = config.get("config")
        if isinstance(config.get("class_name"), str) and isinstance(inner, dict | list):
            name = configured_name(config)
            if name:
                yield name, config["class_name"]
            layers = inner if isinstance(inner, list) else [inner.get("layers"), inner.get("layer")]
            yield from classes(layers, depth + 1)


def places(config: Any, depth: int) -> Iterator[tuple[str, int]]:
    """Yield the place of each layer of a model, and of each layer of a model inside it, by its name."""
    inner = config.get("config") if isinstance(config, dict) else None
    if depth > _MAX_DEPTH or not isinstance(inner, dict | list):
        return
    for i, entry in enumerate(listed(inner.get("layers") if isinstance(inner, dict) else inner)):
        yield configured_name(entry), i
        yield from places(entry, depth + 1)


def configured_name(entry: Mapping[str, Any]) -> str:
    """Return the name of a layer."""
    inner = entry.get("config")
    own = inner.get("name") if isinstance(inner, dict) else None
    return own if isinstance(own, str) else str(entry.get("name", ""))

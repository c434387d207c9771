"""Configurations of adapters, beside a file of PEFT or in one of diffusers: what their updates are multiplied by."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ...regular_files import parse_json, read_json
from .errors import CheckpointError, reading

__all__ = ["ADAPTER_FILE", "adapter_scales", "in_metadata", "scales_in_metadata"]

ADAPTER_FILE = re.compile(r"adapter_model\..*")
CONFIG = "adapter_config.json"
_FACTOR = re.compile(r"(.*)\.lora_(?:embedding_)?A(?:\.weight)?")
_PREFIX = "base_model.model."
_METADATA = "lora_adapter_metadata"
_PLAIN = re.compile(r"\^?[\w.-]+")  # a pattern that a name fits by its letters alone


def adapter_scales(file: Path, names: Iterable[str]) -> dict[str, tuple[float, int]]:
    """Return for each module that a file adapts what the update is multiplied by, and its rank.

    The scale is alpha / r, or alpha / sqrt(r) with `use_rslora`; `rank_pattern` and `alpha_pattern` give modules their
    own numbers. A module for which a pattern of another form than a name would have to be tried has no scale.

    Args:
        file: the weights of an adapter; one of another name has no scales.
        names: of its tensors.

    Raises:
        CheckpointError: a configuration that is damaged.
    """
    config = file.parent / CONFIG
    if not ADAPTER_FILE.fullmatch(file.name) or not config.exists():
        return {}
    with reading(config):
        said = read_json(config, dict, nonfinite=True)
    return _scales(said, names, _PREFIX, config)


def in_metadata(metadata: Mapping[str, str]) -> bool:
    """Return whether the metadata of a file have the configuration of adapters."""
    return _METADATA in metadata


def scales_in_metadata(metadata: Mapping[str, str], names: Iterable[str], file: Path) -> dict[str, tuple[float, int]]:
    """Return the same for a file of diffusers, whose metadata have the configuration of each network that it adapts.

    Args:
        metadata: of a file of safetensors.
        names: of its tensors, which begin with that of a network, such as `unet`.
        file: for messages.

    Raises:
        CheckpointError: metadata that are damaged.
    """
    text = metadata.get(_METADATA)
    if text is None:
        return {}
    try:
        said = parse_json(text, f"its metadata {_METADATA}", dict, nonfinite=True)
    except ValueError as error:
        raise CheckpointError(f"{file}: is damaged: {str(error).partition(chr(10))[0][:200]}") from error
    networks: dict[str, dict[str, Any]] = {}
    for key, value in said.items():
        network, _, own = key.partition(".")
        networks.setdefault(network, {})[own] = value
    listed = list(names)
    found: dict[str, tuple[float, int]] = {}
    for network, own in networks.items():
        inside = [name for name in listed if name.startswith(f"{network}.")]
        found |= _scales(own, inside, f"{network}.", file)
    return found


def _scales(said: Mapping[str, Any], names: Iterable[str], prefix: str, config: Path) -> dict[str, tuple[float, int]]:
    if said.get("peft_type") != "LORA":
        return {}
    scales: dict[str, tuple[float, int]] = {}
    for name in names:
        factor = _FACTOR.fullmatch(name)
        if factor is None:
            continue
        module = factor[1].removeprefix(prefix)
        rank = _of_module(said, "rank_pattern", "r", module, config)
        alpha = _of_module(said, "alpha_pattern", "lora_alpha", module, config)
        if rank is None or alpha is None:
            continue
        if rank < 1 or rank != int(rank):
            raise _damaged(config, "r")
        scales[factor[1]] = alpha / (math.sqrt(rank) if said.get("use_rslora") is True else rank), int(rank)
    return scales


def _of_module(said: Mapping[str, Any], pattern: str, default: str, module: str, config: Path) -> float | None:
    """Return the number that a configuration gives for a module, None if only a regular expression could tell.

    Expressions of a file are not tried: one can be made so that this takes for ever.
    """
    patterns = said.get(pattern) or {}
    if not isinstance(patterns, dict):
        raise _damaged(config, pattern)
    value = said.get(default)
    for key, own in patterns.items():
        if not _PLAIN.fullmatch(key):
            return None
        if module == key.removeprefix("^") or module.endswith(f".{key}"):
            value = own
            break
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise _damaged(config, default)
    return float(value)


def _damaged(config: Path, entry: str) -> CheckpointError:
    return CheckpointError(f"{config}: is damaged: its {entry} must be numbers as PEFT writes them; fetch it again")

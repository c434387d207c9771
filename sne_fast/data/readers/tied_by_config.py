"""Embeddings that a file holds twice although they are tied, as shards of pickles and gathered trainings hold them.

`config.json` beside the file says whether a model ties its input and output embeddings. Where it does not say no, and
both are there with the same values, they are one tensor.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...regular_files import read_json
from .errors import Unreachable, reading
from .lazy_tensors import LazyTensor

__all__ = ["names_embeddings", "with_ties_of_config"]

_INPUT = re.compile(
    r"(^|\.)(embed_tokens|wte|word_embeddings?|embed_in|shared|tok_embeddings|tokens_embed|token_embedding)\.weight$"
)
_OUTPUT = re.compile(
    r"(^|\.)(lm_head|embed_out|decoder|proj_out|lm_loss|output|output_projection|vocab_projector|generator_lm_head"
    r"|pred_layer\.proj|word_embeddings_predictions|head)\.weight$"
)


def with_ties_of_config(folder: Path, tensors: Mapping[str, Tensor | LazyTensor]) -> dict[str, Tensor | LazyTensor]:
    """Return tensors with one object under the names of input and output embeddings that are tied.

    Args:
        folder: where `config.json` may lie; without one nothing is tied.
        tensors: by name. Values are read only of embeddings of one shape and dtype.

    Raises:
        CheckpointError: as `LazyTensor.read`.
    """
    found = dict(tensors)
    named = names_embeddings(tensors)
    if not named or not _may_tie(folder / "config.json"):
        return found
    first: dict[tuple[Any, ...], list[tuple[str, Tensor]]] = {}
    shapes = [(tuple(found[name].shape), found[name].dtype) for name in named]
    for name, shape in zip(named, shapes, strict=True):
        if len(shape[0]) != 2 or shapes.count(shape) < 2:
            continue
        tensor = found[name]
        values = tensor.read() if isinstance(tensor, LazyTensor) else tensor
        same = next((other for other, held in first.get(shape, ()) if torch.equal(held, values)), None)
        if same is None:
            first.setdefault(shape, []).append((name, values))
        elif _INPUT.search(name) or _INPUT.search(same):
            found[name] = found[same]
    return found


def names_embeddings(names: Iterable[str]) -> list[str]:
    """Return those of the names that are of input or output embeddings, none if there are no two or no input's."""
    named = [name for name in names if _INPUT.search(name) or _OUTPUT.search(name)]
    return named if len(named) > 1 and any(map(_INPUT.search, named)) else []


def _may_tie(file: Path) -> bool:
    """Return whether a configuration is there and does not deny that embeddings are tied, as most leave it unsaid."""
    try:
        with reading(file):
            config = read_json(file, dict, nonfinite=True) if file.is_file() else None
    except Unreachable:
        raise
    except ValueError:
        return False
    return config is not None and not _denied(config)


def _denied(config: Mapping[str, Any]) -> bool:
    inner = [value for key, value in config.items() if isinstance(value, Mapping) and key.endswith("config")]
    said = config.get("tie_word_embeddings")
    return said is False or (said is None and any(_denied(value) for value in inner))

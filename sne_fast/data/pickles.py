"""Pickles that hold tensors, plain data and perhaps arrays of numpy, read whole; objects are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..regular_files import open_regular
from .readers.errors import reading
from .readers.numpy_values import Array, RefusedArray, as_array
from .readers.pickled_values import Placeholder, RefusedName
from .readers.stored import StoredTensor, read_tensors
from .readers.torch_files import damage_of, read_content

__all__ = ["RefusedArray", "as_array", "load_plain"]

_MAX_DEPTH = 200


def load_plain(file: Path, *, device: torch.device | str = "cpu", arrays: bool = False) -> Any:
    """Return all that a pickled checkpoint holds, tensors in memory, and refuse one that holds objects.

    Args:
        file: the checkpoint.
        device: where tensors go.
        arrays: whether it may hold numpy's arrays and numbers besides tensors.

    Raises:
        CheckpointError: no such file, one that is damaged, or that holds anything else; the message names it.
    """
    with reading(file), open_regular(file) as opened, damage_of(file):
        content = read_content(opened, strict=True, arrays=arrays)
        stored: dict[str, StoredTensor] = {}
        _check_plain(content, stored)
        tensors = {name: tensor.to(device) for name, tensor in read_tensors(stored).items()}
        return _filled(content, {id(stored[name]): tensor for name, tensor in tensors.items()}, {}, 0)


_PLAIN = str | int | float | bytes | complex | torch.dtype | Array | None
_PLAIN_OBJECTS = ("torch.device", "builtins.bytearray", "builtins.set", "builtins.frozenset")


def _check_plain(content: Any, stored: dict[str, StoredTensor]) -> None:
    """Refuse objects in what was read, and collect its tensors."""
    waiting, seen = [content], set()
    while waiting:
        value = waiting.pop()
        if isinstance(value, StoredTensor):
            stored[str(id(value))] = value
        elif isinstance(value, _PLAIN) or id(value) in seen:
            continue
        elif isinstance(value, dict):
            waiting += [*value, *value.values()]
        elif isinstance(value, list | tuple):
            waiting += value
        elif isinstance(value, Placeholder) and value.path in _PLAIN_OBJECTS:
            waiting += [value.arguments, value.entries]
        else:
            raise RefusedName(getattr(value, "path", type(value).__name__))
        seen.add(id(value))


def _filled(value: Any, tensors: dict[int, Tensor], made: dict[int, Any], depth: int) -> Any:
    """Return the value with its tensors read; what the pickle shares stays shared."""
    if isinstance(value, StoredTensor):
        return tensors[id(value)]
    if not isinstance(value, dict | list | tuple):
        return value
    if depth > _MAX_DEPTH:
        raise RecursionError
    if id(value) in made:
        return made[id(value)]
    filled: Any = {} if isinstance(value, dict) else []
    made[id(value)] = filled
    if isinstance(value, dict):
        filled.update((key, _filled(inner, tensors, made, depth + 1)) for key, inner in value.items())
        return filled
    filled += [_filled(inner, tensors, made, depth + 1) for inner in value]
    if isinstance(value, tuple):
        made[id(value)] = tuple(filled)
    return made[id(value)]

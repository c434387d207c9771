"""Tensors of a file that are read when they are asked for, one at a time."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["LazyTensor"]


@dataclass(frozen=True, eq=False)
class LazyTensor:
    """A tensor of a file, known by its dtype and shape.

    Attributes:
        dtype: of what `read` returns.
        shape: of what `read` returns.
        read: reads the values into memory of their own, as often as it is called; raises CheckpointError for a file
            that changed or is damaged.
        place: where the values are; equal for names of one tensor, which are tied. None for a tensor of its own.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Tensor]
    place: Hashable = field(default=None)

"""Tensors of a file that are read when they are asked for, one at a time."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ...regular_files import open_regular

__all__ = ["LazyTensor", "OpenFile", "read_all"]


class OpenFile:
    """A regular file that is open for reading as long as something refers to this object.

    Args:
        file: its path.

    Attributes:
        opened: the file, whose place all tensors of it share.
        lock: held by who moves that place and reads, since tensors may be read from several threads.

    Raises:
        FileError, OSError: as `sne_fast.regular_files.open_regular`.
    """

    def __init__(self, file: Path) -> None:
        self.opened = open_regular(file)
        self.lock = threading.Lock()
        weakref.finalize(self, self.opened.close)


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
    place: Hashable = None

    @property
    def identity(self) -> Hashable:
        """What all names of one tensor share."""
        return id(self) if self.place is None else (self.place,)


def read_all(tensors: Mapping[str, Tensor | LazyTensor]) -> dict[str, Tensor]:
    """Read all tensors into memory; names of one tensor share it.

    Raises:
        CheckpointError: as `LazyTensor.read`.
    """
    found: dict[Hashable, Tensor] = {}
    read = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, Tensor):
            read[name] = tensor
            continue
        place = tensor.identity
        if place not in found:
            found[place] = tensor.read()
        read[name] = found[place]
    return read

"""Small files of safetensors read whole: one buffer for all tensors, and a header that is parsed once.

The networks of a zoo have the same header in every file, so that what it says is kept by its bytes. What is not of this
plain kind is left to `read_checkpoint`, which also says what is wrong with a file.
"""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...regular_files import read_small
from .adapter_configs import ADAPTER_FILE, in_metadata
from .checkpoint import ORDER_KEY, in_order
from .errors import CheckpointError
from .quantisation_configs import NOTHING_SAID, quantisation_beside
from .safetensors_files import header_length, parse_header
from .shards import counts_itself, has_usual_index, is_rank
from .tied_by_config import names_embeddings

__all__ = ["SmallFiles", "StoredFile"]

MOST_BYTES = 4 * 2**20
"""Size of a file from which nothing is gained by reading it whole."""
_MOST_HEADER = 2**16


class Layout(NamedTuple):
    """What a header says.

    Attributes:
        forms: name, shape and dtype of each tensor, in order.
        offsets: (T,) where the bytes of each begin in the file.
        keeps_order: whether the order is that of definition.
    """

    forms: tuple[tuple[str, tuple[int, ...], torch.dtype], ...]
    offsets: np.ndarray
    keeps_order: bool


class StoredFile(NamedTuple):
    """A file in memory: its layout, and all of its bytes `(size,)` uint8."""

    layout: Layout
    buffer: Tensor


class SmallFiles:
    """Reads small files; what lies beside the files of a folder is looked at once."""

    def __init__(self) -> None:
        self._folders: dict[str, bool] = {}

    def read(self, path: str | os.PathLike[str]) -> StoredFile | None:
        """Return a file, or None where it needs the ordinary reader: it is of another kind, large, damaged or missing.

        Args:
            path: a file or folder, as `read_checkpoint` takes it.
        """
        name = os.fspath(path)
        if not isinstance(name, str):
            return None
        own = name.rpartition(os.sep)[2]
        folder = name[: len(name) - len(own)]
        if not own.endswith(".safetensors") or counts_itself(own) or is_rank(own) or ADAPTER_FILE.fullmatch(own):
            return None
        if folder not in self._folders:
            self._folders[folder] = _is_plain(Path(name))
        content = read_small(name, MOST_BYTES) if self._folders[folder] else None
        if content is None:
            return None
        size = len(content)
        try:
            length = header_length(bytes(content[:8]), size)
        except ValueError:
            return None
        # The order of checks is that of `format_of`: no other format begins so.
        if content[8:9] != b"{" or length > _MOST_HEADER:
            return None
        layout = _layout(bytes(content[8 : 8 + length]), size)
        return None if layout is None else StoredFile(layout, torch.frombuffer(content, dtype=torch.uint8))


def _is_plain(file: Path) -> bool:
    """Return whether nothing beside a file says how to read it."""
    folder = file.parent
    return not (has_usual_index(folder) or is_rank(folder.name) or quantisation_beside(file) != NOTHING_SAID)


@lru_cache(maxsize=256)
def _layout(header: bytes, size: int) -> Layout | None:
    """Return what a header says, None where `read_checkpoint` does more with it or finds it damaged."""
    try:
        found = parse_header(header, size)
        tied = any(other not in found.entries and name in found.entries for other, name in found.metadata.items())
        if not found.entries or tied or in_metadata(found.metadata) or names_embeddings(found.entries):
            return None
        if any((found.start + e.begin) % e.dtype.itemsize for e in found.entries.values()):
            return None
        order = found.metadata.get(ORDER_KEY)
        entries = in_order(found.entries, order, Path())
        forms = tuple((name, entry.shape, entry.dtype) for name, entry in entries.items())
        offsets = np.array([found.start + entry.begin for entry in entries.values()], np.int64)
        return Layout(forms, offsets, order is not None)
    except (ValueError, CheckpointError):
        return None

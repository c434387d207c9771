"""Which chunks a launch of the chunk kernels takes: their order by length, made on the device, and how many blocks.

One launch per slot class takes all chunks of its lengths: a block of S slots holds one chunk, or, of chunks of up to
16, ``S // n`` of one length n. Nothing here waits for the device: the grid comes from the host's pointers, and where
each length begins is found on the device, so that a call can be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

LONGEST_CHUNK = 256
LONGEST_SHARED = 16
SHARED_STARTS = LONGEST_CHUNK + 2
TABLE_ENTRIES = SHARED_STARTS + LONGEST_SHARED


@dataclass(frozen=True)
class SlotClass:
    """Chunks of ``lowest`` to ``slots`` elements (``shared``: 1 to 16, several of one length in a block)."""

    slots: int
    lowest: int
    shared: bool


CLASSES = (
    SlotClass(32, 1, True),
    SlotClass(32, LONGEST_SHARED + 1, False),
    SlotClass(64, 33, False),
    SlotClass(128, 65, False),
    SlotClass(256, 129, False),
)


@dataclass(frozen=True)
class ChunkPlan:
    """``order (N,)``: chunks by length, stable; ``table (274,)``: where each length begins in that order (entries 0 to
    257) and, from ``SHARED_STARTS`` on, at which block each length up to 16; ``counts``: chunks of each length."""

    order: Tensor
    table: Tensor
    counts: np.ndarray

    def blocks(self, slot_class: SlotClass) -> int:
        """How many blocks of slots the chunks of a class fill."""
        if slot_class.shared:
            return sum(-(-int(self.counts[n]) // (slot_class.slots // n)) for n in range(1, LONGEST_SHARED + 1))
        return int(self.counts[slot_class.lowest : slot_class.slots + 1].sum())

    def classes(self, among: Sequence[SlotClass] = CLASSES) -> Iterator[tuple[SlotClass, int]]:
        """The slot classes that have chunks, with their number of blocks."""
        for slot_class in among:
            blocks = self.blocks(slot_class)
            if blocks:
                yield slot_class, blocks


def count_lengths(chunk_ptr_host: Tensor) -> np.ndarray:
    """How many chunks there are of each length, 0 to 256, by the host's pointers ``(N+1,)``."""
    return np.bincount(np.diff(chunk_ptr_host.numpy()), minlength=LONGEST_CHUNK + 1)


def plan_chunks(chunk_ptr: Tensor, counts: np.ndarray) -> ChunkPlan:
    """Order the chunks by length; ``counts`` as :func:`count_lengths` makes them."""
    # Lengths of 1 to 256 fit a byte: the device sorts in one pass.
    lengths, order = torch.sort((chunk_ptr.diff() - 1).to(torch.uint8), stable=True)
    steps = torch.arange(LONGEST_CHUNK + 1, device=chunk_ptr.device)
    first = torch.searchsorted(lengths.to(torch.int16), (steps - 1).to(torch.int16))  # chunks shorter than step
    total = first.new_full((1,), order.shape[0])
    short = steps[1 : LONGEST_SHARED + 1]
    per_block = CLASSES[0].slots // short
    filled = (first[2 : LONGEST_SHARED + 2] - first[1 : LONGEST_SHARED + 1] + per_block - 1) // per_block
    starts = filled.cumsum(0) - filled
    return ChunkPlan(order, torch.cat([first, total, starts]), counts)


def owners(tensor_ptr: Tensor, chunks: int) -> Tensor:
    """The tensor of each chunk ``(chunks,)``."""
    ids = torch.arange(tensor_ptr.shape[0] - 1, device=tensor_ptr.device)
    return torch.repeat_interleave(ids, tensor_ptr.diff(), output_size=chunks)

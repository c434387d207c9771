"""Launch plan of the chunk kernels: order of the chunks by length, made on the device, and number of bins.

A bin of S slots, rows of a tile, holds one chunk or, of chunks of up to 16 elements, ``S // n`` chunks of one length n.
One launch per slot class takes all chunks of its lengths. Nothing here waits for the device: the grid comes from the
host's pointers, and the place of each length in the order is found on the device, so that a call can be captured in a
CUDA graph.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...ops import launch_bounds
from ...ops.launch_bounds import SHARED_SLOTS, bins_of, bounds_of
from ...ops.pointer_facts import derived

LONGEST_CHUNK = 256
LONGEST_SHARED = launch_bounds.LONGEST_SHARED
SHARED_STARTS = LONGEST_CHUNK + 2
TABLE_ENTRIES = SHARED_STARTS + LONGEST_SHARED
SLAB_ROWS_TIMES_WIDTH = 1 << 23
"""Rows of a slab of the backward times the width: 185 MB of workspace with half-precision operands, 335 MB else."""


@dataclass(frozen=True)
class SlotClass:
    """Chunks of ``min_length`` to ``slots`` elements; with ``multi_chunk``, of 1 to 16, several of one length a bin.

    A ``max_length`` above 0 ends the class before its slots are full.
    """

    slots: int
    min_length: int
    multi_chunk: bool
    max_length: int = 0

    @property
    def longest(self) -> int:
        """Return the length of the longest chunks of the class."""
        return self.max_length or (LONGEST_SHARED if self.multi_chunk else self.slots)


CLASSES = (
    SlotClass(SHARED_SLOTS, 1, True),
    SlotClass(32, LONGEST_SHARED + 1, False),
    SlotClass(64, 33, False),
    SlotClass(128, 65, False),
    SlotClass(256, 129, False),
)
MASKED, FULL = SlotClass(32, LONGEST_SHARED + 1, False, 31), SlotClass(32, 32, False)
"""The class of 32 slots apart: chunks that leave slots to mask, and those that fill their bin, as nearly all do."""


@dataclass(frozen=True)
class ChunkPlan:
    """Order and counts of a batch's chunks.

    Attributes:
        order: ``(N,)``, chunks by length, stable.
        table: ``(274,)``, where each length begins in that order (entries 0 to 257) and, from ``SHARED_STARTS`` on, at
            which bin each length up to 16 begins.
        counts: number of chunks of each length, or bounds that fill at least as many bins.
    """

    order: Tensor
    table: Tensor
    counts: np.ndarray

    def bins(self, slot_class: SlotClass) -> int:
        """Return the number of bins that the chunks of a class fill."""
        return bins_of(self.counts, slot_class.min_length, slot_class.longest)

    def classes(self, among: Sequence[SlotClass] = CLASSES) -> Iterator[tuple[SlotClass, int]]:
        """Yield the slot classes that have chunks, with their number of bins."""
        for slot_class in among:
            bins = self.bins(slot_class)
            if bins:
                yield slot_class, bins


def count_lengths(chunk_ptr_host: Tensor) -> np.ndarray:
    """Return the number of chunks of each length, 0 to 256, from the host's pointers ``(N+1,)``.

    Where bounds of them are declared, those are returned.
    """
    bounds = bounds_of(chunk_ptr_host)
    if bounds is not None:
        return np.array(bounds.counts)

    def count() -> np.ndarray:
        return np.bincount(np.diff(chunk_ptr_host.numpy()), minlength=LONGEST_CHUNK + 1)

    return derived(chunk_ptr_host, "counts of lengths", count)


def plan_chunks(chunk_ptr: Tensor, counts: np.ndarray) -> ChunkPlan:
    """Order the chunks by length; ``counts`` is the result of :func:`count_lengths`."""
    order, table = derived(chunk_ptr, "order by length", lambda: _order_and_table(chunk_ptr))
    return ChunkPlan(order, table, counts)


def _order_and_table(chunk_ptr: Tensor) -> tuple[Tensor, Tensor]:
    # Lengths of 1 to 256 fit a byte, which the device sorts in one pass.
    lengths, order = torch.sort((chunk_ptr.diff() - 1).to(torch.uint8), stable=True)
    steps = torch.arange(LONGEST_CHUNK + 1, device=chunk_ptr.device)
    first = torch.searchsorted(lengths.to(torch.int16), (steps - 1).to(torch.int16))  # chunks shorter than step
    total = first.new_full((1,), order.shape[0])
    short = steps[1 : LONGEST_SHARED + 1]
    per_bin = CLASSES[0].slots // short
    filled = (first[2 : LONGEST_SHARED + 2] - first[1 : LONGEST_SHARED + 1] + per_bin - 1) // per_bin
    starts = filled.cumsum(0) - filled
    return order, torch.cat([first, total, starts])

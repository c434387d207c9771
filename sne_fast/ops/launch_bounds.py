"""Bounds by which launches are sized, so that batches of other contents and the same bounds are launched alike.

Launches on a GPU are sized by the lengths of sets and chunks, which the host knows. Where a batch has bounds, they take
the place of these lengths: programs that find no rows of theirs return at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

SHARED_SLOTS, LONGEST_SHARED = 32, 16
"""Chunks of up to 16 elements share a bin of 32 slots with others of their length."""
LENGTH_GROUPS = ((1, 16), (17, 31), (32, 32), (33, 64), (65, 128), (129, 256))
"""Lengths of chunks, first and last, that backends launch together or apart, but never in parts."""


@dataclass(frozen=True)
class LaunchBounds:
    """Bounds of the sets of a pointer.

    Attributes:
        longest: at least the length of the longest set.
        typical: taken for the mean length, weighted by rows; any number gives right results.
        counts: of the pointer of chunks, numbers of chunks by length from 0 on, so that those of any of
            `LENGTH_GROUPS` fill at least as many bins as the chunks do.
    """

    longest: int
    typical: int
    counts: tuple[int, ...] = ()


_bounds: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def declare_bounds(ptr_host: Tensor, bounds: LaunchBounds) -> None:
    """Declare the bounds of the sets of a pointer on the CPU, whose numbers may change within them."""
    _bounds[ptr_host] = bounds


def bounds_of(ptr_host: Tensor) -> LaunchBounds | None:
    """Return the bounds that were declared of a pointer's sets; None where its lengths are to be measured."""
    found: LaunchBounds | None = _bounds.get(ptr_host)
    return found


def bins_of(counts: np.ndarray | Sequence[int], first: int, last: int) -> int:
    """Return the number of bins that chunks of `first` to `last` elements fill, by the numbers of chunks by length."""
    if last <= LONGEST_SHARED:
        return sum(-(-int(counts[n]) // (SHARED_SLOTS // n)) for n in range(first, last + 1))
    return int(sum(counts[first : last + 1]))

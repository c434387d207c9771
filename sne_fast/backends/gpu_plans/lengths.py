"""Lengths of the sets of a batch, by which launches are sized."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from ...ops.launch_bounds import bounds_of
from ...ops.pointer_facts import derived


@dataclass(frozen=True)
class Lengths:
    """Number of sets of one pointer, length of the longest, and mean length weighted by rows, ``typical``."""

    sets: int
    longest: int
    typical: int

    @classmethod
    def of(cls, ptr_host: Tensor) -> Lengths:
        """Measure the sets of one pointer, unless bounds of them are declared."""
        bounds = bounds_of(ptr_host)
        if bounds is not None:
            return cls(ptr_host.shape[0] - 1, bounds.longest, bounds.typical)
        return derived(ptr_host, "lengths of sets", lambda: cls._of(ptr_host))

    @classmethod
    def _of(cls, ptr_host: Tensor) -> Lengths:
        lengths = np.diff(ptr_host.numpy())
        rows = int(lengths.sum())
        if not rows:
            return cls(len(lengths), 0, 0)
        return cls(len(lengths), int(lengths.max()), int(np.square(lengths, dtype=np.float64).sum() / rows))

    @classmethod
    def of_both(cls, q_ptr_host: Tensor, k_ptr_host: Tensor) -> tuple[Lengths, Lengths]:
        """Measure the sets of queries and of keys, once if they are the same."""
        queries = cls.of(q_ptr_host)
        return queries, queries if k_ptr_host is q_ptr_host else cls.of(k_ptr_host)

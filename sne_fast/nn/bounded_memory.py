"""Bounded temporaries where no gradient is wanted: large inputs go through in runs of rows, or of networks.

A pass with gradients keeps every intermediate anyway. Without gradients, one tensor of (rows, width) per elementary
operation would dominate memory, and on a CPU each costs more in page faults than in arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

# 16,384 rows of 64 floats are 4 MB, inside a core's share of cache; a GPU needs larger runs to be filled.
ROWS = {"cpu": 1 << 14, "cuda": 1 << 21}
WEIGHTS = {"cpu": 1 << 20, "cuda": 1 << 26}


def _limit(limits: dict[str, int], device: torch.device) -> int | None:
    """Return how much goes through at once; None for everything."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    return limits.get(device.type)


def row_runs(rows: int, device: torch.device) -> Iterator[slice]:
    """Yield the runs of rows to compute one after another; a single run where gradients are wanted."""
    limit = _limit(ROWS, device)
    if limit is None or rows <= limit:
        yield slice(0, rows)
        return
    for start in range(0, rows, limit):
        yield slice(start, min(rows, start + limit))


def is_large(rows: int, device: torch.device) -> bool:
    """Return whether so many rows go through in several runs."""
    limit = _limit(ROWS, device)
    return limit is not None and rows > limit


def set_runs(ptr_host: Tensor, device: torch.device) -> list[tuple[slice, slice]] | None:
    """Return runs of sets to compute one after another, each with its rows; None for all at once.

    A set that is larger than a run is alone in its own.

    Args:
        ptr_host: ``(S+1,)`` pointers of sets, on the CPU.
        device: of the computation.
    """
    limit = _limit(ROWS, device)
    if limit is None or int(ptr_host[-1]) <= limit:
        return None
    return [(run, slice(int(ptr_host[run.start]), int(ptr_host[run.stop]))) for run in _runs(ptr_host, limit)]


def _runs(ptr: Tensor, limit: int) -> list[slice]:
    """Return runs of sets of at most `limit` rows, or of one larger set."""
    runs, first = [], 0
    while first < ptr.shape[0] - 1:
        fitting = int(torch.searchsorted(ptr, ptr[first] + limit, right=True)) - 1
        last = min(ptr.shape[0] - 1, max(first + 1, fitting))
        runs.append(slice(first, last))
        first = last
    return runs


def joined(function: Callable[[slice], Tensor], runs: Sequence[slice]) -> Tensor:
    """Concatenate the rows that `function` returns for each run, in a new tensor."""
    out: Tensor | None = None
    for run in runs:
        part = function(run)
        if out is None:
            out = part.new_empty((runs[-1].stop, *part.shape[1:]))
        out[run] = part
    assert out is not None
    return out


def fits_at_once(weights: int, device: torch.device) -> bool:
    """Return whether a batch of so many weights goes through in one run; always where gradients are wanted."""
    limit = _limit(WEIGHTS, device)
    return limit is None or weights <= limit


def network_runs(starts: Tensor, device: torch.device) -> list[slice]:
    """Return runs of networks, whose first weights lie at `starts (B+1,)`; one run where gradients are wanted."""
    limit, networks = _limit(WEIGHTS, device), starts.shape[0] - 1
    if limit is None or networks < 2 or int(starts[-1]) <= limit:
        return [slice(0, networks)]
    return _runs(starts, limit)

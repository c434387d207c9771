"""Bounded temporaries where no gradient is wanted: large inputs go through in runs of rows, or of networks.

A pass with gradients keeps every intermediate anyway. Without, a tensor of (rows, width) per elementary operation would
be all that grows, and on a CPU each of them costs more in page faults than in arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

# Of a GPU larger ones, so that a run still fills it. 16,384 rows of 64 floats are 4 MB, inside a core's share of cache.
ROWS = {"cpu": 1 << 14, "cuda": 1 << 21}
WEIGHTS = {"cpu": 1 << 20, "cuda": 1 << 26}


def _most(limits: dict[str, int], device: torch.device) -> int | None:
    """How much goes through at once; None for everything."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    return limits.get(device.type)


def row_runs(rows: int, device: torch.device) -> Iterator[slice]:
    """Runs of rows to be done one after another: a single one where gradients are wanted."""
    most = _most(ROWS, device)
    if most is None or rows <= most:
        yield slice(0, rows)
        return
    for start in range(0, rows, most):
        yield slice(start, min(rows, start + most))


def joined(function: Callable[[slice], Tensor], runs: Sequence[slice], out: Tensor | None = None) -> Tensor:
    """The rows that `function` gives for each run, one after another; in `out` if it has their dtype."""
    for run in runs:
        part = function(run)
        if out is None or out.dtype != part.dtype:
            out = part.new_empty((runs[-1].stop, *part.shape[1:]))
        out[run] = part
    assert out is not None
    return out


def fits_at_once(weights: int, device: torch.device) -> bool:
    """Whether a batch of so many weights goes through in one run; always where gradients are wanted."""
    most = _most(WEIGHTS, device)
    return most is None or weights <= most


def network_runs(starts: Tensor, device: torch.device) -> list[slice]:
    """Runs of networks whose first weights lie at `starts (B+1,)`, on the CPU: one run where gradients are wanted."""
    most, networks = _most(WEIGHTS, device), starts.shape[0] - 1
    if most is None or networks < 2 or int(starts[-1]) <= most:
        return [slice(0, networks)]
    runs, first = [], 0
    while first < networks:
        fitting = int(torch.searchsorted(starts, starts[first] + most, right=True)) - 1
        last = min(networks, max(first + 1, fitting))
        runs.append(slice(first, last))
        first = last
    return runs

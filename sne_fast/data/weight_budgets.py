"""Networks shared out: batches by a budget of weights, shards of a batch, parts of a data set."""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Iterator, Sequence

import torch
from torch import Tensor

from .batch import WeightBatch

SEED_STRIDE = 1_000_003
"""Distance between the random draws of neighbouring seeds, so that they share no step or epoch."""


def network_sizes(batch: WeightBatch) -> Tensor:
    """Return the number of weights of each network, `(B,)` int64 on the CPU."""
    return batch.network_sizes


def batches_by_weights(
    sizes: Tensor, budget: int, generator: torch.Generator | None = None, *, most: int | None = None
) -> Iterator[list[int]]:
    """Yield batches of networks of at most `budget` weights; a network larger than that is a batch of its own.

    Args:
        sizes: `(B,)` int64, weights of each network.
        budget: weights per batch.
        generator: shuffles the networks; in their order without it.
        most: the most networks of a batch; None is any number.
    """
    order = torch.arange(len(sizes)) if generator is None else torch.randperm(len(sizes), generator=generator)
    rows: list[int] = []
    held, weights = 0, sizes.tolist()
    for row in order.tolist():
        size = weights[row]
        if rows and (held + size > budget or len(rows) == most):
            yield rows
            rows, held = [], 0
        rows.append(row)
        held += size
    if rows:
        yield rows


def shards_by_weights(sizes: Tensor, rows: Sequence[int], shards: int) -> list[list[int]]:
    """Deal the networks of a batch to processes so that the largest share of weights is small.

    Greedy, the largest network first, always to the share that holds least: at most 4/3 of the best possible (Graham
    1969).

    Args:
        sizes: `(B,)` int64, weights of all networks.
        rows: the batch, indices into `sizes`.
        shards: number of processes.

    Returns:
        `shards` lists of places in `rows`, each in ascending order; some are empty where there are fewer networks.
    """
    held = [(0, shard) for shard in range(shards)]  # a heap
    dealt: list[list[int]] = [[] for _ in range(shards)]
    weights = sizes[torch.tensor(rows, dtype=torch.int64)].tolist()
    for place in sorted(range(len(rows)), key=lambda p: (-weights[p], p)):
        load, least = held[0]
        heapq.heapreplace(held, (load + weights[place], least))
        dealt[least].append(place)
    return [sorted(places) for places in dealt]


def stratified_split(groups: Sequence[Hashable], fractions: Sequence[float], seed: int = 0) -> list[list[int]]:
    """Split positions 0..n-1 into parts of the given shares, each group being shared out in those shares too.

    Args:
        groups: the group of each position, such as its architecture.
        fractions: shares of the parts, summing to 1.
        seed: of the shuffle within each group.

    Returns:
        One sorted list of positions per share; every position is in exactly one.

    Raises:
        ValueError: shares that are negative or do not sum to 1.
    """
    if min(fractions) < 0 or abs(sum(fractions) - 1) > 1e-9:
        raise ValueError(f"stratified_split: fractions must be at least 0 and sum to 1, got {list(fractions)}")
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(len(groups), generator=generator).tolist()
    by_group: dict[Hashable, list[int]] = {}
    for i in shuffled:
        by_group.setdefault(groups[i], []).append(i)
    parts: list[list[int]] = [[] for _ in fractions]
    bounds = [sum(fractions[: k + 1]) for k in range(len(fractions))]
    # A position's place inside its shuffled group, as a share of the group, says which part it falls in.
    for offset, group in enumerate(by_group.values()):
        shift = (offset * 0.618034) % 1.0  # so that rounding does not favour the same part in every group
        for place, i in enumerate(group):
            share = (place + shift) / len(group) % 1.0
            parts[next((k for k, bound in enumerate(bounds) if share < bound - 1e-12), len(bounds) - 1)].append(i)
    return [sorted(part) for part in parts]

"""The plan of a training: which networks each step takes, in which parts, and which process takes which part."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor

from ..data.weight_budgets import SEED_STRIDE, batches_by_weights, shards_by_weights
from .settings import FitSettings
from .streams import NetworkStream

WINDOW = 16
"""Steps whose parts are taken from one stretch of the order of an epoch, and sorted by weights among them."""

SPLIT = 1.5
"""A network is split by layers where a process would have this many times the mean of all processes."""
LEAST_BUSY = 0.5
"""Share of the time in which processes must have work for `fit` not to warn."""

Part = list[int]
"""Positions of networks that one process encodes at once."""


def cut_parts(sizes: Tensor, order: Sequence[int], budget: int) -> list[Part]:
    """Return parts of at most `budget` weights, filled in the given order; a larger network is a part of its own.

    Args:
        sizes: `(n,)` int64, weights of all networks.
        order: positions of networks, all or some of them.
        budget: weights per part.
    """
    cut = batches_by_weights(sizes[torch.tensor(order, dtype=torch.int64)], budget)
    return [[order[place] for place in places] for places in cut]


def balanced_steps(
    parts: Sequence[Part], weights: Sequence[int], count: int, generator: torch.Generator
) -> list[list[Part]]:
    """Return steps of `count` parts of about equal weights, since processes wait for the one with the largest.

    A stretch of the parts of `WINDOW` steps is sorted by weights and cut into steps, which are then shuffled. Steps of
    one part stay in the given order.

    Args:
        parts: of an epoch, in random order.
        weights: of each network.
        count: parts per step; the last stretch may leave fewer to one of its steps.
        generator: shuffles the steps of a stretch.
    """
    if count == 1:
        return [[part] for part in parts]
    steps: list[list[Part]] = []
    for start in range(0, len(parts), WINDOW * count):
        stretch = sorted(parts[start : start + WINDOW * count], key=lambda rows: -sum(weights[row] for row in rows))
        cuts = range(0, len(stretch), count)
        shuffled = torch.randperm(len(cuts), generator=generator).tolist()
        steps += [stretch[cuts[k] : cuts[k] + count] for k in shuffled]
    return steps


class Plan:
    """The steps of every epoch, and the share of each process in them.

    A step takes `settings.accumulate` parts for each process, so it depends on the number of processes, but only as
    the product of the two: two processes do what one does with twice `accumulate`, up to rounding.

    Args:
        networks: the training networks.
        settings: of the training.
        processes: the number of processes.

    Attributes:
        parts: parts of a step.
        steps: number of steps of all epochs.
    """

    def __init__(self, networks: NetworkStream, settings: FitSettings, processes: int = 1) -> None:
        self.networks, self.settings, self.processes = networks, settings, processes
        self.sizes = networks.sizes
        self.weights: list[int] = self.sizes.tolist()
        self.parts = processes * settings.accumulate
        self.steps = 0
        self._states: list[Tensor] = []  # of the generator at the start of each epoch
        self._planned: tuple[int, list[list[Part]]] | None = None
        generator = torch.Generator().manual_seed(settings.seed)
        for _ in range(settings.epochs):
            self._states.append(generator.get_state())
            cut = batches_by_weights(self.sizes[torch.tensor(networks.order(generator))], settings.batch_weights)
            self.steps += -(-sum(1 for _ in cut) // self.parts)

    def epoch(self, number: int) -> list[list[Part]]:
        """Return the steps of an epoch, each a list of parts."""
        if self._planned is None or self._planned[0] != number:
            generator = torch.Generator()
            generator.set_state(self._states[number])
            found = cut_parts(self.sizes, self.networks.order(generator), self.settings.batch_weights)
            # Epochs count down from the seed where the draws of steps count up, so that no two share a generator.
            generator.manual_seed((self.settings.seed * SEED_STRIDE - 1 - number) % 2**63)
            self._planned = number, balanced_steps(found, self.weights, self.parts, generator)
        return self._planned[1]

    def shares(self, step: Sequence[Part]) -> list[list[int]]:
        """Return for each process the places of its whole parts in a step, so that the largest share is small."""
        split = self.split_places(step)
        whole = [place for place in range(len(step)) if place not in split]
        loads = torch.tensor([self.load(part) for part in step])
        dealt = shards_by_weights(loads, whole, self.processes)
        return [[whole[k] for k in places] for places in dealt]

    def split_places(self, step: Sequence[Part]) -> list[int]:
        """Return the places of the networks of a step that all processes share by layers.

        These are the largest networks, as long as they are larger than a part may be and the process with the most
        weights would have more than `SPLIT` times the mean.
        """
        if self.processes == 1:
            return []
        loads = [self.load(part) for part in step]
        order = sorted(range(len(step)), key=lambda place: (-loads[place], place))
        mean = sum(loads) / self.processes
        split: list[int] = []
        for k, place in enumerate(order):
            if loads[place] <= self.settings.batch_weights:
                break
            rest = torch.tensor([loads[p] for p in order[k:]])
            dealt = shards_by_weights(rest, range(len(rest)), self.processes)
            if max(int(rest[places].sum()) for places in dealt) <= SPLIT * mean:
                break
            split.append(place)
        return split

    def busy_share(self, epoch: int) -> float:
        """Return the share of the time of an epoch in which processes have work, if time goes by weights.

        Networks that are split count as if every process had layers of them to its fill.
        """
        return self._loads(epoch)[0]

    def check_balance(self) -> None:
        """Warn if the processes will wait for each other most of the time of the first epoch.

        Warns:
            UserWarning: the message says what to change.
        """
        share, empty = self._loads(0) if self.processes > 1 else (1.0, 0)
        if share >= LEAST_BUSY:
            return
        steps = self.epoch(0)
        most = max(len(step) for step in steps)
        without = f", and {empty} of {len(steps)} steps leave one without networks" if empty else ""
        if most < self.parts:
            remedy = f"use at most {most} processes, since all networks make {most} parts of {self._budget} weights"
        else:
            now = f"accumulate ({self.settings.accumulate}) or batch_weights ({self._budget})"
            remedy = f"raise {now}, or use fewer processes"
        warnings.warn(
            f"fit: {self.processes} processes will have work in {share:.0%} of the time{without}; {remedy}",
            stacklevel=3,
        )

    def _loads(self, epoch: int) -> tuple[float, int]:
        """Return the busy share of an epoch, and in how many steps a process has no networks."""
        work, longest, empty = 0, 0.0, 0
        for step in self.epoch(epoch):
            loads = [sum(self.load(step[place]) for place in places) for places in self.shares(step)]
            total = sum(self.load(part) for part in step)
            work, longest = work + total, longest + max(*loads, total / self.processes)
            empty += min(loads) == 0 and total == sum(loads)
        return work / (self.processes * longest), empty

    @property
    def _budget(self) -> int:
        return self.settings.batch_weights

    def load(self, rows: Sequence[int]) -> int:
        """Return the number of weights of some networks."""
        return sum(self.weights[row] for row in rows)

    @staticmethod
    def networks_of(step: Sequence[Part]) -> list[int]:
        """Return the positions of all networks of a step."""
        return list(chain.from_iterable(step))

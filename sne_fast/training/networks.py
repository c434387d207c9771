"""The networks that a training reads, in memory or elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from ..data.batch import WeightBatch
from .fingerprint import of_batch


@runtime_checkable
class NetworkStream(Protocol):
    """Networks with their targets, of which those are read that are asked for.

    `fit` knows the numbers of weights and the targets of all networks, plans each epoch with them, and asks for the
    networks of one part of a step after another. So a training can stop after any step and resume exactly.
    :class:`sne_fast.zoo.ZooDataset` is one.
    """

    @property
    def sizes(self) -> Tensor:
        """Number of weights of each network, `(n,)` int64 on the CPU."""

    @property
    def targets(self) -> Tensor:
        """Targets of all networks, `(n, t)`, or classes `(n,)`."""

    def order(self, generator: torch.Generator) -> list[int]:
        """Return all positions in a random order, in which networks that are cheap to read together stand close."""

    def parts(self, rows: Iterable[Sequence[int]]) -> Iterator[WeightBatch]:
        """Read the networks at some positions, again and again, one packed batch for each sequence of positions."""

    def network_name(self, row: int) -> str:
        """Name a network as messages do."""

    def fingerprint(self) -> Mapping[str, Any]:
        """Return "size", a few words, and "sha256", a digest of the networks, as plain values."""


class PackedNetworks:
    """Networks that are held in memory as one batch.

    Args:
        batch: the networks.
        targets: of each.
    """

    def __init__(self, batch: WeightBatch, targets: Tensor) -> None:
        self.batch, self.targets, self.sizes = batch, targets, batch.network_sizes

    def order(self, generator: torch.Generator) -> list[int]:
        """Return all positions in a random order."""
        return torch.randperm(len(self.batch), generator=generator).tolist()

    def parts(self, rows: Iterable[Sequence[int]]) -> Iterator[WeightBatch]:
        """Yield the networks at some positions, one batch for each sequence of positions."""
        return (self.batch[list(chosen)] for chosen in rows)

    def network_name(self, row: int) -> str:
        """Name a network as messages do."""
        return self.batch.network_name(row)

    def fingerprint(self) -> Mapping[str, Any]:
        """Return the size and the digest of the networks."""
        return of_batch(self.batch)

"""What a training asks of the networks that it reads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from ..data.batch import WeightBatch


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
        """Read networks: yield one packed batch, on the CPU, for each sequence of positions."""

    def network_name(self, row: int) -> str:
        """Name a network as messages do."""

    def fingerprint(self) -> Mapping[str, Any]:
        """Return "size", a few words, and "sha256", a digest of the networks, as plain values."""

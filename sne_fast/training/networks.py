"""The networks that a training reads, in memory or elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..data.batch import WeightBatch
from ..data.weight_budgets import batches_by_weights
from ..nn.predictor import Predictor
from .arguments import check_packed
from .distributed import World
from .fingerprint import of_batch
from .streams import NetworkStream

READ_WEIGHTS = 100_000
"""Largest number of weights in a batch of networks that are only read or encoded."""


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


class PreparedNetworks:
    """Networks of a stream, checked and prepared for a predictor as they are read.

    Args:
        stream: the networks.
        targets: of each, as `check_targets` returns them.
        predictor: what they are prepared for.
    """

    def __init__(self, stream: NetworkStream, targets: Tensor, predictor: Predictor) -> None:
        self.stream, self.targets, self.predictor, self.sizes = stream, targets, predictor, stream.sizes
        self.order, self.network_name, self.fingerprint = stream.order, stream.network_name, stream.fingerprint

    def parts(self, rows: Iterable[Sequence[int]]) -> Iterator[WeightBatch]:
        """Read networks, one batch for each sequence of positions.

        Raises:
            TypeError: the stream gives something else than batches.
            ValueError: networks that are packed otherwise than the predictor asks for, or have other numbers of weights
                than the stream says, or fewer batches than were asked for.
        """
        listed = [list(chosen) for chosen in rows]
        read = iter(self.stream.parts(listed))
        for k, chosen in enumerate(listed):
            part = next(read, None)
            if part is None:
                raise ValueError(f"fit: the stream must give a batch for each of {len(listed)} parts, got {k}")
            check_packed(part, self.predictor, "fit: batch")
            if not torch.equal(part.network_sizes, self.sizes[chosen]):
                got, wanted = part.network_sizes.tolist(), self.sizes[chosen].tolist()
                row = next((k for k in range(len(chosen)) if k >= len(got) or got[k] != wanted[k]), 0)
                raise ValueError(
                    f"fit: {self.network_name(chosen[row])} must have the {wanted[row]} weights that the stream says, "
                    f"got {got[row] if row < len(got) else 'no network'}"
                )
            yield self.predictor.prepare(part.detach())


def stream_of(networks: Any, what: str) -> NetworkStream | None:
    """Return a stream, that of a `DataLoader` if it has one; None for anything else.

    Args:
        networks: any value.
        what: its name in messages.

    Raises:
        ValueError: a stream without networks.
    """
    inner = getattr(networks, "dataset", None)
    stream = inner if isinstance(inner, NetworkStream) else networks
    if not isinstance(stream, NetworkStream):
        return None
    if not len(stream.sizes):
        raise ValueError(f"{what} must have at least one network, got an empty stream")
    return stream


def check_stream(batch: Any, targets: Any) -> NetworkStream | None:
    """Return the stream that `fit` is to train on, as `stream_of` does; None for a batch.

    Raises:
        TypeError: a batch without targets, or an iterable that is no stream.
        ValueError: a stream without networks.
    """
    stream = stream_of(batch, "fit: batch")
    if stream is not None:
        return stream
    if isinstance(batch, Iterable) and not isinstance(batch, WeightBatch | list | tuple | Mapping | str):
        raise TypeError(
            f"fit: batch must be a WeightBatch or a NetworkStream, got {type(batch).__name__}, which does not tell "
            "sizes and targets of its networks beforehand; write them to a zoo and use sne_fast.zoo.ZooDataset"
        )
    if targets is None and isinstance(batch, WeightBatch):
        raise TypeError("fit: targets must be given with a WeightBatch, got None")
    return None


def fit_inputs(predictor: Predictor, networks: NetworkStream, world: World) -> None:
    """Fit the input scale, and the mean and spread of statistics, to networks of which each process reads its share.

    Args:
        predictor: the predictor.
        networks: the training networks.
        world: the processes.
    """
    if not predictor.fits_inputs:
        return
    if isinstance(networks, PackedNetworks):
        predictor.set_inputs(networks.batch)
        return
    cut = list(batches_by_weights(networks.sizes, READ_WEIGHTS))
    own = cut[world.rank :: world.size]
    batches = networks.parts(own) if own else (batch[0:0] for batch in networks.parts([[0]]))
    total = sum((predictor.input_sums(batch) for batch in batches), torch.zeros((), dtype=torch.float64))
    predictor.set_input_sums(world.sum_tensor(total, predictor.target_mean.device))

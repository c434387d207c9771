"""The networks of a zoo for training, packed when they are asked for, here or in the worker processes of a loader."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ..data.batch import WeightBatch
from ..data.packing import pack
from ..data.weight_budgets import SEED_STRIDE, batches_by_weights
from ..training.digests import of_values
from .table import Zoo

Item = tuple[WeightBatch, Tensor]


BUFFER = 4096
"""Networks among which a shuffle draws, besides that of shards."""
_SAMPLED = 1 << 22  # weights of networks that are read for a fingerprint


class ZooDataset(Dataset[Item]):
    """Dataset of the networks of a zoo, packed, with their targets; also the stream that `sne_fast.training.fit` takes.

    Item i is a `WeightBatch` of one network and its targets `(t,)` in the default floating dtype. A `DataLoader` asks
    for a whole batch at once, which is packed in one call; `collate` takes items and batches.

    As a stream it is shuffled by shard and inside a buffer: the shards of a zoo come in random order, and networks are
    drawn from stretches of shards that hold at least `buffer` networks, so that a step reads from few shards. The
    buffer holds positions, not networks: those of one part are in memory at a time.

    Args:
        zoo: any zoo; its networks are read when they are asked for, in the worker process if there is one.
        targets: names of columns of numbers, which must not lack a value, one name or several; or a tensor of targets
            `(n, t)`, or of classes `(n,)`.
        options: keyword arguments of `sne_fast.pack`; `pack_options(encoder)` gives those of an encoder.
        keep: pack all networks once, now, and keep them in memory; batches are then selected from those.
        buffer: networks of a stretch, at least.
        workers: processes that read and pack ahead as a stream; 0 reads when a part is needed.

    Attributes:
        targets: those of all networks.

    Raises:
        KeyError: no such column.
        ValueError: a target that is not a number for every network, or not one row of a tensor for each.

    Example:
        >>> data = ZooDataset(zoo, "test_accuracy", pack_options(encoder))
        >>> batch, targets = data[0]
        >>> len(batch), targets.shape
        (1, torch.Size([1]))
    """

    def __init__(
        self,
        zoo: Zoo,
        targets: str | Sequence[str] | Tensor = (),
        options: Mapping[str, Any] | None = None,
        *,
        keep: bool = False,
        buffer: int = BUFFER,
        workers: int = 0,
    ) -> None:
        self.zoo, self.buffer, self.workers = zoo, buffer, workers
        self.options = dict(options or {})
        self.targets = targets if isinstance(targets, Tensor) else self._columns(targets)
        if len(self.targets) != len(zoo):
            raise ValueError(f"ZooDataset: targets must have one row per network ({len(zoo)}), got {len(self.targets)}")
        self._packed = pack(zoo, **self.options).detach() if keep and len(zoo) else None  # type: ignore[arg-type]

    def _columns(self, targets: str | Sequence[str]) -> Tensor:
        """Return columns of numbers as targets `(n, t)`."""
        names = [targets] if isinstance(targets, str) else list(targets)
        columns = []
        for name in names:
            values = self.zoo.column(name) if len(self.zoo) else np.zeros(0)
            if values.dtype == object or (values != values).any():
                raise ValueError(f"ZooDataset: the target {name!r} must be a number for every network")
            columns.append(torch.from_numpy(values))
        goal = torch.stack(columns, 1) if columns else torch.zeros(len(self.zoo), 0)
        return goal.to(torch.get_default_dtype())

    def __len__(self) -> int:
        """Return the number of networks."""
        return len(self.zoo)

    def __getitem__(self, i: int) -> Item:
        """Return a network as a batch of one, and its targets `(t,)`."""
        return self.batch([i])[0], self.targets[i]

    def __getitems__(self, rows: Sequence[int]) -> Item:
        """Return some networks as one batch, and their targets `(B, t)`."""
        return self.batch(rows), self.targets[list(rows)]

    def batch(self, rows: Sequence[int]) -> WeightBatch:
        """Return some networks as one batch."""
        if self._packed is not None:
            return self._packed[list(rows)]
        return pack([self.zoo[i] for i in rows], **self.options).detach()

    def order(self, generator: torch.Generator) -> list[int]:
        """Return all positions, shuffled by shard and inside stretches of at least `buffer` networks."""
        shards = int(self._shard.max()) + 1 if len(self) else 0
        place = torch.randperm(shards, generator=generator)[self._shard]  # of each network's shard in the order
        by_shard = torch.argsort(place, stable=True)
        counts = torch.bincount(place, minlength=shards).tolist()
        shuffled, first, held = [], 0, 0
        for k, count in enumerate(counts):
            held += count
            if held >= self.buffer or k == len(counts) - 1:
                stretch = by_shard[first : first + held]
                shuffled.append(stretch[torch.randperm(held, generator=generator)])
                first, held = first + held, 0
        return torch.cat(shuffled).tolist() if shuffled else []

    @functools.cached_property
    def sizes(self) -> Tensor:
        """Number of weights of each network, `(n,)` int64."""
        return self.zoo.sizes

    @functools.cached_property
    def _shard(self) -> Tensor:
        """Number of the shard of each network, `(n,)` int64."""
        shards = self.zoo.shards
        numbers = {name: k for k, name in enumerate(dict.fromkeys(shards))}
        return torch.tensor([numbers[name] for name in shards], dtype=torch.int64)

    def parts(self, rows: Iterable[Sequence[int]]) -> Iterator[WeightBatch]:
        """Read networks: yield one batch for each sequence of positions."""
        if not self.workers or self._packed is not None:
            return (self.batch(chosen) for chosen in rows)
        # A generator of its own, so that torch's stays where it is.
        loader: DataLoader[Item] = DataLoader(
            self,
            batch_sampler=[list(chosen) for chosen in rows],
            collate_fn=self.collate,
            num_workers=self.workers,
            generator=torch.Generator(),
        )
        return (batch for batch, _ in loader)

    def network_name(self, row: int) -> str:
        """Name a network as messages do."""
        return f"network {row} ({self.zoo[row].name!r})"

    def fingerprint(self) -> dict[str, Any]:
        """Return "size", with `buffer`, and "sha256", a digest of names, sizes, shards, options and some weights.

        The weights are those of networks spread evenly over the zoo, the first one and so many that they have about
        four million weights. So other weights under the same names and sizes may go unnoticed in a large zoo.
        """
        total, count = int(self.sizes.sum()), len(self)
        read = max(1, min(count, _SAMPLED * count // max(total, 1)))
        sample = [k * count // read for k in range(read)] if count else []
        options = {name: str(value) for name, value in self.options.items()}
        read_weights = [list(self.zoo.state_dict(i).values()) for i in sample]
        names = self.zoo.column("name").tolist()
        return {
            "size": f"{count} networks of {total} weights, shuffled in a buffer of {self.buffer}, read from disk",
            "sha256": of_values([names, self.sizes, self._shard, options, read_weights]),
        }

    @staticmethod
    def collate(items: Item | Sequence[Item]) -> Item:
        """Return items, or a batch that `__getitems__` returned, as `(WeightBatch, targets (B, t))`."""
        if isinstance(items, tuple):
            return items
        return WeightBatch.cat([batch for batch, _ in items]), torch.stack([target for _, target in items])


class WeightBudgetSampler(Sampler[list[int]]):
    """Sampler of batches with at most `budget` weights each; a larger network is a batch of its own.

    Args:
        sizes: number of weights of each network, `(n,)`, such as `zoo.sizes`.
        budget: largest number of weights in a batch, at least 1.
        shuffle: shuffle the networks in every epoch, by `seed` and the number of the epoch. Every iteration is an
            epoch, counted from 0; `set_epoch` sets the next one, so that a resumed run continues in the same order.
        seed: of the shuffling.

    Example:
        >>> [len(rows) for rows in WeightBudgetSampler(torch.tensor([40, 30, 90, 20]), 100, shuffle=False)]
        [2, 1, 1]
    """

    def __init__(self, sizes: Tensor, budget: int, *, shuffle: bool = True, seed: int = 0) -> None:
        if budget < 1:
            raise ValueError(f"WeightBudgetSampler: budget must be at least 1, got {budget}")
        self.sizes, self.budget, self.shuffle, self.seed, self.epoch = sizes, budget, shuffle, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Set the number of the epoch that the next iteration runs through."""
        self.epoch = epoch

    def _batches(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed * SEED_STRIDE + self.epoch) if self.shuffle else None
        return batches_by_weights(self.sizes, self.budget, generator)

    def __iter__(self) -> Iterator[list[int]]:
        """Return the batches of the next epoch, as lists of positions."""
        batches = self._batches()
        self.epoch += 1
        return batches

    def __len__(self) -> int:
        """Return the number of batches of the next epoch."""
        return sum(1 for _ in self._batches())


def pack_options(encoder: Any) -> dict[str, Any]:
    """Return the arguments of `sne_fast.pack` that give batches for an encoder or a predictor, on the CPU."""
    return {**encoder.pack_options, "device": "cpu"}


def zoo_loader(
    zoo: Zoo,
    targets: str | Sequence[str] | Tensor,
    *,
    encoder: Any = None,
    options: Mapping[str, Any] | None = None,
    budget: int = 20_000,
    shuffle: bool = True,
    seed: int = 0,
    workers: int = 0,
    keep: bool = False,
    pin_memory: bool = False,
) -> DataLoader[Item]:
    """Return a `DataLoader` of `(WeightBatch, targets (B, t))` over a zoo, with batches cut by a budget of weights.

    Args:
        zoo: any zoo.
        targets: as in :class:`ZooDataset`.
        encoder: the encoder or predictor to pack for; a predictor prepares batches further when it is called.
        options: keyword arguments of `sne_fast.pack`, besides or instead of those of the encoder.
        budget: largest number of weights in a batch; a network with more is a batch of its own.
        shuffle: shuffle the networks in every epoch.
        seed: of the shuffling.
        workers: number of processes that read and pack.
        keep: pack once and keep in memory (see :class:`ZooDataset`); best with `workers=0`.
        pin_memory: copy batches to pinned memory, as in `torch.utils.data.DataLoader`.

    Example:
        >>> for batch, accuracy in zoo_loader(zoo, "test_accuracy", encoder=predictor):
        ...     loss = (predictor(batch) - accuracy).square().mean()
    """
    merged = {**(pack_options(encoder) if encoder is not None else {}), **(options or {})}
    data = ZooDataset(zoo, targets, merged, keep=keep, workers=workers)
    sampler = WeightBudgetSampler(zoo.sizes, budget, shuffle=shuffle, seed=seed)
    return DataLoader(data, batch_sampler=sampler, collate_fn=data.collate, num_workers=workers, pin_memory=pin_memory)

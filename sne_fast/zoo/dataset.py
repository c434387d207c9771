"""Batches of a zoo for training, cut by a budget of weights and packed in the worker processes of a `DataLoader`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ..data.batch import WeightBatch
from ..data.packing import pack
from ..data.weight_budgets import SEED_STRIDE, batches_by_weights
from .table import Zoo

Item = tuple[WeightBatch, Tensor]


class ZooDataset(Dataset[Item]):
    """Dataset of the networks of a zoo, packed, with their targets.

    Item i is a `WeightBatch` of one network and its targets `(t,)` in the default floating dtype. A `DataLoader` asks
    for a whole batch at once, which is packed in one call; `collate` takes items and batches.

    Args:
        zoo: any zoo; its networks are read when they are asked for, in the worker process if there is one.
        targets: names of columns of numbers, which must not lack a value; one name or several.
        options: keyword arguments of `sne_fast.pack`; `pack_options(encoder)` gives those of an encoder.
        keep: pack all networks once, now, and keep them in memory; batches are then selected from those.

    Raises:
        KeyError: no such column.
        ValueError: a target that is not a number for every network.

    Example:
        >>> data = ZooDataset(zoo, "test_accuracy", pack_options(encoder))
        >>> batch, targets = data[0]
        >>> len(batch), targets.shape
        (1, torch.Size([1]))
    """

    def __init__(
        self,
        zoo: Zoo,
        targets: str | Sequence[str] = (),
        options: Mapping[str, Any] | None = None,
        *,
        keep: bool = False,
    ) -> None:
        self.zoo = zoo
        self.options = dict(options or {})
        names = [targets] if isinstance(targets, str) else list(targets)
        columns = []
        for name in names:
            values = zoo.column(name)
            if values.dtype == object or (values != values).any():
                raise ValueError(f"ZooDataset: the target {name!r} must be a number for every network")
            columns.append(torch.from_numpy(values))
        goal = torch.stack(columns, 1) if columns else torch.zeros(len(zoo), 0)
        self.targets = goal.to(torch.get_default_dtype())
        self._packed = pack(zoo, **self.options).detach() if keep and len(zoo) else None  # type: ignore[arg-type]

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
    targets: str | Sequence[str],
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
        targets: names of columns of numbers; one name or several.
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
    data = ZooDataset(zoo, targets, merged, keep=keep)
    sampler = WeightBudgetSampler(zoo.sizes, budget, shuffle=shuffle, seed=seed)
    return DataLoader(data, batch_sampler=sampler, collate_fn=data.collate, num_workers=workers, pin_memory=pin_memory)

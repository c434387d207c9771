"""A few small networks, a predictor of them, and targets, for tests of `fit`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sne_fast import SNE, Predictor, WeightBatch
from sne_fast.training import FitSettings

SETTINGS = FitSettings(epochs=2, batch_weights=80)


def networks(count: int = 6) -> list[dict[str, Tensor]]:
    """Return networks of 35 weights, two of which fill a batch of `SETTINGS`."""
    generator = torch.Generator().manual_seed(0)
    return [
        {"a.weight": torch.randn(5, 4, generator=generator), "b.weight": torch.randn(3, 5, generator=generator)}
        for _ in range(count)
    ]


def make(chunk_size: int = 16, hidden: tuple[int, ...] = (16,), encoder: Any = None, **options: Any) -> Predictor:
    """Return a predictor that starts with the same parameters every time."""
    torch.manual_seed(0)
    return Predictor(SNE(hidden_dim=32, chunk_size=chunk_size, **(encoder or {})), hidden_features=hidden, **options)


def packed(predictor: Predictor | None = None, count: int = 6) -> WeightBatch:
    """Return the networks, packed for a predictor, by default for that of `make`."""
    return (predictor or make()).encoder.pack(networks(count))


def goals(count: int = 6) -> Tensor:
    """Return targets in [0, 1], `(count, 1)`."""
    return torch.rand(count, 1, generator=torch.Generator().manual_seed(1))


def same(one: Predictor, other: Predictor) -> bool:
    """Return True if all parameters and buffers have the same bits."""
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))

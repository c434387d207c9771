"""Trains a small predictor on a fixed task: run by `torchrun` and, alone, for the result to compare with."""

from __future__ import annotations

import dataclasses
import sys

import torch

from sne_fast import SNE, Predictor
from sne_fast.data.batch import WeightBatch
from sne_fast.training import FitSettings, fit
from sne_fast.training.distributed import processes


def jitter(batch: WeightBatch, rows: object, generator: torch.Generator) -> WeightBatch:
    """Add noise: no symmetry, but random and the same on every process, as these tests need."""
    noise = torch.randn(batch.values.shape, generator=generator, dtype=batch.values.dtype)
    return dataclasses.replace(batch, values=batch.values + 0.01 * noise)


def train(epochs: int = 4, accumulate: int = 1) -> tuple[Predictor, list[float]]:
    """Train twenty steps on networks of very different sizes, in float64."""
    generator = torch.Generator().manual_seed(0)
    networks = [
        {"0.weight": torch.randn(4 + 5 * (n % 7), 6, generator=generator, dtype=torch.float64) * (1 + n)}
        for n in range(20)
    ]
    # The processes start apart: the first one's parameters must win.
    torch.manual_seed(torch.distributed.get_rank() if torch.distributed.is_initialized() else 0)
    predictor = Predictor(SNE(hidden_dim=32, num_heads=2, chunk_size=16), 1, (16,)).double()
    batch = predictor.encoder.pack(networks, dtype=torch.float64)
    targets = torch.linspace(-1, 2, 20, dtype=torch.float64)[:, None] ** 3
    settings = FitSettings(epochs=epochs, lr=1e-3, batch_weights=500, accumulate=accumulate, invariance=0.5)
    history = fit(predictor, batch, targets, settings, augment=jitter, validation=(batch[:5], targets[:5]))
    return predictor, [*history.train_loss, *history.validation_loss]


if __name__ == "__main__":
    with processes() as world:
        predictor, losses = train()
        torch.save(
            {"state": predictor.state_dict(), "losses": losses, "size": world.size}, f"{sys.argv[1]}.{world.rank}"
        )

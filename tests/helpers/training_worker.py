"""Trains small models on fixed tasks: run by `torchrun` and, alone, for the results to compare with."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import torch
from torch import Tensor

from sne_fast import SNE, Predictor
from sne_fast.data.batch import WeightBatch
from sne_fast.training import Contrastive, ContrastiveModel, FitSettings, Views, fit, fit_contrastive
from sne_fast.training.distributed import processes
from sne_fast.training.networks import PackedNetworks

CASES = ("batch", "stream", "contrastive")
LARGE = 7
"""Position of the network of "stream" that several processes share by layers."""
SETTINGS = FitSettings(epochs=4, lr=1e-3, batch_weights=500, invariance=0.5)


def jitter(batch: WeightBatch, rows: object, generator: torch.Generator) -> WeightBatch:
    """Add noise: no symmetry, but random and the same on every process, as these tests need."""
    noise = torch.randn(batch.values.shape, generator=generator, dtype=batch.values.dtype)
    return dataclasses.replace(batch, values=batch.values + 0.01 * noise)


def networks(large: bool = False) -> list[dict[str, Tensor]]:
    """Return twenty networks of very different sizes, in float64; a large one has six layers."""
    generator = torch.Generator().manual_seed(0)
    made = [
        {"0.weight": torch.randn(4 + 5 * (n % 7), 6, generator=generator, dtype=torch.float64) * (1 + n)}
        for n in range(20)
    ]
    if large:
        shapes = [(30, 10 + k) for k in range(6)]
        layers = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
        made[LARGE] = {f"{k}.weight": layer for k, layer in enumerate(layers)}
    return made


class Stream(PackedNetworks):
    """Networks that remember which of them were read."""

    def __init__(self, batch: WeightBatch, targets: Tensor) -> None:
        super().__init__(batch, targets)
        self.read: list[int] = []

    def parts(self, rows: Any) -> Any:
        for chosen in rows:
            self.read += chosen
            yield self.batch[list(chosen)]


def train(case: str, accumulate: int = 1) -> dict[str, Any]:
    """Train some steps, and return the parameters, the losses, and how often which network was read."""
    # The processes start apart: the first one's parameters must win.
    torch.manual_seed(torch.distributed.get_rank() if torch.distributed.is_initialized() else 0)
    if case == "contrastive":
        return contrastive(accumulate)
    statistics = "tensor" if case == "stream" else "none"
    encoder = SNE(hidden_dim=32, num_heads=2, chunk_size=16, statistics=statistics)
    predictor = Predictor(encoder, 1, (16,)).double()
    batch = predictor.encoder.pack(networks(case == "stream"), dtype=torch.float64)
    targets = torch.linspace(-1, 2, 20, dtype=torch.float64)[:, None] ** 3
    settings = dataclasses.replace(SETTINGS, accumulate=accumulate)
    stream = Stream(batch, targets)
    given: Any = (batch, targets) if case == "batch" else (stream, None)
    history = fit(predictor, *given, settings, augment=jitter, validation=(batch[:5], targets[:5]))
    counts = torch.bincount(torch.tensor(stream.read, dtype=torch.int64), minlength=20)
    return {"state": predictor.state_dict(), "losses": [*history.train_loss, *history.validation_loss], "read": counts}


def contrastive(accumulate: int) -> dict[str, Any]:
    """Train an encoder without labels, and return the parameters and the losses."""
    model = ContrastiveModel(SNE(hidden_dim=32, num_heads=2, chunk_size=16, statistics="relative"), 16).double()
    batch = model.encoder.pack(networks(), dtype=torch.float64)
    settings = FitSettings(epochs=2, lr=1e-3, batch_weights=500, accumulate=accumulate)
    objective = Contrastive(model, Views(prune=0.5), max_chunks=3, weights_at_once=300)
    history = fit_contrastive(model, batch, objective, settings, validation=(batch, objective))
    return {"state": model.state_dict(), "losses": [*history.train_loss, *history.validation_loss]}


if __name__ == "__main__":
    with processes() as world:
        torch.save({"size": world.size, **{case: train(case) for case in CASES}}, f"{sys.argv[1]}.{world.rank}")

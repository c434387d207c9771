"""Contenders of a benchmark: this package, and what a user would write without it, on the same parameters and batch."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..data.batch import WeightBatch
from ..nn.encoder import SNE
from ..nn.padded import PaddedSNE
from ..ops.dispatch import use_backend
from .padded_memory import padded_bytes

Phases = dict[str, float]
"""Seconds of one run: "total", and "forward", "backward", "optimizer" of a training step."""

BASELINES = ("eager", "compile", "loop")
LEARNING_RATE = 0.0  # the same arithmetic, but the parameters are shared, and a measurement must not move them


class DoesNotFit(RuntimeError):
    """A baseline is predicted to need more memory than it may use: it is reported so, never tried."""


def now(device: torch.device) -> float:
    """Return seconds on the host's clock, once everything launched on a GPU has ended."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class Contender:
    """One way to encode a batch, timed forward without gradients or as a whole training step."""

    def __init__(
        self,
        name: str,
        encoder: SNE,
        batches: Sequence[WeightBatch],
        encode: Callable[[], Tensor],
        autocast: torch.dtype | None = None,
        backend: str = "auto",
    ) -> None:
        self.name, self._encode, self.autocast, self.backend = name, encode, autocast, backend
        self.device = batches[0].values.device
        networks = sum(len(batch) for batch in batches)
        target = torch.randn(networks, encoder.hidden_dim, generator=torch.Generator().manual_seed(3))
        self._target = target.to(self.device)
        self._optimizer = torch.optim.Adam(encoder.parameters(), lr=LEARNING_RATE)

    def encode(self) -> Tensor:
        """Encode the batch on the contender's backend and in its autocast dtype."""
        with (
            use_backend(self.backend),
            torch.autocast(self.device.type, dtype=self.autocast, enabled=self.autocast is not None),
        ):
            return self._encode()

    @torch.no_grad()
    def output(self) -> Tensor:
        """Encode the batch without gradients."""
        return self.encode()

    def forward(self) -> Phases:
        """Run a forward pass without gradients; return its seconds."""
        start = now(self.device)
        self.output()
        return {"total": now(self.device) - start}

    def step(self) -> Phases:
        """Run forward, backward of a mean squared error and an optimiser step; return their seconds."""
        with use_backend(self.backend):  # for the backward pass too
            start = now(self.device)
            loss = self.loss()
            forward = now(self.device)
            loss.backward()
            backward = now(self.device)
            self._optimizer.step()
            end = now(self.device)
        return {
            "forward": forward - start,
            "backward": backward - forward,
            "optimizer": end - backward,
            "total": end - start,
        }

    def loss(self) -> Tensor:
        """Return the mean squared error of z against a fixed random target."""
        self._optimizer.zero_grad()
        return (self.encode() - self._target).square().mean()


def contender(
    name: str,
    encoder: SNE,
    batch: WeightBatch,
    *,
    backend: str = "auto",
    training: bool,
    memory_limit: float,
    autocast: torch.dtype | None = None,
) -> Contender:
    """Make a contender: "sne_fast", "eager" (padded), "compile" (torch.compile of it), "loop" (eager, one by one).

    Args:
        name: one of these.
        encoder: whose parameters all contenders share.
        batch: the packed networks.
        backend: for "sne_fast", as :func:`sne_fast.use_backend` takes it.
        training: whether it will run training steps, which need more memory.
        memory_limit: bytes that a baseline may use.
        autocast: half type to encode in, for all contenders alike; None for the parameters' own.

    Raises:
        DoesNotFit: the padded form is predicted to need more than that.
        ValueError: no such contender.
    """
    if name == "sne_fast":
        return Contender(name, encoder, [batch], lambda: encoder(batch), autocast, backend)
    if name not in BASELINES:
        raise ValueError(f"contender: name must be sne_fast or one of {', '.join(BASELINES)}, got {name!r}")
    batches = [batch[b : b + 1] for b in range(len(batch))] if name == "loop" else [batch]
    needed = max(padded_bytes(encoder, part, training) for part in batches)
    if name == "loop" and training:  # one graph holds all networks until backward
        needed = sum(padded_bytes(encoder, part, training) for part in batches)
    if needed > memory_limit:
        raise DoesNotFit(
            f"does not fit: padded to the longest set it needs about {needed / 2**30:.0f} GiB, "
            f"{memory_limit / 2**30:.0f} GiB may be used"
        )
    padded = PaddedSNE(encoder)
    if name == "compile":
        compiled = torch.compile(padded)
        return Contender(name, encoder, batches, lambda: compiled(batch), autocast)
    if name == "loop":
        return Contender(name, encoder, batches, lambda: torch.cat([padded(part) for part in batches]), autocast)
    return Contender(name, encoder, batches, lambda: padded(batch), autocast)

"""Objectives: what a training computes from a batch of networks and minimises."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..data.batch import WeightBatch
from ..nn.predictor import Predictor
from .ranking import ranking_loss
from .settings import FitSettings

Encode = Callable[[WeightBatch], Tensor]
"""Encoder of a batch of B networks to `(B, in_features)`; for networks that processes share it waits for the others."""


class Losses(NamedTuple):
    """What an objective returns for a batch of n networks.

    Args:
        minimised: `()`, the sum over the networks of what is minimised.
        shown: `(n,)`, the loss of each network as the history reports it.
    """

    minimised: Tensor
    shown: Tensor


class Objective(Protocol):
    """A function of networks whose sum over all networks of a step the training minimises."""

    def __call__(self, part: WeightBatch, rows: Sequence[int], generator: torch.Generator, encode: Encode, /) -> Losses:
        """Return the losses of some networks.

        Args:
            part: n networks, prepared, on the device of the parameters.
            rows: their positions among the training networks.
            generator: the source of all randomness, on the CPU. It is the same whichever process computes this part.
            encode: encodes a batch; to be called equally often, in the same order, by every process.
        """


class Augment(Protocol):
    """A change of the networks of a batch that keeps the functions they compute.

    :class:`sne_fast.symmetry.PermutationAugmentation` is one.
    """

    def __call__(self, part: WeightBatch, rows: Sequence[int], generator: torch.Generator, /) -> WeightBatch:
        """Return the changed batch.

        Args:
            part: networks of a training step.
            rows: their positions among the training networks.
            generator: the source of all randomness, on the CPU. It is the same whichever process has these networks.
        """


class Supervised:
    """The loss of a predictor's targets, with the ranking and logit-invariance losses that the settings give a weight.

    Args:
        predictor: the predictor.
        goals: of all training networks, as `Predictor.normalise` returns them.
        settings: of the training.
        augment: changes the networks before they are encoded.
    """

    def __init__(
        self, predictor: Predictor, goals: Tensor, settings: FitSettings, augment: Augment | None = None
    ) -> None:
        self.predictor, self.goals, self.settings, self.augment = predictor, goals, settings, augment

    def __call__(self, part: WeightBatch, rows: Sequence[int], generator: torch.Generator, encode: Encode) -> Losses:
        """Return the losses of some networks."""
        predictor, settings, weight = self.predictor, self.settings, self.predictor.target_mean
        changed = part if self.augment is None else self.augment(part, rows, generator)
        with autocast(settings, weight.device):
            outputs = predictor.head(encode(changed)).to(weight.dtype)
        goals = rows_of(self.goals, rows)
        losses = predictor.losses(outputs, goals)
        minimised = losses.sum()
        if settings.ranking and predictor.loss == "mse":
            minimised = minimised + settings.ranking * len(rows) * ranking_loss(outputs, goals)
        if settings.invariance:
            with autocast(settings, weight.device):
                unchanged = predictor.head(encode(part))
            minimised = minimised + settings.invariance * (outputs - unchanged.to(outputs)).square().sum() / 2
        return Losses(minimised, losses)


def autocast(settings: FitSettings, device: torch.device) -> torch.autocast:
    """Return the context in which the settings encode networks."""
    dtype = getattr(torch, settings.amp) if settings.amp else None
    return torch.autocast(device.type, dtype=dtype, enabled=settings.amp is not None)


def rows_of(values: Tensor, rows: Sequence[int]) -> Tensor:
    """Return some rows of a tensor; without rows, an empty tensor."""
    return values[torch.tensor(list(rows), dtype=torch.int64, device=values.device)]

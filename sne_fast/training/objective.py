"""Objectives: what a training computes from a batch of networks and minimises."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from ..data.batch import WeightBatch
from ..data.buckets import Bucket, bucket_of, pad_to_bucket
from ..data.devices import without_waiting
from ..nn.predictor import Predictor
from .ranking import ranking_losses
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


@dataclass(frozen=True)
class PaddedInputs:
    """What the losses of n networks are computed from, padded so that its shapes repeat.

    Args:
        batches: the networks to encode, each padded to B by :func:`sne_fast.data.buckets.pad_to_bucket`.
        goals: `(B, t)`, or classes `(B,)`; zeros for padding.
        real: `(B,)` bool, False for padding.
    """

    batches: tuple[WeightBatch, ...]
    goals: Tensor
    real: Tensor

    @property
    def buckets(self) -> tuple[Bucket, ...]:
        """Equal for inputs of which all computations launch the same."""
        return tuple(bucket_of(batch) for batch in self.batches)


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


@runtime_checkable
class PaddedObjective(Protocol):
    """An objective whose losses can be computed from padded inputs."""

    def inputs(self, part: WeightBatch, rows: Sequence[int], generator: torch.Generator, /) -> PaddedInputs:
        """Draw, prepare and pad the inputs; the arguments are those of `Objective`."""

    def losses_of(self, inputs: PaddedInputs, /) -> Losses:
        """Return the losses of inputs, where those of padding are 0: `shown` is `(B,)`."""


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
        return self._losses(self._batches(part, rows, generator), rows_of(self.goals, rows), encode)

    def inputs(self, part: WeightBatch, rows: Sequence[int], generator: torch.Generator) -> PaddedInputs:
        """Draw, scale and pad the networks; see `PaddedObjective`."""
        scaled = [self.predictor.scale_inputs(batch) for batch in self._batches(part, rows, generator)]
        batches = tuple(pad_to_bucket(batch) for batch in scaled)
        goals, more = rows_of(self.goals, rows), len(batches[0]) - len(rows)
        real = torch.arange(len(batches[0]), device=goals.device) < len(rows)
        return PaddedInputs(batches, torch.cat([goals, goals.new_zeros((more, *goals.shape[1:]))]), real)

    def losses_of(self, inputs: PaddedInputs) -> Losses:
        """Return the losses of padded inputs; see `PaddedObjective`."""
        return self._losses(inputs.batches, inputs.goals, self.predictor.encoder, inputs.real)

    def _batches(
        self, part: WeightBatch, rows: Sequence[int], generator: torch.Generator
    ) -> tuple[WeightBatch, ...]:  # fmt: skip
        """Return the networks that are encoded: changed, and for the logit-invariance loss also unchanged."""
        changed = part if self.augment is None else self.augment(part, rows, generator)
        return (changed, part) if self.settings.invariance else (changed,)

    def _losses(
        self, batches: Sequence[WeightBatch], goals: Tensor, encode: Encode, real: Tensor | None = None
    ) -> Losses:  # fmt: skip
        predictor, weight = self.predictor, self.predictor.target_mean
        with autocast(self.settings, weight.device):
            outputs, *unchanged = [predictor.head(encode(batch)) for batch in batches]
        outputs = outputs.to(weight.dtype)
        losses = predictor.losses(outputs, goals)
        apart = [(outputs - one.to(outputs)).square().sum(1) for one in unchanged]
        if real is not None:
            # Not torch.where, for which a number is copied to the device, and waited for.
            losses, *apart = [one.masked_fill(~real, 0) for one in (losses, *apart)]
        minimised = losses.sum()
        if self.settings.ranking and predictor.loss == "mse":
            minimised = minimised + self.settings.ranking * ranking_losses(outputs, goals, real).sum()
        if apart:
            minimised = minimised + self.settings.invariance * apart[0].sum() / 2
        return Losses(minimised, losses)


def autocast(settings: FitSettings, device: torch.device) -> torch.autocast:
    """Return the context in which the settings encode networks."""
    dtype = getattr(torch, settings.amp) if settings.amp else None
    return torch.autocast(device.type, dtype=dtype, enabled=settings.amp is not None)


def rows_of(values: Tensor, rows: Sequence[int]) -> Tensor:
    """Return some rows of a tensor; without rows, an empty tensor."""
    return values[without_waiting(torch.tensor(list(rows), dtype=torch.int64), values.device)]

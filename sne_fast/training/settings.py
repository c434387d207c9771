"""Settings of `fit`, and the history that it returns."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass, field
from typing import Literal, get_args

AmpDtype = Literal["bfloat16", "float16"]


@dataclass(frozen=True)
class FitSettings:
    """Settings of `fit`.

    Args:
        epochs: passes over the training networks.
        lr: peak learning rate of AdamW, finite.
        warmup: share of all steps in which the learning rate rises to its peak, before it falls to zero along a cosine.
        weight_decay: weight decay of matrices; vectors have none.
        batch_weights: largest number of weights that a process encodes at once, in one part of a step; a network with
            more is a part of its own.
        accumulate: parts that each process takes one after another in a step. A step has `accumulate` times the number
            of processes parts, and its loss is the mean over the networks of all of them: two processes train as one
            does with twice `accumulate`, and one with `accumulate` up to rounding as with so many times
            `batch_weights` in parts of that size.
        clip: largest norm of the gradients; infinity does not clip.
        patience: epochs without a better validation loss after which training ends; None trains to the end.
        keep_best: end with the parameters of the epoch with the lowest validation loss, not with those of the last.
        amp: train under autocast in this type; None trains in the parameters' own.
        invariance: weight v of the logit-invariance loss `v mean ||f(g x) - f(x)||^2 / 2`, where f is the output of the
            head and g a permutation that `augment` draws (see "Predictor and logit invariance" in `docs/method.md`).
        ranking: weight of the mean of :func:`sne_fast.training.ranking.ranking_losses` over the networks of one part of
            a step, which is nothing where `batch_weights` has room for one network only. Predictors with other losses
            than "mse" train without.
        seed: of the order of the networks and of the draws of `augment`.
        buckets: pad every part of a step, so that its sizes repeat; see :func:`sne_fast.training.pad_to_bucket`. The
            result is the same up to rounding.
        capture: record the steps of such sizes as CUDA graphs and replay them, so that the host launches nothing but
            graphs; needs `buckets` and one process on a CUDA device. The result is the same up to rounding.

    Raises:
        TypeError: a value of another type.
        ValueError: a value out of its range.

    Example:
        >>> FitSettings(epochs=5, batch_weights=50_000).lr
        0.002
    """

    epochs: int = 40
    lr: float = 2e-3
    warmup: float = 0.1
    weight_decay: float = 1e-2
    batch_weights: int = 20_000
    accumulate: int = 1
    clip: float = 1.0
    patience: int | None = None
    keep_best: bool = True
    amp: AmpDtype | None = None
    invariance: float = 0.0
    ranking: float = 0.0
    seed: int = 0
    buckets: bool = False
    capture: bool = False

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_weights", "accumulate", "patience", "seed"):
            value = getattr(self, name)
            if value is None and name == "patience":
                continue
            if isinstance(value, bool) or not hasattr(value, "__index__"):
                raise TypeError(f"FitSettings: {name} must be an integer, got {value!r:.80}")
            object.__setattr__(self, name, operator.index(value))
        for name in ("lr", "warmup", "weight_decay", "clip", "invariance", "ranking"):
            value = getattr(self, name)
            if isinstance(value, bool | str | bytes | complex) or not hasattr(value, "__float__"):
                raise TypeError(f"FitSettings: {name} must be a number, got {value!r:.80}")
            object.__setattr__(self, name, float(value))
        for name in ("keep_best", "buckets", "capture"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"FitSettings: {name} must be True or False, got {getattr(self, name)!r:.80}")
        for name in ("epochs", "batch_weights", "accumulate"):
            if getattr(self, name) < 1:
                raise ValueError(f"FitSettings: {name} must be at least 1, got {getattr(self, name)}")
        if self.patience is not None and self.patience < 0:
            raise ValueError(f"FitSettings: patience must be at least 0, or None, got {self.patience}")
        if not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"FitSettings: seed must fit 64 bits, got {self.seed}")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"FitSettings: warmup must lie in [0, 1), got {self.warmup}")
        if not 0 < self.lr < math.inf or not self.clip > 0:
            raise ValueError(f"FitSettings: lr and clip must be above 0, got {self.lr} and {self.clip}")
        if self.amp is not None and self.amp not in get_args(AmpDtype):
            raise ValueError(
                f"FitSettings: amp must be None or one of {', '.join(get_args(AmpDtype))}, got {self.amp!r}"
            )
        if self.capture and not self.buckets:
            raise ValueError("FitSettings: capture replays steps whose sizes repeat; it needs buckets=True")
        for name in ("invariance", "ranking", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"FitSettings: {name} must be at least 0, got {getattr(self, name)}")


@dataclass
class History:
    """Course of a training.

    `train_loss` and `validation_loss` hold the loss of the predictor in each epoch, without the ranking and
    logit-invariance losses; `kept` is the epoch whose parameters the predictor has.
    """

    train_loss: list[float] = field(default_factory=list)
    validation_loss: list[float] = field(default_factory=list)
    kept: int = -1
    seconds: float = 0.0
    weights_per_second: float = 0.0

"""How `fit` trains, and what it tells of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

SEED_STRIDE = 1_000_003  # so that neighbouring seeds do not share the draws of their steps or epochs
AmpDtype = Literal["bfloat16", "float16"]


@dataclass(frozen=True)
class FitSettings:
    """How `fit` trains.

    `epochs`: passes over the training networks. `lr`: peak learning rate of AdamW, reached after `warmup` (share of
    all steps) and then lowered to zero along a cosine. `weight_decay`: on matrices only. `batch_weights`: the most
    weights a batch holds, unless one network alone has more. `clip`: gradients' largest norm. `patience`: epochs
    without a better validation loss after which training ends; None trains to the end. `keep_best`: end with the
    parameters of the epoch whose validation loss was lowest, not with the last. `amp`: "bfloat16" or "float16" trains
    under autocast. `invariance`: weight v of the logit-invariance loss `v mean ||f(g x) - f(x)||^2 / 2` (section 3.6 of
    the paper; needs `augment`, which draws g), f being what the head gives. `seed`: order of the networks and draws of
    `augment`.
    """

    epochs: int = 40
    lr: float = 2e-3
    warmup: float = 0.1
    weight_decay: float = 1e-2
    batch_weights: int = 20_000
    clip: float = 1.0
    patience: int | None = None
    keep_best: bool = True
    amp: AmpDtype | None = None
    invariance: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_weights"):
            if getattr(self, name) < 1:
                raise ValueError(f"FitSettings: {name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"FitSettings: warmup must lie in [0, 1), got {self.warmup}")
        if not self.lr > 0 or not self.clip > 0:
            raise ValueError(f"FitSettings: lr and clip must be above 0, got {self.lr} and {self.clip}")
        if self.amp is not None and self.amp not in get_args(AmpDtype):
            raise ValueError(
                f"FitSettings: amp must be None or one of {', '.join(get_args(AmpDtype))}, got {self.amp!r}"
            )
        if not self.invariance >= 0:
            raise ValueError(f"FitSettings: invariance must be at least 0, got {self.invariance}")


@dataclass
class History:
    """What happened in each epoch; losses are the predictor's (without invariance), `kept` the epoch kept."""

    train_loss: list[float] = field(default_factory=list)
    validation_loss: list[float] = field(default_factory=list)
    kept: int = -1
    seconds: float = 0.0
    weights_per_second: float = 0.0

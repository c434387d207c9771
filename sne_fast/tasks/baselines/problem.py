"""What a baseline is given and what it can say of it."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from ...data.batch import WeightBatch
from ...extras import install_command
from ...training.loop import Augment

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Problem:
    """One regression problem: networks, their label, who trains and who chooses the epoch.

    Args:
        batch: n networks, packed with `scale="tensor"`.
        targets: `(n,)` float64 in their own units; only those of `train` and `validation` are looked at.
        train: positions of the networks to fit.
        validation: positions of the networks to choose the epoch by. Baselines without epochs fit these too.
        seed: of everything random.
        logit: targets lie in [0, 1] and are modelled as logits; predictions are again in [0, 1].
        augment: changes each training batch of the neural baselines, as in `sne_fast.training.fit`; `rows` are
            positions in `train`.
    """

    batch: WeightBatch
    targets: np.ndarray
    train: Sequence[int]
    validation: Sequence[int]
    seed: int = 0
    logit: bool = False
    augment: Augment | None = None


class Baseline(Protocol):
    """A method of the tables."""

    name: str

    def why_not(self, problem: Problem) -> list[str]:
        """Sentences saying why it cannot do this problem; empty if it can."""
        ...

    def fit_predict(self, problem: Problem) -> np.ndarray:
        """Predictions `(n,)` float64 for all networks of the batch, in the targets' units.

        Raises:
            ValueError: what `why_not` says, or a loss that is not finite.
        """
        ...


def problems(problem: Problem) -> list[str]:
    """What no baseline can do."""
    import numpy as np

    if len(problem.targets) != len(problem.batch):
        return [f"{len(problem.targets)} targets for {len(problem.batch)} networks"]
    if not len(problem.train):
        return ["no networks to train on"]
    known = np.asarray(problem.targets, np.float64)[[*problem.train, *problem.validation]]
    if not np.isfinite(known).all():
        return ["targets that are not finite among the training and validation networks"]
    if problem.logit and (known.min() < 0 or known.max() > 1):
        return [f"targets outside [0, 1] cannot be modelled as logits: {known.min():g} to {known.max():g}"]
    return []


def differing_shapes(batch: WeightBatch) -> list[str]:
    if not batch.shapes:
        return ["a batch without the shapes of its tensors, which pack keeps"]
    for b, shapes in enumerate(batch.shapes):
        if shapes != batch.shapes[0]:
            return [f"networks of different shapes: {batch.network_name(0)} and {batch.network_name(b)}"]
    return []


def missing(module: str, name: str) -> list[str]:
    try:
        importlib.import_module(module)
    except ImportError:
        return [f"{name} is not installed: {install_command('tasks')}"]
    return []


def check(baseline: Baseline, problem: Problem) -> None:
    if reasons := baseline.why_not(problem):
        raise ValueError(f"{baseline.name}: {'; '.join(reasons)}")

"""The problem that baselines solve, their interface, and the checks they share."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ...data.batch import WeightBatch
from ...extras import install_command
from ...training.objective import Augment
from ...zoo.runnable import Runnable


@dataclass(frozen=True)
class Problem:
    """A regression or classification problem: networks, a target, and which networks train and choose the epoch.

    Args:
        batch: n networks, packed with `scale="tensor"`.
        targets: `(n,)` float64 in their own units, or positions in `classes`; only those of `train` and `validation`
            are read.
        train: positions of the networks to fit.
        validation: positions of the networks that choose the epoch. Baselines without epochs fit these too.
        seed: of all random numbers.
        logit: targets lie in [0, 1] and are modelled as logits; predictions lie in [0, 1] again.
        augment: changes each training batch of the neural baselines, as in :func:`sne_fast.training.fit`; its `rows`
            are positions in `train`.
        classes: names of the classes, if the target is a class; none if it is a number.
        runnable: how the networks are run, for methods that do; None if that is not known.
    """

    batch: WeightBatch
    targets: np.ndarray
    train: Sequence[int]
    validation: Sequence[int]
    seed: int = 0
    logit: bool = False
    augment: Augment | None = None
    classes: Sequence[str] = ()
    runnable: Runnable | None = None

    @property
    def outputs(self) -> int:
        """Number of values that a model gives for each network: one, or a logit per class."""
        return len(self.classes) or 1


class Baseline(Protocol):
    """A method that SNE is compared with, a row of the tables; `name` is its title there."""

    name: str

    def why_not(self, problem: Problem) -> list[str]:
        """Return the reasons why the method cannot solve a problem, as sentences; an empty list if it can."""
        ...

    def fit_predict(self, problem: Problem) -> np.ndarray:
        """Fit the training networks, and return predictions for all.

        They are `(n,)` float64 in the units of the targets, or `(n, classes)` probabilities of the classes.

        Raises:
            ValueError: the method cannot solve the problem, or its loss is not finite.
        """
        ...


def problems(problem: Problem) -> list[str]:
    """Return the reasons why no baseline can solve a problem."""
    if len(problem.targets) != len(problem.batch):
        return [f"{len(problem.targets)} targets for {len(problem.batch)} networks"]
    if not len(problem.train):
        return ["no networks to train on"]
    known = np.asarray(problem.targets, np.float64)[[*problem.train, *problem.validation]]
    if not np.isfinite(known).all():
        return ["targets that are not finite among the training and validation networks"]
    if problem.classes and not np.isin(known, np.arange(len(problem.classes))).all():
        return [f"targets that are no positions among {len(problem.classes)} classes"]
    if problem.logit and (known.min() < 0 or known.max() > 1):
        return [f"targets outside [0, 1] cannot be modelled as logits: {known.min():g} to {known.max():g}"]
    return []


def differing_shapes(batch: WeightBatch) -> list[str]:
    """Return the reason against a method that needs networks of one shape."""
    if not batch.shapes:
        return ["a batch without the shapes of its tensors, which pack keeps"]
    for b, shapes in enumerate(batch.shapes):
        if shapes != batch.shapes[0]:
            return [f"networks of different shapes: {batch.network_name(0)} and {batch.network_name(b)}"]
    return []


def missing(module: str, name: str) -> list[str]:
    """Return the reason against a method whose package cannot be imported."""
    try:
        importlib.import_module(module)
    except ImportError:
        return [f"{name} is not installed: {install_command('tasks')}"]
    return []


def check(baseline: Baseline, problem: Problem) -> None:
    """Check that a baseline can solve a problem.

    Raises:
        ValueError: it cannot; the message gives the reasons.
    """
    if reasons := baseline.why_not(problem):
        raise ValueError(f"{baseline.name}: {'; '.join(reasons)}")

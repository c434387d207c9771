"""Baselines without epochs: the mean, and boosted trees on layer statistics."""

from __future__ import annotations

import numpy as np

from ...zoo.statistics import Statistics as Choice
from ...zoo.statistics import layer_statistics
from ..trees import fit_trees
from .problem import Problem, check, missing, problems


class Mean:
    """The mean target of the training and validation networks, or the shares of the classes, whatever the weights."""

    name = "mean of the training networks"

    def why_not(self, problem: Problem) -> list[str]:
        """Return the reasons against this problem, see :class:`Baseline`."""
        return problems(problem)

    def fit_predict(self, problem: Problem) -> np.ndarray:
        """Return predictions for all networks, see :class:`Baseline`."""
        check(self, problem)
        known = np.asarray(problem.targets, np.float64)[[*problem.train, *problem.validation]]
        if problem.classes:
            shares = np.bincount(known.astype(np.int64), minlength=len(problem.classes)) / len(known)
            return np.tile(shares, (len(problem.batch), 1))
        return np.full(len(problem.batch), known.mean())


class Statistics:
    """Gradient boosting on layer statistics (Unterthiner et al. 2020, arXiv 2002.11448).

    Args:
        name: title of its row in tables.
        statistics: which statistics of a tensor, as :func:`sne_fast.zoo.statistics.layer_statistics` takes them.
        layers: number of layers from the front; by default that of the deepest network.
        max_features: share of the features that each split of a regression tree chooses from.
    """

    def __init__(
        self,
        name: str = "layer statistics, boosted trees",
        statistics: Choice = "plain",
        layers: int | None = None,
        max_features: float = 0.3,
    ) -> None:
        self.name, self.statistics, self.layers, self.max_features = name, statistics, layers, max_features

    def why_not(self, problem: Problem) -> list[str]:
        """Return the reasons against this problem, see :class:`Baseline`."""
        return problems(problem) + missing("sklearn", "scikit-learn")

    def fit_predict(self, problem: Problem) -> np.ndarray:
        """Return predictions for all networks, see :class:`Baseline`."""
        check(self, problem)
        features = layer_statistics(problem.batch, self.layers, self.statistics)
        known = [*problem.train, *problem.validation]
        trees = fit_trees(
            features[known], np.asarray(problem.targets)[known], seed=problem.seed, logit=problem.logit,
            classes=len(problem.classes), max_features=self.max_features,
        )  # fmt: skip
        return trees.predict(features)

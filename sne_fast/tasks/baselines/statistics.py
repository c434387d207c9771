"""Baselines without epochs: the mean, and boosted trees on layer statistics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from ...data.batch import WeightBatch
from ...nn.input_scales import FanInScale
from ...nn.predictor import LOGIT_MARGIN
from ...zoo.statistics import layer_statistics
from .problem import Problem, check, missing, problems

ABSENT = -1e3
"""Value of the statistics that a network lacks; far from all others, so that a tree can split it off."""


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
    """Gradient boosting on layer statistics (Unterthiner et al. 2020, arXiv 2002.11448)."""

    name = "layer statistics, boosted trees"

    def why_not(self, problem: Problem) -> list[str]:
        """Return the reasons against this problem, see :class:`Baseline`."""
        return problems(problem) + missing("sklearn", "scikit-learn")

    def fit_predict(self, problem: Problem) -> np.ndarray:
        """Return predictions for all networks, see :class:`Baseline`."""
        check(self, problem)
        known = [*problem.train, *problem.validation]
        if problem.classes:
            return statistics_classification(problem.batch, problem.targets, known, problem.seed, len(problem.classes))
        return statistics_regression(problem.batch, problem.targets, known, problem.seed, problem.logit)


class StatisticsByFanIn(Statistics):
    """Gradient boosting on statistics of weights times the root of their layer's fan-in, as SNE gets them."""

    name = "layer statistics by fan-in, boosted trees"

    def fit_predict(self, problem: Problem) -> np.ndarray:
        """Return predictions for all networks, see :class:`Baseline`."""
        check(self, problem)
        return Statistics().fit_predict(replace(problem, batch=FanInScale()(_unscaled(problem.batch))))


def _unscaled(batch: WeightBatch) -> WeightBatch:
    """Return networks with their weights as they were stored, as `pack(scale="none")` gives them."""
    sizes = batch.chunk_ptr.index_select(0, batch.tensor_ptr).diff()
    divided = torch.repeat_interleave(batch.tensor_scale, sizes, output_size=batch.num_weights)
    return batch.with_fields(
        values=batch.values * divided.to(batch.dtype), tensor_scale=torch.ones_like(batch.tensor_scale), scale="none"
    )


def statistics_regression(
    batch: WeightBatch, target: np.ndarray, train: Sequence[int], seed: int, logit: bool = True
) -> np.ndarray:
    """Predict a target from layer statistics by gradient boosting.

    Args:
        batch: n networks.
        target: `(n,)`; only the values of `train` are used.
        train: positions of the networks to fit.
        seed: of the boosting.
        logit: the target lies in [0, 1] and is modelled as its logit, with the margin that the predictor has too.

    Returns:
        Predictions `(n,)` float64.
    """
    from sklearn.ensemble import GradientBoostingRegressor

    features = _features(batch)
    goals = np.asarray(target)[list(train)]
    if logit:
        goals = np.clip(goals, LOGIT_MARGIN, 1 - LOGIT_MARGIN)
        goals = np.log(goals / (1 - goals))
    model = GradientBoostingRegressor(
        n_estimators=400, learning_rate=0.03, max_depth=4, subsample=0.5, max_features=0.3, random_state=seed
    )
    predicted = model.fit(features[list(train)], goals).predict(features)
    return 1 / (1 + np.exp(-predicted)) if logit else predicted


def statistics_classification(
    batch: WeightBatch, target: np.ndarray, train: Sequence[int], seed: int, classes: int
) -> np.ndarray:
    """Predict a class from layer statistics by gradient boosting, on histograms of the statistics.

    Args:
        batch: n networks.
        target: the classes `(n,)`, whole numbers from 0; only those of `train` are used.
        train: positions of the networks to fit.
        seed: of the boosting.
        classes: number of classes.

    Returns:
        Probabilities `(n, classes)` float64; 0 for classes without a training network.
    """
    from sklearn.ensemble import HistGradientBoostingClassifier

    features = _features(batch)
    goals = np.asarray(target)[list(train)].astype(np.int64)
    found = np.zeros((len(batch), classes))
    if len(np.unique(goals)) == 1:  # which the classifier refuses
        found[:, goals[0]] = 1.0
        return found
    model = HistGradientBoostingClassifier(
        max_iter=200, learning_rate=0.05, max_leaf_nodes=15, min_samples_leaf=5, early_stopping=False, random_state=seed
    )
    model.fit(features[list(train)], goals)
    found[:, model.classes_] = model.predict_proba(features)
    return found


def _features(batch: WeightBatch) -> np.ndarray:
    features = layer_statistics(batch)
    return np.where(np.isnan(features), ABSENT, features)

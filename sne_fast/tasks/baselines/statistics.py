"""Baselines without epochs: the mean, and boosted trees on layer statistics."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from ...nn.input_scales import FanInScale
from .problem import Problem, check, missing, problems

if TYPE_CHECKING:
    import numpy as np


class Mean:
    """The mean target of the training and validation networks, whatever the weights."""

    name = "mean of the training networks"

    def why_not(self, problem: Problem) -> list[str]:
        return problems(problem)

    def fit_predict(self, problem: Problem) -> np.ndarray:
        import numpy as np

        check(self, problem)
        known = np.asarray(problem.targets, np.float64)[[*problem.train, *problem.validation]]
        return np.full(len(problem.batch), known.mean())


class Statistics:
    """Gradient boosting on layer statistics (Unterthiner et al. 2020, arXiv 2002.11448)."""

    name = "layer statistics, boosted trees"

    def why_not(self, problem: Problem) -> list[str]:
        return problems(problem) + missing("sklearn", "scikit-learn")

    def fit_predict(self, problem: Problem) -> np.ndarray:
        from ...reports.reporting import statistics_regression

        check(self, problem)
        known = [*problem.train, *problem.validation]
        return statistics_regression(problem.batch, problem.targets, known, problem.seed, problem.logit)


class StatisticsByFanIn(Statistics):
    """Layer statistics of weights times the root of their layer's fan-in, as SNE sees them across architectures."""

    name = "layer statistics by fan-in, boosted trees"

    def fit_predict(self, problem: Problem) -> np.ndarray:
        check(self, problem)
        return Statistics().fit_predict(replace(problem, batch=FanInScale()(problem.batch)))

"""What SNE is compared with: methods that predict one number of each network from its weights, on the same split.

problem = Problem(batch, targets, train=range(800), validation=range(800, 900))
for baseline in BASELINES.values():
    if not baseline.why_not(problem):
        predicted = baseline.fit_predict(problem)  # (n,), of all networks
"""

from __future__ import annotations

from .deepsets import DeepSets
from .mlp import MLP
from .nfn import NFN
from .problem import Baseline, Problem
from .statistics import Mean, Statistics, StatisticsByFanIn

__all__ = ["BASELINES", "MLP", "NFN", "Baseline", "DeepSets", "Mean", "Problem", "Statistics", "StatisticsByFanIn"]

BASELINES: dict[str, Baseline] = {
    "mean": Mean(),
    "statistics": Statistics(),
    "statistics_fan_in": StatisticsByFanIn(),
    "deepsets": DeepSets(),
    "mlp": MLP(),
    "nfn": NFN(epochs=70),  # about as long as DeepSets; 100 epochs predict no better
}

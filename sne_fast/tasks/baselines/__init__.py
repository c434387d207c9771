"""Baselines: methods that predict a number or a class of each network from its weights, on the same split as SNE.

Example:
    >>> problem = Problem(encoder.pack(zoo), zoo.column("test_accuracy"), train=range(12), validation=range(12, 15))
    >>> BASELINES["mean"].why_not(problem)
    []
    >>> BASELINES["mean"].fit_predict(problem).shape
    (18,)
"""

from __future__ import annotations

from .deepsets import DeepSets
from .mlp import MLP
from .nfn import NFN
from .probes import Probes
from .problem import Baseline, Problem
from .statistics import Mean, Statistics

__all__ = ["BASELINES", "MLP", "NFN", "Baseline", "DeepSets", "Mean", "Probes", "Problem", "Statistics"]

BASELINES: dict[str, Baseline] = {
    "mean": Mean(),
    "statistics": Statistics(),
    "statistics_fan_in": Statistics("layer statistics by fan-in, boosted trees", "fan_in"),
    "statistics_rich": Statistics("the 23 statistics, boosted trees", "all"),
    # For architectures never seen: places that all have, the last two layers and the whole network. Leaving families
    # and architectures out of the training networks, trees did better so than with first layers, in two cases of three.
    "statistics_relative": Statistics("the 19 relative statistics, boosted trees", "relative", layers=0),
    "deepsets": DeepSets(),
    "mlp": MLP(),
    "nfn": NFN(epochs=70),  # takes about as long as DeepSets; 100 epochs predict no better
    "probes": Probes(),
}
"""Key, as `sne-fast task --method` takes it -> baseline."""

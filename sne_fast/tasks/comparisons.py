"""Comparisons of the rows of a table on the same test networks: paired differences, and the mean of SNE and trees."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from ..regular_files import FileError
from ..reports.measures import class_measures, measures, tau_above
from ..reports.paired import ABOVE, INFLUENCES, PairedRun, paired_difference
from .definitions import Experiment, Task
from .networks import Networks
from .run_folder import Run, RunFolder, read_array
from .stacking import average_predictions

REFERENCE = "statistics"
"""Row that differences are taken from."""
STACKED = "SNE and trees, mean"
"""Title of the row of the mean of SNE's and the trees' predictions."""
STACKED_TREES = ("statistics_relative", "statistics_rich")
"""Rows of trees, of which the first that a task has is averaged with SNE."""

Predictions = dict[int, np.ndarray]
"""Seed -> predictions of its test networks, `(n,)` or probabilities `(n, classes)`."""


class Comparisons:
    """Predictions of the runs of an experiment, and what is computed from several of them.

    Args:
        task: the task.
        experiment: one of its experiments.
        data: its networks.
        folder: the folder of the runs.
    """

    def __init__(self, task: Task, experiment: Experiment, data: Networks, folder: RunFolder) -> None:
        self.task, self.experiment, self.data, self.folder = task, experiment, data, folder

    def predictions(self, row: str, runs: Sequence[Mapping[str, Any]], share: float = 1.0) -> Predictions:
        """Read the predictions of the runs of a row that have left any.

        Raises:
            FileError: predictions of other networks than the test networks.
        """
        found = {}
        for seed in (run["seed"] for run in runs if "test" in run):
            path = self.folder.predicted(Run(self.experiment, row, seed, share))
            if path.exists():
                found[seed] = read_array(path, "predicted")
                count = len(self.test(seed))
                if len(found[seed]) != count:
                    raise FileError(
                        f"{path}: holds predictions of {len(found[seed])} networks, and the split has {count} test "
                        "networks; remove it and the .json file beside it to make the run again"
                    )
        return found

    def test(self, seed: int) -> np.ndarray:
        """Return the positions of the test networks of a seed."""
        return np.asarray(self.data.split(self.experiment, seed)["test"], np.int64)

    def differences(self, predictions: Predictions, reference: Predictions) -> dict[str, dict[str, float]]:
        """Return the paired difference to the reference of every measure that is defined, over the seeds of both.

        See :mod:`sne_fast.reports.paired`.
        """
        runs = [
            PairedRun(self.test(seed), self.data.targets[self.test(seed)], predictions[seed], reference[seed])
            for seed in sorted(set(predictions) & set(reference))
        ]
        found = {}
        for measure in measured(self.task):
            difference = paired_difference(runs, measure)
            if difference is not None:
                found[measure] = asdict(difference)
        return found

    def stacked(
        self, rows: Sequence[tuple[Sequence[Mapping[str, Any]], Predictions]]
    ) -> tuple[list[dict[str, Any]], Predictions]:
        """Return the runs of the mean of several rows' predictions, one for each seed that all have, and these means.

        Args:
            rows: for each row its runs and their predictions.
        """
        runs, means = [], {}
        for seed in sorted(set.intersection(*(set(predictions) for _, predictions in rows))):
            of_seed = [next(run for run in found if run["seed"] == seed) for found, _ in rows]
            mean = average_predictions([predictions[seed] for _, predictions in rows], logit=self.task.logit)
            means[seed] = mean
            runs.append(
                {
                    "method": STACKED,
                    "seed": seed,
                    "networks": of_seed[0]["networks"],
                    "of": [run["method"] for run in of_seed],
                    "seconds": sum(run["seconds"] for run in of_seed),
                    "test": test_measures(self.task, mean, self.data.targets[self.test(seed)]),
                }
            )
        return runs, means


def measured(task: Task) -> list[str]:
    """Return the measures of a task that differences are given of."""
    if task.classes:
        return ["accuracy", "cross_entropy"]
    return [
        name for name in INFLUENCES if name not in ("accuracy", "cross_entropy") and (name != "tau_above" or task.logit)
    ]


def test_measures(task: Task, predicted: np.ndarray, true: np.ndarray) -> dict[str, float | None]:
    """Return the measures of predictions `(n,)`, or of probabilities `(n, classes)`, as a run's result holds them.

    Targets in [0, 1] are accuracies, of which tau among networks above 20 % is measured too.
    """
    if predicted.ndim == 2:
        return class_measures(predicted, true)
    found = measures(predicted, true)
    if task.logit:
        found["tau_above"] = tau_above(predicted, true, ABOVE)
    return {**found, "mse": None if found["rmse"] is None else found["rmse"] ** 2}

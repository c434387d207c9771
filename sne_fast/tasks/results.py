"""Results of all runs of a task: means and standard deviations over seeds, and curves over training-set size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..reports.machine import machine
from .baselines import BASELINES
from .definitions import Task
from .networks import Networks
from .run_folder import RunFolder


def collect(name: str, task: Task, data: Networks, sne_rows: Sequence[str], folder: RunFolder) -> dict[str, Any]:
    """Gather the results of all runs in a folder, whichever call made them.

    Args:
        sne_rows: rows of the table that are SNE; the baselines come after them.

    Returns:
        The content of `results.json`.
    """
    experiments: dict[str, Any] = {}
    for experiment in task.experiments:
        methods: dict[str, Any] = {}
        curves: dict[str, list[dict[str, Any]]] = {}
        for row in [*sne_rows, *BASELINES]:
            whole = folder.results_of(experiment, row)
            if not whole:
                continue
            title = whole[0]["method"]
            methods[title] = _summary(whole)
            points = [run for run in folder.results_of(experiment, row, whole[0]["seed"]) if "test" in run]
            if len(points) > 1:
                curves[title] = [{"networks": run["networks"]["train"], **run["test"]} for run in points]
        if methods:
            experiments[experiment.name] = {"name": experiment.name, "methods": methods, "by_training_size": curves}
    return {
        "task": name,
        "title": task.title,
        "target": task.target,
        "networks": len(data),
        "weights": sum(int(zoo.sizes.sum()) for zoo in data.zoos),
        "variance": float(data.targets.var()),
        "experiments": experiments,
        "machine": machine(),
    }


def _summary(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return mean and standard deviation over seeds, and the result of each."""
    summary: dict[str, Any] = {
        "runs": len(runs),
        "seconds": float(np.mean([run["seconds"] for run in runs])),
        "each": [{key: value for key, value in run.items() if not key.endswith("_loss")} for run in runs],
    }
    if "test" not in runs[0]:
        return {**summary, "why_not": runs[0]["why_not"]}
    for key in ("tau", "r2", "mse", "mae"):
        values = [run["test"][key] for run in runs]
        known = all(value is not None for value in values)
        summary[key] = {
            "mean": float(np.mean(values)) if known else None,
            # Relative to the first value, so that equal values, whose mean may be rounded, have a spread of exactly 0.
            "std": float(np.std(np.subtract(values, values[0]), ddof=1)) if known and len(values) > 1 else None,
        }
    if "invariance_rms" in runs[0]:
        shares = [run["invariance_rms"] / run["test"]["rmse"] for run in runs if run["test"]["rmse"]]
        if len(shares) == len(runs):  # not without an error to compare with
            summary["invariance_rms_over_rmse"] = float(np.max(shares))
    return summary

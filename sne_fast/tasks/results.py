"""Results of all runs of a task: means and standard deviations over seeds, and curves over training-set size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..regular_files import FileError
from ..reports.machine import machine
from ..training.fingerprint import differences
from .baselines import BASELINES
from .definitions import Task
from .networks import Networks
from .run_folder import RunFolder

SUMMARISED = ("tau", "r2", "mse", "mae", "accuracy", "cross_entropy")
"""Measures of which results hold mean and standard deviation over seeds."""


def collect(name: str, task: Task, data: Networks, sne_rows: Sequence[str], folder: RunFolder) -> dict[str, Any]:
    """Gather the results of all runs in a folder, whichever call made them.

    Args:
        sne_rows: rows of the table that are SNE; the baselines come after them.

    Returns:
        The content of `results.json`.

    Raises:
        ValueError: runs of a row that do not belong together.
    """
    experiments: dict[str, Any] = {}
    for experiment in task.experiments:
        methods: dict[str, Any] = {}
        curves: dict[str, list[dict[str, Any]]] = {}
        for row in [*sne_rows, *BASELINES]:
            whole = folder.results_of(experiment, row)
            if not whole:
                continue
            check_runs(whole, data, folder, whole[0].get("settings"))
            for run in whole:
                if not {"method", "seconds"} <= set(run) or not ("test" in run or "why_not" in run):
                    damaged = f"the result of {row!r} with seed {run['seed']} in {folder}"
                    raise FileError(f"task: {damaged} lacks its measures; remove it to make the run again")
            title = whole[0]["method"]
            methods[title] = _summary(whole)
            shares = folder.results_of(experiment, row, whole[0]["seed"])
            check_runs(shares, data, folder, whole[0].get("settings"))
            points = [run for run in shares if "test" in run]
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


def check_runs(
    runs: Sequence[Mapping[str, Any]], data: Networks, folder: RunFolder, settings: Mapping[str, Any] | None
) -> None:
    """Check that the runs of a row of a table are of one configuration and of these networks.

    Args:
        settings: those of the row, None for a baseline.

    Raises:
        ValueError: a run of others; the message names it and says what differs.
    """
    made_of = data.fingerprint
    for run in runs:
        then = run.get("made_of")
        then = {key: then[key] for key in made_of if key in then} if isinstance(then, dict) else {}
        changed = differences({"settings": run.get("settings"), **then}, {"settings": settings, **made_of})
        if changed:
            raise ValueError(
                f"task: {folder} holds a run with other settings or data ({run.get('method')}, seed {run['seed']}: "
                f"{'; '.join(changed)}); choose another --out or remove it"
            )


def _summary(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return mean and standard deviation over seeds, and the result of each."""
    summary: dict[str, Any] = {
        "runs": len(runs),
        "seconds": float(np.mean([run["seconds"] for run in runs])),
        "each": [{key: value for key, value in run.items() if not key.endswith("_loss")} for run in runs],
    }
    if "test" not in runs[0]:
        return {**summary, "why_not": runs[0]["why_not"]}
    for key in (key for key in SUMMARISED if key in runs[0]["test"]):
        values = [run["test"][key] for run in runs]
        known = all(value is not None for value in values)
        summary[key] = {
            "mean": float(np.mean(values)) if known else None,
            # Relative to the first value, so that equal values, whose mean may be rounded, have a spread of exactly 0.
            "std": float(np.std(np.subtract(values, values[0]), ddof=1)) if known and len(values) > 1 else None,
        }
    if "invariance_rms" in runs[0]:
        shares = [run["invariance_rms"] / run["test"]["rmse"] for run in runs if run["test"].get("rmse")]
        if len(shares) == len(runs):  # not without an error to compare with
            summary["invariance_rms_over_rmse"] = float(np.max(shares))
    return summary

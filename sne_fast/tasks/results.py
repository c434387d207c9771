"""Results of all runs of a task: means and spreads over seeds, differences to a reference, and learning curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..regular_files import FileError, read_json
from ..reports.machine import machine
from ..training.fingerprint import differences
from .baselines import BASELINES
from .comparisons import REFERENCE, STACKED, STACKED_TREES, Comparisons, Predictions
from .definitions import Experiment, Task
from .networks import Networks
from .run_folder import RunFolder

SUMMARISED = ("tau", "tau_above", "r2", "mse", "mae", "accuracy", "cross_entropy")
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
        found = _experiment(task, experiment, data, sne_rows, folder)
        if found["methods"]:
            experiments[experiment.name] = found
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


def _experiment(
    task: Task, experiment: Experiment, data: Networks, sne_rows: Sequence[str], folder: RunFolder
) -> dict[str, Any]:
    """Return the methods of an experiment, their learning curves and differences to the reference."""
    comparisons = Comparisons(task, experiment, data, folder)
    titles: dict[str, str] = {}
    runs: dict[str, dict[float, Sequence[Mapping[str, Any]]]] = {}
    predictions: dict[str, dict[float, Predictions]] = {}
    for row in [*sne_rows, *BASELINES]:
        runs[row] = {share: folder.results_of(experiment, row, share) for share in folder.shares_of(experiment, row)}
        if 1.0 not in runs[row]:
            del runs[row]
            continue
        titles[row] = runs[row][1.0][0]["method"]
        whole = runs[row][1.0][0].get("settings")
        for share, of_share in runs[row].items():
            settings = whole and {**whole, "epochs": task.epochs(whole["epochs"], share)}
            check_runs(of_share, data, folder, settings)
            for run in of_share:
                if not {"method", "seconds"} <= set(run) or not ("test" in run or "why_not" in run):
                    damaged = f"the result of {row!r} with seed {run['seed']} in {folder}"
                    raise FileError(f"task: {damaged} lacks its measures; remove it to make the run again")
        predictions[row] = {share: comparisons.predictions(row, found, share) for share, found in runs[row].items()}
    pair = (sne_rows[0], next((row for row in STACKED_TREES if row in task.baselines), ""))
    if all(row in runs for row in pair):
        stacked = {
            share: comparisons.stacked([(runs[row][share], predictions[row][share]) for row in pair])
            for share in runs[pair[0]]
            if share in runs[pair[1]]
        }
        runs[STACKED] = {share: found for share, (found, _) in stacked.items() if found}
        predictions[STACKED] = {share: found for share, (_, found) in stacked.items()}
        titles[STACKED] = STACKED
    methods: dict[str, Any] = {}
    curves: dict[str, list[dict[str, Any]]] = {}
    for row in [*sne_rows, STACKED, *BASELINES]:
        if 1.0 not in runs.get(row, {}):
            continue
        methods[titles[row]] = _summary(runs[row][1.0])
        if REFERENCE in runs and row != REFERENCE:
            found = comparisons.differences(predictions[row][1.0], predictions[REFERENCE][1.0])
            methods[titles[row]]["differences"] = found
        points = [_point(share, of_share) for share, of_share in runs[row].items() if "test" in of_share[0]]
        if len(points) > 1:
            curves[titles[row]] = points
    return {
        "name": experiment.name,
        "reference": titles.get(REFERENCE),
        "methods": methods,
        "by_training_size": curves,
        "ceiling": _ceiling(experiment, data, folder),
    }


def _ceiling(experiment: Experiment, data: Networks, folder: RunFolder) -> dict[str, Any] | None:
    """Return what a perfect predictor would reach, over the seeds that it was measured for; None if for none."""
    stem = folder.ceiling(experiment, 0).name.removesuffix("0.json")
    runs = [read_json(path, dict) for path in sorted(folder.ceiling(experiment, 0).parent.glob(f"{stem}*.json"))]
    for run in runs:
        if run.get("made_of") != data.fingerprint or not isinstance(run.get("test"), dict):
            raise ValueError(f"task: {folder} holds a ceiling of other networks ({stem}*.json); remove it")
    return {"runs": len(runs), **_spreads(runs)} if runs else None


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
    summary |= _spreads(runs)
    if "invariance_rms" in runs[0]:
        shares = [run["invariance_rms"] / run["test"]["rmse"] for run in runs if run["test"].get("rmse")]
        if len(shares) == len(runs):  # not without an error to compare with
            summary["invariance_rms_over_rmse"] = float(np.max(shares))
    return summary


def _point(share: float, runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the point of a learning curve: training networks, seeds, and mean and standard deviation of measures."""
    done = [run for run in runs if "test" in run]
    networks = float(np.mean([run["networks"]["train"] for run in done]))
    return {"share": share, "networks": networks, "runs": len(done), **_spreads(done)}


def _spreads(runs: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float | None]]:
    """Return mean and standard deviation over seeds of every measure."""
    spreads = {}
    for key in (key for key in SUMMARISED if key in runs[0]["test"]):
        values = [run["test"].get(key) for run in runs]
        known = all(value is not None for value in values)
        spreads[key] = {
            "mean": float(np.mean(values)) if known else None,
            # Relative to the first value, so that equal values, whose mean may be rounded, have a spread of exactly 0.
            "std": float(np.std(np.subtract(values, values[0]), ddof=1)) if known and len(values) > 1 else None,
        }
    return spreads

"""The report of a task: a table of each experiment, for the terminal and in Markdown, and plots."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..atomic_files import write_text
from ..reports.plots import embedding_map, literal, new_figure, predicted_against_true, save_figure
from ..reports.terminal import say, show_table
from ..similarity.layouts import layout
from .baselines import BASELINES
from .definitions import Experiment, Task
from .networks import Networks
from .run_folder import Run, RunFolder, read_array

if TYPE_CHECKING:
    from rich.console import Console

COLUMNS = {
    "Kendall's tau": "tau",
    "difference": "differences.tau",
    "R2": "r2",
    "MSE": "mse",
    "seconds": "seconds",
}
"""Heading of each column of a table -> its measure; those of differences are paired, to the reference."""
ACCURACY_COLUMNS = {**dict(list(COLUMNS.items())[:2]), "tau above 20 %": "tau_above", **dict(list(COLUMNS.items())[2:])}
"""The same for tasks whose target is an accuracy."""
CLASS_COLUMNS = {
    "accuracy": "accuracy",
    "difference": "differences.accuracy",
    "cross entropy": "cross_entropy",
    "seconds": "seconds",
}
"""The same for tasks whose target is a class."""
CEILING = "ceiling, a perfect predictor"
"""Title of the row of the tau that a perfect predictor of accuracies would reach."""


def columns(experiment: Mapping[str, Any]) -> dict[str, str]:
    """Return the columns of an experiment's table."""
    known = {key for method in experiment["methods"].values() for key in method}
    shown = ACCURACY_COLUMNS if "tau_above" in known else CLASS_COLUMNS if "accuracy" in known else COLUMNS
    return shown


def cells(method: Mapping[str, Any], shown: Mapping[str, str]) -> list[str]:
    """Return the cells of a method: mean and standard deviation over seeds, "-" where a measure is not defined.

    Differences stand with their standard error in brackets, "-" for the reference itself.
    """
    if "why_not" in method:
        return ["; ".join(method["why_not"]), *[""] * (len(shown) - 1)]
    return [_cell(method, key) for key in shown.values()]


def table(experiment: Mapping[str, Any]) -> list[list[str]]:
    """Return the rows of an experiment's table: title, cells by `columns`, and number of seeds; the ceiling is last."""
    shown = columns(experiment)
    rows = [[name, *cells(method, shown), str(method["runs"])] for name, method in experiment["methods"].items()]
    ceiling = experiment.get("ceiling")
    if ceiling is not None:
        rows.append([CEILING, *(_cell(ceiling, key) for key in shown.values()), str(ceiling["runs"])])
    return rows


def _cell(method: Mapping[str, Any], key: str) -> str:
    if key not in method and not key.startswith("differences."):
        return "-"
    if key == "seconds":
        return f"{method['seconds']:.0f}"
    if key.startswith("differences."):
        found = method.get("differences", {}).get(key.removeprefix("differences."))
        return "-" if found is None else f"{found['mean']:+.3f} ({found['standard_error']:.3f})"
    mean, std = method[key]["mean"], method[key]["std"]
    if mean is None:
        return "-"
    return f"{mean:.3g}" if std is None else f"{mean:.3g} ± {std:.2g}"


def about_columns(experiment: Mapping[str, Any]) -> str:
    """Return the sentence that says what the columns of an experiment's table are."""
    said = "Mean ± standard deviation over seeds"
    if experiment.get("reference") is None:
        return f"{said}."
    return (
        f"{said}; difference: paired, to {experiment['reference']!r} on the same test networks, with its "
        "standard error over test networks and seeds in brackets."
    )


def show_experiment(console: Console, experiment: Mapping[str, Any]) -> None:
    """Print the table of an experiment."""
    runs = max(method["runs"] for method in experiment["methods"].values())
    show_table(
        console,
        ["", *columns(experiment)],
        [row[:-1] for row in table(experiment)],
        title=f"{experiment['name']}: test networks, {runs} seed(s)",
    )
    say(console, about_columns(experiment))


def markdown(results: Mapping[str, Any]) -> str:
    """Return the tables of all experiments as Markdown."""
    lines = [
        f"# {results['title']}",
        "",
        f"`{results['target']}` of {results['networks']} networks ({results['weights']:,} weights); variance of the "
        f"label {results['variance']:.4g}.",
    ]
    for experiment in results["experiments"].values():
        shown = columns(experiment)
        lines += ["", f"## {experiment['name']}", "", f"| method | {' | '.join(shown)} | seeds |"]
        lines += ["|---" * (len(shown) + 2) + "|"]
        lines += [f"| {' | '.join(row)} |" for row in table(experiment)]
        lines += ["", about_columns(experiment)]
        for name, method in experiment["methods"].items():
            if "invariance_rms_over_rmse" in method:
                share = method["invariance_rms_over_rmse"]
                lines += [
                    "",
                    f"{name}: permuting hidden units moves predictions by {share:.1%} of the test RMSE at most.",
                ]
    return "\n".join(lines) + "\n"


def write_report(folder: RunFolder, task: Task, data: Networks, results: Mapping[str, Any]) -> None:
    """Write `results.md`, and for each experiment `scatter-*.png`, `embedding-*.png` and `size-*.png`."""
    write_text(folder.report, markdown(results))
    for experiment in task.experiments:
        found = results["experiments"].get(experiment.name)
        if found is None:
            continue
        seed = min(run["seed"] for method in found["methods"].values() for run in method["each"])
        parts = data.split(experiment, seed)
        predictions = {}
        for name, run in _runs(task, experiment, seed).items():
            if folder.predicted(run).exists():
                predictions[name] = read_array(folder.predicted(run), "predicted")
        first = folder.encodings(Run(experiment, next(iter(task.sne)), seed))
        if first.exists():
            embedding_map(
                folder.plot("embedding", experiment), layout(read_array(first, "encodings"), seed), data.targets,
                data.groups, parts["test"], label=task.target, limits=(None, None),
            )  # fmt: skip
        if not task.classes:
            _scatter(folder.plot("scatter", experiment), task, data, parts["test"], predictions)
        if found["by_training_size"]:
            _curves(folder.plot("size", experiment), found["by_training_size"])


def _runs(task: Task, experiment: Experiment, seed: int) -> dict[str, Run]:
    """Return the runs of a seed by the title of each row."""
    titles = {**{row: row for row in task.sne}, **{key: b.name for key, b in BASELINES.items()}}
    return {title: Run(experiment, row, seed) for row, title in titles.items()}


def _scatter(path: Path, task: Task, data: Networks, test: list[int], predictions: Mapping[str, np.ndarray]) -> None:
    """Plot predicted against true values, one panel per method whose predictions differ between networks."""
    shown = {name: p for name, p in predictions.items() if np.ptp(p) > 0}
    if not shown:
        return
    true = data.targets[test]
    predicted_against_true(path, {name: (true, p) for name, p in shown.items()}, task.target)


def _curves(path: Path, curves: Mapping[str, list[dict[str, Any]]]) -> None:
    """Plot the test error, or the accuracy, against the number of training networks: mean and spread over seeds."""
    classes = any("accuracy" in point for points in curves.values() for point in points)
    key = "accuracy" if classes else "mse"
    figure = new_figure(6.0, 4.2)
    axis = figure.subplots()
    for name, points in curves.items():
        networks = np.array([p["networks"] for p in points])
        mean = np.array([np.nan if p[key]["mean"] is None else p[key]["mean"] for p in points])
        spread = np.array([p[key]["std"] or 0.0 for p in points])
        (line,) = axis.plot(networks, mean, marker="o", markersize=4, label=literal(name))
        low = mean - spread if classes else np.maximum(mean - spread, mean / 10)  # a logarithmic axis has no zero
        axis.fill_between(networks, low, mean + spread, color=line.get_color(), alpha=0.15, linewidth=0)
    what, scale = ("accuracy", "linear") if classes else ("mean squared error", "log")
    axis.set(xscale="log", yscale=scale, xlabel="training networks", ylabel=f"{what} on test networks")
    axis.grid(alpha=0.25, which="both")
    axis.legend(frameon=False, fontsize=8)
    save_figure(figure, path)

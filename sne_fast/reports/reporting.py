"""Measures, the statistics baseline, tables, files and plots that the demo, `train` and the tasks report with."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from rich.table import Table

    from ..data.batch import WeightBatch


def measures(predicted: np.ndarray, true: np.ndarray) -> dict[str, float | None]:
    """Kendall's tau-b with its two-sided p-value, R2, mean absolute and root mean square error.

    tau and p are None for a prediction that is the same for all networks, where they are not defined.
    """
    import numpy as np
    from scipy.stats import kendalltau

    error = predicted - true
    constant = bool(np.all(predicted == predicted[0]))
    tau = None if constant else kendalltau(predicted, true)
    return {
        "tau": None if tau is None else float(tau.statistic),
        "tau_p": None if tau is None else float(tau.pvalue),
        "r2": float(1 - (error**2).sum() / ((true - true.mean()) ** 2).sum()),
        "mae": float(np.abs(error).mean()),
        "rmse": float(np.sqrt((error**2).mean())),
    }


def statistics_regression(
    batch: WeightBatch, target: np.ndarray, train: Sequence[int], seed: int, logit: bool = True
) -> np.ndarray:
    """Predictions `(len(batch),)` from layer statistics by gradient boosting, fitted on `train`.

    With `logit` the target, in [0, 1], gets the same transform as the predictor's, so that neither is favoured.
    """
    import numpy as np
    from sklearn.ensemble import GradientBoostingRegressor

    from ..nn.predictor import LOGIT_MARGIN
    from ..zoo.statistics import layer_statistics

    features = layer_statistics(batch)
    features = np.where(np.isnan(features), -1e3, features)  # a place of its own: trees split it off
    goals = np.asarray(target)[list(train)]
    if logit:
        goals = np.clip(goals, LOGIT_MARGIN, 1 - LOGIT_MARGIN)
        goals = np.log(goals / (1 - goals))
    model = GradientBoostingRegressor(
        n_estimators=400, learning_rate=0.03, max_depth=4, subsample=0.5, max_features=0.3, random_state=seed
    )
    predicted = model.fit(features[list(train)], goals).predict(features)
    return 1 / (1 + np.exp(-predicted)) if logit else predicted


def table(results: dict[str, dict[str, float | None]], networks: int) -> Table:
    """The measures of each model as a table for the terminal."""
    from rich.table import Table

    shown = Table(title=f"Accuracy of {networks} held-out networks", title_justify="left", box=None, pad_edge=False)
    shown.add_column("")
    for column in ("Kendall's tau", "p-value", "R2", "MAE", "RMSE"):
        shown.add_column(column, justify="right")
    for name, row in results.items():
        shown.add_row(
            name,
            *("-" if row[key] is None else f"{row[key]:.3f}" for key in ("tau",)),
            "-" if row["tau_p"] is None else f"{row['tau_p']:.1e}",
            *(f"{row[key]:.3f}" for key in ("r2", "mae", "rmse")),
        )
    return shown


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file, all or nothing."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_csv(path: Path, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Write a CSV file, all or nothing."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with open(partial, "w", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream)
            writer.writerow(columns)
            writer.writerows(rows)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def commit() -> str | None:
    """The commit of a checkout that this package is imported from, with "-dirty" if it has changes; None elsewhere."""
    import subprocess

    root = Path(__file__).resolve().parents[2]

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", root, *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        # An installed package may lie in a virtual environment inside somebody else's checkout.
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root:
            return None
        return git("describe", "--always", "--dirty", "--exclude=*", "--abbrev=40")
    except (OSError, subprocess.CalledProcessError):
        return None


def machine() -> dict[str, Any]:
    """Versions, cores and which CPU backend runs, for reports."""
    import platform

    import torch

    from .. import __version__
    from ..backends.cpu import library

    return {
        "sne_fast": __version__,
        "commit": commit(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_backend": "; ".join(library.reasons()) or library.isa(),
    }


def save_figure(figure: Any, path: Path) -> None:
    partial = path.with_name(f".{path.stem}.partial{path.suffix}")
    try:
        figure.savefig(partial, dpi=130)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def new_figure(width: float, height: float) -> Any:
    # Not pyplot: nothing global is touched, and no display is asked for.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _colours(groups: Sequence[str]) -> dict[str, Any]:
    import matplotlib

    names = sorted(set(groups))
    palette = matplotlib.colormaps["tab10" if len(names) <= 10 else "tab20"]
    return {name: palette(i % palette.N) for i, name in enumerate(names)}


def scatter(
    path: Path,
    true: np.ndarray,
    predictions: dict[str, np.ndarray],
    groups: Sequence[str],
    results: dict[str, dict[str, float | None]],
) -> None:
    """Predicted against true accuracy, one panel per model, coloured by architecture."""
    import numpy as np

    figure = new_figure(4.6 * len(predictions) + 2.0, 4.8)
    axes = figure.subplots(1, len(predictions), sharex=True, sharey=True, squeeze=False)[0]
    colours = _colours(groups)
    names = np.array(groups)
    for axis, (model, predicted) in zip(axes, predictions.items(), strict=True):
        axis.plot([0, 1], [0, 1], color="0.7", linewidth=1, zorder=0)
        for name, colour in colours.items():
            rows = names == name
            axis.scatter(true[rows], predicted[rows], s=26, color=colour, edgecolor="white", linewidth=0.4, label=name)
        row = results[model]
        axis.set_title(
            f"{model}\n" + rf"$\tau$ = {row['tau']:.2f}, $R^2$ = {row['r2']:.2f}, MAE = {row['mae']:.3f}", fontsize=10
        )
        axis.set(xlim=(0, 1), ylim=(0, 1), xlabel="true accuracy", aspect="equal")
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("predicted accuracy")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=8)
    save_figure(figure, path)


def embedding_map(
    path: Path,
    z: np.ndarray,
    target: np.ndarray,
    groups: Sequence[str],
    held_out: Sequence[int],
    seed: int,
    label: str = "accuracy",
    limits: tuple[float | None, float | None] = (0.0, 1.0),
) -> None:
    """t-SNE of the encodings of all networks, coloured by target and by architecture; held-out ones are ringed."""
    import numpy as np
    from sklearn.manifold import TSNE

    spread = z.std(0)
    scaled = (z - z.mean(0)) / np.where(spread > 0, spread, 1)
    perplexity = min(30.0, (len(z) - 1) / 3)
    places = TSNE(n_components=2, perplexity=perplexity, init="pca", random_state=seed).fit_transform(scaled)
    figure = new_figure(12.5, 5.2)
    left, right = figure.subplots(1, 2)
    shown = left.scatter(*places.T, c=target, cmap="viridis", vmin=limits[0], vmax=limits[1], s=30, linewidth=0)
    figure.colorbar(shown, ax=left, label=label)
    left.set_title(f"coloured by {label}", fontsize=10)
    names = np.array(groups)
    for name, colour in _colours(groups).items():
        rows = names == name
        right.scatter(*places[rows].T, color=colour, s=30, linewidth=0, label=name)
    right.set_title("coloured by architecture", fontsize=10)
    right.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=8)
    for axis in (left, right):
        axis.scatter(*places[list(held_out)].T, facecolor="none", edgecolor="black", s=30, linewidth=0.8)
        axis.set(xticks=[], yticks=[])
    figure.suptitle(f"t-SNE of the encodings of {len(z)} networks (ringed: held out)", fontsize=11)
    save_figure(figure, path)

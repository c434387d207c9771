"""Plots of predictions and encodings, as PNG files.

Figures are made without pyplot, which keeps global state and may ask for a display.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..atomic_files import replacing
from ..failures import utf8
from .measures import number_or_dash


def new_figure(width: float, height: float) -> Any:
    """Return an empty matplotlib figure, its size in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure to a file, whole or not at all; the suffix of the path decides the format."""
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=130, format=path.suffix.removeprefix("."))


def literal(text: str) -> str:
    """Return a name as matplotlib's labels show it as it is, not as mathematics, and with an entry in the legend."""
    escaped = utf8(text).replace("$", r"\$")
    return f" {escaped}" if escaped.startswith("_") else escaped


def _colours(groups: Sequence[str]) -> dict[str, Any]:
    import matplotlib

    names = sorted(set(groups))
    palette = matplotlib.colormaps["tab10" if len(names) <= 10 else "tab20"]
    return {name: palette(i % palette.N) for i, name in enumerate(names)}


def scatter(
    path: Path,
    true: np.ndarray,
    predictions: Mapping[str, np.ndarray],
    groups: Sequence[str],
    results: Mapping[str, Mapping[str, float | None]],
) -> None:
    """Plot predicted against true accuracy, one panel per model, coloured by group.

    Args:
        true: accuracies `(n,)`, in [0, 1].
        predictions: predicted accuracies `(n,)` by model.
        groups: the group of each of the n networks, such as its architecture.
        results: the measures of each model, for the titles.
    """
    figure = new_figure(4.6 * len(predictions) + 2.0, 4.8)
    axes = figure.subplots(1, len(predictions), sharex=True, sharey=True, squeeze=False)[0]
    colours = _colours(groups)
    names = np.array(groups)
    for axis, (model, predicted) in zip(axes, predictions.items(), strict=True):
        axis.plot([0, 1], [0, 1], color="0.7", linewidth=1, zorder=0)
        for name, colour in colours.items():
            rows = names == name
            axis.scatter(
                true[rows], predicted[rows], s=26, color=colour, edgecolor="white", linewidth=0.4, label=literal(name)
            )
        tau, r2, mae = (
            number_or_dash(results[model][key], form) for key, form in (("tau", ".2f"), ("r2", ".2f"), ("mae", ".3f"))
        )
        axis.set_title(literal(model) + "\n" + rf"$\tau$ = {tau}, $R^2$ = {r2}, MAE = {mae}", fontsize=10)
        axis.set(xlim=(0, 1), ylim=(0, 1), xlabel="true accuracy", aspect="equal")
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("predicted accuracy")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=8)
    save_figure(figure, path)


def learning_curve(path: Path, losses: Mapping[str, Sequence[float]], kept: int) -> None:
    """Plot the loss of each epoch.

    Args:
        losses: the losses by name, such as "training"; one without values is left out.
        kept: the epoch whose parameters were kept.
    """
    figure = new_figure(6.0, 4.2)
    axis = figure.subplots()
    for name, values in losses.items():
        if values:
            axis.plot(range(1, len(values) + 1), values, marker="o", markersize=3, label=literal(name))
    axis.axvline(kept + 1, color="0.7", linewidth=1, zorder=0, label="kept")
    positive = all(value > 0 for values in losses.values() for value in values)
    axis.set(xlabel="epoch", ylabel="loss", yscale="log" if positive else "linear")
    axis.grid(alpha=0.25, which="both")
    axis.legend(frameon=False, fontsize=8)
    save_figure(figure, path)


def predicted_against_true(path: Path, panels: Mapping[str, tuple[np.ndarray, np.ndarray]], label: str) -> None:
    """Plot predicted against true values, one panel for each pair of true and predicted values `(n,)`.

    Args:
        panels: the pairs by the title of their panel.
        label: name of the values, such as "accuracy"; "" where each panel has its own.
    """
    figure = new_figure(3.2 * len(panels), 3.4)
    axes = figure.subplots(1, len(panels), sharex=bool(label), sharey=bool(label), squeeze=False)[0]
    for axis, (name, (true, predicted)) in zip(axes, panels.items(), strict=True):
        low, high = float(true.min()), float(true.max())
        axis.plot([low, high], [low, high], color="0.7", linewidth=1, zorder=0)
        axis.scatter(true, predicted, s=12, linewidth=0, alpha=0.6)
        axis.set_title(literal(name), fontsize=9)
        axis.set_xlabel(f"true {literal(label)}", fontsize=8)
        axis.grid(alpha=0.25)
    axes[0].set_ylabel(f"predicted {literal(label)}", fontsize=8)
    save_figure(figure, path)


def confusion_matrix(path: Path, true: np.ndarray, predicted: np.ndarray, names: Sequence[str]) -> None:
    """Plot how often each class was predicted of each true class, both `(n,)` positions in `names`."""
    counts = np.zeros((len(names), len(names)), int)
    np.add.at(counts, (true.astype(int), predicted.astype(int)), 1)
    figure = new_figure(1.6 + 0.4 * len(names), 1.4 + 0.4 * len(names))
    axis = figure.subplots()
    axis.imshow(counts, cmap="Blues")
    for (row, column), count in np.ndenumerate(counts):
        dark = count > counts.max() / 2
        axis.text(column, row, count, ha="center", va="center", fontsize=8, color="white" if dark else "black")
    labels = [literal(name) for name in names]
    axis.set_xticks(range(len(names)), labels, rotation=90, fontsize=8)
    axis.set_yticks(range(len(names)), labels, fontsize=8)
    axis.set(xlabel="predicted", ylabel="true")
    save_figure(figure, path)


SHOWN_GROUPS = 20
"""Colours of a plot of one column; where there are more groups, the smallest ones share the last colour."""


def embedding_map(
    path: Path,
    places: np.ndarray,
    target: np.ndarray,
    groups: Sequence[str],
    held_out: Sequence[int],
    label: str = "accuracy",
    limits: tuple[float | None, float | None] = (0.0, 1.0),
) -> None:
    """Plot a map of the encodings of all networks, coloured by target and by group, held-out networks ringed.

    Args:
        places: positions `(n, 2)`, as :func:`sne_fast.similarity.layout` returns them.
        target: the colour of each of the n networks in the left panel.
        groups: the group of each network, such as its architecture, for the right panel.
        held_out: positions of the held-out networks.
        label: name of the target.
        limits: least and greatest value of the colour scale; None takes that of the targets.
    """
    figure = new_figure(12.5, 5.2)
    left, right = figure.subplots(1, 2)
    _by_number(left, places, target, label, s=30, vmin=limits[0], vmax=limits[1])
    left.set_title(f"coloured by {literal(label)}", fontsize=10)
    _by_group(right, places, groups, s=30)
    right.set_title("coloured by architecture", fontsize=10)
    for axis in (left, right):
        axis.scatter(*places[list(held_out)].T, facecolor="none", edgecolor="black", s=30, linewidth=0.8)
        axis.set(xticks=[], yticks=[])
    figure.suptitle(f"t-SNE of the encodings of {len(places)} networks (ringed: held out)", fontsize=11)
    save_figure(figure, path)


def column_map(path: Path, places: np.ndarray, values: np.ndarray | Sequence[str], label: str) -> None:
    """Plot a map of networks, coloured by a column.

    Args:
        places: positions `(n, 2)`.
        values: numbers `(n,)`, NaN where one is not known, or names of groups, of which the largest are told apart.
        label: name of the column.
    """
    figure = new_figure(8.0, 6.0)
    axis = figure.subplots()
    size = float(np.clip(20_000 / max(1, len(places)), 3, 30))
    if isinstance(values, np.ndarray):
        axis.scatter(*places[np.isnan(values)].T, color="0.8", s=size, linewidth=0)
        known = ~np.isnan(values)
        _by_number(axis, places[known], values[known], label, s=size)
    else:
        counts = Counter(values)
        shown = dict(counts.most_common(SHOWN_GROUPS if len(counts) <= SHOWN_GROUPS else SHOWN_GROUPS - 1))
        others = f"{len(counts) - len(shown)} others"
        _by_group(axis, places, [name if name in shown else others for name in values], s=size)
    axis.set(xticks=[], yticks=[])
    axis.set_title(f"{len(places):,} networks by {literal(label)}", fontsize=11)
    save_figure(figure, path)


def _by_number(axis: Any, places: np.ndarray, values: np.ndarray, label: str, **options: Any) -> None:
    shown = axis.scatter(*places.T, c=values, cmap="viridis", linewidth=0, **options)
    axis.figure.colorbar(shown, ax=axis, label=literal(label))


def _by_group(axis: Any, places: np.ndarray, groups: Sequence[str], **options: Any) -> None:
    names = np.array(groups)
    for name, colour in _colours(groups).items():
        axis.scatter(*places[names == name].T, color=colour, linewidth=0, label=literal(name), **options)
    axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=8)

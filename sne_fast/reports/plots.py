"""Plots of predictions and encodings, as PNG files.

Figures are made without pyplot, which keeps global state and may ask for a display.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..atomic_files import replacing
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
    escaped = text.replace("$", r"\$")
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
    """Plot the t-SNE of the encodings of all networks, coloured by target and by group, held-out networks ringed.

    Args:
        z: encodings `(n, h)`.
        target: the colour of each of the n networks in the left panel.
        groups: the group of each network, such as its architecture, for the right panel.
        held_out: positions of the held-out networks.
        seed: of the t-SNE.
        label: name of the target.
        limits: least and greatest value of the colour scale; None takes that of the targets.
    """
    from sklearn.manifold import TSNE

    spread = z.std(0)
    scaled = (z - z.mean(0)) / np.where(spread > 0, spread, 1)
    perplexity = min(30.0, (len(z) - 1) / 3)
    places = TSNE(n_components=2, perplexity=perplexity, init="pca", random_state=seed).fit_transform(scaled)
    figure = new_figure(12.5, 5.2)
    left, right = figure.subplots(1, 2)
    shown = left.scatter(*places.T, c=target, cmap="viridis", vmin=limits[0], vmax=limits[1], s=30, linewidth=0)
    figure.colorbar(shown, ax=left, label=literal(label))
    left.set_title(f"coloured by {literal(label)}", fontsize=10)
    names = np.array(groups)
    for name, colour in _colours(groups).items():
        rows = names == name
        right.scatter(*places[rows].T, color=colour, s=30, linewidth=0, label=literal(name))
    right.set_title("coloured by architecture", fontsize=10)
    right.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=8)
    for axis in (left, right):
        axis.scatter(*places[list(held_out)].T, facecolor="none", edgecolor="black", s=30, linewidth=0.8)
        axis.set(xticks=[], yticks=[])
    figure.suptitle(f"t-SNE of the encodings of {len(z)} networks (ringed: held out)", fontsize=11)
    save_figure(figure, path)

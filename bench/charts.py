"""Charts of the benchmark report: throughput by case, and time and memory as the batch grows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from measured import Results

# Keys of `seconds` in the results, in the order of the bars.
NAMES = {"sne_fast": "sne_fast", "eager": "eager padded", "compile": "torch.compile", "loop": "eager, one by one"}
COLOURS = {"sne_fast": "#0072b2", "eager": "#d55e00", "compile": "#e69f00", "loop": "#999999"}
BAR = 0.2
LARGE_NETWORK_CASES = ("gpt2",)


def plot_throughput(results: Results, path: Path) -> None:
    """Draw weights per second of every case and contender, one panel per mode, into `path`."""
    modes = [mode for mode in ("forward", "training") if any(m == mode for _, m in results.entries)]
    figure, axes = plt.subplots(
        1, len(modes), figsize=(5 * len(modes), 4.0), squeeze=False, sharey=True, layout="constrained"
    )
    shown: dict[str, Any] = {}
    for axis, mode in zip(axes[0], modes, strict=True):
        cases = [case for case in results.cases if (case, mode) in results.entries]
        for k, case in enumerate(cases):
            info = results.entries[case, mode]
            present = [name for name in NAMES if name in info["seconds"]]
            for n, name in enumerate(present):  # centred on the tick, however many contenders there are
                at = k + BAR * (n - (len(present) - 1) / 2)
                bars = axis.bar(at, info["weights"] / info["seconds"][name], 0.95 * BAR, color=COLOURS[name])
                shown.setdefault(name, bars)
            if info["skipped"]:
                axis.annotate(
                    "padded form\ndoes not fit", (k + 0.75 * BAR, 0.03), xycoords=("data", "axes fraction"),
                    rotation=90, fontsize=7, color="#666666", ha="left", va="bottom",
                )  # fmt: skip
        axis.set(yscale="log", title=mode, ylabel="weights per second" if mode == modes[0] else "")
        axis.yaxis.set_major_formatter(FuncFormatter(_count))
        axis.set_xlim(-0.6, len(cases) - 0.4)
        axis.set_xticks(range(len(cases)), cases)
        _style(axis)
    # Above the panels, so that it covers no bar.
    figure.legend(
        [shown[name] for name in NAMES if name in shown], [NAMES[name] for name in NAMES if name in shown],
        loc="outside upper center", ncols=len(NAMES), fontsize=9, frameon=False,
    )  # fmt: skip
    figure.savefig(path, dpi=130)
    plt.close(figure)


def plot_scaling(results: Results, path: Path) -> None:
    """Draw seconds and peak memory of a forward pass against the number of weights into `path`."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.0), layout="constrained")
    labels = {"networks": "more networks (SAB)", "network": "one larger network (ISAB)"}
    # The lines nearly coincide in the left panel: the second is dashed and has open markers.
    styles = ({"color": "#0072b2", "marker": "o", "markersize": 8}, {
        "color": "#d55e00", "marker": "s", "markersize": 5, "linestyle": "--", "markerfacecolor": "white",
    })  # fmt: skip
    for info, style in zip(results.scaling, styles, strict=False):
        points = _points(results, info)
        weights = [p["weights"] for p in points]
        axes[0].plot(weights, [p["seconds"] for p in points], **style)
        axes[1].plot(weights, [p["peak_bytes"] / 2**20 for p in points], label=labels[info["family"]], **style)
    for axis, label in zip(axes, ("seconds of a forward pass", "peak memory above the batch, MiB"), strict=True):
        axis.set(xscale="log", yscale="log", xlabel="weights in the batch", title=label)
        axis.xaxis.set_major_formatter(FuncFormatter(_count))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        _style(axis)
    figure.legend(loc="outside upper center", ncols=2, fontsize=9, frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _points(results: Results, info: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the measured sizes; the large networks of the cases continue the line of one growing network."""
    points = list(info["points"])
    if info["family"] == "network":
        for case in LARGE_NETWORK_CASES:
            speed, memory = (results.entries.get((case, mode)) for mode in ("forward", "memory of forward"))
            if speed and memory and speed["weights"] > points[-1]["weights"]:
                points.append(
                    {
                        "weights": speed["weights"],
                        "seconds": speed["seconds"]["sne_fast"],
                        "peak_bytes": memory["peak_bytes"]["sne_fast"],
                    }
                )
    return points


def _style(axis: Axes) -> None:
    axis.yaxis.set_major_locator(LogLocator(base=10))
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.grid(axis="y", alpha=0.3)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def _count(value: float, _: int) -> str:
    for limit, unit in ((1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:g}{unit}"
    return f"{value:g}"

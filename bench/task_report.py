"""Write the tables of experiments of docs/experiments.md and the README from committed JSON.

.venv/bin/python bench/task_report.py    # from every bench/results/task_*.json, the results.json of `sne-fast task`
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sne_fast.tasks.baselines import BASELINES
from sne_fast.tasks.definitions import TASKS
from sne_fast.tasks.report import ACCURACY_COLUMNS, CLASS_COLUMNS, COLUMNS, cells, columns, table

sys.path.insert(0, str(Path(__file__).parent))

from report import README, RESULTS, ROOT, insert

PAGE = ROOT / "docs" / "experiments.md"
MARKERS = "<!-- tasks:begin -->", "<!-- tasks:end -->"
RESULTS_MARKERS = "<!-- results:begin -->", "<!-- results:end -->"
DEMO_MARKERS = "<!-- demo:begin -->", "<!-- demo:end -->"
DEMO_MEASURES = {"tau": "Kendall's tau", "r2": "R2", "mae": "MAE", "rmse": "RMSE"}
SEEDS = 3
# Columns of the README's table. The baselines of every method, ablations included, are in docs/experiments.md.
SUMMARY = {
    "SNE": "SNE",
    "SNE and trees, mean": "SNE and trees",
    "layer statistics, boosted trees": "layer statistics",
    "the 23 statistics, boosted trees": "the 23 statistics",
    "DeepSets": "DeepSets",
    "NFN": "NFN",
}


def read(folder: Path) -> list[dict[str, Any]]:
    """Return the contents of every `task_*.json` in `folder`, by name."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("task_*.json"))]


def section(folder: Path) -> str:
    """Return one table of all tasks that predict accuracies, one of other numbers, and one of classes."""
    lines = []
    for wanted in (ACCURACY_COLUMNS, COLUMNS, CLASS_COLUMNS):
        rows = _rows(folder, wanted)
        if rows:
            shown = list(wanted)[:-1]
            lines += ["", f"| experiment | method | {' | '.join(shown)} | seeds |", "|---" * (len(shown) + 3) + "|"]
            lines += rows
    return "\n".join([*lines, *_curves(folder), "", ""])


def _name(results: Mapping[str, Any], experiment: Mapping[str, Any]) -> str:
    """Return the name of an experiment, with the number of networks of all zoos where it is not the task's own."""
    name: str = experiment["name"]
    count = results["networks"]
    return name if count == TASKS[results["task"]].networks else f"{name}, {count:,} networks"


def _curves(folder: Path) -> list[str]:
    """Return a table for each learning curve: a column for every number of training networks."""
    lines: list[str] = []
    for results in read(folder):
        for experiment in results["experiments"].values():
            curves = experiment["by_training_size"]
            wanted = columns(experiment)
            name = "MSE" if wanted is COLUMNS else next(iter(wanted))
            sizes = sorted({point["networks"] for curve in curves.values() for point in curve})
            if not sizes:
                continue
            title = f"`{results['task']}`, {_name(results, experiment)}: {name} from so many networks"
            lines += [
                "",
                f"| {title} | {' | '.join(f'{size:,.0f}' for size in sizes)} |",
                "|---" * (len(sizes) + 1) + "|",
            ]
            for method, curve in curves.items():
                if method == BASELINES["mean"].name:
                    continue
                of_size = {point["networks"]: cells(point, {name: wanted[name]})[0] for point in curve}
                lines.append(f"| {method} | {' | '.join(of_size.get(size, '-') for size in sizes)} |")
    return lines


def _rows(folder: Path, wanted: Mapping[str, str]) -> list[str]:
    """Return the rows of experiments whose tables have these columns, without the seconds."""
    lines = []
    for results in read(folder):
        for experiment in results["experiments"].values():
            if columns(experiment) is not wanted:
                continue
            title = f"`{results['task']}`, {_name(results, experiment)}"
            for name, *numbers, _, runs in table(experiment):
                if "why_not" not in experiment["methods"].get(name, {}):
                    lines.append(f"| {title} | {name} | {' | '.join(numbers)} | {runs} |")
    return lines


def summary(folder: Path) -> str:
    """Return the README's table: mean Kendall's tau over three seeds, fewer where it says so, a row per experiment."""
    lines = [f"| Kendall's tau | {' | '.join(SUMMARY.values())} |", f"|---|{'---:|' * len(SUMMARY)}"]
    for results in read(folder):
        for experiment in results["experiments"].values():
            if columns(experiment) is CLASS_COLUMNS:
                continue
            shown = []
            for name in SUMMARY:
                method = experiment["methods"].get(name, {})
                fewer = f" ({method['runs']} of 3 seeds)" if method.get("runs", SEEDS) < SEEDS else ""
                shown.append(f"{method['tau']['mean']:.3f}{fewer}" if "tau" in method else "-")
            lines.append(f"| `{results['task']}`: {_name(results, experiment)} | {' | '.join(shown)} |")
    return "\n".join([*lines, ""])


def demo(folder: Path) -> str:
    """Return the table of the demo: held-out networks, seed 0, and tau of the other seeds of `demo*.json`."""
    files = sorted(folder.glob("demo*.json"))
    first, *others = (json.loads(file.read_text(encoding="utf-8"))["held_out"]["models"] for file in files)
    seeds = ", ".join(file.stem.removeprefix("demo_seed") for file in files[1:])
    header = [*DEMO_MEASURES.values(), f"tau, seeds {seeds}"]
    lines = [f"| accuracy of held-out networks | {' | '.join(header)} |", f"|---|{'---:|' * len(header)}"]
    for name, found in first.items():
        cells = ["-" if found[key] is None else f"{found[key]:.3f}" for key in DEMO_MEASURES]
        rest = ["-" if other[name]["tau"] is None else f"{other[name]['tau']:.3f}" for other in others]
        lines.append(f"| {name} | {' | '.join([*cells, ', '.join(rest)])} |")
    return "\n".join([*lines, ""])


def main() -> None:
    insert(PAGE, section(RESULTS), *MARKERS)
    insert(PAGE, demo(RESULTS), *DEMO_MARKERS)
    insert(README, summary(RESULTS), *RESULTS_MARKERS)
    print(f"written to {PAGE} and {README}")


if __name__ == "__main__":
    main()

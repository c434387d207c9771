"""Write the README's tables of experiments from committed JSON.

.venv/bin/python bench/task_report.py    # from every bench/results/task_*.json, the results.json of `sne-fast task`
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from sne_fast.tasks.report import cells

sys.path.insert(0, str(Path(__file__).parent))

from report import README, RESULTS, insert

MARKERS = "<!-- tasks:begin -->", "<!-- tasks:end -->"


def section(folder: Path) -> str:
    """One table of all tasks: experiment, method, tau, R2, MSE, seeds."""
    lines = ["| experiment | method | Kendall's tau | R2 | MSE | seeds |", "|---|---|---|---|---|---|"]
    for path in sorted(folder.glob("task_*.json")):
        results = json.loads(path.read_text(encoding="utf-8"))
        for experiment in results["experiments"].values():
            for name, method in experiment["methods"].items():
                if "why_not" in method:
                    continue
                numbers = cells(method)[:3]
                title = f"`{results['task']}`, {experiment['name']}"
                lines.append(f"| {title} | {name} | {' | '.join(numbers)} | {method['runs']} |")
    return "\n".join(["", *lines, "", ""])


if __name__ == "__main__":
    insert(README, section(RESULTS), *MARKERS)
    print(f"written to {README}")

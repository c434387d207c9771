"""Write the tables of docs/agreement.md from bench/results/agreement.json.

python bench/agreement_report.py
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from agreement import RESULTS, SOURCES, agrees
from report import ROOT, insert

PAGE = ROOT / "docs" / "agreement.md"
MARKERS = "<!-- agreement:begin -->", "<!-- agreement:end -->"
WORDS = {
    "state_dict": "its state dict",
    "bin": "that, written by `torch.save`",
    "folder": "its folder of `save_pretrained`",
    "folder_rebuilt": "that, rebuilt by `transformers`",
}
WRITTEN_DOWN = ("torchvision/", "timm/")
WORST = 10


def section(results: dict[str, Any]) -> str:
    """Return the tables as Markdown."""
    rows = [row for row in results["rows"] if "differs" in row]
    lines = [*_totals(rows, results["versions"]), "", *_correlations(rows), "", *_failures(rows), "", *_absent(results)]
    return "\n".join(lines) + "\n"


def _totals(rows: list[dict[str, Any]], versions: dict[str, str]) -> list[str]:
    named = [row for row in rows if row["name"].startswith(WRITTEN_DOWN)]
    parts = [row for row in rows if row not in named], named
    families = {row["name"].partition("/")[0] for row in parts[0]}
    lines = [
        f"transformers {versions['transformers']}, torch {versions['torch']}: {len(parts[0])} classes of "
        f"{len(families)} model types, and {len(named)} networks of torchvision and timm.",
        "",
        "| z of the module is that of | transformers | | torchvision, timm | |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for source in SOURCES:
        cells = []
        for part in parts:
            compared = [row for row in part if source in row["differs"]]
            count = sum(agrees(row, source) for row in compared)
            share = f"{100 * count / len(compared):.1f} %" if compared else ""
            cells += [f"{count} of {len(compared)}" if compared else "", share]
        lines.append(f"| {WORDS[source]} | {' | '.join(cells)} |")
    return lines


def _correlations(rows: list[dict[str, Any]]) -> list[str]:
    found = sorted((row["spearman"], row["name"]) for row in rows if row.get("spearman") is not None)
    values = [value for value, _ in found]
    high = sum(value >= 0.9 for value in values)
    return [
        f"Rank correlation (Spearman) of the order of layers by names with the order of definition: median "
        f"{statistics.median(values):.3f}, at least 0.9 for {high} of {len(values)} networks. The lowest {WORST}:",
        "",
        "| network | rank correlation |",
        "| --- | ---: |",
        *(f"| `{name}` | {value:.2f} |" for value, name in found[:WORST]),
    ]


def _failures(rows: list[dict[str, Any]]) -> list[str]:
    """Return a line for each model type whose sources differ from its module, with the reason."""
    grouped: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        family, _, name = row["name"].partition("/")
        failed = tuple(source for source in SOURCES if source in row["differs"] and not agrees(row, source))
        if failed:
            reason = row["differs"][failed[-1] if failed[-1] == "folder_rebuilt" else failed[0]]
            kind = "experts" if "experts" in reason and reason.startswith("tensors") else _reason(reason)
            words = ", ".join(
                WORDS[source].split(",")[0] + ("" if "," not in WORDS[source] else "*") for source in failed
            )
            grouped.setdefault((words, kind, "" if kind == "experts" else family), []).append(name)
    experts = [(words, names) for (words, kind, _), names in grouped.items() if kind == "experts"]
    lines = []
    for words, names in experts:
        lines += [
            f"Experts, which modules hold stacked and files one by one ({words} differs; {len(names)} classes): "
            f"{_listed(names)}.",
            "",
        ]
    lines += ["The other networks that differ:", "", "| network | differs | first difference |", "| --- | --- | --- |"]
    for (words, kind, family), names in grouped.items():
        if kind != "experts":
            lines.append(f"| {family}: {_listed(names)} | {words} | {kind} |")
    return lines


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _reason(difference: str) -> str:
    """Return a difference in words, with the first tensor of each kind."""
    text = re.sub(r"((?:^|: )\d+ (?:lacking|more): [^,;]+)[^;]*", r"\1", difference)
    text = text.replace("tensors: ", "").replace("order: ", "").replace("types: ", "types: ")
    return re.sub(r"([\w-]+(?:\.[\w-]+)+)", r"`\1`", text.replace("|", "/"))[:300]


def _absent(results: dict[str, Any]) -> list[str]:
    counts: dict[str, int] = {}
    for row in results["rows"]:
        if "not_built" in row:
            kind = row["not_built"].partition(":")[0]
            counts[kind] = counts.get(kind, 0) + 1
    failed = [row for row in results["rows"] if "failed" in row]
    shown = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items(), key=lambda pair: -pair[1]))
    lines = [
        f"Not compared, since no tiny configuration was found that builds: {sum(counts.values())} classes ({shown})."
    ]
    if failed:
        lines.append(
            "Not compared, since saving failed: " + "; ".join(f"`{r['name']}` ({r['failed'][:80]})" for r in failed)
        )
    return lines


if __name__ == "__main__":
    insert(PAGE, section(json.loads(RESULTS.read_text(encoding="utf-8"))), *MARKERS)

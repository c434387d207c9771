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
SHORT = {"state_dict": "state dict", "bin": "`.bin`", "folder": "folder", "folder_rebuilt": "rebuilt folder"}
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
    """Return a line for each model type whose sources differ from its module, with the first difference."""
    grouped: dict[tuple[str, str], list[tuple[str, str]]] = {}
    experts: list[str] = []
    for row in rows:
        family, _, name = row["name"].partition("/")
        failed = [source for source in SOURCES if source in row["differs"] and not agrees(row, source)]
        if not failed:
            continue
        difference = row["differs"][failed[0]]
        if failed == ["folder"] and difference.startswith("tensors") and "experts" in difference:
            experts.append(name)
        else:
            grouped.setdefault((family, ", ".join(SHORT[source] for source in failed)), []).append((name, difference))
    lines = [
        f"Of {len(experts)} classes the folder differs since modules hold experts stacked and files hold them one by "
        f"one: {_listed(experts)}.",
        "",
        "The other networks that differ, with the first difference of the first class:",
        "",
        "| network | what differs | how |",
        "| --- | --- | --- |",
    ]
    for (family, failed), entries in grouped.items():
        lines.append(f"| {family}: {_listed(name for name, _ in entries)} | {failed} | {_reason(entries[0][1])} |")
    return lines


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _reason(difference: str) -> str:
    """Return a difference in words, with the first tensor of each kind."""
    kind, _, text = difference.partition(": ")
    if kind == "tensors":
        parts = [part.partition(",")[0].replace(": ", ", as ") for part in text.split("; ")]
        words = {"lacking": "of the module alone", "more": "of the file alone"}
        text = "; ".join(re.sub(r"lacking|more", lambda found: words[found[0]], part, count=1) for part in parts)
    elif kind not in ("order", "layers", "types"):
        text = difference.replace("'", "").partition(" and ")[0]
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

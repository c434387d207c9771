"""Write the tables and charts of docs/benchmarks.md, and the README's table of speed, from committed JSON.

    python bench/report.py [bench/results/NAME.json ...]      # the newest of bench/results/ by default

The first file is the main run. Entries that a later file measured again (`pytest bench -k ...`) replace those of the
main run, and the text says so. Results are refused if they are not committed, were taken at less than full size or
with fewer than 5 rounds, or have no passed correctness check. `--preview DIR` accepts any results, writes into DIR
instead, and marks the page as a preview.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from charts import plot_scaling, plot_throughput
from measured import MODES, Refused, Results, load

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
README = ROOT / "README.md"
PAGE = ROOT / "docs" / "benchmarks.md"
FIGURES = ROOT / "docs" / "figures"
BEGIN, END = "<!-- benchmark:begin -->", "<!-- benchmark:end -->"
SPEED_MARKERS = "<!-- speed:begin -->", "<!-- speed:end -->"


# --------------------------------------------------------------------------------------------------------------- text


def _count(n: float) -> str:
    return f"{n / 1e6:.1f}M" if n >= 1e6 else f"{n / 1e3:.1f}k"


def _rate(weights: float, seconds: float) -> str:
    return f"{weights / seconds / 1e6:.3g}"


def _bytes(n: float) -> str:
    return f"{n / 2**30:.2f} GiB" if n >= 0.1 * 2**30 else f"{n / 2**20:.0f} MiB"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    rule = ["---", *["---:"] * (len(header) - 1)]
    return ["| " + " | ".join(cells) + " |" for cells in (header, rule, *rows)]


def _ratio(info: dict[str, Any], baseline: str, notes: list[str]) -> str:
    if baseline in info["ratios"]:
        return f"{info['ratios'][baseline]:.3g}x"
    why = info["skipped"].get(baseline)
    if why is None:
        return ""
    if why not in notes:
        notes.append(why)
    return f"({notes.index(why) + 1})"


def speed_table(results: Results) -> list[str]:
    rows, notes = [], []
    for case in results.cases:
        for mode in MODES:
            info = results.entries.get((case, mode))
            if info is not None:
                rows.append(
                    [
                        f"`{case}` {mode}",
                        _count(info["weights"]),
                        _rate(info["weights"], info["seconds"]["sne_fast"]),
                        *(_ratio(info, baseline, notes) for baseline in ("eager", "compile", "loop")),
                        f"{100 * info['fraction_of_limit']:.0f} %",
                        str(info["rounds"]),
                    ]
                )
    header = [
        "case",
        "weights",
        "M weights/s",
        "vs eager padded",
        "vs torch.compile",
        "vs one by one",
        "of limit",
        "rounds",
    ]
    lines = _table(header, rows)
    return [*lines, "", *(f"({n + 1}) {note}.  " for n, note in enumerate(notes))]


def memory_table(results: Results) -> list[str]:
    rows, notes = [], []
    for (case, mode), info in results.entries.items():
        if mode.startswith("memory"):
            cells = []
            for name in ("sne_fast", "eager"):
                if name in info["peak_bytes"]:
                    cells.append(_bytes(info["peak_bytes"][name]))
                else:
                    cells.append(_ratio({"ratios": {}, **info}, name, notes))
            rows.append([f"`{case}` {mode.removeprefix('memory of ')}", *cells])
    lines = _table(["peak memory above the loaded batch", "sne_fast", "eager padded"], rows) if rows else []
    return [*lines, "", *(f"({n + 1}) {note}.  " for n, note in enumerate(notes))]


def op_table(results: Results) -> list[str]:
    rows = [
        [
            f"`chunk_encode` {mode.removeprefix('chunk_encode ')}, `{case}`",
            f"{info['fraction_of_limit'] * info['product_rate_median'] / 1e9:.0f} GFLOP/s",
            f"{info['product_rate_median'] / 1e9:.0f} GFLOP/s",
            f"{100 * info['fraction_of_limit']:.0f} %",
        ]
        for (case, mode), info in results.entries.items()
        if mode.startswith("chunk_encode")
    ]
    header = ["op", "reached", "best 8192 x 64 by 64 x 192 product", "fraction"]
    return _table(header, rows) if rows else []


def scaling_text(results: Results) -> list[str]:
    lines = []
    for info in results.scaling:
        worst = max(info["time_per_weight_over_first"].values(), key=lambda g: abs(g - 1))
        first = _count(float(next(iter(info["time_per_weight_over_first"]))))
        last = _count(info["points"][-1]["weights"])
        what = "as the number of networks grows" if info["family"] == "networks" else "as one network grows (ISAB)"
        lines.append(
            f"Forward time per weight from {first} to {last} weights, {what}: at most {abs(worst - 1):.0%} off.  "
        )
    return lines


def summary_table(results: Results) -> list[str]:
    """Return the README's table: forward and training speed, and peak memory, against eager padded PyTorch."""
    rows = []
    for case in results.cases:
        forward, training = (results.entries.get((case, mode)) for mode in ("forward", "training"))
        memory = results.entries.get((case, "memory of training")) or results.entries.get((case, "memory of forward"))
        if forward is None:
            continue
        cells = [f"`{case}`", _count(forward["weights"])]
        for info, baselines in ((forward, ("eager", "compile")), (training, ("eager",))):
            if info is None:
                cells += ["-"] * (1 + len(baselines))
            else:
                cells += [_rate(info["weights"], info["seconds"]["sne_fast"])]
                cells += [f"{info['ratios'][name]:.3g}x" if name in info["ratios"] else "-" for name in baselines]
        peaks = memory["peak_bytes"] if memory else {}
        cells.append(" / ".join(_bytes(peaks[name]) if name in peaks else "-" for name in ("sne_fast", "eager")))
        rows.append(cells)
    header = [
        "case", "weights", "forward, M/s", "vs eager", "vs compile", "training, M/s", "vs eager",
        "peak memory, ours / eager",
    ]  # fmt: skip
    return _table(header, rows)


def section(results: Results, plots: Sequence[Path], base: Path, preview: bool) -> str:
    m = results.machine
    versions = ", ".join(f"{name} {v}" for name, v in m["versions"].items() if v and name in ("python", "torch"))
    dirty = " with uncommitted changes" if m["dirty"] else ""
    lines = [
        *(["**Preview: not a committed full run.**", ""] if preview else []),
        f"{m['device']}, {m['threads']} threads ({m['instruction_set']}), {versions}, float32, width 64, 4 heads, "
        f"chunks of 32, layer norm; commit {(m['commit'] or 'unknown')[:10]}{dirty}, {results.when[:10]}"
        f"{''.join(f' ({part})' for part in results.later)}. Medians of interleaved rounds: sne_fast and the baselines "
        "run in turn on the same weights. The limit is the rate of this machine's best matrix product, measured in "
        "every round, divided by the operations of the chunk stage alone; a training step counts as four forwards.",
        "",
        *speed_table(results),
        "",
        *memory_table(results),
        "",
        *op_table(results),
        "",
        *scaling_text(results),
        "",
        *(f"![{plot.stem}]({plot.relative_to(base).as_posix()})" for plot in plots),
    ]
    text = "\n".join(lines)
    while "\n\n\n" in text:
        text = text.replace("\n\n\n", "\n\n")
    return text.strip() + "\n"


def insert(page: Path, text: str, begin: str = BEGIN, end: str = END) -> None:
    """Replace the text between two markers of `page`."""
    old = page.read_text(encoding="utf-8")
    if old.count(begin) != 1 or old.count(end) != 1 or old.index(begin) > old.index(end):
        raise Refused(f"{page}: must hold the lines {begin} and {end} once each, in this order")
    head, tail = old[: old.index(begin) + len(begin)], old[old.index(end) :]
    page.write_text(f"{head}\n{text}{tail}", encoding="utf-8")


# --------------------------------------------------------------------------------------------------------------- main


def write(path: Path, page: Path, plots: Path, preview: bool = False, later: Sequence[Path] = ()) -> str:
    """Check the results, draw the charts into `plots` and write the section of `page`; return the section."""
    results = load((path, *later), preview)
    plots.mkdir(parents=True, exist_ok=True)
    made = []
    if results.cases:
        made.append(plots / f"{path.stem}-throughput.png")
        plot_throughput(results, made[-1])
    if results.scaling:
        made.append(plots / f"{path.stem}-scaling.png")
        plot_scaling(results, made[-1])
    text = section(results, made, page.parent, preview)
    insert(page, text)
    return text


def newest(folder: Path) -> Path:
    found = sorted(folder.glob("*.json"), key=lambda p: json.loads(p.read_text(encoding="utf-8")).get("datetime", ""))
    if not found:
        raise Refused(f"{folder}: no results; run `pytest bench --benchmark-json={folder}/NAME.json` first")
    return found[-1]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("json", nargs="*", type=Path, help="results of pytest bench; default: the newest")
    parser.add_argument("--preview", type=Path, metavar="DIR", help="write into DIR, from any results")
    options = parser.parse_args(arguments)
    path, *later = options.json or [newest(RESULTS)]
    if options.preview is None:
        write(path, PAGE, FIGURES, later=later)
        insert(README, "\n".join([*summary_table(load((path, *later))), ""]), *SPEED_MARKERS)
        return
    options.preview.mkdir(parents=True, exist_ok=True)
    page = options.preview / "benchmarks.md"
    page.write_text(f"{BEGIN}\n{END}\n", encoding="utf-8")
    sys.stdout.write(write(path, page, options.preview, preview=True, later=later))


if __name__ == "__main__":
    main()

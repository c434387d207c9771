"""The tables that `bench/gpu_suite.py` ends with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from sne_fast.benchmark import gpu_ops

Json = dict[str, Any]
SHAPES = {"chunk_encode": ("weights",), "gather_chunks": ("weights",), "segment_pool": ("rows", "length"),
          "feed_forward": ("rows",),
          "set_attention": ("rows", "longest", "head_width"),
          "set_block": ("rows", "longest")}  # fmt: skip


def show(results: Json, backends: Sequence[str], baselines: Sequence[str], console: Console) -> None:
    """Print ops and cases, as far as they were measured; then a line for each part that was left out or failed."""
    console.print(_ops(results["parts"].get("ops", [])))
    console.print(_cases(all_cases(results), backends, baselines))
    console.print(_captured([row for row in all_cases(results) if row.get("mode") == "captured steps"]))
    for kind in ("skipped", "errors"):
        for name, text in results[kind].items():
            console.print(f"{kind}: {name}: {text.strip().splitlines()[-1][:300]}", highlight=False)


def all_cases(results: Json) -> list[Json]:
    """Return the rows of cases, and those of a run that measured captured steps alone."""
    return [row for part in ("cases", "captured") for row in results["parts"].get(part, [])]


def _ops(rows: Sequence[Json]) -> Table:
    table = Table(title="ops", box=None)
    for heading in ("op", "dtype", "shape", "by", "forward", "step", "rate", "of the limit", "vs triton"):
        table.add_column(heading)
    of_triton = {gpu_ops.shape_of(row): row for row in rows if row.get("backend") == "triton"}
    for row in rows:
        shape = ", ".join(f"{key} {row[key]}" for key in SHAPES[row["op"]])
        what = (row["op"], row["dtype"].removeprefix("torch."), shape)
        by = row.get("backend") or row["by"]
        if "skipped" in row:
            table.add_row(*what, by, row["skipped"][:60])
            continue
        share = next((v for k, v in row.items() if k.startswith("forward_fraction")), None)
        rate = row.get("forward_weights_per_second")
        rival = of_triton.get(gpu_ops.shape_of(row)) if by == "cuda" else None
        table.add_row(
            *what, by, f"{1e3 * row['forward_seconds']:.3f} ms",
            f"{1e3 * row['step_seconds']:.3f} ms" if "step_seconds" in row else "",
            f"{rate / 1e9:.2f} G/s" if rate else "", f"{share:.0%}" if share is not None else "",
            f"{rival['forward_seconds'] / row['forward_seconds']:.2f}x" if rival else "",
        )  # fmt: skip
    return table


def _cases(rows: Sequence[Json], backends: Sequence[str], baselines: Sequence[str]) -> Table:
    table = Table(title="cases (times of sne_fast; the others' as ratios to them)", box=None)
    others = [name for name in backends if any(f"{name} forward" in row for row in rows)]
    for heading in ("case", "dtype", "mode", "by", "sne_fast", *others, *baselines, "peak memory"):
        table.add_column(heading)
    for row in rows:
        for mode in ("forward", "training"):
            if f"sne_fast {mode}" not in row:
                continue
            own, ratios = row[f"sne_fast {mode}"], row[f"ratios {mode}"]
            peak = f"{own['peak_bytes'] / 2**20:.0f} MiB" if "peak_bytes" in own else ""
            table.add_row(
                row["case"], row["dtype"], mode, row["backend"], f"{1e3 * own['seconds']:.2f} ms",
                *(f"{ratios[who]:.2f}x" if who in ratios else "-" for who in (*others, *baselines)), peak,
            )  # fmt: skip
    return table


def _captured(rows: Sequence[Json]) -> Table:
    table = Table(title="captured training steps (padded and plain ones as ratios to them)", box=None)
    for heading in ("case", "dtype", "by", "step", "host", "networks/s", "padded", "plain", "graphs", "replays"):
        table.add_column(heading)
    for row in rows:
        own, ratios = row["captured"], row["ratios"]
        table.add_row(
            row["case"], row["dtype"], row["backend"], f"{own['milliseconds']:.2f} ms",
            f"{own['host_milliseconds']:.2f} ms", f"{own['networks_per_second']:.0f}", f"{ratios['padded']:.2f}x",
            f"{ratios['plain']:.2f}x", str(row["graphs"]), f"{row['replays']} of {row['steps']}",
        )  # fmt: skip
    return table

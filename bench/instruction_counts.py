"""Write the table of instructions in docs/benchmarks.md from bench/results/instructions.json.

python -m sne_fast.benchmark.instructions --compile --architecture 90a --json bench/results/instructions.json
python bench/instruction_counts.py
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from report import PAGE, RESULTS, insert

JSON = RESULTS / "instructions.json"
MARKERS = "<!-- instructions:begin -->", "<!-- instructions:end -->"
UNITS = {"issue": "issue", "exponential": "exponentials", "matrix": "products", "shared memory": "shared memory"}


def step(row: dict[str, Any]) -> int:
    """Return the warp instructions per 32 weights of a training step."""
    return sum(kernel["launches"] * kernel["instructions"] for kernel in row["kernels"])


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Return the table of all backends and architectures, in Markdown."""
    lines = [
        f"| kernels | GPU | forward | training step | {' | '.join(UNITS.values())} | spilling |",
        f"| --- | --- | ---: | ---: |{' ---: |' * len(UNITS)} --- |",
    ]
    for backend, architectures in rows.items():
        for architecture, row in architectures.items():
            bounds = row["bounds"]
            limits = " | ".join(f"{bounds['forward'][unit]:.2f}, {bounds['training step'][unit]:.2f}" for unit in UNITS)
            spilling = ", ".join(kernel["kernel"] for kernel in row["kernels"] if kernel["spills"]) or "none"
            lines.append(
                f"| {backend}, {architecture} | {row['chip']} | {row['kernels'][0]['instructions']:,} | {step(row):,} "
                f"| {limits} | {spilling} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    insert(PAGE, table(json.loads(JSON.read_text(encoding="utf-8"))) + "\n", *MARKERS)

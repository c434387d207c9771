"""docs/benchmarks.md states what bench/results/cpu_bfloat16.json and cpu_bfloat16_set_block.json hold."""

from __future__ import annotations

import json

from helpers.paths import ROOT

ROWS = {
    "chunk_encode_forward": "`chunk_encode` forward",
    "chunk_encode_training": "`chunk_encode` forward and backward",
    "encoder_forward": "encoder, forward",
    "encoder_training": "encoder, forward and backward",
}


PAGE = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
RESULTS = ROOT / "bench" / "results"


def states(title: str, row: dict) -> None:
    low, high = row["ratio_range"]
    seconds = f"{row['float32_seconds']:.3f} s | {row['bfloat16_seconds']:.3f} s"
    if row["float32_seconds"] < 0.1:
        seconds = f"{1e3 * row['float32_seconds']:.1f} ms | {1e3 * row['bfloat16_seconds']:.1f} ms"
    assert f"| {title} | {seconds} | {row['ratio']:.2f} | {low:.2f} to {high:.2f} |" in PAGE


def test_the_page_states_the_committed_result() -> None:
    found = json.loads((RESULTS / "cpu_bfloat16.json").read_text(encoding="utf-8"))
    assert "-dirty" not in found["machine"]["commit"]
    for case, results in found["cases"].items():
        for name, title in ROWS.items():
            states(f"{title}, `{case}`", results[name])
        assert f"{results['z_error']:.1%} (`{case}`)" in PAGE


def test_the_page_states_the_committed_result_of_set_block() -> None:
    found = json.loads((RESULTS / "cpu_bfloat16_set_block.json").read_text(encoding="utf-8"))
    assert "-dirty" not in found["machine"]["commit"]
    for case, results in found["cases"].items():
        states(f"forward, {case}", results["forward"])
        states(f"forward and backward, {case}", results["training"])

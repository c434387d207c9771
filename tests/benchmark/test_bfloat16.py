"""docs/benchmarks.md states what bench/results/cpu_bfloat16.json holds."""

from __future__ import annotations

import json

from helpers.paths import ROOT

ROWS = {
    "chunk_encode_forward": "`chunk_encode` forward",
    "chunk_encode_training": "`chunk_encode` forward and backward",
    "encoder_forward": "encoder, forward",
    "encoder_training": "encoder, forward and backward",
}


def test_the_page_states_the_committed_result() -> None:
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    found = json.loads((ROOT / "bench" / "results" / "cpu_bfloat16.json").read_text(encoding="utf-8"))
    assert "-dirty" not in found["machine"]["commit"]
    for case, results in found["cases"].items():
        for name, title in ROWS.items():
            row = results[name]
            low, high = row["ratio_range"]
            seconds = f"{row['float32_seconds']:.3f} s | {row['bfloat16_seconds']:.3f} s"
            assert f"| {title}, `{case}` | {seconds} | {row['ratio']:.2f} | {low:.2f} to {high:.2f} |" in page
        assert f"{results['z_error']:.1%} (`{case}`)" in page

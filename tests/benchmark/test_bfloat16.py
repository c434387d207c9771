"""docs/benchmarks.md states what the committed results of bench/bfloat16.py hold."""

from __future__ import annotations

import bfloat16

PAGE = bfloat16.PAGE.read_text(encoding="utf-8")


def test_the_page_states_the_committed_results() -> None:
    found = bfloat16.committed()
    assert not any("-dirty" in part["machine"]["commit"] for part in found.values())
    for name, table in bfloat16.tables(found).items():
        assert f"<!-- {name}:begin -->\n\n{table}\n\n<!-- {name}:end -->" in PAGE
    for case, results in found["cases"]["cases"].items():
        assert f"{results['z_error']:.1%} (`{case}`)" in PAGE

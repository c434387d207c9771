"""The committed counts of instructions, and the table of them in docs/benchmarks.md."""

from __future__ import annotations

import json
from pathlib import Path

import instruction_counts
import pytest

from sne_fast.benchmark.instructions import CHIPS, Config, Count, bounds, training_kernels
from sne_fast.benchmark.instructions.__main__ import put
from sne_fast.benchmark.instructions.triton_kernels import KERNELS

ROWS = json.loads(instruction_counts.JSON.read_text(encoding="utf-8"))
EACH = [(backend, architecture) for backend, rows in ROWS.items() for architecture in rows]
EXPECTED = {"cuda": ["sm_80", "sm_90a", "sm_100"], "triton": ["sm_80", "sm_90", "sm_100"]}


def test_there_is_a_row_of_each_backend_and_architecture() -> None:
    assert {backend: list(rows) for backend, rows in ROWS.items()} == EXPECTED


@pytest.mark.parametrize(("backend", "architecture"), EACH)
def test_a_row_is_complete_and_its_bounds_are_of_its_kernels(backend: str, architecture: str) -> None:
    row = ROWS[backend][architecture]
    config = Config(row["hidden"], row["heads"], row["chunk_size"])
    expected = KERNELS if backend == "triton" else training_kernels(config, row["dtype"], architecture[3:])
    assert [(k["kernel"], k["launches"]) for k in row["kernels"]] == [(k.title, k.launches) for k in expected]
    found = [Count(**kernel) for kernel in row["kernels"]]
    chip = next(chip for chip in CHIPS.values() if chip.name == row["chip"])
    for name, counts in (("forward", found[:1]), ("training step", found)):
        assert row["bounds"][name] == pytest.approx(bounds(counts, chip), abs=0.02), name
    for one in found:
        assert sum(one.classes.values()) == pytest.approx(one.instructions, abs=len(one.classes))
        assert one.float_atomics == 0 and 0 < one.registers <= 255 and 0 < one.warps_per_multiprocessor <= chip.warps


@pytest.mark.parametrize("backend", ROWS)
def test_architectures_do_the_same_products_in_the_forward(backend: str) -> None:
    found = {row["kernels"][0]["matrix_operations"] for row in ROWS[backend].values()}
    assert len(found) == 1


def test_the_page_has_the_committed_counts() -> None:
    assert instruction_counts.table(ROWS) in instruction_counts.PAGE.read_text(encoding="utf-8")


def test_rows_stand_beside_each_other_by_backend_and_number(tmp_path: Path) -> None:
    file = tmp_path / "counts.json"
    for backend, architecture in (("triton", "90"), ("cuda", "100"), ("cuda", "90a"), ("triton", "90")):
        put(file, backend, architecture, {"of": f"{backend} {architecture}"})
    found = json.loads(file.read_text())
    assert [(backend, list(rows)) for backend, rows in found.items()] == [
        ("cuda", ["sm_90a", "sm_100"]), ("triton", ["sm_90"])]  # fmt: skip
    assert found["cuda"]["sm_90a"] == {"of": "cuda 90a"}

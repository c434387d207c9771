"""The launch tables and what the tuner does to them; measuring itself needs a GPU."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("triton")

from sne_fast.backends.gpu_plans.chunks import ChunkPlan, count_lengths
from sne_fast.backends.triton import launches, tune, tune_cases
from sne_fast.backends.triton.chunk_launches import FUSED_CLASSES, length_class


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert tune.main(["--op", "segment_pool"]) == 2
    assert "needs a CUDA GPU" in capsys.readouterr().err


def test_candidates_are_every_combination() -> None:
    found = tune_cases.sizes((1, 2), (3,), BLOCK=(16, 32))
    assert len(found) == 4
    assert found[0] == {"num_warps": 1, "num_stages": 3, "blocks": {"BLOCK": 16}}


def test_new_rules_replace_those_of_the_same_case(tmp_path) -> None:
    def rule(warps: int, **when: object) -> dict[str, object]:
        return {"when": when, "num_warps": warps, "num_stages": 1, "blocks": {}}

    old = [rule(1, h=64, arch=90), rule(2)]
    new = tune.merged(old, [rule(8, h=64, arch=90)])
    assert new == [rule(8, h=64, arch=90), rule(2)]
    tune.write(tmp_path / "x.json", new)
    assert json.loads((tmp_path / "x.json").read_text()) == new
    assert len((tmp_path / "x.json").read_text().splitlines()) == 4


def test_the_first_rule_that_matches_is_taken() -> None:
    usual = launches.launch("segment_pool", kernel="forward", h=64, heads=4, dtype=torch.float32, arch=90)
    rule = {"when": {"arch": [90, 100], "h": 64}, "num_warps": 16, "num_stages": 1, "blocks": {"SHORT": 3}}
    with launches.trial("segment_pool", rule):
        tried = launches.launch("segment_pool", kernel="forward", h=64, heads=4, dtype=torch.float32, arch=90)
        other = launches.launch("segment_pool", kernel="forward", h=64, heads=4, dtype=torch.float32, arch=80)
    assert tried.num_warps == 16 and tried["SHORT"] == 3 and tried.options["enable_fp_fusion"]
    assert "maxnreg" not in tried.options
    with launches.trial("segment_pool", rule | {"maxnreg": 96}):
        limited = launches.launch("segment_pool", kernel="forward", h=64, heads=4, dtype=torch.float32, arch=90)
    assert limited.options == tried.options | {"maxnreg": 96}
    assert (
        other == usual == launches.launch("segment_pool", kernel="forward", h=64, heads=4, dtype=torch.float32, arch=90)
    )
    with pytest.raises(KeyError, match="segment_pool: no launch sizes for"):
        launches.launch("segment_pool", kernel="sideways")


CHUNK_TABLES = sorted(path.stem for path in launches.TABLES.glob("chunk_encode*.json"))


@pytest.mark.parametrize("dtype, precision", [(torch.bfloat16, ""), (torch.float32, "ieee")])
def test_chunk_kernels_are_tuned_on_chunks_that_use_the_rule(dtype: torch.dtype, precision: str) -> None:
    rules = list(tune_cases.chunk_rules(64, 4, dtype, 90))
    assert len(CHUNK_TABLES) == 6 and len(rules) == len(CHUNK_TABLES) * len(FUSED_CLASSES)
    for slot_class in FUSED_CLASSES:
        name = length_class(slot_class, precision)
        of_class = [rule for rule in rules if rule.when == {"h": 64, "heads": 4, "length": name}]
        assert [rule.table for rule in of_class] == CHUNK_TABLES
        for rule in of_class:
            counts = count_lengths(torch.tensor([0, rule.length]))
            plan = ChunkPlan(torch.empty(0), torch.empty(0), counts)
            assert [found for found, _ in plan.classes(FUSED_CLASSES)] == [slot_class]
            query = {**rule.when, "dtype": dtype, "arch": 90}
            usual = launches.launch(rule.table, **query)
            assert all(candidate["blocks"] == usual.blocks for candidate in rule.candidates)
            new = {"when": {**rule.when, "dtype": str(dtype).removeprefix("torch."), "arch": 90}, **rule.candidates[-1]}
            with launches.trial(rule.table, new):
                assert launches.launch(rule.table, **query).num_warps == 16


def test_kernels_that_do_not_take_a_width_are_not_tuned_for_it() -> None:
    assert {rule.table for rule in tune_cases.chunk_rules(128, 4, torch.bfloat16, 90)} == {"chunk_encode"}
    assert not list(tune_cases.chunk_rules(128, 4, torch.float32, 90))


@pytest.mark.parametrize("path", sorted(launches.TABLES.glob("*.json")), ids=lambda path: path.stem)
def test_committed_tables_are_well_formed(path) -> None:
    for rule in launches.table(path.stem):
        assert set(rule) == {"when", "num_warps", "num_stages", "blocks"}
        assert rule["num_warps"] in (1, 2, 4, 8, 16, 32) and 1 <= rule["num_stages"] <= 8
        assert set(rule["when"]) <= {"kernel", "h", "heads", "d", "length", "dtype", "arch"}

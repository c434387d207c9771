"""The launch tables and what the tuner does to them; measuring itself needs a GPU."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("triton")

from sne_fast.backends.triton import launches, tune


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert tune.main(["--op", "segment_pool"]) == 2
    assert "needs a CUDA GPU" in capsys.readouterr().err


def test_candidates_are_every_combination() -> None:
    found = tune.sizes((1, 2), (3,), BLOCK=(16, 32))
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
    assert (
        other == usual == launches.launch("segment_pool", kernel="forward", h=64, heads=4, dtype=torch.float32, arch=90)
    )
    with pytest.raises(KeyError, match="segment_pool: no launch sizes for"):
        launches.launch("segment_pool", kernel="sideways")


@pytest.mark.parametrize("path", sorted(launches.TABLES.glob("*.json")), ids=lambda path: path.stem)
def test_committed_tables_are_well_formed(path) -> None:
    for rule in launches.table(path.stem):
        assert set(rule) == {"when", "num_warps", "num_stages", "blocks"}
        assert rule["num_warps"] in (1, 2, 4, 8, 16, 32) and 1 <= rule["num_stages"] <= 8
        assert set(rule["when"]) <= {"kernel", "h", "heads", "d", "length", "dtype", "arch"}

"""Cases of the tuner on kernels that run: the smallest and the largest candidate agree with the table's own choice."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from sne_fast.backends.triton import tune
from sne_fast.backends.triton.tune_cases import TUNED, Inputs

pytestmark = pytest.mark.build

SHORT = ("ieee8", "ieee32", "ieeepooled")  # the interpreter is slow


@pytest.mark.parametrize("name", ["set_block", "pool_block", "add_codes", "partial_sums"])
def test_candidates_give_the_results_of_the_table(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran = []

    def bench(run: Any, return_mode: str) -> float:
        ran.append(run)
        return 1 / len(ran)

    monkeypatch.setattr(tune, "do_bench", bench)
    inputs = Inputs(32, 2, torch.float32, torch.device("cpu"), share=0.0)
    cases = [case for case in TUNED[name].cases(inputs) if case.when.get("length", "ieee8") in SHORT]
    for case in cases:
        few = dataclasses.replace(case, candidates=(case.candidates[0], case.candidates[-1]))
        rule = tune.tune(few, torch.float32, 0)
        assert rule is not None and rule["blocks"] == case.candidates[-1]["blocks"]
    assert len(ran) == 3 * len(cases) and "skipped" not in capsys.readouterr().out

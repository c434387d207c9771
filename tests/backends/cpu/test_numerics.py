"""A few of the random encoders of bench/numerics.py: z and gradients as near to float64 as float32 allows."""

from __future__ import annotations

import math

import numerics
import pytest
import torch

from helpers.cpu_cases import NEEDS_BACKEND
from sne_fast.backends.cpu import library

pytestmark = pytest.mark.skipif(bool(library.reasons()), reason=NEEDS_BACKEND)


@pytest.mark.parametrize("first", range(0, 60, 10))
def test_random_encoders_lose_no_more_than_rounding(first):
    for seed in range(first, first + 10):
        row = numerics.judge(numerics.Configuration.draw(seed))
        assert not row["beyond"], row


def test_a_wrong_result_is_beyond_what_is_allowed(monkeypatch):
    configuration = next(
        c for c in map(numerics.Configuration.draw, range(100)) if c.dtype == "float32" and c.width == 32
    )
    results = numerics.results

    def spoilt(encoder, networks, backend):
        found = results(encoder, networks, backend)
        return {name: t * 1.01 for name, t in found.items()} if backend == "cpu" else found

    monkeypatch.setattr(numerics, "results", spoilt)
    assert "z" in numerics.judge(configuration)["beyond"]


def test_the_error_of_a_result_that_is_not_finite_is_infinite():
    want = {"z": torch.ones(2), "a.mab.fc_q.weight": torch.zeros(2)}
    got = {"z": torch.tensor([1.0, math.nan]), "a.mab.fc_q.weight": torch.zeros(2)}
    assert numerics.errors(got, want) == {"z": math.inf, "a.mab": 0.0}

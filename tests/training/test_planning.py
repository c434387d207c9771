"""The plan of a training: full parts, balanced steps, shares, and which networks are split."""

from __future__ import annotations

import importlib.util
import warnings

import pytest
import torch

from helpers.paths import ROOT
from sne_fast.training import FitSettings
from sne_fast.training.planning import Plan

_spec = importlib.util.spec_from_file_location("busy_share", ROOT / "bench" / "busy_share.py")
assert _spec is not None and _spec.loader is not None
busy = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(busy)


def plan(sizes: list[int], processes: int = 1, **settings: int) -> Plan:
    chosen = FitSettings(**{"epochs": 2, "batch_weights": 100, **settings})  # type: ignore[arg-type]
    return Plan(busy.Sizes(torch.tensor(sizes)), chosen, processes)


@pytest.mark.parametrize("processes", [8, 64])
@pytest.mark.parametrize(("mix", "least"), list(zip(busy.mixes(1), (0.9, 0.9, 0.7), strict=True)))
def test_processes_are_busy_at_the_default_budget(mix: str, least: float, processes: int) -> None:
    assert busy.plan_of(busy.mixes(8000)[mix], processes).busy_share(0) >= least


def test_every_epoch_has_every_network_once_in_parts_of_the_budget() -> None:
    sizes = torch.randint(1, 60, (300,), generator=torch.Generator().manual_seed(0)).tolist()
    sizes[5] = 500
    made = plan(sizes, processes=3, accumulate=2)
    assert made.parts == 6 and made.steps == len(made.epoch(0)) + len(made.epoch(1))
    assert made.epoch(0) != made.epoch(1)
    for epoch in (0, 1):
        steps = made.epoch(epoch)
        assert sorted(row for step in steps for part in step for row in part) == list(range(300))
        assert sum(len(step) != 6 for step in steps) <= 1
        assert all(made.load(part) <= 100 or part == [5] for step in steps for part in step)
    assert made.epoch(1) == plan(sizes, processes=6).epoch(1), "the product with accumulate decides"


def test_shares_are_complete_and_large_networks_are_split() -> None:
    made = plan([30] * 40 + [2000, 150], processes=4)
    for step in made.epoch(0):
        split, shares = made.split_places(step), made.shares(step)
        assert sorted([*split, *(place for share in shares for place in share)]) == list(range(len(step)))
        assert [step[place] for place in split] == ([[40]] if [40] in step else [])
    assert plan([30] * 40 + [2000]).split_places(plan([30] * 40 + [2000]).epoch(0)[0]) == []


def test_badly_balanced_processes_are_warned_of_with_what_to_change() -> None:
    with pytest.warns(UserWarning, match=r"8 processes will have work in 25% of the time, and 1 of 1 steps .* most 2 "):
        plan([50] * 4, processes=8).check_balance()
    with pytest.warns(
        UserWarning, match=r"1 of 2 steps leave one without networks; raise accumulate \(1\) or batch_weights \(100\)"
    ):
        plan([100, *[51] * 8], processes=8).check_balance()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan([50] * 64, processes=8).check_balance()
        plan([100, 6]).check_balance()

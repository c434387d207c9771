"""set_block in the interpreter: forward and gradients against the float64 reference, whole blocks and parts."""

from __future__ import annotations

import contextlib
import math

import pytest
import torch

from helpers import set_block_checks as checks
from helpers.set_block_checks import DOUBLE, HALF, RAGGED, SINGLE, across, check, itself, run, upstream
from sne_fast.backends.gpu_plans import whole_blocks
from sne_fast.backends.gpu_plans.lengths import Lengths
from sne_fast.backends.triton import block_plans, launches
from sne_fast.backends.triton import set_block as module
from sne_fast.backends.triton.launches import programs_of

pytestmark = pytest.mark.build


@pytest.mark.parametrize("dtype", [SINGLE, DOUBLE], ids=str)
@pytest.mark.parametrize(("h", "heads", "layer_norm"), [(32, 4, True), (64, 4, True), (64, 2, False)])
def test_whole_blocks(h: int, heads: int, layer_norm: bool, dtype: torch.dtype) -> None:
    args = itself(RAGGED, h, heads, dtype, layer_norm)
    assert module.takes_whole(*args[:2], args[4], args[-4])
    check(module, args)


@pytest.mark.parametrize("lengths", checks.FEW_ROWS, ids=str)
def test_numbers_of_rows(lengths: list[int]) -> None:
    check(module, itself(lengths, 32, 2, SINGLE))


def test_programs_of_several_tiles_and_the_same_bits() -> None:
    args = itself([9] * 16, 32, 2, SINGLE)
    plan = module.Plan.make("query_backward", args[0], 2, True, Lengths.of(args[4]))
    assert plan.tiles(144) > 2 * programs_of(args[0].device)
    check(module, args)
    first, second = run(module, args), run(module, args)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(("query_rows", "key_rows"), [(16, 64), (64, 16)])
def test_kernels_of_the_backward_have_sizes_of_their_own(
    query_rows: int, key_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where one has fewer tiles than the other has programs."""
    monkeypatch.setattr(block_plans, "programs_of", lambda device: 4)
    with contextlib.ExitStack() as stack:
        for kernel, rows in (("query_backward", query_rows), ("key_backward", key_rows)):
            blocks = {"ROWS": rows, "INNER": 32, "PROGRAMS": 1}
            rule = {"when": {"kernel": kernel}, "num_warps": 4, "num_stages": 1, "blocks": blocks}
            stack.enter_context(launches.trial("set_block", rule))
        check(module, itself(RAGGED, 32, 2, SINGLE))


@pytest.mark.parametrize(("h", "heads"), [(64, 4), (64, 8)])
def test_float16_loses_at_most_twice_what_torch_loses(h: int, heads: int) -> None:
    checks.loses_at_most_twice_what_torch_loses(module, itself(RAGGED, h, heads, HALF))


@pytest.mark.parametrize(("dims", "heads"), [((48, 16, 32), 4), ((64, 64, 64), 4), ((128, 128, 128), 8)], ids=str)
def test_in_parts(dims: tuple[int, int, int], heads: int) -> None:
    args = across(dims, heads, SINGLE)
    assert not module.takes_whole(*args[:2], args[4], args[-4])
    check(module, args)


def test_long_sets_go_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    args = itself([5, 9], 32, 2, SINGLE)
    monkeypatch.setattr(whole_blocks, "LONGEST", 8)
    assert not module.takes_whole(*args[:2], args[4], args[-4])
    check(module, args)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["x", "grad"])
def test_what_is_not_finite_stays_in_its_set(where: str, value: float) -> None:
    checks.what_is_not_finite_stays_in_its_set(module, where, value, (4, 6, 3), 4, SINGLE)


def test_why_not() -> None:
    args = itself([2], 48, 4, SINGLE)
    assert module.why_not("set_block", args) == ["width must be one of 32, 64, 128, 256, got 48"]
    args = itself([2], 32, 4, SINGLE)
    assert module.why_not("set_block_backward", (upstream(args), *args)) == []

"""pool_block in the interpreter: forward and gradients against the float64 reference, whole blocks and parts."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.errors import loses_at_most_twice, relative_error
from helpers.op_cases import pool_block_case
from sne_fast import reference
from sne_fast.backends.triton import pool_block as module
from sne_fast.ops.schema import POOL_PARAMETERS

pytestmark = pytest.mark.build

SINGLE, DOUBLE, HALF = torch.float32, torch.float64, torch.float16
RAGGED = [3, 0, 40, 1, 1, 7, 0, 22]
NAMES = ("out", "x", *POOL_PARAMETERS)
TOLERANCES = {DOUBLE: (1e-13, 1e-12), SINGLE: (2e-6, 2e-5)}


def case(lengths: list[int], h: int, heads: int, dtype: torch.dtype, layer_norm: bool = True) -> tuple[Tensor, ...]:
    """Return arguments of the op."""
    x, ptr, *parameters = pool_block_case(lengths, h, heads, layer_norm, dtype)
    return x, ptr, ptr, *parameters


def upstream(args: tuple[Tensor, ...]) -> Tensor:
    shape = args[0].shape[0] if args[0].dim() == 3 else args[1].shape[0] - 1, args[0].shape[-1]
    return torch.randn(shape, generator=torch.Generator().manual_seed(5), dtype=DOUBLE).to(args[0].dtype)


def run(backend: Any, args: tuple[Tensor, ...], grad: Tensor | None = None) -> list[Tensor]:
    """Return the result and all gradients."""
    grad = upstream(args) if grad is None else grad.to(args[0].dtype)
    return [backend.pool_block(*args), *backend.pool_block_backward(grad, *args)]


def exact(args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(t.double() if t.is_floating_point() else t for t in args)


def compare(args: tuple[Tensor, ...], forward: float, backward: float) -> list[Tensor]:
    got = run(module, args)
    for name, a, b in zip(NAMES, got, run(reference, exact(args), upstream(args)), strict=True):
        assert a.shape == b.shape and a.dtype == args[0].dtype
        if not b.any():
            assert not a.any(), name
        else:
            assert relative_error(a, b) < (backward if name != "out" else forward), name
    return got


@pytest.mark.parametrize("dtype", [SINGLE, DOUBLE], ids=str)
@pytest.mark.parametrize(("h", "heads", "layer_norm"), [(32, 4, True), (64, 4, True), (64, 2, False)])
def test_whole_blocks(h: int, heads: int, layer_norm: bool, dtype: torch.dtype) -> None:
    args = case(RAGGED, h, heads, dtype, layer_norm)
    got = compare(args, *TOLERANCES[dtype])
    assert all(torch.equal(a, b) for a, b in zip(got, run(module, args), strict=True)), "the same bits twice"


@pytest.mark.parametrize("lengths", [[], [0, 0], [1], [0, 5, 0], [2] * 37], ids=str)
def test_numbers_of_sets(lengths: list[int]) -> None:
    compare(case(lengths, 32, 2, SINGLE), *TOLERANCES[SINGLE])


@pytest.mark.parametrize("sets", [0, 1, 37])
@pytest.mark.parametrize(("h", "heads"), [(64, 4), (32, 2), (128, 8)])
def test_rows_that_are_pooled_already(h: int, heads: int, sets: int) -> None:
    none = torch.empty(0, dtype=torch.int64)
    pooled = torch.randn(sets, heads, h, generator=torch.Generator().manual_seed(3))
    compare((pooled, none, none, *case([1], h, heads, SINGLE)[3:]), *TOLERANCES[SINGLE])


@pytest.mark.parametrize(("h", "heads"), [(64, 4), (64, 8)])
def test_float16_loses_at_most_twice_what_torch_loses(h: int, heads: int) -> None:
    args = case(RAGGED, h, heads, HALF)
    leaves = [t.clone().requires_grad_() for t in (args[0], *args[3:])]
    x, logits, query, w_v, b_v, w_o, b_o, norm = leaves
    parts = []
    for s, n in enumerate(RAGGED):
        rows = x[int(args[1][s]) : int(args[1][s + 1])]
        pooled = torch.softmax(rows @ logits.t(), 0).t() @ rows  # [H, h]
        parts.append((w_v @ pooled[..., None]).flatten() + b_v if n else torch.zeros_like(b_v))
    o = torch.nn.functional.layer_norm(query + torch.stack(parts), (h,), norm[0], norm[1])
    out = torch.nn.functional.layer_norm(
        o + torch.relu(torch.nn.functional.linear(o, w_o, b_o)), (h,), norm[2], norm[3]
    )
    out.backward(upstream(args))
    usual = [out.detach(), *(t.grad for t in leaves)]
    want, got = run(reference, exact(args), upstream(args)), run(module, args)
    for name, a, b, c in zip(NAMES, got, usual, want, strict=True):
        loses_at_most_twice(a, b, c, name)


@pytest.mark.parametrize(("h", "heads"), [(64, 4), (128, 8)])
def test_in_parts(monkeypatch: pytest.MonkeyPatch, h: int, heads: int) -> None:
    monkeypatch.setattr(module, "LONGEST", 8)
    compare(case([5, 0, 19], h, heads, SINGLE), *TOLERANCES[SINGLE])


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["x", "grad"])
def test_what_is_not_finite_stays_in_its_set(where: str, value: float) -> None:
    args = case([4, 6, 3], 32, 4, SINGLE)
    grad = upstream(args)
    want = run(module, args, grad)
    x, broken = args[0].clone(), grad.clone()
    if where == "x":
        x[5, 3] = value
    else:
        broken[1, 3] = value
    got = run(module, (x, *args[1:]), broken)
    others = torch.tensor([True] * 4 + [False] * 6 + [True] * 3)
    assert torch.equal(got[0][::2], want[0][::2]) and torch.equal(got[1][others], want[1][others])
    assert not got[1][4:10].isfinite().any() and (where == "grad" or not got[0][1].isfinite().any())


def test_why_not() -> None:
    args = case([2], 48, 4, SINGLE)
    assert module.why_not("pool_block", args) == ["width must be one of 32, 64, 128, 256, got 48"]
    args = case([2], 32, 4, SINGLE)
    assert module.why_not("pool_block_backward", (upstream(args), *args)) == []

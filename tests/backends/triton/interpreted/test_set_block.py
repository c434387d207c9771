"""set_block in the interpreter: forward and gradients against the float64 reference, whole blocks and parts."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.errors import loses_at_most_twice, relative_error
from helpers.op_cases import block_case
from sne_fast import reference
from sne_fast.backends.gpu_plans.lengths import Lengths
from sne_fast.backends.triton import block_plans, launches
from sne_fast.backends.triton import set_block as module
from sne_fast.backends.triton.launches import programs_of
from sne_fast.ops.schema import BLOCK_PARAMETERS

pytestmark = pytest.mark.build

SINGLE, DOUBLE, HALF = torch.float32, torch.float64, torch.float16
RAGGED = [3, 0, 40, 1, 1, 7, 0, 22]
NAMES = ("out", "q", "k", *BLOCK_PARAMETERS)
B_K = NAMES.index("b_k")


def itself(lengths: list[int], h: int, heads: int, dtype: torch.dtype, layer_norm: bool = True) -> tuple[Any, ...]:
    """Return arguments of the op for rows that attend to each other."""
    x, _, ptr, _, *parameters = block_case(lengths, lengths, (h, h, h), layer_norm, dtype)
    return x, None, ptr, ptr, ptr, ptr, *parameters, heads


def across(dims: tuple[int, int, int], heads: int, dtype: torch.dtype) -> tuple[Any, ...]:
    """Return arguments of the op for queries of other rows than keys."""
    q, k, q_ptr, k_ptr, *parameters = block_case([3, 0, 2, 17], [2, 3, 0, 19], dims, True, dtype)
    return q, k, q_ptr, k_ptr, q_ptr, k_ptr, *parameters, heads


def upstream(args: tuple[Any, ...]) -> Tensor:
    shape = args[0].shape[0], args[-4].shape[0]
    return torch.randn(shape, generator=torch.Generator().manual_seed(5), dtype=DOUBLE).to(args[0].dtype)


def run(backend: Any, args: tuple[Any, ...], grad: Tensor | None = None) -> list[Tensor]:
    """Return the result and all gradients, without that of k where rows attend to each other."""
    grad = upstream(args) if grad is None else grad.to(args[0].dtype)
    out, (by_q, by_k, *others) = backend.set_block(*args), backend.set_block_backward(grad, *args)
    if args[1] is None:
        assert by_k.shape == (0,)
    return [out, by_q, *others] if args[1] is None else [out, by_q, by_k, *others]


def exact(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for t in args)


def compare(args: tuple[Any, ...], forward: float, backward: float) -> None:
    names = [name for name in NAMES if args[1] is not None or name != "k"]
    grad = upstream(args)
    for name, a, b in zip(names, run(module, args), run(reference, exact(args), grad), strict=True):
        assert a.shape == b.shape and a.dtype == args[0].dtype and a.is_contiguous()
        if name == "b_k":
            assert a.numel() == 0 or float(a.abs().max()) < 2 * backward, "constant in the softmax"
        else:
            assert relative_error(a, b) < (backward if name != "out" else forward), name


TOLERANCES = {DOUBLE: (1e-13, 1e-12), SINGLE: (2e-6, 2e-5)}


@pytest.mark.parametrize("dtype", [SINGLE, DOUBLE], ids=str)
@pytest.mark.parametrize(("h", "heads", "layer_norm"), [(32, 4, True), (64, 4, True), (64, 2, False)])
def test_whole_blocks(h: int, heads: int, layer_norm: bool, dtype: torch.dtype) -> None:
    args = itself(RAGGED, h, heads, dtype, layer_norm)
    assert module.takes_whole(*args[:2], args[4], args[-4])
    compare(args, *TOLERANCES[dtype])


@pytest.mark.parametrize("lengths", [[], [0, 0], [1], [0, 5, 0], [70]], ids=str)
def test_numbers_of_rows(lengths: list[int]) -> None:
    compare(itself(lengths, 32, 2, SINGLE), *TOLERANCES[SINGLE])


def test_programs_of_several_tiles_and_the_same_bits() -> None:
    args = itself([9] * 16, 32, 2, SINGLE)
    plan = module.Plan.make("query_backward", args[0], 2, True, Lengths.of(args[4]))
    assert plan.tiles(144) > 2 * programs_of(args[0].device)
    compare(args, *TOLERANCES[SINGLE])
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
        compare(itself(RAGGED, 32, 2, SINGLE), *TOLERANCES[SINGLE])


@pytest.mark.parametrize(("h", "heads"), [(64, 4), (64, 8)])
def test_float16_loses_at_most_twice_what_torch_loses(h: int, heads: int) -> None:
    args = itself(RAGGED, h, heads, HALF)
    leaves = [t.clone().requires_grad_() for t in (args[0], *args[6:-1])]
    x, w_q, b_q, w_k, b_k, w_v, b_v, w_o, b_o, norm = leaves

    def eager() -> Tensor:
        q, k, v = (torch.nn.functional.linear(x, w, b) for w, b in ((w_q, b_q), (w_k, b_k), (w_v, b_v)))
        parts = []
        for s in range(len(args[2]) - 1):
            rows = slice(int(args[2][s]), int(args[2][s + 1]))
            a, b, c = (t[rows].unflatten(1, (heads, -1)).transpose(0, 1) for t in (q, k, v))
            parts.append((torch.softmax(a @ b.mT / math.sqrt(h), -1) @ c).transpose(0, 1).flatten(1))
        o = torch.nn.functional.layer_norm(q + torch.cat(parts), (h,), norm[0], norm[1])
        o = o + torch.relu(torch.nn.functional.linear(o, w_o, b_o))
        return torch.nn.functional.layer_norm(o, (h,), norm[2], norm[3])

    grad = upstream(args)
    out = eager()
    out.backward(grad)
    usual = [out.detach(), *(t.grad for t in leaves)]
    want, got = run(reference, exact(args), grad), run(module, args)
    for place, (a, b, c) in enumerate(zip(got, usual, want, strict=True)):
        if place != B_K - 1:
            loses_at_most_twice(a, b, c, place)


@pytest.mark.parametrize(("dims", "heads"), [((48, 16, 32), 4), ((64, 64, 64), 4), ((128, 128, 128), 8)], ids=str)
def test_in_parts(dims: tuple[int, int, int], heads: int) -> None:
    args = across(dims, heads, SINGLE)
    assert not module.takes_whole(*args[:2], args[4], args[-4])
    compare(args, *TOLERANCES[SINGLE])


def test_long_sets_go_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    args = itself([5, 9], 32, 2, SINGLE)
    monkeypatch.setattr(module, "LONGEST", 8)
    assert not module.takes_whole(*args[:2], args[4], args[-4])
    compare(args, *TOLERANCES[SINGLE])


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["x", "grad"])
def test_what_is_not_finite_stays_in_its_set(where: str, value: float) -> None:
    args = itself([4, 6, 3], 32, 4, SINGLE)
    grad = upstream(args)
    want = run(module, args, grad)
    x, broken = args[0].clone(), grad.clone()
    (x if where == "x" else broken)[5, 3] = value
    got = run(module, (x, *args[1:]), broken)
    others = torch.tensor([True] * 4 + [False] * 6 + [True] * 3)
    assert torch.equal(got[0][others], want[0][others]) and torch.equal(got[1][others], want[1][others])
    assert not got[1][5].isfinite().all() and (where == "grad" or not got[0][4:10].isfinite().any())


def test_why_not() -> None:
    args = itself([2], 48, 4, SINGLE)
    assert module.why_not("set_block", args) == ["width must be one of 32, 64, 128, 256, got 48"]
    args = itself([2], 32, 4, SINGLE)
    assert module.why_not("set_block_backward", (upstream(args), *args)) == []

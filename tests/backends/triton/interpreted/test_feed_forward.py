"""feed_forward in the interpreter: forward and gradients against the float64 reference."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as nnf
from torch import Tensor

from helpers.errors import loses_at_most_twice, relative_error
from helpers.op_cases import feed_forward_case
from sne_fast import reference
from sne_fast.backends.triton import feed_forward as kernels

pytestmark = pytest.mark.build

SINGLE, DOUBLE, HALF = torch.float32, torch.float64, torch.float16
Inputs = tuple[tuple[Tensor, ...], Tensor]


@pytest.fixture(params=["fused", "staged"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both forms of every width, and tiles of 16 rows, so that a few hundred give each program several."""
    launch = kernels.launch

    def other(*args, **kwargs):
        sizes, h = launch(*args, **kwargs), kwargs["h"]
        rows = 0 if request.param == "staged" else 16
        return dataclasses.replace(sizes, blocks={"ROWS": rows, "INNER": min(h, 64), "PROGRAMS": 2})

    monkeypatch.setattr(kernels, "launch", other)
    return request.param


def case(rows: int, h: int, dtype: torch.dtype, layer_norm: bool = True, one_query: bool = False) -> Inputs:
    """Make arguments of the op, and a gradient of its result."""
    g = torch.Generator().manual_seed(5)
    grad = torch.randn(rows, h, generator=g, dtype=DOUBLE).to(dtype)
    return feed_forward_case(rows, h, layer_norm, dtype, one_query), grad


def run(backend, args: tuple[Tensor, ...], grad: Tensor) -> tuple[Tensor, ...]:
    """Return out, the gradient of q + attended, dw_o, db_o, dnorm."""
    return backend.feed_forward(*args), *backend.feed_forward_backward(grad, *args)


def exact(args: tuple[Tensor, ...], grad: Tensor) -> tuple[Tensor, ...]:
    return run(reference, tuple(t.double() for t in args), grad.double())


def compare(got: tuple[Tensor, ...], want: tuple[Tensor, ...], forward: float, backward: float) -> None:
    for place, (a, b) in enumerate(zip(got, want, strict=True)):
        assert a.shape == b.shape and relative_error(a, b) < (backward if place else forward), place


@pytest.mark.parametrize("rows", [0, 1, 16, 37, 150])
@pytest.mark.parametrize("layer_norm", [True, False])
@pytest.mark.parametrize("dtype", [SINGLE, DOUBLE], ids=str)
def test_rows(form, rows: int, layer_norm: bool, dtype: torch.dtype) -> None:
    inputs = case(rows, 64, dtype, layer_norm)
    got = run(kernels, *inputs)
    compare(got, exact(*inputs), *((2e-6, 1e-5) if dtype == SINGLE else (1e-13, 1e-12)))
    assert all(torch.equal(a, b) for a, b in zip(got, run(kernels, *inputs), strict=True)), "the same bits twice"


@pytest.mark.parametrize("h", [32, 128, 256])
@pytest.mark.parametrize("layer_norm", [True, False])
def test_widths(form, h: int, layer_norm: bool) -> None:
    inputs = case(70, h, SINGLE, layer_norm)
    compare(run(kernels, *inputs), exact(*inputs), 2e-6, 1e-5)


@pytest.mark.parametrize("dtype", [SINGLE, DOUBLE, HALF], ids=str)
@pytest.mark.parametrize("h", [32, 64, 128, 256])
def test_sizes_of_the_table(h: int, dtype: torch.dtype) -> None:
    inputs = case(300, h, dtype)
    tolerances = {SINGLE: (2e-6, 1e-5), DOUBLE: (1e-13, 1e-12), HALF: (2e-3, 0.3)}  # a ReLU may flip
    compare(run(kernels, *inputs), exact(*inputs), *tolerances[dtype])


@pytest.mark.parametrize("h", [64, 256])
@pytest.mark.parametrize("rows", [1, 2, 45])
def test_one_query_of_all_rows(form, rows: int, h: int) -> None:
    args, grad = case(rows, h, SINGLE, one_query=True)
    assert rows == 1 or args[0].stride(0) == 0
    got = run(kernels, args, grad)
    compare(got, exact(args, grad), 2e-6, 1e-5)
    copied = run(kernels, (args[0].contiguous(), *args[1:]), grad)
    assert all(torch.equal(a, b) for a, b in zip(got, copied, strict=True))


def test_arguments_that_are_not_contiguous(form) -> None:
    args, grad = case(40, 64, SINGLE)
    turned = tuple(t.t().contiguous().t() if t.dim() == 2 else t for t in args)
    assert not any(t.is_contiguous() for t in turned if t.dim() == 2)
    got, want = run(kernels, turned, grad.t().contiguous().t()), run(kernels, args, grad)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert all(t.is_contiguous() for t in got)


def eager(q: Tensor, attended: Tensor, w: Tensor, b: Tensor, norm: Tensor) -> Tensor:
    """Compute what MAB does on other backends."""
    h, o = (q.shape[1],), q + attended
    o = nnf.layer_norm(o, h, norm[0], norm[1]) if len(norm) else o
    o = o + nnf.relu(nnf.linear(o, w, b))
    return nnf.layer_norm(o, h, norm[2], norm[3]) if len(norm) else o


@pytest.mark.parametrize("h", [32, 64, 128, 256])
@pytest.mark.parametrize("layer_norm", [True, False])
def test_float16_loses_at_most_twice_what_pytorch_does(form, h: int, layer_norm: bool) -> None:
    args, grad = case(150, h, HALF, layer_norm)
    want, got = exact(args, grad), run(kernels, args, grad)
    leaves = [t.clone().requires_grad_() for t in args]
    out = eager(*leaves)
    out.backward(grad)
    usual = (out.detach(), leaves[1].grad, *(t.grad for t in leaves[2:]))
    for place, (a, b) in enumerate(zip(got, usual, strict=True)):
        assert a.dtype == HALF
        if b is not None and b.numel():
            loses_at_most_twice(a, b, want[place], place)


@pytest.mark.parametrize("h", [64, 256])
@pytest.mark.parametrize("place", ["q", "attended", "grad"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_stays_in_its_row(form, h: int, place: str, value: float) -> None:
    args, grad = case(40, h, SINGLE)
    want = run(kernels, args, grad)
    broken = {"q": args[0].clone(), "attended": args[1].clone(), "grad": grad.clone()}
    broken[place][20, 3] = value
    got = run(kernels, (broken["q"], broken["attended"], *args[2:]), broken["grad"])
    others = torch.arange(40) != 20
    for a, b in zip(got[:2], want[:2], strict=True):
        assert torch.equal(a[others], b[others])
    assert not got[1][20].isfinite().all() and (place == "grad" or not got[0][20].isfinite().all())


def test_the_spare_rows_of_a_tile_give_nothing_to_the_parameters(form) -> None:
    """Rows of zeros that only fill a tile have values of their own behind ln0 and fc_o, but no gradient."""
    (q, attended, w, b, norm), grad = case(3, 32, DOUBLE)
    args = (q, attended, w, b + 100, norm + 100)
    compare(run(kernels, args, grad), exact(args, grad), 1e-12, 1e-11)


@pytest.mark.parametrize("h", [32, 256])
@pytest.mark.parametrize("layer_norm", [True, False])
def test_gradcheck(form, h: int, layer_norm: bool) -> None:
    class Op(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *args):
            ctx.save_for_backward(*args)
            return kernels.feed_forward(*args)

        @staticmethod
        def backward(ctx, grad):
            grad_sum, *grads = kernels.feed_forward_backward(grad, *ctx.saved_tensors)
            return grad_sum, grad_sum, *grads

    args, _ = case(21, h, DOUBLE, layer_norm)
    leaves = [t.requires_grad_(t.numel() > 0) for t in args]
    assert torch.autograd.gradcheck(Op.apply, leaves, fast_mode=True)


def test_why_not() -> None:
    args, grad = case(2, 48, SINGLE)
    assert kernels.why_not("feed_forward", args) == ["width must be one of 32, 64, 128, 256, got 48"]
    args, grad = case(2, 64, SINGLE)
    assert kernels.why_not("feed_forward_backward", (grad, *args)) == []

"""segment_pool in the interpreter: forward and gradients against the float64 reference."""

from __future__ import annotations

import math

import pytest
import torch
from cpu_cases import relative_error
from op_cases import pool_case
from torch import Tensor

from sne_fast import reference
from sne_fast.kernels import segment_pool as kernels

SINGLE, DOUBLE, HALF = torch.float32, torch.float64, torch.float16
LENGTHS = {
    "short": [1, 2, 0, 7, 1, 30, 3],
    "middle": [70, 3, 0, 33],
    "long": [1, 700, 0, 260, 128, 5],
    "empty": [0, 0],
    "none": [],
    "one": [1],
}


def run(engine, x: Tensor, logits: Tensor, ptr: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    """out, lse, dx, dlogits."""
    out, lse = engine.segment_pool(x, logits, ptr, ptr)
    return out, lse, *engine.segment_pool_backward(grad, x, logits, out, lse, ptr, ptr)


def case(lengths: list[int], h: int, queries: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    x, logits, ptr = pool_case(lengths, h, queries)
    g = torch.Generator().manual_seed(5)
    grad = torch.randn(len(lengths), queries, h, generator=g, dtype=DOUBLE)
    return x.to(dtype), (3 * logits).to(dtype), ptr, grad.to(dtype)


def exact(x: Tensor, logits: Tensor, ptr: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    return run(reference, x.double(), logits.double(), ptr, grad.double())


def compare(got: tuple[Tensor, ...], want: tuple[Tensor, ...], forward: float, backward: float) -> None:
    finite = want[1].isfinite()
    assert torch.equal(got[1].isfinite(), finite) and bool((got[1][~finite] == -math.inf).all())
    assert relative_error(got[1][finite], want[1][finite]) < forward
    assert relative_error(got[0], want[0]) < forward
    for a, b in zip(got[2:], want[2:], strict=True):
        assert a.shape == b.shape and relative_error(a, b) < backward


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
@pytest.mark.parametrize("dtype", [SINGLE, DOUBLE], ids=str)
def test_lengths(lengths: list[int], dtype: torch.dtype) -> None:
    inputs = case(lengths, 32, 4, dtype)
    got = run(kernels, *inputs)
    compare(got, exact(*inputs), *((2e-6, 1e-5) if dtype == SINGLE else (1e-13, 1e-12)))
    assert all(torch.equal(a, b) for a, b in zip(got, run(kernels, *inputs), strict=True)), "the same bits twice"


@pytest.mark.parametrize(
    ("h", "queries"), [(64, 4), (256, 7), (48, 3), (16, 1), (1008, 2), (64, 100), (512, 32), (32, 0)]
)
def test_any_number_of_queries_and_width(h: int, queries: int) -> None:
    for lengths in ([3, 70, 300], [9, 1, 0, 5])[h * queries > 5000 :]:
        inputs = case(lengths, h, queries, SINGLE)
        compare(run(kernels, *inputs), exact(*inputs), 2e-6, 1e-5)


def test_float16_loses_at_most_twice_what_pytorch_does() -> None:
    x, logits, ptr, grad = case([300], 64, 4, HALF)
    want, got = exact(x, logits, ptr, grad), run(kernels, x, logits, ptr, grad)
    leaves = [t.clone().requires_grad_() for t in (x, logits)]
    out = torch.softmax(leaves[1], dim=0).T @ leaves[0]
    out.backward(grad[0])
    for place, usual in ((0, out.detach()[None]), (2, leaves[0].grad), (3, leaves[1].grad)):
        lost, allowed = (relative_error(t, want[place]) for t in (got[place], usual))
        assert got[place].dtype == HALF and lost < 2 * allowed, (place, lost, allowed)


@pytest.mark.parametrize("lengths", [[5, 9, 3], [90, 80, 3], [400, 300, 20]], ids=str)
@pytest.mark.parametrize("where", ["x", "logits"])
def test_nan_stays_in_its_segment(lengths: list[int], where: str) -> None:
    inputs = case(lengths, 32, 2, SINGLE)
    want = run(kernels, *inputs)
    (inputs[0] if where == "x" else inputs[1])[lengths[0] + 1] = math.nan
    got = run(kernels, *inputs)
    for which, (a, b) in enumerate(zip(got, want, strict=True)):
        outside = torch.ones(a.shape[0], dtype=torch.bool)
        outside[slice(1, 2) if which < 2 else slice(lengths[0], lengths[0] + lengths[1])] = False
        assert torch.equal(a[outside], b[outside])
    assert got[0][1].isnan().any()


def test_rows_masked_by_their_logit_have_no_weight() -> None:
    x, logits, ptr, grad = case([10, 700], 32, 2, SINGLE)
    logits[4:9], logits[20:600] = -math.inf, -math.inf  # whole pieces of the long segment among them
    kept = logits[:, 0].isfinite()
    x[~kept] = 1e32
    few = torch.tensor([0, 5, 5 + int(kept[10:].sum())])
    got, want = run(kernels, x, logits, ptr, grad), run(kernels, x[kept], logits[kept], few, grad)
    torch.testing.assert_close(got[:2], want[:2])
    torch.testing.assert_close(got[2][kept], want[2])
    assert all(t.isfinite().all() and torch.count_nonzero(t[~kept]) == 0 for t in got[2:])


@pytest.mark.parametrize("lengths", [[2, 0, 3], [70, 300]], ids=str)
def test_gradcheck(lengths: list[int]) -> None:
    x, logits, ptr, _ = case(lengths, 16, 2, DOUBLE)

    class Op(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, logits):
            out, lse = kernels.segment_pool(x, logits, ptr, ptr)
            ctx.save_for_backward(x, logits, out, lse)
            return out

        @staticmethod
        def backward(ctx, grad):
            return kernels.segment_pool_backward(grad, *ctx.saved_tensors, ptr, ptr)

    assert torch.autograd.gradcheck(Op.apply, (x.requires_grad_(), logits.requires_grad_()), fast_mode=True)


def test_why_not() -> None:
    x, logits, ptr, _ = case([2], 8, 2, SINGLE)
    assert kernels.why_not("segment_pool", (x, logits, ptr, ptr)) == ["width must be a multiple of 16, got 8"]
    x, logits, ptr, grad = case([2], 48, 3, SINGLE)
    assert kernels.why_not("segment_pool_backward", (grad, x, logits, grad, grad, ptr, ptr)) == []

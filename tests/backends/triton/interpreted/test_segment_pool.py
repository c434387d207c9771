"""segment_pool in the interpreter: forward and gradients against the float64 reference."""

from __future__ import annotations

import pytest
import torch

from helpers import segment_pool_checks as checks
from helpers.segment_pool_checks import DOUBLE, HALF, SINGLE, case, check, run
from sne_fast.backends.triton import segment_pool as kernels

pytestmark = pytest.mark.build


@pytest.mark.parametrize("lengths", checks.LENGTHS.values(), ids=checks.LENGTHS.keys())
@pytest.mark.parametrize("dtype", [SINGLE, DOUBLE], ids=str)
def test_lengths(lengths: list[int], dtype: torch.dtype) -> None:
    inputs = case(lengths, 32, 4, dtype)
    got = check(kernels, inputs)
    assert all(torch.equal(a, b) for a, b in zip(got, run(kernels, *inputs), strict=True)), "the same bits twice"


@pytest.mark.parametrize(("h", "queries"), [(64, 4), *checks.WIDTHS_AND_QUERIES, (32, 0)])
def test_any_number_of_queries_and_width(h: int, queries: int) -> None:
    for lengths in ([3, 70, 300], [9, 1, 0, 5])[h * queries > 5000 :]:
        check(kernels, case(lengths, h, queries, SINGLE))


def test_float16_loses_at_most_twice_what_pytorch_does() -> None:
    checks.loses_at_most_twice_what_pytorch_does(kernels, 300, 64, 4, HALF)


@pytest.mark.parametrize("lengths", checks.WITH_NAN, ids=str)
@pytest.mark.parametrize("where", ["x", "logits"])
def test_nan_stays_in_its_segment(lengths: list[int], where: str) -> None:
    checks.nan_stays_in_its_segment(kernels, lengths, where)


def test_rows_masked_by_their_logit_have_no_weight() -> None:
    checks.rows_masked_by_their_logit_have_no_weight(kernels)


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
    checks.why_not(kernels)

"""set_attention in the interpreter: forward and gradients against the float64 reference."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from helpers import set_attention_checks as checks
from helpers.set_attention_checks import DOUBLE, HALF, SINGLE, check, inputs, run
from sne_fast.backends.triton import set_attention as kernels

pytestmark = pytest.mark.build

CASES = {**checks.CASES, "one long": ([130], [130])}


@pytest.fixture(autouse=True)
def short_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let sets of a hundred rows count as long ones, as the interpreter is slow."""
    launch = kernels.launch

    def smaller(*args, **kwargs):
        sizes = launch(*args, **kwargs)
        return dataclasses.replace(sizes, blocks={**sizes.blocks, "SPLIT": 64})

    monkeypatch.setattr(kernels, "launch", smaller)


@pytest.mark.parametrize("lengths", CASES.values(), ids=CASES.keys())
def test_float64_is_exact(lengths) -> None:
    check(kernels, inputs(*lengths, 32, DOUBLE), 2)


@pytest.mark.parametrize("lengths", checks.RAGGED_OR_FEW, ids=str)
def test_float32(lengths) -> None:
    case = inputs(*lengths, 64, SINGLE)
    got = check(kernels, case, 4)
    assert all(torch.equal(a, b) for a, b in zip(got, run(kernels, *case, 4), strict=True)), "the same bits twice"


@pytest.mark.parametrize(("h", "heads"), [(32, 4), (32, 1), (64, 1), (128, 16), (128, 2), (256, 8), (256, 32)])
def test_widths_and_heads(h: int, heads: int) -> None:
    check(kernels, inputs([5, 1, 18], [20, 2, 1], h, SINGLE), heads)


@pytest.mark.parametrize("lengths", checks.ONE_SET)
def test_float16_loses_at_most_twice_what_pytorch_does(lengths: tuple[int, int]) -> None:
    checks.loses_at_most_twice_what_pytorch_does(kernels, lengths, HALF)


def test_the_mean_of_the_gradient_does_not_come_from_a_rounded_result() -> None:
    checks.mean_of_the_gradient_does_not_come_from_a_rounded_result(kernels, (20, 20), HALF, 0.02)


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("lengths", checks.WITH_NAN.values(), ids=checks.WITH_NAN.keys())
def test_nan_stays_in_its_set(lengths, place: int) -> None:
    checks.nan_stays_in_its_set(kernels, lengths, place, SINGLE)


def test_masked_rows_and_large_logits() -> None:
    checks.masked_rows_and_large_logits(kernels)


def test_gradcheck() -> None:
    (q, k, v), pointers, _ = inputs([3, 1, 2], [2, 4, 17], 32, DOUBLE)

    class Op(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *qkv):
            out, lse = kernels.set_attention(*qkv, *pointers, 4)
            ctx.save_for_backward(*qkv, out, lse)
            return out

        @staticmethod
        def backward(ctx, grad):
            return kernels.set_attention_backward(grad, *ctx.saved_tensors, *pointers, 4)

    leaves = [t.requires_grad_() for t in (q, k, v)]
    assert torch.autograd.gradcheck(Op.apply, leaves, fast_mode=True)


def test_why_not() -> None:
    checks.why_not(kernels)

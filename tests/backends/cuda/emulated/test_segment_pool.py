"""segment_pool of the CUDA backend in the emulator: forward and gradients against the float64 reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import sne_fast
from helpers import segment_pool_checks as checks
from helpers.errors import loses_at_most_twice, relative_error
from helpers.segment_pool_checks import BRAIN, DOUBLE, HALF, SINGLE, case, check, exact, run
from sne_fast import functional, reference
from sne_fast.backends.cuda import segment_pool as kernels
from sne_fast.backends.cuda.library import library

pytestmark = pytest.mark.build

LENGTHS = {
    **checks.LENGTHS,
    "many short": [3, 1, 2, 0, 2, 5, 1, 1] * 40,
    "one long": [1500],
    "long among short": [2, 3, 1] * 40 + [600] + [1, 0, 2] * 40 + [200],
    "many empty": [0] * 300 + [5] + [0] * 300,
}


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_lengths(lengths: list[int]) -> None:
    check(kernels, case(lengths, 64, 4, SINGLE))


@pytest.mark.parametrize("lengths", [[2, 3, 1] * 12 + [400] + [1, 0, 2] * 12, [70, 3, 0, 90]], ids=["mixed", "middle"])
@pytest.mark.parametrize(("dtype", "queries"), [(SINGLE, 4), (HALF, 4), (SINGLE, 9)], ids=str)
def test_every_schedule_gives_the_same_bits(lengths: list[int], dtype: torch.dtype, queries: int) -> None:
    inputs = case(lengths, 64, queries, dtype)
    want = run(kernels, *inputs)
    for seed in (1, 2):
        library().sne_fast_cuda_emulated_schedule(seed)
        assert all(torch.equal(a, b) for a, b in zip(run(kernels, *inputs), want, strict=True))


@pytest.mark.parametrize(
    ("h", "queries"), [(32, 1), (32, 2), (64, 8), (128, 16), (256, 4), (256, 32), *checks.WIDTHS_AND_QUERIES]
)
@pytest.mark.parametrize("dtype", [SINGLE, BRAIN], ids=str)
def test_any_number_of_queries_and_width(h: int, queries: int, dtype: torch.dtype) -> None:
    for lengths in ([3, 70, 200], [9, 1, 0, 5], [2, 1, 3, 0] * 40)[: 3 if h * queries <= 1024 else 1]:
        check(kernels, case(lengths, h, queries, dtype))


@pytest.mark.parametrize("dtype", [SINGLE, HALF], ids=str)
@pytest.mark.parametrize("min_items", [128, 700, 4096])
def test_parts_of_every_size(dtype: torch.dtype, min_items: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Segments that lanes, a warp or the whole block have, cut and whole, as blocks get more items."""
    monkeypatch.setattr(kernels, "MIN_ITEMS", min_items)
    for lengths in ([1100, 3, 1, 90, 0, 300], [4, 1, 0, 2] * 30 + [600] + [3] * 70):
        check(kernels, case(lengths, 64, 4, dtype))


def test_no_queries() -> None:
    x, logits, ptr, grad = case([2, 3], 32, 0, SINGLE)
    out, lse, grad_x, grad_logits = run(kernels, x, logits, ptr, grad)
    assert out.shape == (2, 0, 32) and lse.shape == (2, 0) and grad_logits.shape == (5, 0)
    assert torch.equal(grad_x, torch.zeros_like(x))


@pytest.mark.parametrize("dtype", [HALF, BRAIN], ids=str)
@pytest.mark.parametrize(("length", "h", "queries"), [(300, 64, 4), (1500, 32, 2), (12, 256, 8)])
def test_half_types_lose_at_most_twice_what_pytorch_does(dtype: torch.dtype, length: int, h: int, queries: int) -> None:
    checks.loses_at_most_twice_what_pytorch_does(kernels, length, h, queries, dtype)


@pytest.mark.parametrize("lengths", [*checks.WITH_NAN, [60, 1500, 100]], ids=str)
@pytest.mark.parametrize("where", ["x", "logits"])
def test_nan_stays_in_its_segment(lengths: list[int], where: str) -> None:
    checks.nan_stays_in_its_segment(kernels, lengths, where)


def test_rows_masked_by_their_logit_have_no_weight() -> None:
    checks.rows_masked_by_their_logit_have_no_weight(kernels)


def test_large_logits() -> None:
    """As exact as float32 holds lse; gradients as PyTorch's own in float32, which take the weights from it too."""
    x, logits, ptr, grad = case([40, 500, 3], 32, 2, SINGLE)
    inputs = (x, logits * 100 + 1e4, ptr, grad)
    want, got, usual = exact(*inputs), run(kernels, *inputs), run(reference, *inputs)
    assert relative_error(got[0], want[0]) < 2e-6 and relative_error(got[1], want[1]) < 2e-6
    for a, b, c in zip(got[2:], want[2:], usual[2:], strict=True):
        loses_at_most_twice(a, c, b)


@pytest.mark.parametrize("lengths", [[2, 0, 3], [70, 300]], ids=str)
def test_autograd(lengths: list[int]) -> None:
    x, logits, ptr, grad = case(lengths, 64, 4, SINGLE)

    def gradients(backend: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [t.to(dtype).requires_grad_() for t in (x, logits)]
        with sne_fast.use_backend(backend):
            return torch.autograd.grad(functional.segment_pool(*leaves, ptr), leaves, grad.to(dtype))

    for a, b in zip(gradients("cuda", SINGLE), gradients("reference", DOUBLE), strict=True):
        assert relative_error(a, b) < 1e-5


def test_views_that_begin_anywhere_and_strides() -> None:
    x, logits, ptr, grad = case([5, 90, 0, 3], 32, 4, SINGLE)
    want = run(kernels, x, logits, ptr, grad)
    odd = [torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape) for t in (x, logits)]
    assert all(torch.equal(a, b) for a, b in zip(run(kernels, *odd, ptr, grad), want, strict=True))
    strided = [t.T.contiguous().T for t in (x, logits)]
    got = run(kernels, *strided, ptr, grad.transpose(0, 2).contiguous().transpose(0, 2))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_the_division_follows_the_number_of_items() -> None:
    assert kernels.divide_work(0, 1, 4, 132) == (128, 1)
    assert kernels.divide_work(1 << 20, 1000, 4, 132) == (997, 1056)
    assert kernels.divide_work(1 << 40, 1, 4, 132)[0] == kernels.MAX_ITEMS


def test_why_not() -> None:
    checks.why_not(kernels)
    x, logits, ptr, _ = case([2], 48, 3, SINGLE)
    with pytest.raises(ValueError, match=r"segment_pool: logits must have shape .rows, A. with rows = 2, got "):
        kernels.segment_pool(x, logits[:1], ptr, ptr)

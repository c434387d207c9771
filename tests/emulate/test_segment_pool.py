"""segment_pool of the CUDA engine in the emulator: forward and gradients against the float64 reference."""

from __future__ import annotations

import math

import pytest
import torch
from cpu_cases import relative_error
from op_cases import pool_case
from torch import Tensor

import sne_fast
from sne_fast import functional, reference
from sne_fast._cuda import segment_pool as kernels
from sne_fast._cuda.library import library

SINGLE, DOUBLE, HALF, BFLOAT = torch.float32, torch.float64, torch.float16, torch.bfloat16
LENGTHS = {
    "short": [1, 2, 0, 7, 1, 30, 3],
    "many short": [3, 1, 2, 0, 2, 5, 1, 1] * 40,
    "middle": [70, 3, 0, 33, 17, 90],
    "long": [1, 900, 0, 260, 128, 5],
    "one long": [1500],
    "long among short": [2, 3, 1] * 40 + [600] + [1, 0, 2] * 40 + [200],
    "empty": [0, 0],
    "many empty": [0] * 300 + [5] + [0] * 300,
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
def test_lengths(lengths: list[int]) -> None:
    inputs = case(lengths, 64, 4, SINGLE)
    compare(run(kernels, *inputs), exact(*inputs), 2e-6, 1e-5)


@pytest.mark.parametrize("lengths", [[2, 3, 1] * 12 + [400] + [1, 0, 2] * 12, [70, 3, 0, 90]], ids=["mixed", "middle"])
@pytest.mark.parametrize(("dtype", "queries"), [(SINGLE, 4), (HALF, 4), (SINGLE, 9)], ids=str)
def test_every_schedule_gives_the_same_bits(lengths: list[int], dtype: torch.dtype, queries: int) -> None:
    inputs = case(lengths, 64, queries, dtype)
    want = run(kernels, *inputs)
    for seed in (1, 2):
        library().sne_fast_cuda_emulated_schedule(seed)
        assert all(torch.equal(a, b) for a, b in zip(run(kernels, *inputs), want, strict=True))


@pytest.mark.parametrize(
    ("h", "queries"),
    [
        (32, 1),
        (32, 2),
        (64, 8),
        (128, 16),
        (256, 4),
        (256, 32),
        (256, 7),
        (48, 3),
        (16, 1),
        (1008, 2),
        (64, 100),
        (512, 32),
    ],
)
@pytest.mark.parametrize("dtype", [SINGLE, BFLOAT], ids=str)
def test_any_number_of_queries_and_width(h: int, queries: int, dtype: torch.dtype) -> None:
    for lengths in ([3, 70, 200], [9, 1, 0, 5], [2, 1, 3, 0] * 40)[: 3 if h * queries <= 1024 else 1]:
        inputs = case(lengths, h, queries, dtype)
        compare(run(kernels, *inputs), exact(*inputs), *((2e-6, 1e-5) if dtype == SINGLE else (4e-3, 6e-3)))


@pytest.mark.parametrize("dtype", [SINGLE, HALF], ids=str)
@pytest.mark.parametrize("fewest", [128, 700, 4096])
def test_parts_of_every_size(dtype: torch.dtype, fewest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Segments that lanes, a warp or the whole block have, cut and whole, as shares of the blocks grow."""
    monkeypatch.setattr(kernels, "FEWEST", fewest)
    for lengths in ([1100, 3, 1, 90, 0, 300], [4, 1, 0, 2] * 30 + [600] + [3] * 70):
        inputs = case(lengths, 64, 4, dtype)
        compare(run(kernels, *inputs), exact(*inputs), *((2e-6, 1e-5) if dtype == SINGLE else (5e-4, 1e-3)))


def test_no_queries() -> None:
    x, logits, ptr, grad = case([2, 3], 32, 0, SINGLE)
    out, lse, grad_x, grad_logits = run(kernels, x, logits, ptr, grad)
    assert out.shape == (2, 0, 32) and lse.shape == (2, 0) and grad_logits.shape == (5, 0)
    assert torch.equal(grad_x, torch.zeros_like(x))


@pytest.mark.parametrize("dtype", [HALF, BFLOAT], ids=str)
@pytest.mark.parametrize(("length", "h", "queries"), [(300, 64, 4), (1500, 32, 2), (12, 256, 8)])
def test_half_types_lose_at_most_twice_what_pytorch_does(dtype: torch.dtype, length: int, h: int, queries: int) -> None:
    x, logits, ptr, grad = case([length], h, queries, dtype)
    want, got = exact(x, logits, ptr, grad), run(kernels, x, logits, ptr, grad)
    leaves = [t.clone().requires_grad_() for t in (x, logits)]
    out = torch.softmax(leaves[1], dim=0).T @ leaves[0]
    out.backward(grad[0])
    for place, usual in ((0, out.detach()[None]), (2, leaves[0].grad), (3, leaves[1].grad)):
        lost, allowed = (relative_error(t, want[place]) for t in (got[place], usual))
        assert got[place].dtype == dtype and lost < 2 * allowed, (place, lost, allowed)


@pytest.mark.parametrize("lengths", [[5, 9, 3] + [1] * 60, [90, 80, 3], [400, 300, 20], [60, 1500, 100]], ids=str)
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
    assert got[0][1].isnan().any() and (where == "x" or got[1][1].isnan().all())


def test_rows_masked_by_their_logit_have_no_weight() -> None:
    x, logits, ptr, grad = case([10, 700], 32, 2, SINGLE)
    logits[4:9], logits[20:600] = -math.inf, -math.inf  # whole parts of the long segment among them
    kept = logits[:, 0].isfinite()
    x[~kept] = 1e32
    few = torch.tensor([0, 5, 5 + int(kept[10:].sum())])
    got, want = run(kernels, x, logits, ptr, grad), run(kernels, x[kept], logits[kept], few, grad)
    torch.testing.assert_close(got[:2], want[:2])
    torch.testing.assert_close(got[2][kept], want[2])
    assert all(t.isfinite().all() and torch.count_nonzero(t[~kept]) == 0 for t in got[2:])


def test_large_logits() -> None:
    """As exact as float32 holds lse; gradients as PyTorch's own in float32, which take the weights from it too."""
    x, logits, ptr, grad = case([40, 500, 3], 32, 2, SINGLE)
    inputs = (x, logits * 100 + 1e4, ptr, grad)
    want, got, usual = exact(*inputs), run(kernels, *inputs), run(reference, *inputs)
    assert relative_error(got[0], want[0]) < 2e-6 and relative_error(got[1], want[1]) < 2e-6
    for a, b, c in zip(got[2:], want[2:], usual[2:], strict=True):
        assert relative_error(a, b) < 2 * relative_error(c, b)


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


def test_shares_follow_the_number_of_items() -> None:
    assert kernels.shares(0, 1, 4, 132) == (128, 1)
    assert kernels.shares(1 << 20, 1000, 4, 132) == (997, 1056)
    assert kernels.shares(1 << 40, 1, 4, 132)[0] == kernels.MOST


def test_why_not() -> None:
    x, logits, ptr, _ = case([2], 8, 2, SINGLE)
    assert kernels.why_not("segment_pool", (x, logits, ptr, ptr)) == ["width must be a multiple of 16, got 8"]
    x, logits, ptr, grad = case([2], 48, 3, SINGLE)
    assert kernels.why_not("segment_pool_backward", (grad, x, logits, grad, grad, ptr, ptr)) == []
    with pytest.raises(ValueError, match="x, logits and ptr must have shapes"):
        kernels.segment_pool(x, logits[:1], ptr, ptr)

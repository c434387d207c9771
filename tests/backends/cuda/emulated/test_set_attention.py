"""set_attention's CUDA kernels in the emulator: forward and gradients against the float64 reference."""

from __future__ import annotations

import pytest
import torch

import sne_fast
from helpers import set_attention_checks as checks
from helpers.errors import relative_error
from helpers.op_cases import pointer, products
from helpers.set_attention_checks import BRAIN, HALF, SINGLE, check, compare, exact, inputs, run
from sne_fast.backends.cuda import library
from sne_fast.backends.cuda import set_attention as backend
from sne_fast.backends.gpu_plans.lengths import Lengths

pytestmark = pytest.mark.build

CASES = {**checks.CASES, "long": ([1, 70, 2, 130], [1, 70, 2, 130]), "many seeds": ([33, 40], [150, 200])}


@pytest.fixture(autouse=True)
def short_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let sets of a hundred rows count as long ones."""
    monkeypatch.setattr(backend, "MAX_SPLIT", 64)
    monkeypatch.setattr(backend, "MIN_SPLIT", 64)


@pytest.mark.parametrize("lengths", CASES.values(), ids=CASES.keys())
def test_float32(lengths) -> None:
    check(backend, inputs(*lengths, 32, SINGLE), 2)


@pytest.mark.parametrize("lengths", checks.RAGGED_OR_FEW, ids=str)
def test_tf32(lengths) -> None:
    case = inputs(*lengths, 32, SINGLE)
    with products("high"):
        got, want = run(backend, *case, 2), exact(*case, 2)
    compare(got, want, 2e-3, 3e-3)
    assert relative_error(got[0], want[0]) > 1e-5, "products were rounded"


@pytest.mark.parametrize(
    ("h", "heads"),
    [(32, 4), (32, 1), (64, 8), (64, 4), (64, 2), (64, 1), (128, 16), (128, 2), (256, 4), (256, 32)],
)
@pytest.mark.parametrize("dtype", [SINGLE, HALF, BRAIN], ids=str)
def test_widths_and_heads(h: int, heads: int, dtype: torch.dtype) -> None:
    check(backend, inputs([5, 1, 18], [20, 2, 1], h, dtype), heads)


@pytest.mark.parametrize("dtype", [HALF, BRAIN], ids=str)
@pytest.mark.parametrize(
    "lengths", [CASES["long"], CASES["few queries"], CASES["few keys"], CASES["many seeds"]], ids=str
)
@pytest.mark.parametrize("heads", [1, 2])
def test_half_types_ragged(lengths, heads: int, dtype: torch.dtype) -> None:
    check(backend, inputs(*lengths, 32, dtype), heads)


@pytest.mark.parametrize("dtype", [HALF, BRAIN], ids=str)
@pytest.mark.parametrize("lengths", checks.ONE_SET)
def test_half_types_lose_at_most_twice_what_pytorch_does(lengths: tuple[int, int], dtype: torch.dtype) -> None:
    checks.loses_at_most_twice_what_pytorch_does(backend, lengths, dtype)


@pytest.mark.parametrize(("dtype", "bound"), [(HALF, 0.02), (BRAIN, 0.04)], ids=str)
@pytest.mark.parametrize("lengths", [(20, 20), (4, 140), (140, 4)])
def test_the_mean_of_the_gradient_does_not_come_from_a_rounded_result(
    lengths: tuple[int, int], dtype: torch.dtype, bound: float
) -> None:
    checks.mean_of_the_gradient_does_not_come_from_a_rounded_result(backend, lengths, dtype, bound)


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("dtype", [SINGLE, BRAIN], ids=str)
@pytest.mark.parametrize("lengths", checks.WITH_NAN.values(), ids=checks.WITH_NAN.keys())
def test_nan_stays_in_its_set(lengths, place: int, dtype: torch.dtype) -> None:
    checks.nan_stays_in_its_set(backend, lengths, place, dtype)


def test_masked_rows_and_large_logits() -> None:
    checks.masked_rows_and_large_logits(backend)


@pytest.mark.parametrize("dtype", [SINGLE, BRAIN], ids=str)
@pytest.mark.parametrize("lengths", [CASES["long"], *checks.RAGGED_OR_FEW], ids=str)
def test_the_same_bits_in_every_order_of_threads(lengths, dtype: torch.dtype) -> None:
    case = inputs(*lengths, 32, dtype)
    want = run(backend, *case, 2)
    for seed in (1, 2, 3):
        library.library().sne_fast_cuda_emulated_schedule(seed)
        assert all(torch.equal(a, b) for a, b in zip(run(backend, *case, 2), want, strict=True)), seed


@pytest.mark.parametrize("warps", [1, 2, 4])
@pytest.mark.parametrize(("heads", "dtype"), [(4, BRAIN), (1, BRAIN), (2, SINGLE), (1, SINGLE)])
def test_teams_of_any_size(monkeypatch, warps: int, heads: int, dtype: torch.dtype) -> None:
    """Every size of team on sets shorter and longer than it, found by search and by number."""
    monkeypatch.setattr(backend, "MAX_WARPS", warps)
    for lengths in ([9, 0, 33, 2], [1, 5, 16, 3]):
        check(backend, inputs(lengths, lengths, 64 if heads == 1 else 32, dtype), heads)


def test_plans(monkeypatch) -> None:
    monkeypatch.setattr(backend, "MAX_SPLIT", 1024)
    monkeypatch.setattr(backend, "MIN_SPLIT", 256)

    def plan(own: list[int], inner: list[int], heads: int = 4) -> tuple[int, ...]:
        p = backend.Plan.make(*(Lengths.of(pointer(x)) for x in (own, inner)), sum(own), sum(inner), heads, 132)
        return p.warps, p.one_tile_per_set, p.split_rows, p.pieces, p.aligned_splits, p.max_own_rows

    assert plan([3, 16, 2], [3, 16, 2]) == (1, True, 0, 3, 0, 16)
    assert plan([20, 30], [20, 30]) == (2, True, 0, 2, 0, 30)
    assert plan([20, 300], [20, 300]) == (4, False, 0, 5 + 2, 0, 300)
    assert plan([20, 3], [100, 511]) == (2, True, 0, 2, 0, 20)
    assert plan([4, 32], [10, 700]) == (2, False, 256, 2 + 2, 2, 32)
    assert plan([4, 40], [10, 1 << 20]) == (4, False, 1024, 1024 + 2, 1024, 40)
    assert plan([4, 65], [10, 1 << 20])[2] == 0
    assert plan([], []) == (1, True, 0, 0, 0, 0)


def test_more_than_2_to_31_values(monkeypatch) -> None:
    """Check addresses of keys and values: memory that nothing touches, but for the last set's."""
    monkeypatch.setattr(backend, "MAX_SPLIT", 1 << 20)
    torch.use_deterministic_algorithms(False)
    (q, few, _), _, _ = inputs([3], [5], 32, HALF)
    rows = (1 << 26) + 100
    keys = torch.empty(rows + 5, 32, dtype=HALF)
    keys[rows:] = few
    pointers = (torch.tensor([0, 0, 3]), torch.tensor([0, rows, rows + 5])) * 2
    want, want_lse = backend.set_attention(q, few, few, *(pointer([3]), pointer([5])) * 2, 2)
    got, lse = backend.set_attention(q, keys, keys, *pointers, 2)
    assert torch.equal(got, want) and torch.equal(lse, want_lse)


def test_sets_found_among_many() -> None:
    """More sets than a warp looks at in one step, many of them empty."""
    g = torch.Generator().manual_seed(0)
    lengths = torch.randint(0, 3, (2100,), generator=g).tolist()
    lengths[1500] = 40
    check(backend, inputs(lengths, lengths, 32, BRAIN), 1)


def test_through_the_backend_with_views() -> None:
    """Operands that are no multiple of 16 bytes into their storage, or not contiguous, and a gradient by autograd."""
    (q, k, v), pointers, grad = inputs([5, 9], [3, 8], 32, HALF)
    storage = torch.zeros(q.numel() + 1, dtype=HALF)
    storage[1:] = q.flatten()
    q_view, k_view = storage[1:].view_as(q), torch.cat([k, k], 1)[:, :32]
    with sne_fast.use_backend("cuda"):
        leaves = [t.detach().requires_grad_() for t in (q_view, k_view, v)]
        out = sne_fast.functional.set_attention(*leaves, pointers[0], pointers[1], 2)
        out.backward(grad)
    want = run(backend, (q, k, v), pointers, grad, 2)
    assert torch.equal(out, want[0])
    assert all(torch.equal(a.grad, b) for a, b in zip(leaves, want[2:], strict=True))


def test_why_not() -> None:
    checks.why_not(backend)

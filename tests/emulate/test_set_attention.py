"""set_attention's CUDA kernels in the emulator: forward and gradients against the float64 reference."""

from __future__ import annotations

import math

import pytest
import torch
from cpu_cases import relative_error
from op_cases import pointer
from torch import Tensor

import sne_fast
from sne_fast import reference
from sne_fast._cuda import library
from sne_fast._cuda import set_attention as engine
from sne_fast._plans.lengths import Lengths

CASES = {
    "ragged": ([3, 0, 17, 1, 33, 5], [2, 3, 17, 0, 40, 70]),
    "short": ([1, 2, 3, 1], [1, 2, 3, 1]),
    "long": ([1, 70, 2, 130], [1, 70, 2, 130]),
    "empty sets": ([0, 0], [0, 3]),
    "no sets": ([], []),
    "few queries": ([3, 1, 0, 5, 2, 4], [210, 0, 40, 300, 1, 64]),
    "few keys": ([210, 0, 40, 300, 1], [3, 1, 0, 5, 2]),
    "many seeds": ([33, 40], [150, 200]),
}
SINGLE, DOUBLE, HALF, BRAIN = torch.float32, torch.float64, torch.float16, torch.bfloat16


@pytest.fixture(autouse=True)
def short_splits(monkeypatch: pytest.MonkeyPatch):
    """Sets of a hundred rows count as long ones; and whatever a kernel leaves unwritten is NaN."""
    monkeypatch.setattr(engine, "LONGEST_SPLIT", 64)
    monkeypatch.setattr(engine, "SHORTEST_SPLIT", 64)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    library.library().sne_fast_cuda_emulated_schedule(0)


@pytest.fixture
def tf32():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


def inputs(q_lengths: list[int], k_lengths: list[int], h: int, dtype: torch.dtype, seed: int = 0):
    """(q, k, v), four pointers, and a gradient of the result, in ``dtype``."""
    g = torch.Generator().manual_seed(seed)
    rows = (sum(q_lengths), sum(k_lengths), sum(k_lengths), sum(q_lengths))
    q, k, v, grad = ((1.5 * torch.randn(n, h, generator=g, dtype=torch.float64)).to(dtype) for n in rows)
    return (q, k, v), (pointer(q_lengths), pointer(k_lengths)) * 2, grad


def run(module, qkv, pointers, grad, heads: int) -> tuple[Tensor, ...]:
    """out, lse, dq, dk, dv."""
    out, lse = module.set_attention(*qkv, *pointers, heads)
    return out, lse, *module.set_attention_backward(grad, *qkv, out, lse, *pointers, heads)


def exact(qkv, pointers, grad, heads: int) -> tuple[Tensor, ...]:
    return run(reference, [t.double() for t in qkv], pointers, grad.double(), heads)


def compare(got: tuple[Tensor, ...], want: tuple[Tensor, ...], forward: float, backward: float) -> None:
    finite = want[1].isfinite()
    assert torch.equal(got[1].isfinite(), finite) and bool((got[1][~finite] == -math.inf).all())
    assert relative_error(got[1][finite], want[1][finite]) < forward
    assert relative_error(got[0], want[0]) < forward
    for name, a, b in zip(("q", "k", "v"), got[2:], want[2:], strict=True):
        assert a.shape == b.shape and relative_error(a, b) < backward, (name, relative_error(a, b))


@pytest.mark.parametrize("lengths", CASES.values(), ids=CASES.keys())
def test_float32(lengths) -> None:
    case = inputs(*lengths, 32, SINGLE)
    compare(run(engine, *case, 2), exact(*case, 2), 2e-6, 1e-5)


@pytest.mark.parametrize("lengths", [CASES["ragged"], CASES["few queries"], CASES["few keys"]], ids=str)
def test_tf32(lengths, tf32) -> None:
    case = inputs(*lengths, 32, SINGLE)
    got, want = run(engine, *case, 2), exact(*case, 2)
    compare(got, want, 2e-3, 3e-3)
    assert relative_error(got[0], want[0]) > 1e-5, "products were rounded"


@pytest.mark.parametrize(
    ("h", "heads"),
    [(32, 4), (32, 1), (64, 8), (64, 4), (64, 2), (64, 1), (128, 16), (128, 2), (256, 4), (256, 32)],
)
@pytest.mark.parametrize("dtype", [SINGLE, HALF, BRAIN], ids=str)
def test_widths_and_heads(h: int, heads: int, dtype: torch.dtype) -> None:
    case = inputs([5, 1, 18], [20, 2, 1], h, dtype)
    forward, backward = {SINGLE: (2e-6, 1e-5), HALF: (1e-3, 2e-3), BRAIN: (8e-3, 1.6e-2)}[dtype]
    compare(run(engine, *case, heads), exact(*case, heads), forward, backward)


@pytest.mark.parametrize("dtype", [HALF, BRAIN], ids=str)
@pytest.mark.parametrize(
    "lengths", [CASES["long"], CASES["few queries"], CASES["few keys"], CASES["many seeds"]], ids=str
)
@pytest.mark.parametrize("heads", [1, 2])
def test_half_types_ragged(lengths, heads: int, dtype: torch.dtype) -> None:
    case = inputs(*lengths, 32, dtype)
    compare(run(engine, *case, heads), exact(*case, heads), *((1e-3, 2e-3) if dtype == HALF else (8e-3, 1.6e-2)))


def eager(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """What a user would write for one set."""
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(0, 1) for t in (q, k, v))
    return (torch.softmax(q @ k.mT / math.sqrt(heads * q.shape[-1]), dim=-1) @ v).transpose(0, 1).flatten(1)


@pytest.mark.parametrize("dtype", [HALF, BRAIN], ids=str)
@pytest.mark.parametrize("lengths", [(40, 70), (4, 210), (210, 4)])
def test_half_types_lose_at_most_twice_what_pytorch_does(lengths: tuple[int, int], dtype: torch.dtype) -> None:
    qkv, pointers, grad = inputs([lengths[0]], [lengths[1]], 32, dtype)
    want, got = exact(qkv, pointers, grad, 2), run(engine, qkv, pointers, grad, 2)
    leaves = [t.clone().requires_grad_() for t in qkv]
    out = eager(*leaves, 2)
    out.backward(grad)
    usual = (out.detach(), None, *(t.grad for t in leaves))
    for place in (0, 2, 3, 4):
        lost, allowed = (relative_error(t[place], want[place]) for t in (got, usual))
        assert got[place].dtype == dtype and lost < 2 * allowed, (place, lost, allowed)


@pytest.mark.parametrize("dtype", [HALF, BRAIN], ids=str)
@pytest.mark.parametrize("lengths", [(20, 20), (4, 140), (140, 4)])
def test_the_mean_of_the_gradient_does_not_come_from_a_rounded_result(lengths, dtype: torch.dtype) -> None:
    """Values far from zero: the gradient of logits is a small difference, which <grad, out> of a rounded out misses."""
    (q, k, v), pointers, grad = inputs([lengths[0]], [lengths[1]], 32, dtype)
    v = (100 + 0.1 * v.float()).to(dtype)
    want, got = exact((q, k, v), pointers, grad, 1), run(engine, (q, k, v), pointers, grad, 1)
    bound = 0.02 if dtype == HALF else 0.04
    assert relative_error(got[2], want[2]) < bound and relative_error(got[3], want[3]) < bound


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("dtype", [SINGLE, BRAIN], ids=str)
@pytest.mark.parametrize("lengths", [([4, 20, 3], [4, 20, 3]), ([4, 20, 3], [30, 210, 9])], ids=["self", "split"])
def test_nan_stays_in_its_set(lengths, place: int, dtype: torch.dtype) -> None:
    qkv, pointers, grad = inputs(*lengths, 32, dtype)
    want = run(engine, qkv, pointers, grad, 2)
    bad = [t.clone() for t in qkv]
    bad[place][int(pointers[min(place, 1)][1])] = math.nan  # first row of the middle set
    got = run(engine, bad, pointers, grad, 2)
    for which, (a, b) in enumerate(zip(got, want, strict=True)):
        ptr = pointers[0 if which < 3 else 1]
        outside = torch.ones(a.shape[0], dtype=torch.bool)
        outside[int(ptr[1]) : int(ptr[2])] = False
        assert torch.equal(a[outside], b[outside])
    assert got[0][int(pointers[0][1])].isnan().any()


def test_masked_rows_and_large_logits() -> None:
    """Logits of -1e32 have no weight, and logits of ten thousand do not overflow."""
    (q, k, v), pointers, grad = inputs([9], [70], 32, SINGLE)
    q[:, 0], k[:, 0] = 1.0, 0.0
    k[5:60, 0], v[5:60] = -1e32, 1e32
    kept = torch.cat([torch.arange(5), torch.arange(60, 70)])
    few = (pointers[0], pointer([15])) * 2
    got, want = run(engine, (q, k, v), pointers, grad, 1), run(engine, (q, k[kept], v[kept]), few, grad, 1)
    torch.testing.assert_close(got[0], want[0])
    torch.testing.assert_close(got[4][kept], want[4])
    (q, k, v), pointers, grad = inputs([9], [70], 32, SINGLE)
    assert all(t.isfinite().all() for t in run(engine, (100 * q, 100 * k, v), pointers, grad, 1))


@pytest.mark.parametrize("dtype", [SINGLE, BRAIN], ids=str)
@pytest.mark.parametrize("lengths", [CASES["ragged"], CASES["long"], CASES["few queries"], CASES["few keys"]], ids=str)
def test_the_same_bits_in_every_order_of_threads(lengths, dtype: torch.dtype) -> None:
    case = inputs(*lengths, 32, dtype)
    want = run(engine, *case, 2)
    for seed in (1, 2, 3):
        library.library().sne_fast_cuda_emulated_schedule(seed)
        assert all(torch.equal(a, b) for a, b in zip(run(engine, *case, 2), want, strict=True)), seed


@pytest.mark.parametrize("warps", [1, 2, 4])
@pytest.mark.parametrize(("heads", "dtype"), [(4, BRAIN), (1, BRAIN), (2, SINGLE), (1, SINGLE)])
def test_teams_of_any_size(monkeypatch, warps: int, heads: int, dtype: torch.dtype) -> None:
    """Every size of team on sets shorter and longer than it, found by search and by number."""
    monkeypatch.setattr(engine, "MOST_WARPS", warps)
    for lengths in ([9, 0, 33, 2], [1, 5, 16, 3]):
        case = inputs(lengths, lengths, 64 if heads == 1 else 32, dtype)
        forward, backward = {SINGLE: (2e-6, 1e-5), BRAIN: (8e-3, 1.6e-2)}[dtype]
        compare(run(engine, *case, heads), exact(*case, heads), forward, backward)


def test_plans(monkeypatch) -> None:
    monkeypatch.setattr(engine, "LONGEST_SPLIT", 1024)
    monkeypatch.setattr(engine, "SHORTEST_SPLIT", 256)

    def plan(own: list[int], inner: list[int], heads: int = 4) -> tuple[int, ...]:
        p = engine.Plan.make(*(Lengths.of(pointer(x)) for x in (own, inner)), sum(own), sum(inner), heads, 132)
        return p.warps, p.single, p.split, p.pieces, p.pages, p.most

    assert plan([3, 16, 2], [3, 16, 2]) == (1, True, 0, 3, 0, 16)
    assert plan([20, 30], [20, 30]) == (2, True, 0, 2, 0, 30)
    assert plan([20, 300], [20, 300]) == (4, False, 0, 5 + 2, 0, 300)
    assert plan([20, 3], [100, 511]) == (2, True, 0, 2, 0, 20)
    assert plan([4, 32], [10, 700]) == (2, False, 256, 2 + 2, 2, 32)
    assert plan([4, 40], [10, 1 << 20]) == (4, False, 1024, 1024 + 2, 1024, 40)
    assert plan([4, 65], [10, 1 << 20])[2] == 0
    assert plan([], []) == (1, True, 0, 0, 0, 0)


def test_more_than_2_to_31_values(monkeypatch) -> None:
    """Of keys and values: pages of memory that nothing touches, but for the last set's."""
    monkeypatch.setattr(engine, "LONGEST_SPLIT", 1 << 20)
    torch.use_deterministic_algorithms(False)
    (q, few, _), _, _ = inputs([3], [5], 32, HALF)
    rows = (1 << 26) + 100
    keys = torch.empty(rows + 5, 32, dtype=HALF)
    keys[rows:] = few
    pointers = (torch.tensor([0, 0, 3]), torch.tensor([0, rows, rows + 5])) * 2
    want, want_lse = engine.set_attention(q, few, few, *(pointer([3]), pointer([5])) * 2, 2)
    got, lse = engine.set_attention(q, keys, keys, *pointers, 2)
    assert torch.equal(got, want) and torch.equal(lse, want_lse)


def test_sets_found_among_many() -> None:
    """More sets than a warp looks at in one step, many of them empty."""
    g = torch.Generator().manual_seed(0)
    lengths = torch.randint(0, 3, (2100,), generator=g).tolist()
    lengths[1500] = 40
    case = inputs(lengths, lengths, 32, BRAIN)
    compare(run(engine, *case, 1), exact(*case, 1), 8e-3, 1.6e-2)


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
    want = run(engine, (q, k, v), pointers, grad, 2)
    assert torch.equal(out, want[0])
    assert all(torch.equal(a.grad, b) for a, b in zip(leaves, want[2:], strict=True))


def test_why_not() -> None:
    (q, k, v), pointers, _ = inputs([3], [3], 48, SINGLE)
    assert "width must be one of 32, 64, 128, 256, got 48" in engine.why_not("set_attention", (q, k, v, *pointers, 4))
    (q, k, v), pointers, _ = inputs([3], [3], 64, SINGLE)
    for heads in (3, 16):
        assert "num_heads" in engine.why_not("set_attention", (q, k, v, *pointers, heads))[0]
    assert engine.why_not("set_attention_backward", (q, q, k, v, q, q, *pointers, 4)) == []

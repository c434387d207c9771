"""set_attention in the interpreter: forward and gradients against the float64 reference."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from cpu_cases import relative_error
from op_cases import pointer
from torch import Tensor

from sne_fast import reference
from sne_fast.kernels import set_attention as kernels

CASES = {
    "ragged": ([3, 0, 17, 1, 33, 5], [2, 3, 17, 0, 40, 70]),
    "short": ([1, 2, 3, 1], [1, 2, 3, 1]),
    "one long": ([130], [130]),
    "empty sets": ([0, 0], [0, 3]),
    "no sets": ([], []),
    "few queries": ([3, 1, 0, 5, 2], [210, 0, 40, 300, 1]),
    "few keys": ([210, 0, 40, 300, 1], [3, 1, 0, 5, 2]),
}
SINGLE, DOUBLE, HALF = torch.float32, torch.float64, torch.float16


@pytest.fixture(autouse=True)
def short_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter is slow: sets of a hundred rows count as long ones."""
    launch = kernels.launch

    def smaller(*args, **kwargs):
        sizes = launch(*args, **kwargs)
        return dataclasses.replace(sizes, blocks={**sizes.blocks, "SPLIT": 64})

    monkeypatch.setattr(kernels, "launch", smaller)


def inputs(q_lengths: list[int], k_lengths: list[int], h: int, dtype: torch.dtype, seed: int = 0):
    """(q, k, v), four pointers, and a gradient of the result, in ``dtype``."""
    g = torch.Generator().manual_seed(seed)
    rows = (sum(q_lengths), sum(k_lengths), sum(k_lengths), sum(q_lengths))
    q, k, v, grad = ((1.5 * torch.randn(n, h, generator=g, dtype=torch.float64)).to(dtype) for n in rows)
    return (q, k, v), (pointer(q_lengths), pointer(k_lengths)) * 2, grad


def run(engine, qkv, pointers, grad, heads: int) -> tuple[Tensor, ...]:
    """out, lse, dq, dk, dv."""
    out, lse = engine.set_attention(*qkv, *pointers, heads)
    return out, lse, *engine.set_attention_backward(grad, *qkv, out, lse, *pointers, heads)


def exact(qkv, pointers, grad, heads: int) -> tuple[Tensor, ...]:
    return run(reference, [t.double() for t in qkv], pointers, grad.double(), heads)


def compare(got: tuple[Tensor, ...], want: tuple[Tensor, ...], forward: float, backward: float) -> None:
    finite = want[1].isfinite()
    assert torch.equal(got[1].isfinite(), finite) and bool((got[1][~finite] == -math.inf).all())
    assert relative_error(got[1][finite], want[1][finite]) < forward
    assert relative_error(got[0], want[0]) < forward
    for name, a, b in zip(("q", "k", "v"), got[2:], want[2:], strict=True):
        assert a.shape == b.shape and relative_error(a, b) < backward, name


@pytest.mark.parametrize("lengths", CASES.values(), ids=CASES.keys())
def test_float64_is_exact(lengths) -> None:
    case = inputs(*lengths, 32, DOUBLE)
    compare(run(kernels, *case, 2), exact(*case, 2), 1e-13, 1e-12)


@pytest.mark.parametrize("lengths", [CASES["ragged"], CASES["few queries"], CASES["few keys"]], ids=str)
def test_float32(lengths) -> None:
    case = inputs(*lengths, 64, SINGLE)
    got = run(kernels, *case, 4)
    compare(got, exact(*case, 4), 2e-6, 1e-5)
    assert all(torch.equal(a, b) for a, b in zip(got, run(kernels, *case, 4), strict=True)), "the same bits twice"


@pytest.mark.parametrize(("h", "heads"), [(32, 4), (32, 1), (64, 1), (128, 16), (128, 2), (256, 8), (256, 32)])
def test_widths_and_heads(h: int, heads: int) -> None:
    case = inputs([5, 1, 18], [20, 2, 1], h, SINGLE)
    compare(run(kernels, *case, heads), exact(*case, heads), 2e-6, 1e-5)


def eager(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """What a user would write for one set."""
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(0, 1) for t in (q, k, v))
    return (torch.softmax(q @ k.mT / math.sqrt(heads * q.shape[-1]), dim=-1) @ v).transpose(0, 1).flatten(1)


@pytest.mark.parametrize("lengths", [(40, 70), (4, 210), (210, 4)])
def test_float16_loses_at_most_twice_what_pytorch_does(lengths: tuple[int, int]) -> None:
    qkv, pointers, grad = inputs([lengths[0]], [lengths[1]], 32, HALF)
    want, got = exact(qkv, pointers, grad, 2), run(kernels, qkv, pointers, grad, 2)
    leaves = [t.clone().requires_grad_() for t in qkv]
    out = eager(*leaves, 2)
    out.backward(grad)
    usual = (out.detach(), None, *(t.grad for t in leaves))
    for place in (0, 2, 3, 4):
        lost, allowed = (relative_error(t[place], want[place]) for t in (got, usual))
        assert got[place].dtype == HALF and lost < 2 * allowed, (place, lost, allowed)


def test_the_mean_of_the_gradient_does_not_come_from_a_rounded_result() -> None:
    """Equal keys: the gradient of k vanishes in exact arithmetic, and <grad, out> of a rounded out would not cancel."""
    qkv, pointers, grad = inputs([20], [20], 32, HALF)
    q, k, v = qkv
    v = (100 + 0.1 * v.float()).half()
    want = exact((q, k, v), pointers, grad, 1)
    got = run(kernels, (q, k, v), pointers, grad, 1)
    assert relative_error(got[2], want[2]) < 0.02 and relative_error(got[3], want[3]) < 0.02


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("lengths", [([4, 20, 3], [4, 20, 3]), ([4, 20, 3], [30, 210, 9])], ids=["self", "split"])
def test_nan_stays_in_its_set(lengths, place: int) -> None:
    qkv, pointers, grad = inputs(*lengths, 32, SINGLE)
    want = run(kernels, qkv, pointers, grad, 2)
    bad = [t.clone() for t in qkv]
    bad[place][int(pointers[min(place, 1)][1])] = math.nan  # first row of the middle set
    got = run(kernels, bad, pointers, grad, 2)
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
    got, want = run(kernels, (q, k, v), pointers, grad, 1), run(kernels, (q, k[kept], v[kept]), few, grad, 1)
    torch.testing.assert_close(got[0], want[0])
    torch.testing.assert_close(got[4][kept], want[4])
    (q, k, v), pointers, grad = inputs([9], [70], 32, SINGLE)
    assert all(t.isfinite().all() for t in run(kernels, (100 * q, 100 * k, v), pointers, grad, 1))


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
    (q, k, v), pointers, _ = inputs([3], [3], 48, SINGLE)
    assert "width must be one of 32, 64, 128, 256, got 48" in kernels.why_not("set_attention", (q, k, v, *pointers, 4))
    (q, k, v), pointers, _ = inputs([3], [3], 64, SINGLE)
    for heads in (3, 16):
        assert "num_heads" in kernels.why_not("set_attention", (q, k, v, *pointers, heads))[0]
    assert kernels.why_not("set_attention_backward", (q, q, k, v, q, q, *pointers, 4)) == []

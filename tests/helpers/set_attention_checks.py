"""Cases of ``set_attention`` and what holds of its results: for tests of both GPU backends, each given as a module."""

from __future__ import annotations

import math
from types import ModuleType
from typing import TypeAlias

import torch
from torch import Tensor

from helpers.errors import loses_at_most_twice, relative_error
from helpers.op_cases import pointer
from sne_fast import reference

SINGLE, DOUBLE, HALF, BRAIN = torch.float32, torch.float64, torch.float16, torch.bfloat16
TOLERANCE = {SINGLE: (2e-6, 1e-5), DOUBLE: (1e-13, 1e-12), HALF: (1e-3, 2e-3), BRAIN: (8e-3, 1.6e-2)}
"""Tolerances of results and of gradients."""

Lengths: TypeAlias = tuple[list[int], list[int]]
CASES: dict[str, Lengths] = {
    "ragged": ([3, 0, 17, 1, 33, 5], [2, 3, 17, 0, 40, 70]),
    "short": ([1, 2, 3, 1], [1, 2, 3, 1]),
    "empty sets": ([0, 0], [0, 3]),
    "no sets": ([], []),
    "few queries": ([3, 1, 0, 5, 2, 4], [210, 0, 40, 300, 1, 64]),
    "few keys": ([210, 0, 40, 300, 1], [3, 1, 0, 5, 2]),
}
RAGGED_OR_FEW = [CASES[name] for name in ("ragged", "few queries", "few keys")]
ONE_SET = [(40, 70), (4, 210), (210, 4)]
WITH_NAN: dict[str, Lengths] = {"self": ([4, 20, 3], [4, 20, 3]), "split": ([4, 20, 3], [30, 210, 9])}

Case: TypeAlias = tuple[tuple[Tensor, ...], tuple[Tensor, ...], Tensor]


def inputs(q_lengths: list[int], k_lengths: list[int], h: int, dtype: torch.dtype, seed: int = 0) -> Case:
    """Return (q, k, v), four pointers, and a gradient of the result, in ``dtype``."""
    g = torch.Generator().manual_seed(seed)
    rows = (sum(q_lengths), sum(k_lengths), sum(k_lengths), sum(q_lengths))
    q, k, v, grad = ((1.5 * torch.randn(n, h, generator=g, dtype=torch.float64)).to(dtype) for n in rows)
    return (q, k, v), (pointer(q_lengths), pointer(k_lengths)) * 2, grad


def run(backend: ModuleType, qkv, pointers, grad: Tensor, heads: int) -> tuple[Tensor, ...]:
    """Return out, lse, dq, dk, dv."""
    out, lse = backend.set_attention(*qkv, *pointers, heads)
    return out, lse, *backend.set_attention_backward(grad, *qkv, out, lse, *pointers, heads)


def exact(qkv, pointers, grad: Tensor, heads: int) -> tuple[Tensor, ...]:
    return run(reference, [t.double() for t in qkv], pointers, grad.double(), heads)


def compare(got: tuple[Tensor, ...], want: tuple[Tensor, ...], forward: float, backward: float) -> None:
    finite = want[1].isfinite()
    assert torch.equal(got[1].isfinite(), finite) and bool((got[1][~finite] == -math.inf).all())
    assert relative_error(got[1][finite], want[1][finite]) < forward
    assert relative_error(got[0], want[0]) < forward
    for name, a, b in zip(("q", "k", "v"), got[2:], want[2:], strict=True):
        assert a.shape == b.shape and relative_error(a, b) < backward, (name, relative_error(a, b))


def check(backend: ModuleType, case: Case, heads: int) -> tuple[Tensor, ...]:
    """Check results within the tolerance of their type."""
    got = run(backend, *case, heads)
    compare(got, exact(*case, heads), *TOLERANCE[case[2].dtype])
    return got


def eager(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Attend within one set, as a user would write it."""
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(0, 1) for t in (q, k, v))
    return (torch.softmax(q @ k.mT / math.sqrt(heads * q.shape[-1]), dim=-1) @ v).transpose(0, 1).flatten(1)


def loses_at_most_twice_what_pytorch_does(backend: ModuleType, lengths: tuple[int, int], dtype: torch.dtype) -> None:
    qkv, pointers, grad = inputs([lengths[0]], [lengths[1]], 32, dtype)
    want, got = exact(qkv, pointers, grad, 2), run(backend, qkv, pointers, grad, 2)
    leaves = [t.clone().requires_grad_() for t in qkv]
    out = eager(*leaves, 2)
    out.backward(grad)
    usual = (out.detach(), None, *(t.grad for t in leaves))
    for place in (0, 2, 3, 4):
        assert got[place].dtype == dtype
        loses_at_most_twice(got[place], usual[place], want[place], place)


def mean_of_the_gradient_does_not_come_from_a_rounded_result(
    backend: ModuleType, lengths: tuple[int, int], dtype: torch.dtype, bound: float
) -> None:
    """Check values far from zero: logits have small gradients, differences that <grad, out> of a rounded out misses."""
    (q, k, v), pointers, grad = inputs([lengths[0]], [lengths[1]], 32, dtype)
    v = (100 + 0.1 * v.float()).to(dtype)
    want, got = exact((q, k, v), pointers, grad, 1), run(backend, (q, k, v), pointers, grad, 1)
    assert relative_error(got[2], want[2]) < bound and relative_error(got[3], want[3]) < bound


def nan_stays_in_its_set(backend: ModuleType, lengths: Lengths, place: int, dtype: torch.dtype) -> None:
    qkv, pointers, grad = inputs(*lengths, 32, dtype)
    want = run(backend, qkv, pointers, grad, 2)
    bad = [t.clone() for t in qkv]
    bad[place][int(pointers[min(place, 1)][1])] = math.nan  # first row of the middle set
    got = run(backend, bad, pointers, grad, 2)
    for which, (a, b) in enumerate(zip(got, want, strict=True)):
        ptr = pointers[0 if which < 3 else 1]
        outside = torch.ones(a.shape[0], dtype=torch.bool)
        outside[int(ptr[1]) : int(ptr[2])] = False
        assert torch.equal(a[outside], b[outside])
    assert got[0][int(pointers[0][1])].isnan().any()


def masked_rows_and_large_logits(backend: ModuleType) -> None:
    """Check that logits of -1e32 have no weight, and that logits of ten thousand do not overflow."""
    (q, k, v), pointers, grad = inputs([9], [70], 32, SINGLE)
    q[:, 0], k[:, 0] = 1.0, 0.0
    k[5:60, 0], v[5:60] = -1e32, 1e32
    kept = torch.cat([torch.arange(5), torch.arange(60, 70)])
    few = (pointers[0], pointer([15])) * 2
    got, want = run(backend, (q, k, v), pointers, grad, 1), run(backend, (q, k[kept], v[kept]), few, grad, 1)
    torch.testing.assert_close(got[0], want[0])
    torch.testing.assert_close(got[4][kept], want[4])
    (q, k, v), pointers, grad = inputs([9], [70], 32, SINGLE)
    assert all(t.isfinite().all() for t in run(backend, (100 * q, 100 * k, v), pointers, grad, 1))


def why_not(backend: ModuleType) -> None:
    (q, k, v), pointers, _ = inputs([3], [3], 48, SINGLE)
    assert "width must be one of 32, 64, 128, 256, got 48" in backend.why_not("set_attention", (q, k, v, *pointers, 4))
    (q, k, v), pointers, _ = inputs([3], [3], 64, SINGLE)
    for heads in (3, 16):
        assert "num_heads" in backend.why_not("set_attention", (q, k, v, *pointers, heads))[0]
    assert backend.why_not("set_attention_backward", (q, q, k, v, q, q, *pointers, 4)) == []

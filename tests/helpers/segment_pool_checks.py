"""Cases of ``segment_pool`` and what holds of its results: for tests of both GPU backends, each given as a module."""

from __future__ import annotations

import math
from types import ModuleType

import torch
from torch import Tensor

from helpers.errors import loses_at_most_twice, relative_error
from helpers.op_cases import pool_case
from sne_fast import reference

SINGLE, DOUBLE, HALF, BRAIN = torch.float32, torch.float64, torch.float16, torch.bfloat16
TOLERANCE = {SINGLE: (2e-6, 1e-5), DOUBLE: (1e-13, 1e-12), HALF: (5e-4, 1e-3), BRAIN: (4e-3, 6e-3)}
"""Tolerances of results and of gradients."""

LENGTHS = {
    "short": [1, 2, 0, 7, 1, 30, 3],
    "middle": [70, 3, 0, 33, 17, 90],
    "long": [1, 900, 0, 260, 128, 5],
    "empty": [0, 0],
    "none": [],
    "one": [1],
}
WIDTHS_AND_QUERIES = [(256, 7), (48, 3), (16, 1), (1008, 2), (64, 100), (512, 32)]
"""Widths and numbers of queries that are no powers of two, the least ones, and many of either and of both."""
WITH_NAN = [[5, 9, 3] + [1] * 60, [90, 80, 3], [400, 300, 20]]


def run(backend: ModuleType, x: Tensor, logits: Tensor, ptr: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    """Return out, lse, dx, dlogits."""
    out, lse = backend.segment_pool(x, logits, ptr, ptr)
    return out, lse, *backend.segment_pool_backward(grad, x, logits, out, lse, ptr, ptr)


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


def check(backend: ModuleType, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Check results within the tolerance of their type."""
    got = run(backend, *inputs)
    compare(got, exact(*inputs), *TOLERANCE[inputs[0].dtype])
    return got


def loses_at_most_twice_what_pytorch_does(
    backend: ModuleType, length: int, h: int, queries: int, dtype: torch.dtype
) -> None:
    x, logits, ptr, grad = case([length], h, queries, dtype)
    want, got = exact(x, logits, ptr, grad), run(backend, x, logits, ptr, grad)
    leaves = [t.clone().requires_grad_() for t in (x, logits)]
    out = torch.softmax(leaves[1], dim=0).T @ leaves[0]
    out.backward(grad[0])
    for place, usual in ((0, out.detach()[None]), (2, leaves[0].grad), (3, leaves[1].grad)):
        assert got[place].dtype == dtype
        loses_at_most_twice(got[place], usual, want[place], place)


def nan_stays_in_its_segment(backend: ModuleType, lengths: list[int], where: str) -> None:
    inputs = case(lengths, 32, 2, SINGLE)
    want = run(backend, *inputs)
    (inputs[0] if where == "x" else inputs[1])[lengths[0] + 1] = math.nan
    got = run(backend, *inputs)
    for which, (a, b) in enumerate(zip(got, want, strict=True)):
        outside = torch.ones(a.shape[0], dtype=torch.bool)
        outside[slice(1, 2) if which < 2 else slice(lengths[0], lengths[0] + lengths[1])] = False
        assert torch.equal(a[outside], b[outside])
    assert got[0][1].isnan().any() and (where == "x" or got[1][1].isnan().all())


def rows_masked_by_their_logit_have_no_weight(backend: ModuleType) -> None:
    x, logits, ptr, grad = case([10, 700], 32, 2, SINGLE)
    logits[4:9], logits[20:600] = -math.inf, -math.inf  # whole parts of the long segment among them
    kept = logits[:, 0].isfinite()
    x[~kept] = 1e32
    few = torch.tensor([0, 5, 5 + int(kept[10:].sum())])
    got, want = run(backend, x, logits, ptr, grad), run(backend, x[kept], logits[kept], few, grad)
    torch.testing.assert_close(got[:2], want[:2])
    torch.testing.assert_close(got[2][kept], want[2])
    assert all(t.isfinite().all() and torch.count_nonzero(t[~kept]) == 0 for t in got[2:])


def why_not(backend: ModuleType) -> None:
    x, logits, ptr, _ = case([2], 8, 2, SINGLE)
    assert backend.why_not("segment_pool", (x, logits, ptr, ptr)) == ["width must be a multiple of 16, got 8"]
    x, logits, ptr, grad = case([2], 48, 3, SINGLE)
    assert backend.why_not("segment_pool_backward", (grad, x, logits, grad, grad, ptr, ptr)) == []

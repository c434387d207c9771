"""Every op, called directly with ragged shapes and with hostile pointers: right, or an error, never a crash.

Results are compared with the reference in float64. Inputs lie between guard bands of NaN, and memory that results are
written to is full of NaN before.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import sne_fast
from helpers.cpu_cases import NEEDS_BACKEND, cast, chunk_encode_case
from helpers.errors import relative_error
from helpers.op_cases import pointer
from sne_fast import reference
from sne_fast.backends.cpu import library

OPS = torch.ops.sne_fast
BACKENDS = [
    pytest.param("cpu", marks=pytest.mark.skipif(bool(library.reasons()), reason=NEEDS_BACKEND)),
    "reference",
]
CHUNK = 7
LENGTHS = st.lists(st.sampled_from([1, 2, CHUNK - 1, CHUNK, 3]), max_size=40)
SETS = st.lists(st.tuples(st.sampled_from([0, 1, 2, 17, 33, 65]), st.sampled_from([0, 1, 2, 17, 33, 65])), max_size=6)
HOSTILE = st.sampled_from([-1, 1, 0, 6, 1000, 2**31, 2**40, 2**62, 2**63 - 1, -(2**63)])
FEW = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
REFUSED = (ValueError, TypeError)


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Let ``torch.empty`` return NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


def guarded(t: Tensor) -> Tensor:
    """Return ``t`` in the middle of memory that is NaN before and behind it."""
    if not t.is_floating_point():
        return t
    memory = torch.full((t.numel() + 128,), float("nan"), dtype=t.dtype)
    inside = memory[64 : 64 + t.numel()].view(t.shape)
    return inside.copy_(t)


def compare(op: str, backend: str, dtype: torch.dtype, *args: Any) -> Any:
    """Call an op and compare its results with the reference in float64; return them."""
    want = getattr(reference, op)(*cast(args, torch.float64))
    with sne_fast.use_backend(backend):
        got = getattr(OPS, op)(*(guarded(a) if isinstance(a, Tensor) else a for a in cast(args, dtype)))
    bound = 1e-9 if dtype == torch.float64 else 1e-3
    for a, b in zip(flat(got), flat(want), strict=True):
        finite = b.isfinite()
        assert a.shape == b.shape and torch.equal(a.isfinite(), finite)
        assert relative_error(a[finite], b[finite]) < bound or float((a[finite] - b[finite]).abs().max()) < 1e-5
    return got


def flat(results: Any) -> list[Tensor]:
    if isinstance(results, Tensor):
        return [results]
    return [t for part in results for t in flat(part)]


def owners(chunks: int, cuts: list[int]) -> Tensor:
    """Return a tensor_ptr over ``chunks`` chunks, with empty tensors among them."""
    return torch.tensor([0, *sorted(min(cut, chunks) for cut in cuts), chunks])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("backend", BACKENDS)
@FEW
@given(lengths=LENGTHS, cuts=st.lists(st.integers(0, 40), max_size=4), layer_norm=st.booleans())
def test_chunk_encode_of_any_ragged_shape(backend, dtype, lengths, cuts, layer_norm):
    args = list(chunk_encode_case(32, 4, lengths, layer_norm=layer_norm, rows=CHUNK))
    args[2] = args[4] = owners(len(lengths), cuts)
    args[5] = torch.randn(len(args[2]) - 1, 32, dtype=torch.float64)
    compare("chunk_encode", backend, dtype, *args)
    grad = torch.randn(len(lengths), 4, 32, dtype=torch.float64)
    compare("chunk_encode_backward", backend, dtype, grad, *args)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("backend", BACKENDS)
@FEW
@given(sets=SETS)
def test_set_attention_of_any_ragged_shape(backend, dtype, sets):
    q_ptr, k_ptr = (pointer([pair[i] for pair in sets]) for i in (0, 1))
    q, grad = (torch.randn(int(q_ptr[-1]), 32, dtype=torch.float64) for _ in range(2))
    k, v = (torch.randn(int(k_ptr[-1]), 32, dtype=torch.float64) for _ in range(2))
    ptrs = (q_ptr, k_ptr, q_ptr, k_ptr, 2)
    out, lse = compare("set_attention", backend, dtype, q, k, v, *ptrs)
    compare("set_attention_backward", backend, dtype, grad, q, k, v, out.double(), lse.double(), *ptrs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("backend", BACKENDS)
@FEW
@given(lengths=st.lists(st.sampled_from([0, 1, 2, 63, 64, 65, 300]), max_size=5), heads=st.integers(1, 5))
def test_segment_pool_of_any_ragged_shape(backend, dtype, lengths, heads):
    ptr = pointer(lengths)
    x, logits = (torch.randn(int(ptr[-1]), n, dtype=torch.float64) for n in (48, heads))
    out, lse = compare("segment_pool", backend, dtype, x, logits, ptr, ptr)
    grad = torch.randn(len(lengths), heads, 48, dtype=torch.float64)
    compare("segment_pool_backward", backend, dtype, grad, x, logits, out.double(), lse.double(), ptr, ptr)


@pytest.mark.parametrize("backend", BACKENDS)
@FEW
@given(shapes=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), max_size=5))
def test_gather_chunks_of_any_shapes(backend, shapes):
    tensors = [guarded(torch.randn(shape)) for shape in shapes]
    plan, scale = torch.tensor(shapes, dtype=torch.int64).view(-1, 2), torch.rand(len(shapes)) + 0.5
    want = reference.gather_chunks(tensors, scale, plan, torch.float32)
    with sne_fast.use_backend(backend):
        values = OPS.gather_chunks(tensors, scale, plan, torch.float32)
        torch.testing.assert_close(values, want)
        grads, scale_grad = OPS.gather_chunks_backward(torch.ones_like(values), values, tensors, scale, plan)
    want_grads, want_scale = reference.gather_chunks_backward(torch.ones_like(want), want, tensors, scale, plan)
    torch.testing.assert_close(grads, want_grads)
    torch.testing.assert_close(scale_grad, want_scale, rtol=1e-4, atol=1e-4)


def spoilt(ptr: Tensor, edits: list[tuple[int, int]]) -> Tensor:
    ptr = ptr.clone()
    for place, number in edits:
        ptr[place % len(ptr)] = number
    return ptr


def fits(ptr: Tensor, rows: int) -> bool:
    return int(ptr[0]) == 0 and int(ptr[-1]) == rows and bool((ptr[1:] >= ptr[:-1]).all())


def refuses_unless(good: bool, call: Any) -> None:
    """Check that a call is refused, or that it is right to compute."""
    try:
        call()
    except REFUSED as error:
        assert not good and "must" in str(error), error
    else:
        assert good


EDITS = st.lists(st.tuples(st.integers(0, 50), HOSTILE), min_size=1, max_size=3)


@pytest.mark.parametrize("backend", BACKENDS)
@FEW
@given(lengths=LENGTHS, which=st.sampled_from([1, 2]), copy=st.booleans(), edits=EDITS)
def test_chunk_encode_refuses_hostile_pointers(backend, lengths, which, copy, edits):
    args = list(cast(chunk_encode_case(32, 4, lengths, rows=CHUNK), torch.float32))
    rows = (None, len(args[0]), len(lengths))[which]
    args[which] = spoilt(args[which], edits)
    if copy:
        args[which + 2] = args[which]
    good = torch.equal(args[which], args[which + 2]) and fits(args[which], rows)
    good = good and (which == 2 or not (args[1].diff() > CHUNK).any())
    grad = torch.randn(len(lengths), 4, 32)
    with sne_fast.use_backend(backend):
        refuses_unless(good, lambda: OPS.chunk_encode(*args))
        refuses_unless(good, lambda: OPS.chunk_encode_backward(grad, *args))


@pytest.mark.parametrize("backend", BACKENDS)
@FEW
@given(sets=SETS, which=st.sampled_from([0, 1]), edits=EDITS)
def test_set_attention_and_segment_pool_refuse_hostile_pointers(backend, sets, which, edits):
    ptrs = [pointer([pair[i] for pair in sets]) for i in (0, 1)]
    rows = [int(ptr[-1]) for ptr in ptrs]
    q, k = torch.randn(rows[0], 32), torch.randn(rows[1], 32)
    ptrs[which] = spoilt(ptrs[which], edits)
    good = fits(ptrs[which], rows[which])
    lse = torch.zeros(rows[0], 1)
    with sne_fast.use_backend(backend):
        refuses_unless(good, lambda: OPS.set_attention(q, k, k, *ptrs, *ptrs, 1))
        refuses_unless(good, lambda: OPS.set_attention_backward(q, q, k, k, q, lse, *ptrs, *ptrs, 1))
        ptr, x = ptrs[which], (q, k)[which]
        pooled, sums = torch.zeros(len(sets), 2, 32), torch.zeros(len(sets), 2)
        refuses_unless(good, lambda: OPS.segment_pool(x, x[:, :2], ptr, ptr))
        refuses_unless(good, lambda: OPS.segment_pool_backward(pooled, x, x[:, :2], pooled, sums, ptr, ptr))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("plan", [[0, 2**62], [2**62, 0], [0, 2**63 - 1]])
def test_a_plan_of_no_elements_takes_no_memory(backend, plan):
    tensors, scale = [torch.empty(0)], torch.ones(1)
    with sne_fast.use_backend(backend):
        assert OPS.gather_chunks(tensors, scale, torch.tensor([plan]), torch.float32).shape == (0,)
        grads, scale_grad = OPS.gather_chunks_backward(
            torch.empty(0), torch.empty(0), tensors, scale, torch.tensor([plan])
        )
    assert grads[0].shape == (0,) and scale_grad.tolist() == [0.0]


@pytest.mark.parametrize("backend", BACKENDS)
@FEW
@given(shape=st.tuples(st.integers(0, 9), st.integers(0, 9)), edits=EDITS)
def test_gather_chunks_refuses_plans_of_other_sizes(backend, shape, edits):
    tensors, scale = [torch.randn(shape)], torch.ones(1)
    plan = spoilt(torch.tensor(shape), edits).view(1, 2)
    rows, positions = plan[0].tolist()
    good = min(rows, positions) >= 0 and rows * positions == shape[0] * shape[1]
    with sne_fast.use_backend(backend):
        refuses_unless(good, lambda: OPS.gather_chunks(tensors, scale, plan, torch.float32))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_no_chunks_are_zero(backend):
    args = list(cast(chunk_encode_case(32, 4, [], rows=CHUNK), torch.float32))
    for tensors in (0, 1, 3):
        args[2] = args[4] = torch.zeros(tensors + 1, dtype=torch.int64)
        args[5] = torch.randn(tensors, 32)
        with sne_fast.use_backend(backend):
            grads = OPS.chunk_encode_backward(torch.empty(0, 4, 32), *args)
            for hostile in (2**40, 5, -1):
                beyond = [*args]
                beyond[2] = beyond[4] = torch.tensor([0] * tensors + [hostile])
                with pytest.raises(ValueError, match="tensor_ptr_host must start at 0, never decrease and end at"):
                    OPS.chunk_encode_backward(torch.empty(0, 4, 32), *beyond)
        assert all(torch.count_nonzero(t) == 0 for t in grads)

"""NaN of any bits stays NaN in the set, segment or chunk that has it; infinity does what it does in the reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from helpers.cpu_cases import ISAS, NEEDS_BACKEND, cast, chunk_encode_case
from helpers.op_cases import pointer
from sne_fast import reference
from sne_fast.backends.cpu import backend as cpu
from sne_fast.backends.cpu import library

pytestmark = pytest.mark.skipif(bool(library.reasons()), reason=NEEDS_BACKEND)
INFINITY = float("inf")
BITS = {
    torch.float32: [0x7FFFFFFF, -1, 0x7FC00000, 0x7F800001, -0x400000, 0x7FC0007F],
    torch.float64: [0x7FFFFFFFFFFFFFFF, -1, 0x7FF8000000000000, 0x7FF0000000000001, 0x7FF80000000003FF],
}
SETS = [3, 70, 1, 20]
PTR = pointer(SETS)


@pytest.fixture(params=ISAS, autouse=True)
def isa(request):
    with library.use_isa(request.param):
        yield request.param


def nan(bits: int, dtype: torch.dtype) -> Tensor:
    integer = torch.int32 if dtype == torch.float32 else torch.int64
    return torch.tensor(bits, dtype=integer).view(dtype)


def same(got: Tensor, want: Tensor) -> None:
    """Check that ``got`` is NaN and infinite where ``want`` is, and close to it elsewhere."""
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4, equal_nan=True)


def attention(backend, grad, q, k, v):
    out, lse = backend.set_attention(q, k, v, PTR, PTR, PTR, PTR, 2)
    return out, *backend.set_attention_backward(grad, q, k, v, out, lse, PTR, PTR, PTR, PTR, 2)


def pool(backend, grad, x, logits):
    out, lse = backend.segment_pool(x, logits, PTR, PTR)
    return out, *backend.segment_pool_backward(grad, x, logits, out, lse, PTR, PTR)


@pytest.mark.parametrize("dtype", BITS)
@pytest.mark.parametrize("place", ["grad", "q", "k", "v"])
def test_set_attention_keeps_nan_of_any_bits(dtype, place):
    for bits in BITS[dtype]:
        g = torch.Generator().manual_seed(0)
        inputs = {name: torch.randn(sum(SETS), 32, generator=g).to(dtype) for name in ("grad", "q", "k", "v")}
        inputs[place][40, 5] = nan(bits, dtype)
        got, want = attention(cpu, *inputs.values()), attention(reference, *inputs.values())
        assert any(t.isnan().any() for t in want)
        for a, b in zip(got, want, strict=True):
            same(a, b)


@pytest.mark.parametrize("dtype", BITS)
@pytest.mark.parametrize("place", ["x", "logits"])
@pytest.mark.parametrize("rows", [SETS, [3, 5000, 1, 20]], ids=["short", "long"])
def test_segment_pool_keeps_nan_of_any_bits(dtype, place, rows):
    ptr = pointer(rows)
    for bits in BITS[dtype]:
        g = torch.Generator().manual_seed(0)
        x, logits = torch.randn(sum(rows), 32, generator=g).to(dtype), torch.randn(sum(rows), 3, generator=g).to(dtype)
        grad = torch.randn(4, 3, 32, generator=g).to(dtype)
        (x if place == "x" else logits)[40, 1] = nan(bits, dtype)
        results = []
        for backend in (cpu, reference):
            out, lse = backend.segment_pool(x, logits, ptr, ptr)
            results.append((out, *backend.segment_pool_backward(grad, x, logits, out, lse, ptr, ptr)))
        assert results[1][0].isnan().any()
        for a, b in zip(*results, strict=True):
            same(a, b)


@pytest.mark.parametrize("value", [INFINITY, -INFINITY])
@pytest.mark.parametrize("all_rows", [False, True])
def test_infinite_logits_do_what_they_do_in_the_reference(value, all_rows):
    g = torch.Generator().manual_seed(1)
    x, logits = torch.randn(sum(SETS), 32, generator=g), torch.randn(sum(SETS), 3, generator=g)
    grad = torch.randn(4, 3, 32, generator=g)
    logits[slice(3, 73) if all_rows else 40, 1] = value
    for a, b in zip(pool(cpu, grad, x, logits), pool(reference, grad, x, logits), strict=True):
        same(a, b)
    q, k, v, grad = (torch.randn(sum(SETS), 32, generator=g) for _ in range(4))
    q[3:73, 5], k[slice(3, 73) if all_rows else 40, 5] = 1.0, value
    for a, b in zip(attention(cpu, grad, q, k, v), attention(reference, grad, q, k, v), strict=True):
        same(a, b)


@pytest.mark.parametrize("dtype", BITS)
@pytest.mark.parametrize("layer_norm", [True, False])
def test_chunk_encode_keeps_nan_of_any_bits_in_its_chunk(dtype, layer_norm):
    args = list(cast(chunk_encode_case(32, 4, [5, 32, 3, 16, 7], layer_norm=layer_norm), dtype))
    grad = torch.randn(5, 4, 32, generator=torch.Generator().manual_seed(2)).to(dtype)
    clean = cpu.chunk_encode(*args), cpu.chunk_encode_backward(grad, *args)[0]
    owner = torch.repeat_interleave(torch.arange(5), args[1].diff())
    for bits in BITS[dtype]:
        args[0] = args[0].clone()
        args[0][40] = nan(bits, dtype)  # in chunk 3
        out, grad_values = cpu.chunk_encode(*args), cpu.chunk_encode_backward(grad, *args)[0]
        assert out[3].isnan().all() and grad_values[owner == 3].isnan().all()
        rest = [0, 1, 2, 4]
        torch.testing.assert_close(out[rest], clean[0][rest], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(grad_values[owner != 3], clean[1][owner != 3], rtol=1e-3, atol=1e-4)

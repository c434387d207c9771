"""Large logits and activations without layer norm: no more is lost than to rounding, and no network sees another."""

from __future__ import annotations

import pytest
import torch

import sne_fast
from helpers.cpu_cases import ISAS, NEEDS_BACKEND, cast, chunk_encode_case
from helpers.errors import relative_error
from helpers.op_cases import pointer
from sne_fast import reference
from sne_fast.backends.cpu import backend as cpu
from sne_fast.backends.cpu import library

pytestmark = pytest.mark.skipif(bool(library.reasons()), reason=NEEDS_BACKEND)
SIZES = [1e-6, 1e-3, 1.0, 1e2, 1e4, 1e5, 1e6]


@pytest.fixture(params=ISAS, autouse=True)
def isa(request):
    with library.use_isa(request.param):
        yield request.param


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("lengths", [[32] * 4, [20, 1, 33, 7], [5] * 13], ids=["full", "ragged", "short"])
def test_chunk_encode_without_layer_norm_on_values_of_any_size(size, lengths):
    args = list(chunk_encode_case(64, 4, lengths, layer_norm=False))
    args[0] = args[0] * size
    args = cast(args, torch.float32)
    want = reference.chunk_encode(*cast(args, torch.float64))
    got, usual = cpu.chunk_encode(*args), reference.chunk_encode(*args)
    assert relative_error(got, want) < max(2e-5, 2 * relative_error(usual, want))


@pytest.mark.parametrize("size", [1e4, 1e6])
def test_equal_logits_share_the_softmax_however_large_they_are(size):
    """Equal rows have equal weights exactly: their mean, and gradients that halve."""
    g = torch.Generator().manual_seed(0)
    q = torch.randn(40, 64, generator=g) * size
    k = q[torch.arange(40).repeat_interleave(2)]  # each query has two equal keys of the largest logit
    v = torch.randn(80, 64, generator=g)
    rows, keys = pointer([40]), pointer([80])
    args = (q, k, v, rows, keys, rows, keys, 1)
    out, lse = cpu.set_attention(*args)
    mean = v.view(40, 2, 64).mean(1)
    torch.testing.assert_close(out, mean)
    grad = torch.randn(40, 64, generator=g)
    *_, grad_v = cpu.set_attention_backward(grad, q, k, v, out, lse, rows, keys, rows, keys, 1)
    torch.testing.assert_close(grad_v, grad.repeat_interleave(2, 0) / 2)

    x, logits = torch.randn(3000, 32, generator=g), torch.full((3000, 2), size * 1e3)
    whole = pointer([3000])
    pooled, lse = cpu.segment_pool(x, logits, whole, whole)
    torch.testing.assert_close(pooled[0], x.mean(0).expand(2, 32), rtol=1e-4, atol=1e-6)
    grad_x, _ = cpu.segment_pool_backward(torch.ones_like(pooled), x, logits, pooled, lse, whole, whole)
    torch.testing.assert_close(grad_x, torch.full_like(x, 2 / 3000), rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1e3, 1e6])
def test_gradients_of_attention_and_pool_with_large_logits(dtype, size):
    g = torch.Generator().manual_seed(1)
    sets = [3, 40, 130, 1]
    ptr, rows = pointer(sets), sum(sets)
    q, k, v, grad = (torch.randn(rows, 64, generator=g, dtype=torch.float64).to(dtype) for _ in range(4))
    k = k * size
    out, lse = cpu.set_attention(q, k, v, ptr, ptr, ptr, ptr, 4)
    got = (out, *cpu.set_attention_backward(grad, q, k, v, out, lse, ptr, ptr, ptr, ptr, 4))

    def results(*inputs):
        out, lse = reference.set_attention(*inputs[1:], ptr, ptr, ptr, ptr, 4)
        return out, *reference.set_attention_backward(*inputs, out, lse, ptr, ptr, ptr, ptr, 4)

    usual, want = results(grad, q, k, v), results(*(t.double() for t in (grad, q, k, v)))
    for a, b, exact in zip(got, usual, want, strict=True):
        assert relative_error(a, exact) < max(1e-4, 3 * relative_error(b, exact))


@pytest.mark.parametrize("size", [1e4, 1e5, 1e6, 1e25, 1e38])
def test_large_values_leave_the_other_networks_of_the_batch_alone(size):
    torch.manual_seed(0)
    encoder = sne_fast.SNE(hidden_dim=64, num_heads=4, layer_norm=False, scale="none")
    plain = [torch.nn.Linear(9, 7), torch.nn.BatchNorm1d(5), torch.nn.Linear(3, 3)]
    large = torch.nn.BatchNorm1d(13)
    large.running_var.fill_(size)
    with torch.no_grad(), sne_fast.use_backend("cpu"):
        want, got = encoder(plain), encoder([plain[0], large, *plain[1:]])
    torch.testing.assert_close(got[[0, 2, 3]], want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("layer_norm", [True, False])
def test_a_gradient_that_is_not_finite_stays_in_its_chunk(value, layer_norm):
    args = cast(chunk_encode_case(64, 4, [5, 5, 32, 32, 3, 16, 7], layer_norm=layer_norm), torch.float32)
    grad = torch.randn(7, 4, 64, generator=torch.Generator().manual_seed(2))
    want, *_ = cpu.chunk_encode_backward(grad, *args)
    grad[1, 0, 3] = grad[3, 2, 1] = value
    got, *_ = cpu.chunk_encode_backward(grad, *args)
    owner = torch.repeat_interleave(torch.arange(7), args[1].diff())
    hit = (owner == 1) | (owner == 3)
    assert not got[hit].isfinite().any()
    torch.testing.assert_close(got[~hit], want[~hit], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_gradients_of_other_chunks_survive_an_overflow(value):
    args = list(cast(chunk_encode_case(64, 4, [5, 5, 32, 32, 3], layer_norm=False), torch.float32))
    grad = torch.randn(5, 4, 64, generator=torch.Generator().manual_seed(3))
    want, *_ = cpu.chunk_encode_backward(grad, *args)
    args[0][6], args[0][12] = value, value
    got, *_ = cpu.chunk_encode_backward(grad, *args)
    owner = torch.repeat_interleave(torch.arange(5), args[1].diff())
    others = (owner != 1) & (owner != 2)
    torch.testing.assert_close(got[others], want[others], rtol=1e-4, atol=1e-5)

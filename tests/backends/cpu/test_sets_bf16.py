"""set_attention and segment_pool where the processor multiplies bfloat16: errors against PyTorch's, the same bits."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from helpers import segment_pool_checks, set_attention_checks
from sne_fast import functional, use_backend
from sne_fast.backends.cpu import backend as cpu
from sne_fast.backends.cpu import library
from sne_fast.training.threads import torch_threads

ISA = "avx512_bf16"
pytestmark = pytest.mark.skipif(
    bool(library.reasons()) or ISA not in library.supported_isas(), reason=f"needs a processor with {ISA}"
)
BRAIN, SINGLE = torch.bfloat16, torch.float32
LONG = ([90, 3, 0, 200, 1, 40], [300, 3, 5, 90, 1, 40])
SEGMENTS = [900, 1, 0, 5000, 2, 33]


@pytest.fixture(autouse=True)
def isa():
    with library.use_isa(ISA):
        yield


def attention(lengths=LONG, h: int = 64, heads: int = 4, dtype: torch.dtype = BRAIN) -> tuple[Tensor, ...]:
    return set_attention_checks.run(cpu, *set_attention_checks.inputs(*lengths, h, dtype), heads)


def pool(lengths=SEGMENTS, h: int = 64, queries: int = 4, dtype: torch.dtype = BRAIN) -> tuple[Tensor, ...]:
    return segment_pool_checks.run(cpu, *segment_pool_checks.case(lengths, h, queries, dtype))


def same(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("lengths", set_attention_checks.CASES.values(), ids=set_attention_checks.CASES)
@pytest.mark.parametrize(("h", "heads"), [(32, 1), (32, 4), (256, 32)])
def test_attention_is_near_the_reference(lengths, h: int, heads: int) -> None:
    out, lse, *grads = set_attention_checks.check(cpu, set_attention_checks.inputs(*lengths, h, BRAIN), heads)
    assert lse.dtype == SINGLE and all(t.dtype == BRAIN for t in (out, *grads))


@pytest.mark.parametrize("lengths", [(2, 2), (7, 5), (40, 70), (4, 210), (210, 4)])
def test_attention_loses_at_most_twice_what_pytorch_does(lengths: tuple[int, int]) -> None:
    set_attention_checks.loses_at_most_twice_what_pytorch_does(cpu, lengths, BRAIN)


@pytest.mark.parametrize("lengths", set_attention_checks.ONE_SET)
def test_gradients_of_logits_are_differences_of_exact_numbers(lengths: tuple[int, int]) -> None:
    set_attention_checks.mean_of_the_gradient_does_not_come_from_a_rounded_result(cpu, lengths, BRAIN, 2e-2)


@pytest.mark.parametrize("lengths", set_attention_checks.WITH_NAN.values(), ids=set_attention_checks.WITH_NAN)
@pytest.mark.parametrize("place", [0, 1, 2])
def test_nan_stays_in_its_set(lengths, place: int) -> None:
    set_attention_checks.nan_stays_in_its_set(cpu, lengths, place, BRAIN)


@pytest.mark.parametrize("size", [30.0, 1000.0])
def test_large_logits_pick_one_key(size: float) -> None:
    (q, k, v), pointers, grad = set_attention_checks.inputs([70], [200], 32, BRAIN)
    case = (q * size, k, v), pointers, grad
    got, want = set_attention_checks.run(cpu, *case, 2), set_attention_checks.exact(*case, 2)
    assert all(t.isfinite().all() for t in got)
    assert float((got[0].double() - want[0]).norm()) < 0.02 * float(want[0].norm())


@pytest.mark.parametrize("lengths", segment_pool_checks.LENGTHS.values(), ids=segment_pool_checks.LENGTHS)
@pytest.mark.parametrize(("h", "queries"), [(64, 4), (32, 1), (96, 7), (128, 32)])
def test_pool_is_near_the_reference(lengths: list[int], h: int, queries: int) -> None:
    out, lse, *grads = segment_pool_checks.check(cpu, segment_pool_checks.case(lengths, h, queries, BRAIN))
    assert lse.dtype == SINGLE and all(t.dtype == BRAIN for t in (out, *grads))


@pytest.mark.parametrize(("length", "queries"), [(2, 4), (3, 4), (33, 1), (700, 4), (5000, 3)])
def test_pool_loses_at_most_twice_what_pytorch_does(length: int, queries: int) -> None:
    segment_pool_checks.loses_at_most_twice_what_pytorch_does(cpu, length, 64, queries, BRAIN)


@pytest.mark.parametrize("lengths", segment_pool_checks.WITH_NAN)
def test_logits_of_minus_infinity_have_no_weight(lengths: list[int]) -> None:
    x, logits, ptr, grad = segment_pool_checks.case(lengths, 32, 3, BRAIN)
    logits[: lengths[0] - 1] = -math.inf
    out, lse, dx, dlogits = segment_pool_checks.run(cpu, x, logits, ptr, grad)
    torch.testing.assert_close(out[0], x[lengths[0] - 1].expand(3, 32))
    assert lse.isfinite().all() and not dx[: lengths[0] - 1].any() and not dlogits[: lengths[0] - 1].any()


@pytest.mark.parametrize("op", [attention, pool])
def test_the_same_bits_for_any_number_of_threads(op) -> None:
    with torch_threads(1):
        want = op()
    for count in (2, 5):
        with torch_threads(count):
            assert same(op(), want)


@pytest.mark.parametrize("op", [attention, pool])
def test_products_are_of_bfloat16_for_bfloat16_alone(op) -> None:
    rounded, single = op(), op(dtype=SINGLE)
    with library.use_isa("avx512"):
        assert same(op(dtype=SINGLE), single)
        assert not same(op(), rounded)


def test_pools_of_other_widths_are_computed_in_float32() -> None:
    got = pool(h=48)
    with library.use_isa("avx512"):
        assert same(pool(h=48), got)


def test_numbers_that_do_not_start_at_a_word() -> None:
    def shifted(t: Tensor) -> Tensor:
        odd = torch.cat([t.new_zeros(1), t.flatten()])[1:].view_as(t)
        assert odd.data_ptr() % 4
        return odd

    qkv, pointers, grad = set_attention_checks.inputs(*LONG, 32, BRAIN)
    want = set_attention_checks.run(cpu, qkv, pointers, grad, 4)
    assert same(set_attention_checks.run(cpu, [shifted(t) for t in qkv], pointers, shifted(grad), 4), want)
    x, logits, ptr, grad = segment_pool_checks.case(SEGMENTS, 32, 3, BRAIN)
    want = segment_pool_checks.run(cpu, x, logits, ptr, grad)
    assert same(segment_pool_checks.run(cpu, shifted(x), shifted(logits), ptr, shifted(grad)), want)


def test_autocast_multiplies_bfloat16() -> None:
    (q, k, v), (q_ptr, k_ptr, *_), _ = set_attention_checks.inputs(*LONG, 32, SINGLE)
    with use_backend("cpu"), torch.autocast("cpu", BRAIN):
        got = functional.set_attention(q, k, v, q_ptr, k_ptr, 4)
        assert torch.equal(got, functional.set_attention(q.to(BRAIN), k.to(BRAIN), v.to(BRAIN), q_ptr, k_ptr, 4))
    assert got.dtype == BRAIN

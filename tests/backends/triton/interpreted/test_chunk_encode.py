"""The Triton kernels of ``chunk_encode`` in the interpreter, forward and every gradient, against float64."""

from __future__ import annotations

import math
import mmap

import numpy as np
import pytest
import torch
from torch import Tensor

import sne_fast.backends.triton.chunk_encode as module
import sne_fast.backends.triton.chunk_encode_backward as backward_module
import sne_fast.backends.triton.chunk_encode_staged as staged_module
from helpers import chunk_checks as checks
from helpers.chunk_checks import MIXED, arguments, check, error, gentle, half_by_torch, in_float64, upstream
from helpers.op_cases import GRADED, GRADED_NAMES, ChunkCase, pointer
from sne_fast import reference
from sne_fast.backends.gpu_plans.chunks import SHARED_STARTS, TABLE_ENTRIES, ChunkPlan, plan_chunks
from sne_fast.backends.triton.chunk_encode import chunk_encode, chunk_encode_backward, why_not
from sne_fast.backends.triton.chunk_launches import fits_a_tile

pytestmark = pytest.mark.build

TOLERANCE = {torch.float32: (2e-6, 1e-5), torch.float64: (1e-12, 1e-10)}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("layer_norm", [True, False], ids=["norm", "plain"])
@pytest.mark.parametrize("width, heads", [(32, 4), (64, 4)])
def test_tile_of_mixed_lengths(width: int, heads: int, layer_norm: bool, dtype: torch.dtype) -> None:
    args = arguments(ChunkCase.make(MIXED, width=width, heads=heads, layer_norm=layer_norm, dtype=dtype))
    check(module, args if layer_norm else gentle(args), *TOLERANCE[dtype])


@pytest.mark.parametrize("heads", [1, 2, 8])
def test_heads(heads: int) -> None:
    check(module, arguments(ChunkCase.make([[32, 5], [4, 4]], width=64, heads=heads, dtype=torch.float32)), 2e-6, 1e-5)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_chunks_of_33_to_64(dtype: torch.dtype) -> None:
    case = ChunkCase.make([[64, 33, 7], [40]], width=32, heads=2, chunk_size=64, dtype=dtype)
    check(module, arguments(case), *TOLERANCE[dtype])


@pytest.mark.parametrize("dtype, layer_norm", [(torch.float32, True), (torch.float64, False)], ids=str)
@pytest.mark.parametrize(
    "width, heads, chunk_size, tensors",
    [(32, 2, 256, [[130]]), (128, 8, 32, [[32, 9], [1]]), (128, 16, 32, [[20]]), (256, 4, 16, [[16, 1]])],
)
def test_staged(
    width: int, heads: int, chunk_size: int, tensors: list[list[int]], dtype: torch.dtype, layer_norm: bool
) -> None:
    case = ChunkCase.make(tensors, width, heads, chunk_size, layer_norm, dtype)
    # The gradient of pool_query is a small difference of large sums. The processor decides how much of it the
    # interpreter's float32 products lose: 1.4e-5 at width 128 on an Intel Xeon, less than 1e-5 on an AMD EPYC.
    forward, backward = TOLERANCE[dtype]
    check(module, arguments(case), forward, max(backward, 2e-5) if dtype == torch.float32 else backward)


@pytest.mark.parametrize(
    "width, heads, layer_norm, tensors",
    [(32, 4, True, MIXED[:3]), (64, 4, False, MIXED[:3]), (64, 8, True, [[32, 9]]), (256, 8, True, [[20, 9]])],
)
def test_float16_loses_at_most_twice_what_torch_loses(
    width: int, heads: int, layer_norm: bool, tensors: list[list[int]]
) -> None:
    # A relu that flips by rounding costs either side the same: the seed is one where neither is unlucky.
    args = arguments(ChunkCase.make(tensors, width, heads, layer_norm=layer_norm, dtype=torch.float16, seed=1))
    ratios = checks.loses_at_most_twice_what_torch_loses(module, args)
    for name, ratio in zip(GRADED_NAMES, ratios, strict=True):
        assert ratio <= 2, name


def test_float16_tile_of_width_128() -> None:
    """The forward is fused for operands of 16 bits, the backward staged."""
    args = arguments(ChunkCase.make([[32, 9], [2, 40]], 128, 8, chunk_size=40, dtype=torch.float16, seed=1))
    with torch.enable_grad():
        want, theirs = reference.chunk_encode(*in_float64(args)), half_by_torch(upstream(args), args)[0]
    assert fits_a_tile(128, np.bincount([1], minlength=257), torch.float16)
    assert error(chunk_encode(*args), want) <= 2 * error(theirs, want)


class _Encode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *args: Tensor) -> Tensor:
        ctx.save_for_backward(*args)
        return chunk_encode(*args)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        values_grad, *rest = chunk_encode_backward(grad, *ctx.saved_tensors)
        return (values_grad, None, None, None, None, *rest)


@pytest.mark.parametrize("width, heads, tensors", [(32, 4, [[3, 2]]), (128, 2, [[3]])], ids=["tile", "staged"])
def test_gradcheck(width: int, heads: int, tensors: list[list[int]]) -> None:
    args = arguments(ChunkCase.make(tensors, width=width, heads=heads))
    inputs = [a.requires_grad_() if a.is_floating_point() else a for a in args]
    assert torch.autograd.gradcheck(_Encode.apply, inputs, fast_mode=True, check_undefined_grad=False)


@pytest.mark.parametrize(
    "where, bad, width",
    [("values", math.nan, 32), ("values", math.inf, 32), ("grad", math.nan, 32), ("values", math.nan, 128)],
)
def test_what_is_not_finite_stays_in_its_chunk(bad: float, where: str, width: int) -> None:
    checks.not_finite_stays_in_its_chunk(module, width, 2, where, bad)


@pytest.mark.parametrize("width", [32, 128])
def test_nothing_to_encode(width: int) -> None:
    checks.nothing_to_encode(module, width)


def test_tensor_without_chunks() -> None:
    check(module, arguments(ChunkCase.make([[], [32, 3], [], [4]], dtype=torch.float64)), 1e-12, 1e-10)


@pytest.mark.parametrize("width", [32, 128], ids=["tile", "staged"])
def test_slabs_and_same_bits(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = [[32] * 9, [8] * 6] if width == 32 else [[32], [5], [20]]
    args = arguments(ChunkCase.make(tensors, width=width, heads=4, dtype=torch.float64))

    def shrink() -> None:
        monkeypatch.setattr(backward_module, "SLAB_ROWS_TIMES_WIDTH", 1)
        monkeypatch.setattr(staged_module, "SLAB_ROWS_TIMES_WIDTH", 40 * width)

    checks.slabs(module, args, shrink, 1e-13)
    if width == 128:
        assert error(chunk_encode(*args), reference.chunk_encode(*args)) <= 1e-12


def test_addresses_beyond_32_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two chunks with more than 2^31 values between them, in memory that is mapped but never touched."""
    torch.use_deterministic_algorithms(False)
    small, gap = arguments(ChunkCase.make([[32], [32]], dtype=torch.float16)), (1 << 31) + 5
    memory = [mmap.mmap(-1, 2 * (gap + 64)) for _ in range(2)]
    # Tensors of the first chunk only, as the interpreter copies whole storages back and forth.
    (values, second), (values_grad, second_grad) = (
        [torch.frombuffer(m, dtype=torch.float16, count=32, offset=at) for at in (0, 2 * (32 + gap))] for m in memory
    )
    values.copy_(small[0][:32]), second.copy_(small[0][32:])
    chunk_ptr, tensor_ptr = torch.tensor([0, 32, 32 + gap, 64 + gap]), torch.tensor([0, 1, 3])
    plan = plan_chunks(small[1], np.bincount([32, 32], minlength=257))
    plan = ChunkPlan(torch.tensor([0, 2]), plan.table, plan.counts)
    want_out, want = chunk_encode(*small), chunk_encode_backward(upstream(small), *small)
    for place in (module, backward_module):
        monkeypatch.setattr(place, "count_lengths", lambda _: plan.counts)
        monkeypatch.setattr(place, "plan_chunks", lambda *_: plan)
    far = (values, chunk_ptr, tensor_ptr, chunk_ptr, tensor_ptr, *small[5:])
    out, grad = chunk_encode(*far), torch.zeros(3, 4, 32, dtype=torch.float16)
    grad[::2] = upstream(small)
    monkeypatch.setattr(backward_module, "sum_over_sets", lambda rows, *_: rows[::2])
    monkeypatch.setattr(torch, "empty_like", lambda t: values_grad)
    _, *grads = chunk_encode_backward(grad, *far)
    monkeypatch.undo()
    assert torch.equal(out[::2], want_out)
    assert torch.equal(torch.cat([values_grad, second_grad]), want[0])
    assert all(torch.equal(a, b) for a, b in zip(grads, want[1:], strict=True))


def test_plan_gives_every_chunk_its_own_slots() -> None:
    lengths = torch.randint(1, 65, (500,), generator=torch.Generator().manual_seed(0)).tolist()
    counts = np.bincount(lengths, minlength=257)
    plan = plan_chunks(pointer(lengths), counts)
    assert plan.table.shape == (TABLE_ENTRIES,)
    assert [lengths[i] for i in plan.order.tolist()] == sorted(lengths)
    blocks = {slot_class.slots + slot_class.min_length: n for slot_class, n in plan.classes()}
    assert blocks[33] == sum(-(-lengths.count(n) // (32 // n)) for n in range(1, 17))
    assert blocks[49] == sum(17 <= n <= 32 for n in lengths) and blocks[97] == sum(n > 32 for n in lengths)
    starts = plan.table[SHARED_STARTS:].tolist()
    assert starts == [sum(-(-lengths.count(m) // (32 // m)) for m in range(1, n)) for n in range(1, 17)]


@pytest.mark.parametrize(
    "width, heads, chunk_size, says", [*checks.REFUSED, (32, 4, 300, "chunk size must be at most 256")]
)
def test_why_not(width: int, heads: int, chunk_size: int, says: str) -> None:
    checks.why_not(module, width, heads, chunk_size, torch.float64, says)


def test_why_not_is_silent_on_what_runs() -> None:
    for width, heads in ((32, 4), (64, 8), (128, 2), (256, 32)):
        assert why_not("chunk_encode", arguments(ChunkCase.make([[3]], width=width, heads=heads))) == []
    assert len(GRADED) == len(GRADED_NAMES)

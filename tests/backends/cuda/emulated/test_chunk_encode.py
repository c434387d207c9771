"""The CUDA kernels of ``chunk_encode`` in the emulator, forward and every gradient, against float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from helpers import chunk_checks as checks
from helpers.chunk_checks import MIXED, arguments, error, gentle, in_float64, upstream
from helpers.op_cases import GRADED_NAMES, ChunkCase, products
from sne_fast import reference
from sne_fast.backends.cuda import chunk_encode as module
from sne_fast.backends.cuda import library
from sne_fast.backends.cuda.chunk_encode import chunk_encode, chunk_encode_backward, segment_sum, why_not

pytestmark = pytest.mark.build

SMALL = [[32, 3], [20], [5, 5, 1]]


def check(args: tuple[Tensor, ...], forward: float = 2e-6, backward: float = 1e-5) -> None:
    checks.check(module, args, forward, backward)


@pytest.mark.parametrize("width, heads, layer_norm", [(32, 4, True), (64, 4, True), (64, 4, False)])
def test_mixed_lengths(width: int, heads: int, layer_norm: bool) -> None:
    args = arguments(ChunkCase.make(MIXED, width, heads, layer_norm=layer_norm, dtype=torch.float32))
    check(args if layer_norm else gentle(args))


@pytest.mark.parametrize("width, heads", [(32, 1), (32, 2), (64, 1), (64, 2), (64, 8)])
def test_heads(width: int, heads: int) -> None:
    check(arguments(ChunkCase.make(SMALL, width, heads, dtype=torch.float32)))


@pytest.mark.parametrize("width, heads", [(128, 2), (128, 16)])
def test_wide(width: int, heads: int) -> None:
    check(arguments(ChunkCase.make([[20, 3]], width, heads, dtype=torch.float32)))


@pytest.mark.parametrize("width", [32, 64])
def test_long_chunks(width: int) -> None:
    check(arguments(ChunkCase.make([[64, 33], [65], [128]], width, 2, 128, dtype=torch.float32)))


def test_tf32() -> None:
    args = arguments(ChunkCase.make(SMALL, 64, 4, dtype=torch.float32))
    with products("high"):
        rounded = chunk_encode(*args)
        check(args, 2e-3, 2e-2)
    assert error(rounded, reference.chunk_encode(*in_float64(args))) > 2e-5  # the setting was taken


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width, heads, tensors", [(32, 4, [[32, 9, 2]]), (64, 8, [[32, 9]]), (256, 4, [[20, 9]])])
def test_half_types_lose_at_most_twice_what_torch_loses(
    width: int, heads: int, tensors: list[list[int]], dtype: torch.dtype
) -> None:
    # Now and then rounding flips a relu, which costs either side tenfold: gradients are judged by the median of seeds.
    ratios = []
    for seed in range(5 if width < 256 else 3):
        args = arguments(ChunkCase.make(tensors, width, heads, dtype=dtype, seed=seed))
        ratios.append(checks.loses_at_most_twice_what_torch_loses(module, args))
    for name, ratio in zip(GRADED_NAMES, torch.tensor(ratios).median(0).values.tolist(), strict=True):
        assert ratio <= 2, name


def test_weights_in_pieces_and_any_order_of_threads_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that stay in shared memory or come piece by piece; a barrier too few would show as another result."""
    args = arguments(ChunkCase.make([[31, 40, 5], [5, 5, 20], [128]], 64, 4, 128, dtype=torch.bfloat16))
    grad = upstream(args)

    def both() -> tuple[Tensor, ...]:
        return (chunk_encode(*args), *chunk_encode_backward(grad, *args))

    first = both()
    try:
        for seed in (1, 2, 3):
            library.library().sne_fast_cuda_emulated_schedule(seed)
            assert all(torch.equal(a, b) for a, b in zip(first, both(), strict=True)), seed
        monkeypatch.setattr(library, "EMULATED_SHARED", 99 << 10)
        for seed in (0, 4):
            library.library().sne_fast_cuda_emulated_schedule(seed)
            pieces = both()
            assert torch.equal(pieces[0], first[0]) and torch.equal(pieces[1], first[1])
            for name, a, b in zip(GRADED_NAMES, pieces[1:], first[1:], strict=True):
                assert error(a, b.double()) <= 1e-2, name  # fewer warps: sums over other rows
    finally:
        library.library().sne_fast_cuda_emulated_schedule(0)


@pytest.mark.parametrize("heads", [1, 2, 4, 8])
def test_products_by_warpgroups_are_those_by_warps(heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hopper's path: the same sums in the same order, from resident and from streamed weights."""
    args = arguments(ChunkCase.make([[32, 40, 5], [5, 5, 20], [100]], 64, heads, 128, dtype=torch.bfloat16))
    plain = chunk_encode(*args)
    monkeypatch.setattr(module, "EMULATED_WGMMA", True)
    for limit in (227 << 10, 99 << 10):
        monkeypatch.setattr(library, "EMULATED_SHARED", limit)
        assert error(chunk_encode(*args), plain.double()) <= 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width, heads, wgmma", [(64, 4, True), (64, 8, False), (64, 1, True), (32, 2, False)])
def test_bins_that_one_chunk_fills(width: int, heads: int, wgmma: bool, dtype: torch.dtype, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """Enough chunks of 32 that a thread block takes the way without masks, beside others that do not fill their bin."""
    monkeypatch.setattr(module, "EMULATED_WGMMA", wgmma)
    args = arguments(ChunkCase.make([[32] * 10, [20, *[32] * 9]], width, heads, dtype=dtype))
    args[0].mul_(torch.linspace(0.1, 3, len(args[0])).to(dtype))
    exact, rounded = reference.chunk_encode(*in_float64(args)), reference.chunk_encode(*args)
    found = chunk_encode(*args)
    assert error(found, exact) <= 2 * error(rounded, exact)
    for chunk in range(found.shape[0]):
        assert error(found[chunk], exact[chunk]) <= 4 * error(rounded, exact), chunk
    library.library().sne_fast_cuda_emulated_schedule(5)
    assert torch.equal(chunk_encode(*args), found), "whatever the order of threads"
    args[0][40] = math.nan
    spoilt = chunk_encode(*args)
    assert spoilt[1].isnan().all() and torch.equal(spoilt[2:], found[2:]) and torch.equal(spoilt[0], found[0])


def test_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    args = arguments(ChunkCase.make([[32] * 3, [8] * 6], 32, 4, dtype=torch.float32))
    checks.slabs(module, args, lambda: monkeypatch.setattr(module, "SLAB_ROWS_TIMES_WIDTH", 1), 1e-6)


@pytest.mark.parametrize("where, bad", [("values", math.nan), ("values", math.inf), ("grad", math.nan)])
@pytest.mark.parametrize("width", [32, 128])
def test_what_is_not_finite_stays_in_its_chunk(bad: float, where: str, width: int) -> None:
    checks.not_finite_stays_in_its_chunk(module, width, 2 if width == 32 else 4, where, bad)


def test_nothing_to_encode() -> None:
    checks.nothing_to_encode(module, 32)


@pytest.mark.parametrize(
    "width, heads, chunk_size, dtype, kilobytes, fits",
    [(64, 4, 32, torch.bfloat16, 99, True), (64, 4, 128, torch.float32, 163, True),
     (256, 4, 128, torch.bfloat16, 227, True), (256, 4, 128, torch.bfloat16, 99, False),
     (64, 1, 128, torch.float32, 163, False)],
)  # fmt: skip
def test_what_does_not_fit_in_shared_memory_is_refused_beforehand(
    width: int, heads: int, chunk_size: int, dtype: torch.dtype, kilobytes: int, fits: bool, monkeypatch
) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(library, "EMULATED_SHARED", kilobytes << 10)
    args = arguments(ChunkCase.make([[3]], width, heads, chunk_size, dtype=dtype))
    reasons = why_not("chunk_encode", args)
    assert (reasons == []) == fits
    assert fits or "shared memory" in reasons[0]


def test_tensor_without_chunks() -> None:
    check(arguments(ChunkCase.make([[], [32, 3], [], [4]], dtype=torch.float32)))


def test_segment_sum() -> None:
    ptr = torch.tensor([0, 3, 3, 700, 701, 1500])
    for width in (32, 256):
        x = torch.randn(1500, width, generator=torch.Generator().manual_seed(0))
        want = torch.segment_reduce(x.double(), "sum", offsets=ptr, axis=0, initial=0)
        assert error(segment_sum(x, ptr), want) <= 1e-6


@pytest.mark.parametrize(
    "width, heads, chunk_size, says",
    [*checks.REFUSED, (32, 4, 300, "chunk size must be at most 128"),
     (256, 8, 32, "float32 fit the registers up to width 128")],
)  # fmt: skip
def test_why_not(width: int, heads: int, chunk_size: int, says: str) -> None:
    checks.why_not(module, width, heads, chunk_size, torch.float32, says)

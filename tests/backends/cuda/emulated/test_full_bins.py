"""The backward of bins that one chunk of 32 elements fills, which has kernels of its own, in the emulator."""

from __future__ import annotations

import math

import pytest
import torch

from helpers import chunk_checks as checks
from helpers.chunk_checks import arguments, error, gentle, upstream
from helpers.op_cases import GRADED_NAMES, ChunkCase
from sne_fast.backends.cuda import chunk_encode as module
from sne_fast.backends.cuda import library
from sne_fast.backends.cuda.chunk_encode import FULL, MASKED, chunk_encode, chunk_encode_backward
from sne_fast.ops.launch_bounds import LaunchBounds, declare_bounds

pytestmark = pytest.mark.build

TENSORS = [[32] * 5, [20, 32, 32]]
"""Full bins for two blocks of threads, the last of which has warps without one, and a chunk that fills none."""


def case(width: int, heads: int, dtype: torch.dtype, **options: int) -> tuple[torch.Tensor, ...]:
    return arguments(ChunkCase.make(TENSORS, width, heads, dtype=dtype, **options))


def with_bounds(args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Return the same arguments, whose launches are sized for more chunks of 16, of 17 to 31 and of 32 elements."""
    values, chunk_ptr, tensor_ptr, _, *rest = args
    counts = [0] * 257
    counts[16], counts[31], counts[32] = 4, 6, 15
    host = chunk_ptr.clone()
    declare_bounds(host, LaunchBounds(32, 32, tuple(counts)))
    return values, chunk_ptr, tensor_ptr, host, *rest


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Kernels with the shortest chunk of their launch, as they are launched."""
    names: list[tuple[str, int]] = []

    def run(self: module.ChunkCall, name: str, *args: object) -> None:
        if hasattr(args[0], "_obj") and hasattr(args[0]._obj, "min_length"):
            names.append((name, args[0]._obj.min_length))
        library.run(name, self.values.device, library.precision(self.values.dtype), *args)

    monkeypatch.setattr(module.ChunkCall, "run", run)
    return names


@pytest.mark.parametrize(
    "width, heads, dtype, layer_norm",
    [(64, 4, torch.bfloat16, True), (64, 2, torch.float16, False), (64, 1, torch.bfloat16, True),
     (32, 2, torch.float16, True), (32, 1, torch.bfloat16, False)],
)  # fmt: skip
def test_gradients_lose_at_most_twice_what_torch_loses(
    width: int, heads: int, dtype: torch.dtype, layer_norm: bool, launched: list[tuple[str, int]]
) -> None:
    ratios = []
    for seed in range(3):
        args = case(width, heads, dtype, seed=seed, layer_norm=layer_norm)
        ratios.append(checks.loses_at_most_twice_what_torch_loses(module, args if layer_norm else gentle(args)))
    assert ("chunk_block_backward", FULL.min_length) in launched
    for name, ratio in zip(GRADED_NAMES, torch.tensor(ratios).median(0).values.tolist(), strict=True):
        assert ratio <= 2, name


def test_any_order_of_threads_gives_the_same_bits() -> None:
    args = case(64, 4, torch.bfloat16)
    grad = upstream(args)
    first = chunk_encode_backward(grad, *args)
    for seed in (1, 2, 3):
        library.library().sne_fast_cuda_emulated_schedule(seed)
        again = chunk_encode_backward(grad, *args)
        for name, a, b in zip(GRADED_NAMES, first, again, strict=True):
            assert torch.equal(a, b), (name, seed)


def test_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    checks.slabs(
        module, case(64, 4, torch.bfloat16), lambda: monkeypatch.setattr(module, "SLAB_ROWS_TIMES_WIDTH", 1), 4e-3
    )


@pytest.mark.parametrize("wgmma", [False, True])
@pytest.mark.parametrize("tensors", [TENSORS, [[20, 31]], [[32]]], ids=str)
def test_bounds_above_the_counts_give_the_same_bits_by_the_same_kernels(
    tensors: list[list[int]], wgmma: bool, monkeypatch: pytest.MonkeyPatch, launched: list[tuple[str, int]]
) -> None:
    monkeypatch.setattr(module, "EMULATED_WGMMA", wgmma)
    args = arguments(ChunkCase.make(tensors, 64, 4, dtype=torch.bfloat16))
    grad = upstream(args)
    counted = chunk_encode(*args), *chunk_encode_backward(grad, *args)
    launched.clear()
    bounded = chunk_encode(*with_bounds(args)), *chunk_encode_backward(grad, *with_bounds(args))
    for name, a, b in zip(("out", *GRADED_NAMES), bounded, counted, strict=True):
        assert torch.equal(a, b), name
    blocks = [shortest for name, shortest in launched if name == "chunk_block_backward"]
    assert blocks == [1] * 3 + [MASKED.min_length] * 3 + [FULL.min_length] * 3


def test_slabs_may_lie_behind_the_last_full_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    args = case(64, 4, torch.bfloat16)
    grad = upstream(args)
    whole = chunk_encode_backward(grad, *args)
    monkeypatch.setattr(module, "SLAB_ROWS_TIMES_WIDTH", 1)
    for name, a, b in zip(GRADED_NAMES, chunk_encode_backward(grad, *with_bounds(args)), whole, strict=True):
        assert error(a, b.double()) <= 4e-3, name


@pytest.mark.parametrize("where", ["values", "grad"])
def test_what_is_not_finite_stays_in_its_chunk(where: str) -> None:
    args = case(32, 2, torch.bfloat16)
    grad = upstream(args)
    clean = chunk_encode_backward(grad, *args)
    if where == "values":
        args[0][40] = math.nan
    else:
        grad[1, 0, 3] = math.inf
    found = chunk_encode_backward(grad, *args)
    spoilt = torch.zeros(len(args[0]), dtype=torch.bool)
    spoilt[32:64] = True
    assert torch.equal(found[0][~spoilt], clean[0][~spoilt])
    assert not found[0][spoilt].isfinite().any() and not found[1][0].isfinite().any()
    assert torch.equal(found[1][1], clean[1][1])  # the row code of the other tensor


def test_little_shared_memory_takes_the_way_of_other_bins(
    monkeypatch: pytest.MonkeyPatch, launched: list[tuple[str, int]]
) -> None:
    args = case(64, 4, torch.bfloat16)
    grad = upstream(args)
    usual = chunk_encode_backward(grad, *args)
    assert ("chunk_block_backward", FULL.min_length) in launched
    launched.clear()
    monkeypatch.setattr(library, "EMULATED_SHARED", 163 << 10)
    for name, a, b in zip(GRADED_NAMES, chunk_encode_backward(grad, *args), usual, strict=True):
        assert error(a, b.double()) <= 0.06, name
    assert launched and all(min_length < FULL.min_length for _, min_length in launched)

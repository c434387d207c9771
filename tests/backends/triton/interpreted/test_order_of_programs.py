"""Results have the same bits in whichever order the programs of a kernel run, so that two runs on a GPU agree."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from triton.runtime import interpreter

from helpers.chunk_checks import arguments, upstream
from helpers.op_cases import ChunkCase, attention_case, block_case, feed_forward_case, pool_block_case, pool_case
from sne_fast.backends.triton import (
    block_plans,
    chunk_encode,
    chunk_encode_backward,
    chunk_launches,
    feed_forward,
    gather_chunks,
    pool_block,
    segment_pool,
    set_attention,
    set_block,
)

pytestmark = pytest.mark.build

SINGLE = torch.float32


@pytest.fixture(autouse=True)
def two_multiprocessors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Share tiles out among several programs, as a GPU does."""
    for module in (block_plans, chunk_encode_backward, chunk_launches, feed_forward):
        monkeypatch.setattr(module, "programs_of", lambda device: 2)


def encoded(tensors: list[list[int]], width: int, heads: int) -> Iterator[Tensor]:
    args = arguments(ChunkCase.make(tensors, width, heads, chunk_size=128, dtype=SINGLE))
    yield chunk_encode.chunk_encode(*args)
    yield from chunk_encode.chunk_encode_backward(upstream(args), *args)


def attended() -> Iterator[Tensor]:
    q, k, v, q_ptr, k_ptr = attention_case([70, 3], [90, 40], 32, SINGLE)
    ptrs = (q_ptr, k_ptr, q_ptr, k_ptr)
    out, lse = set_attention.set_attention(q, k, v, *ptrs, 4)
    yield from (out, *set_attention.set_attention_backward(out, q, k, v, out, lse, *ptrs, 4))


def pooled() -> Iterator[Tensor]:
    x, logits, ptr = pool_case([700, 3], 32, 3, SINGLE)
    out, lse = segment_pool.segment_pool(x, logits, ptr, ptr)
    yield from (out, *segment_pool.segment_pool_backward(out, x, logits, out, lse, ptr, ptr))


def fed_forward(width: int) -> Iterator[Tensor]:
    args = feed_forward_case(200, width, dtype=SINGLE)
    yield feed_forward.feed_forward(*args)
    yield from feed_forward.feed_forward_backward(args[1], *args)


def gathered() -> Iterator[Tensor]:
    g = torch.Generator().manual_seed(0)
    tensors = [torch.randn(40, 10, 3, 3, generator=g), torch.randn(7000, generator=g)]
    scale, plan = torch.tensor([2.0, 3.0]), torch.tensor([[400, 9], [7000, 1]])
    values = gather_chunks.gather_chunks(tensors, scale, plan, SINGLE)
    grads, scale_grad = gather_chunks.gather_chunks_backward(values, values, tensors, scale, plan)
    yield from (values, *grads, scale_grad)


def blocked() -> Iterator[Tensor]:
    x, _, ptr, _, *parameters = block_case([9] * 9, [9] * 9, (32, 32, 32), dtype=SINGLE)
    args = (x, None, ptr, ptr, ptr, ptr, *parameters, 2)
    yield set_block.set_block(*args)
    yield from set_block.set_block_backward(x, *args)


def pool_blocked() -> Iterator[Tensor]:
    x, ptr, *parameters = pool_block_case([9] * 9, 32, 2, dtype=SINGLE)
    out = pool_block.pool_block(x, ptr, ptr, *parameters)
    yield from (out, *pool_block.pool_block_backward(out, x, ptr, ptr, *parameters))


CASES = {
    "chunk_encode, tiles": lambda: encoded([[32] * 9, [7] * 9], 32, 2),
    "chunk_encode, staged": lambda: encoded([[66], [3]], 32, 2),
    "set_attention": attended,
    "segment_pool": pooled,
    "feed_forward": lambda: fed_forward(32),
    "feed_forward, staged": lambda: fed_forward(256),
    "set_block": blocked,
    "pool_block": pool_blocked,
    "gather_chunks": gathered,
}


@pytest.mark.parametrize("name", CASES)
def test_bits_do_not_depend_on_the_order_of_programs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    builder = interpreter.interpreter_builder
    set_index, grids = builder.set_grid_idx, []

    def from_the_last(*index: int) -> None:
        grids.append(builder.grid_dim)
        set_index(*(n - 1 - i for n, i in zip(builder.grid_dim, index, strict=True)))

    want = list(CASES[name]())
    monkeypatch.setattr(builder, "set_grid_idx", from_the_last)
    got = list(CASES[name]())
    assert max(map(max, grids)) > 1
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))

"""The reference backend: against loops over elements in float64, gradients, memory, empty sets, half types."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import sne_fast
from helpers.op_cases import GRADED, ChunkCase, attention_case, pool_case
from sne_fast import functional as F
from sne_fast.ops import reference

TENSORS = [[5, 5, 3], [1], [2, 1], [5]]


@pytest.fixture(autouse=True)
def _reference():
    with sne_fast.use_backend("reference"):
        yield


def chunk_encode_loop(args: tuple[Tensor, ...]) -> Tensor:
    """Compute the op element by element and head by head."""
    values, chunk_ptr, tensor_ptr, row_code, element_code, logit, basis, w_qkv, b_qkv, w_o, b_o, norm, query = args
    heads, h = query.shape
    d = h // heads

    def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return (x - x.mean()) / torch.sqrt(x.var(unbiased=False) + 1e-5) * weight + bias

    def residual(o: Tensor, b: int) -> Tensor:
        o = layer_norm(o, norm[b, 0], norm[b, 1]) if len(norm) else o
        o = o + torch.relu(w_o[b] @ o + b_o[b])
        return layer_norm(o, norm[b, 2], norm[b, 3]) if len(norm) else o

    pooled = []
    for t in range(len(chunk_ptr) - 1):
        x = values[chunk_ptr[t] : chunk_ptr[t + 1]]
        owner = next(s for s in range(len(tensor_ptr) - 1) if tensor_ptr[s] <= t < tensor_ptr[s + 1])
        rows = []
        for x_i in x:
            weights = [torch.softmax((logit[0, a] * x_i + logit[1, a]) * x, 0) for a in range(heads)]
            mean = torch.cat([(w @ x).expand(d) for w in weights])
            rows.append(residual(x_i * basis[0] + mean * basis[1] + basis[2], 0))
        for b in (1, 2, 3):
            if b == 2:
                rows = [row + row_code[owner] + element_code[i] for i, row in enumerate(rows)]
            q, k, v = (
                [w_qkv[b - 1, part * h : part * h + h] @ r + b_qkv[b - 1, part * h : part * h + h] for r in rows]
                for part in range(3)
            )
            new = []
            for i in range(len(rows)):
                o = q[i].clone()
                for a in range(heads):
                    c = slice(a * d, a * d + d)
                    w = torch.softmax(torch.stack([q[i][c] @ k[j][c] / math.sqrt(h) for j in range(len(rows))]), 0)
                    o[c] = o[c] + sum(w[j] * v[j][c] for j in range(len(rows)))
                new.append(residual(o, b))
            rows = new
        stacked = torch.stack(rows)
        pooled.append(torch.stack([torch.softmax(stacked @ query[a], 0) @ stacked for a in range(heads)]))
    return torch.stack(pooled)


@pytest.mark.parametrize("layer_norm", [True, False])
@pytest.mark.parametrize("width, heads", [(8, 1), (16, 2)])
def test_chunk_encode_equals_loops(width: int, heads: int, layer_norm: bool) -> None:
    args = ChunkCase.make(TENSORS, width, heads, chunk_size=5, layer_norm=layer_norm).args
    expected = chunk_encode_loop(args)
    torch.testing.assert_close(F.chunk_encode(*args), expected, rtol=1e-12, atol=1e-12 * float(expected.abs().max()))


def test_tiles_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    case = ChunkCase.make([[32] * 40, [7], [32, 1]]).args
    q, k, v, q_ptr, k_ptr = attention_case([40, 3, 40], [30, 2, 30], 32)
    pool = pool_case([50, 2], 16, 4)
    whole = (F.chunk_encode(*case), F.set_attention(q, k, v, q_ptr, k_ptr, 4), F.segment_pool(*pool))
    monkeypatch.setattr(reference, "TILE_ELEMENTS", 1000)
    tiled = (F.chunk_encode(*case), F.set_attention(q, k, v, q_ptr, k_ptr, 4), F.segment_pool(*pool))
    for one, other in zip(whole, tiled, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-13)


def test_memory_of_chunk_encode_does_not_grow_with_the_width_of_every_weight() -> None:
    """The largest tensor made on the way stays within a tile, whatever the number of weights."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.is_floating_point():
                Largest.seen = max(Largest.seen, out.numel())
            return out

    args = ChunkCase.make([[32] * 2000], width=64, dtype=torch.float32).args
    pooled = 2000 * 4 * 64
    host = (args[1], args[2])
    with torch.no_grad(), Largest():
        grad = torch.ones(2000, 4, 64)
        reference.chunk_encode(args[0], *args[1:3], *host, *args[3:])
        reference.chunk_encode_backward(grad, args[0], *args[1:3], *host, *args[3:])
    assert args[0].numel() * 64 > 4 * max(pooled, reference.TILE_ELEMENTS)  # the test could fail
    assert Largest.seen <= max(pooled, reference.TILE_ELEMENTS)


@pytest.mark.parametrize("layer_norm", [True, False])
def test_gradcheck_chunk_encode(layer_norm: bool) -> None:
    args = list(ChunkCase.make([[3, 2], [1]], width=8, heads=2, chunk_size=3, layer_norm=layer_norm).args)
    for i in GRADED:
        args[i].requires_grad_(args[i].numel() > 0)
    assert torch.autograd.gradcheck(F.chunk_encode, args, fast_mode=True)


@pytest.mark.parametrize("q_lengths, k_lengths", [([3, 1, 2], [3, 1, 2]), ([2, 0, 3], [1, 4, 0])])
def test_gradcheck_set_attention(q_lengths: list[int], k_lengths: list[int]) -> None:
    q, k, v, q_ptr, k_ptr = attention_case(q_lengths, k_lengths, 8)
    inputs = [t.requires_grad_() for t in (q, k, v)]
    assert torch.autograd.gradcheck(lambda *t: F.set_attention(*t, q_ptr, k_ptr, 2), inputs)


def test_gradcheck_segment_pool() -> None:
    x, logits, ptr = pool_case([3, 0, 1, 4], 5, 3)
    inputs = [x.requires_grad_(), logits.requires_grad_()]
    assert torch.autograd.gradcheck(lambda *t: F.segment_pool(*t, ptr), inputs)


def test_gradcheck_gather_chunks() -> None:
    tensors = [torch.randn(2, 3, 2, dtype=torch.float64), torch.randn(4, dtype=torch.float64).reshape(2, 2).t()]
    inputs = [t.requires_grad_() for t in tensors] + [torch.rand(2, dtype=torch.float64).add(0.5).requires_grad_()]
    plan = torch.tensor([[6, 2], [4, 1]])
    assert torch.autograd.gradcheck(lambda a, b, s: F.gather_chunks([a, b], s, plan, torch.float64), inputs)


def test_empty_sets_give_zero() -> None:
    q, k, v, q_ptr, k_ptr = attention_case([2, 3], [4, 0], 8)
    assert F.set_attention(q, k, v, q_ptr, k_ptr, 2)[2:].eq(0).all()
    x, logits, ptr = pool_case([2, 0], 8, 3)
    assert F.segment_pool(x, logits, ptr)[1].eq(0).all()


def test_nothing_at_all() -> None:
    args = ChunkCase.make([], width=8, heads=2).args
    assert F.chunk_encode(*args).shape == (0, 2, 8)
    empty = torch.zeros(0, 8, requires_grad=True)
    ptr = torch.zeros(1, dtype=torch.int64)
    out = F.set_attention(empty, empty, empty, ptr, ptr, 2)
    out.sum().backward()
    assert out.shape == (0, 8) and empty.grad is not None and empty.grad.shape == (0, 8)
    assert F.segment_pool(empty, torch.zeros(0, 3), ptr).shape == (0, 3, 8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_lose_one_rounding(dtype: torch.dtype) -> None:
    """Computed in float32 from the same rounded inputs, so that the error is that of rounding the result."""
    args = ChunkCase.make(TENSORS, width=32, dtype=dtype).args
    wide = tuple(t.double() if t.is_floating_point() else t for t in args)
    got, expected = F.chunk_encode(*args), F.chunk_encode(*wide)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-4)

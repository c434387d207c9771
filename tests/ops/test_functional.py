"""The ops on the reference backend: loops, gradients, opcheck, autocast, error messages."""

from __future__ import annotations

import math
import re

import pytest
import torch
from torch import Tensor

import sne_fast
from helpers.op_cases import GRADED, ChunkCase, attention_case, feed_forward_case, pointer, pool_case
from sne_fast import functional as F
from sne_fast.ops import reference
from sne_fast.ops.schema import SCHEMAS

TENSORS = [[5, 5, 3], [1], [2, 1], [5]]


@pytest.fixture(autouse=True)
def _reference():
    with sne_fast.use_backend("reference"):
        yield


def chunk_encode_loop(args: tuple[Tensor, ...]) -> Tensor:
    """DESIGN of the op, element by element and head by head."""
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


def host_args(op: str) -> tuple:
    chunk = ChunkCase.make(TENSORS, width=8, heads=2, chunk_size=5).args
    q, k, v, q_ptr, k_ptr = attention_case([2, 3], [4, 1], 8)
    x, logits, ptr = pool_case([2, 3], 8, 3)
    ops = torch.ops.sne_fast
    if op.startswith("chunk_encode"):
        args = (*chunk[:3], chunk[1].clone(), chunk[2].clone(), *chunk[3:])
        return args if op == "chunk_encode" else (torch.randn(7, 2, 8, dtype=torch.float64), *args)
    if op.startswith("set_attention"):
        args = (q, k, v, q_ptr, k_ptr, q_ptr.clone(), k_ptr.clone(), 2)
        if op == "set_attention":
            return args
        return (torch.randn_like(q), q, k, v, *ops.set_attention(*args), *args[3:])
    if op.startswith("segment_pool"):
        args = (x, logits, ptr, ptr.clone())
        if op == "segment_pool":
            return args
        out, lse = ops.segment_pool(*args)
        return (torch.randn_like(out), x, logits, out, lse, ptr, ptr.clone())
    if op.startswith("feed_forward"):
        args = feed_forward_case(5, 8)
        return args if op == "feed_forward" else (torch.randn_like(args[0]), *args)
    tensors, scale, plan = [torch.randn(2, 3, 2), torch.randn(5)], torch.rand(2) + 0.5, torch.tensor([[6, 2], [5, 1]])
    if op == "gather_chunks":
        return tensors, scale, plan, torch.float64
    values = ops.gather_chunks(tensors, scale, plan, torch.float32)
    return torch.randn_like(values), values, tensors, scale, plan


@pytest.mark.parametrize("op", SCHEMAS)
def test_opcheck(op: str) -> None:
    torch.library.opcheck(getattr(torch.ops.sne_fast, op).default, host_args(op))


def test_double_backward_is_refused_by_name() -> None:
    q, k, v, q_ptr, k_ptr = attention_case([2], [3], 8)
    out = F.set_attention(q.requires_grad_(), k, v, q_ptr, k_ptr, 2)
    with pytest.raises(RuntimeError, match="set_attention: double backward is not implemented"):
        torch.autograd.grad(out.sum(), q, create_graph=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_lose_one_rounding(dtype: torch.dtype) -> None:
    """Computed in float32 from the same rounded inputs, so that the error is that of rounding the result."""
    args = ChunkCase.make(TENSORS, width=32, dtype=dtype).args
    wide = tuple(t.double() if t.is_floating_point() else t for t in args)
    got, expected = F.chunk_encode(*args), F.chunk_encode(*wide)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-4)


def test_autocast_casts_once_and_grads_return_in_the_inputs_dtype() -> None:
    x, logits, ptr = pool_case([3, 2], 8, 2, torch.float32)
    x.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = F.segment_pool(x, logits, ptr)
        double = F.segment_pool(x.detach().double(), logits.double(), ptr)
    out.float().sum().backward()
    assert out.dtype == torch.bfloat16 and double.dtype == torch.float64
    assert x.grad is not None and x.grad.dtype == torch.float32


def test_the_backend_computes_outside_autocast() -> None:
    q, k, v, q_ptr, k_ptr = attention_case([5], [5], 32, torch.float32)
    plain = torch.ops.sne_fast.set_attention(q, k, v, q_ptr, k_ptr, q_ptr, k_ptr, 4)[0]
    with torch.autocast("cpu", torch.bfloat16):
        inside = torch.ops.sne_fast.set_attention(q, k, v, q_ptr, k_ptr, q_ptr, k_ptr, 4)[0]
    assert torch.equal(plain, inside)


def broken(change: dict[str, Tensor]) -> dict[str, Tensor]:
    names = [
        "values",
        "chunk_ptr",
        "tensor_ptr",
        "row_code",
        "element_code",
        "logit",
        "basis",
        "w_qkv",
        "b_qkv",
        "w_o",
        "b_o",
        "norm",
        "pool_query",
    ]
    return {**dict(zip(names, ChunkCase.make(TENSORS, 8, 2, 5, dtype=torch.float32).args, strict=True)), **change}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"values": torch.zeros(22).int()}, "chunk_encode: values must be a tensor of float16, bfloat16, float32 or"),
        ({"basis": torch.zeros(3, 8, dtype=torch.float64)}, "basis must have the dtype and device of values"),
        ({"w_o": torch.zeros(3, 8, 8)}, "w_o must have shape (4, h, h) with T = 4, H = 2, h = 8, got float32"),
        ({"row_code": torch.zeros(3, 8)}, "row_code must have shape (T, h) with T = 4"),
        ({"norm": torch.zeros(2, 4, 8)}, "norm must have shape (4, 4, h), or (0, 4, h) for no layer norm"),
        ({"pool_query": torch.zeros(3, 8)}, "logit must have shape (2, H)"),
        ({"chunk_ptr": torch.tensor([0, 5], dtype=torch.int32)}, "chunk_ptr must be int64 of shape (S+1,)"),
        ({"chunk_ptr": pointer([5, 5, 3, 1, 2, 1, 4])}, "chunk_ptr must start at 0, never decrease and end at"),
        ({"chunk_ptr": pointer([5, 5, 3, 0, 3, 1, 5])}, "chunk_ptr must hold chunks of 1 to c = 5 values"),
        ({"chunk_ptr": pointer([9, 1, 3, 1, 2, 1, 5])}, "chunk_ptr must hold chunks of 1 to c = 5 values"),
        ({"tensor_ptr": pointer([3, 1, 2, 2])}, "tensor_ptr must start at 0"),
    ],
)  # fmt: skip
def test_chunk_encode_errors(change: dict[str, Tensor], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        F.chunk_encode(**broken(change))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"num_heads": 3}, "SNE: num_heads must divide hidden_dim 64, got 3"),
        ({"num_inducing": 0}, "SNE: num_inducing must be an integer of at least 1, got 0"),
        ({"num_inducing": "a", "set_attention": "isab"}, "SNE: num_inducing must be an integer"),
        ({"hidden_dim": 0}, "SNE: hidden_dim must be an integer of at least 1, got 0"),
        ({"chunking": "rows"}, "SNE: chunking must be one of 'flat', 'neuron', 'kernel', got 'rows'"),
        ({"scale": None}, "SNE: scale must be one of 'tensor', 'none', got None"),
        ({"set_attention": "full"}, "SNE: set_attention must be one of 'sab', 'isab', got 'full'"),
    ],
)
def test_encoder_argument_errors(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        sne_fast.SNE(**arguments)


def test_encoder_refuses_batches_of_another_kind() -> None:
    encoder = sne_fast.SNE(hidden_dim=32)
    network = [torch.nn.Linear(4, 3)]
    with pytest.raises(ValueError, match=r"SNE: batch must be cut with chunk_size 32 .*, got 16; use encoder.pack"):
        encoder(sne_fast.pack(network, 16))
    with pytest.raises(ValueError, match=r"SNE: batch must be cut with chunking 'flat' .*, got 'neuron'"):
        encoder(sne_fast.pack(network, chunking="neuron"))
    with pytest.raises(
        ValueError, match=r"SNE: batch must have the encoder's dtype torch.float32 .* got torch.float64"
    ):
        encoder(sne_fast.pack(network, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"SNE: batch must have the encoder's dtype .* device cpu, got .* on meta"):
        encoder(sne_fast.pack(network).to("meta"))


def test_set_attention_errors() -> None:
    q, k, v, q_ptr, k_ptr = attention_case([2, 3], [4, 1], 8)
    with pytest.raises(ValueError, match="num_heads must be an integer that divides the width h = 8, got 3"):
        F.set_attention(q, k, v, q_ptr, k_ptr, 3)
    with pytest.raises(ValueError, match=r"k must have shape \(rows_k, h\) with h = 8"):
        F.set_attention(q, k[:, :4], v, q_ptr, k_ptr, 2)
    with pytest.raises(ValueError, match="v must have shape that of k"):
        F.set_attention(q, k, v[:3], q_ptr, k_ptr, 2)
    with pytest.raises(ValueError, match="k_ptr must have as many sets as q_ptr, got 1 and 2"):
        F.set_attention(q, k, v, q_ptr, pointer([5]), 2)
    with pytest.raises(ValueError, match="q_ptr_host must be a CPU copy of q_ptr"):
        F.set_attention(q, k, v, q_ptr, k_ptr, 2, q_ptr_host=pointer([5]))
    with pytest.raises(TypeError, match="k must have the dtype and device of q"):
        F.set_attention(q, k.float(), v, q_ptr, k_ptr, 2)


def test_segment_pool_errors() -> None:
    x, logits, ptr = pool_case([2, 3], 8, 3)
    with pytest.raises(ValueError, match=r"logits must have shape \(rows, A\) with rows = 5"):
        F.segment_pool(x, logits[:4], ptr)
    with pytest.raises(TypeError, match="ptr must be int64 of shape"):
        F.segment_pool(x, logits, ptr.float())


def test_gather_chunks_errors() -> None:
    ones, plan = torch.ones(1), torch.tensor([[2, 3]])
    with pytest.raises(ValueError, match=r"tensors\[0\] must be floating with plan\[0\] = 2 x 3 elements"):
        F.gather_chunks([torch.ones(5)], ones, plan, torch.float32)
    with pytest.raises(TypeError, match=r"scale must be float32 or float64 of shape \(T,\) = \(1,\)"):
        F.gather_chunks([torch.ones(6)], torch.ones(2), plan, torch.float32)
    with pytest.raises(TypeError, match="plan must be int64"):
        F.gather_chunks([torch.ones(6)], ones, plan.int(), torch.float32)
    with pytest.raises(TypeError, match=r"tensors\[0\] must be a tensor, got float"):
        F.gather_chunks([1.0], ones, plan, torch.float32)
    with pytest.raises(ValueError, match=r"with plan\[0\] = -2 x -3 elements"):
        F.gather_chunks([torch.ones(6)], ones, -plan, torch.float32)
    with pytest.raises(TypeError, match="dtype must be one of"):
        F.gather_chunks([torch.ones(6)], ones, plan, torch.int64)

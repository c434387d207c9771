"""The ops as they are called: opcheck, double backward, autocast, error messages."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

import sne_fast
from helpers.op_cases import (
    ChunkCase,
    attention_case,
    block_case,
    feed_forward_case,
    pointer,
    pool_block_case,
    pool_case,
)
from sne_fast import functional as F
from sne_fast.ops import functional
from sne_fast.ops.schema import CHUNK_PARAMETERS, SCHEMAS

TENSORS = [[5, 5, 3], [1], [2, 1], [5]]


@pytest.fixture(autouse=True)
def _reference():
    with sne_fast.use_backend("reference"):
        yield


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
    if op.startswith("set_block"):
        q, k, q_ptr, k_ptr, *parameters = block_case([2, 3], [4, 1])
        args = (q, k, q_ptr, k_ptr, q_ptr.clone(), k_ptr.clone(), *parameters, 2)
        return args if op == "set_block" else (torch.randn(5, 8, dtype=torch.float64), *args)
    if op.startswith("pool_block"):
        x, ptr, *parameters = pool_block_case([2, 0, 3], 8, 2)
        args = (x, ptr, ptr.clone(), *parameters)
        return args if op == "pool_block" else (torch.randn(3, 8, dtype=torch.float64), *args)
    if op.startswith("add_codes"):
        x, _, ptr = pool_case([2, 0, 3], 8, 2)
        g = torch.Generator().manual_seed(0)
        codes = [torch.randn(s, generator=g, dtype=torch.float64) for s in ((3, 8), (3, 8), (3,), (8,), ())]
        return x, ptr, ptr.clone(), *codes[:2], codes[2].exp(), *codes[3:]
    if op == "tensor_statistics":
        dims = torch.tensor([[3, 2, 2, 4, 3, 1], [5, 0, 1, 4, 3, 0]])
        start = torch.tensor([0, 12, 17])
        return torch.randn(17), start, torch.rand(2) + 0.5, dims, start.clone()
    if op == "gather_stored":
        buffers, table = [torch.randn(5), torch.randn(14)], torch.tensor([[1, 8, 0, 6, 2], [0, 0, 0, 5, 1]])
        return buffers, table, torch.rand(2) + 0.5, 17, torch.float64
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
    names = ("values", "chunk_ptr", "tensor_ptr", *CHUNK_PARAMETERS)
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
    with pytest.raises(ValueError, match=r"SNE: batch must be packed with chunk_size=32 .*, got 16; use encoder.pack"):
        encoder(sne_fast.pack(network, 16))
    with pytest.raises(ValueError, match=r"SNE: batch must be packed with chunking='flat' .*, got 'neuron'"):
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


def test_gather_stored_errors() -> None:
    buffers, table, scale, values, dtype = host_args("gather_stored")
    for backend in ("reference", "cpu"):
        with sne_fast.use_backend(backend):
            call = functional.gather_stored
            for row in (
                [2, 0, 0, 5, 1],
                [0, 4, 0, 5, 1],
                [0, 2, 0, 2, 1],
                [0, 0, 4, 5, 1],
                [0, 0, 0, 1 << 62, 4],
                [0, -4, 0, 5, 1],
            ):
                with pytest.raises(ValueError, match=r"table must have .* inside the 2 buffers, got .* in row 1"):
                    call(buffers, torch.tensor([table[0].tolist(), row]), scale, values, dtype)
            with pytest.raises(ValueError, match="num_values must be 17 by table, got 16"):
                call(buffers, table, scale, 16, dtype)
            with pytest.raises(TypeError, match=r"buffers\[1\] must be a contiguous tensor on the CPU"):
                call([buffers[0], torch.randn(4, 7).t()], table, scale, values, dtype)
            with pytest.raises(TypeError, match=r"table must be int64 of shape \(T, 5\)"):
                call(buffers, table[:, :4], scale, values, dtype)
            with pytest.raises(TypeError, match=r"scale must be float32 or float64 of shape \(T,\) = \(2,\)"):
                call(buffers, table, scale[:1], values, dtype)
            with pytest.raises(TypeError, match="dtype must be one of"):
                call(buffers, table, scale, values, torch.int8)


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


@pytest.mark.parametrize(
    "place, change, message",
    [
        (0, torch.zeros(5), r"x must have shape \(rows, h\)"),
        (3, torch.zeros(2, 8, dtype=torch.float64), r"level must have shape \(S, h\) = \(3, 8\)"),
        (4, torch.zeros(2, 8, dtype=torch.float64), "table must have a row for each place of a set, 3"),
        (5, torch.zeros(4, dtype=torch.float64), r"scale must have shape \(S,\) = \(3,\)"),
        (7, torch.zeros(1, dtype=torch.float64), r"gain must have shape \(\)"),
    ],
)
def test_errors_of_add_codes(place: int, change: torch.Tensor, message: str) -> None:
    args = list(host_args("add_codes"))
    args[place] = change
    with pytest.raises(ValueError, match=f"add_codes: {message}"):
        functional.add_codes(*args)


@pytest.mark.parametrize(
    "place, change, message",
    [
        (0, torch.zeros(5), r"x must have shape \(rows, h\)"),
        (3, torch.zeros(3, 8, dtype=torch.float64), "logits must have a row for each of H heads, a divisor of h = 8"),
        (4, torch.zeros(7, dtype=torch.float64), r"query must have shape \(h,\) with h = 8"),
        (5, torch.zeros(2, 8, 4, dtype=torch.float64), r"w_v must have shape \(H, h/H, h\) = \(2, 4, 8\)"),
        (9, torch.zeros(2, 8, dtype=torch.float64), r"norm must have shape \(4, h\), or \(0, h\) for no layer norm"),
    ],
)
def test_errors_of_pool_block(place: int, change: torch.Tensor, message: str) -> None:
    args = list(host_args("pool_block"))
    args[place] = change.to(args[0].dtype)
    with pytest.raises(ValueError, match=f"pool_block: {message}"):
        functional.pool_block(args[0], args[1], *args[3:], ptr_host=args[2])

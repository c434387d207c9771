"""The backends for a GPU, Triton's and CUDA's: parity, synchronisation, CUDA graphs, streams, compile, autocast."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

import sne_fast
from helpers.errors import loses_at_most_twice, relative_error
from helpers.op_cases import (
    GRADED,
    ChunkCase,
    attention_case,
    block_case,
    feed_forward_case,
    pool_block_case,
    pool_case,
    products,
)
from sne_fast.ops import dispatch, found_backends, functional, selftest
from sne_fast.ops.schema import OPTIONAL_OPS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

GPU = torch.device("cuda")
DOUBLE, SINGLE, HALF, BRAIN = torch.float64, torch.float32, torch.float16, torch.bfloat16
# dtype, float32 products, largest relative error of results, of gradients.
PRECISIONS = [
    pytest.param(SINGLE, "highest", 1e-5, 1e-4, id="float32"),
    pytest.param(SINGLE, "high", 1e-2, 5e-2, id="tf32"),
    pytest.param(HALF, "highest", 1e-2, 5e-2, id="float16"),
    pytest.param(BRAIN, "highest", 5e-2, 0.2, id="bfloat16"),
]
LENGTHS = {"ragged": ([3, 0, 17, 1, 133, 70], [2, 3, 17, 0, 140, 70]), "few queries": ([32, 1, 5], [5000, 0, 900]),
           "few keys": ([5000, 0, 900], [32, 1, 5]), "long": ([700], [700]), "none": ([], [])}  # fmt: skip


@contextmanager
def no_host_synchronisation() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


# -------------------------------------------------------------------------------------------------- calls of the ops


class Call:
    """A public function with inputs in ``dtype`` on the GPU, and the same in float64 for the reference."""

    def __init__(self, function: Callable[..., Tensor], inputs: list[Tensor], dtype: torch.dtype) -> None:
        self.function, self.inputs = function, [t.to(GPU, dtype) for t in inputs]

    def results(self, inputs: list[Tensor] | None = None) -> list[Tensor]:
        leaves = [t.detach().requires_grad_() for t in (self.inputs if inputs is None else inputs)]
        out = self.function(*leaves)
        g = torch.Generator(GPU).manual_seed(0)
        grad = torch.randn(out.shape, generator=g, device=GPU).to(self.inputs[0].dtype).to(out.dtype)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad)]

    def exact(self) -> list[Tensor]:
        with sne_fast.use_backend("reference"):
            return self.results([t.double() for t in self.inputs])


def attention(lengths: tuple[list[int], list[int]], dtype: torch.dtype, h: int = 64, heads: int = 4) -> Call:
    *rows, q_host, k_host = attention_case(*lengths, h)
    q_ptr, k_ptr = q_host.to(GPU), k_host.to(GPU)

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return functional.set_attention(q, k, v, q_ptr, k_ptr, heads, q_ptr_host=q_host, k_ptr_host=k_host)

    return Call(function, rows, dtype)


def pooling(lengths: list[int], dtype: torch.dtype, h: int = 64, queries: int = 4) -> Call:
    x, logits, host = pool_case(lengths, h, queries)
    ptr = host.to(GPU)
    return Call(lambda x, logits: functional.segment_pool(x, logits, ptr, ptr_host=host), [x, logits], dtype)


def gathering(dtype: torch.dtype) -> Call:
    plan = torch.tensor([[640, 9], [3000, 1], [0, 3], [48, 49], [1, 70]])
    tensors = [torch.randn(r, k, generator=torch.Generator().manual_seed(r)) for r, k in plan.tolist()]
    scale = torch.rand(len(tensors), device=GPU) + 0.5

    def function(*tensors: Tensor) -> Tensor:
        return functional.gather_chunks(list(tensors), scale, plan, tensors[0].dtype)

    return Call(function, tensors, dtype)


def encoding(dtype: torch.dtype, h: int = 64, heads: int = 4) -> Call:
    case = ChunkCase.make([[32] * 20 + [7], [1, 5], [32, 20, 2]], h, heads, 32)
    for place in (0, 6, 7):  # values, basis, w_qkv: a saturated softmax leaves half types nothing of a gradient
        case.args[place].mul_(0.5)
    hosts = [case.args[1], case.args[2]]
    pointers = [t.to(GPU) for t in hosts]

    def function(values: Tensor, *parameters: Tensor) -> Tensor:
        return functional.chunk_encode(
            values, *pointers, *parameters, chunk_ptr_host=hosts[0], tensor_ptr_host=hosts[1]
        )

    return Call(function, [case.args[place] for place in GRADED], dtype)


def feeding_forward(dtype: torch.dtype, rows: int = 60001, h: int = 64, layer_norm: bool = True) -> Call:
    """Make rows for several tiles per program, without arguments of the ReLU near 0, where rounding would decide."""
    q, attended, w, b, norm = feed_forward_case(rows, h, layer_norm)
    return Call(functional.feed_forward, [q, attended, 0.3 * w, 3 * b.sign(), norm], dtype)


def blocking(lengths: list[int], dtype: torch.dtype, h: int = 64, heads: int = 4) -> Call:
    """Make a block whose rows attend to each other; as above, nothing is near 0 where the ReLU bends."""
    x, _, host, _, *parameters = block_case(lengths, lengths, (h, h, h))
    *projections, w_o, b_o, norm = parameters
    ptr = host.to(GPU)

    def function(x: Tensor, *parameters: Tensor) -> Tensor:
        return functional.set_block(x, x, ptr, ptr, *parameters, heads, q_ptr_host=host, k_ptr_host=host)

    return Call(function, [x, *projections, 0.3 * w_o, 3 * b_o.sign(), norm], dtype)


def pooling_whole(lengths: list[int], dtype: torch.dtype, h: int = 64, heads: int = 4) -> Call:
    x, host, *parameters = pool_block_case(lengths, h, heads)
    *projections, w_o, b_o, norm = parameters
    ptr = host.to(GPU)

    def function(x: Tensor, *parameters: Tensor) -> Tensor:
        return functional.pool_block(x, ptr, *parameters, ptr_host=host)

    return Call(function, [x, *projections, 0.3 * w_o, 3 * b_o.sign(), norm], dtype)


def adding_codes(dtype: torch.dtype, h: int = 64) -> Call:
    g, host = torch.Generator().manual_seed(0), torch.tensor([0, 3, 3, 700])
    level, table, scale = (torch.randn(s, generator=g).to(GPU, dtype) for s in ((3, h), (700, h), (3,)))
    ptr, inputs = host.to(GPU), [torch.randn(s, generator=g) for s in ((700, h), (h,), ())]

    def function(x: Tensor, magnitude: Tensor, gain: Tensor) -> Tensor:
        codes = (t.to(x.dtype) for t in (level, table, scale.exp()))
        return functional.add_codes(x, ptr, host, *codes, magnitude, gain)

    return Call(function, inputs, dtype)


CALLS = {
    "set_attention": lambda dtype: attention(LENGTHS["ragged"], dtype),
    "set_attention, few queries": lambda dtype: attention(LENGTHS["few queries"], dtype),
    "segment_pool": lambda dtype: pooling([1, 700, 0, 30, 9000], dtype),
    "gather_chunks": gathering,
    "chunk_encode": encoding,
    "feed_forward": feeding_forward,
    "set_block": lambda dtype: blocking([3, 0, 40, 1, 133, *[20] * 500], dtype),
    "set_block, long": lambda dtype: blocking([700, 3], dtype),
    "pool_block": lambda dtype: pooling_whole([3, 0, 40, 1, 133, *[20] * 500], dtype),
    "pool_block, long": lambda dtype: pooling_whole([1700, 3], dtype),
    "add_codes": adding_codes,
}


def call_of(backend: str, name: str, dtype: torch.dtype) -> Call:
    op = name.partition(",")[0]
    if op in OPTIONAL_OPS and op not in found_backends.FUSIONS[backend]:
        pytest.skip(f"{backend} does not fuse {name}")
    return CALLS[name](dtype)


def compare(call: Call, forward: float, backward: float) -> None:
    for place, (got, want) in enumerate(zip(call.results(), call.exact(), strict=True)):
        assert got.shape == want.shape and got.isfinite().all(), place
        # Gradients that nearly cancel are judged by the size of what they are the difference of.
        small = float(want.norm()) < 1e-3 * want.numel() ** 0.5
        assert small or relative_error(got, want) < (backward if place else forward), place


@pytest.mark.parametrize(("dtype", "precision", "forward", "backward"), PRECISIONS)
@pytest.mark.parametrize("name", CALLS)
def test_parity(gpu_backend, name: str, dtype, precision, forward, backward) -> None:
    with products(precision):
        compare(call_of(gpu_backend, name, dtype), forward, backward)


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
@pytest.mark.parametrize(("h", "heads"), [(32, 4), (64, 1), (64, 8), (128, 2), (256, 4), (256, 32)])
@pytest.mark.parametrize("dtype", [SINGLE, BRAIN], ids=str)
def test_attention_widths_and_heads(gpu_backend, lengths, h: int, heads: int, dtype: torch.dtype) -> None:
    compare(attention(lengths, dtype, h, heads), *((1e-5, 1e-4) if dtype == SINGLE else (5e-2, 0.2)))


@pytest.mark.parametrize("lengths", [[1] * 500, [20] * 300, [100] * 50, [200000, 3], [0, 0], []], ids=str)
@pytest.mark.parametrize(("h", "queries"), [(64, 4), (48, 3), (256, 32), (512, 1)])
@pytest.mark.parametrize("dtype", [SINGLE, BRAIN], ids=str)
def test_pooling_lengths(gpu_backend, lengths: list[int], h: int, queries: int, dtype: torch.dtype) -> None:
    compare(pooling(lengths, dtype, h, queries), *((1e-5, 1e-4) if dtype == SINGLE else (5e-2, 0.2)))


@pytest.mark.parametrize("rows", [0, 1, 333, 70000])
@pytest.mark.parametrize("h", [32, 64, 128, 256])
@pytest.mark.parametrize("layer_norm", [True, False])
@pytest.mark.parametrize("dtype", [SINGLE, BRAIN], ids=str)
def test_feed_forward_rows_and_widths(gpu_backend, rows: int, h: int, layer_norm: bool, dtype: torch.dtype) -> None:
    call_of(gpu_backend, "feed_forward", dtype)
    call = feeding_forward(dtype, rows, h, layer_norm)
    compare(call, *((1e-5, 1e-4) if dtype == SINGLE else (5e-2, 0.2)))
    q, attended, *parameters = call.inputs
    if rows > 1:
        one = q[:1].expand_as(attended)
        got, want = (functional.feed_forward(t, attended, *parameters) for t in (one, one.contiguous()))
        assert torch.equal(got, want)


def test_blocks_call_it_where_the_backend_has_it(gpu_backend, monkeypatch: pytest.MonkeyPatch) -> None:
    fused: list[int] = []
    function = functional.feed_forward
    monkeypatch.setattr(functional, "feed_forward", lambda *args: (fused.append(1), function(*args))[1])
    model, batch = model_and_batch()
    z = model.encoder(batch).detach()
    assert len(fused) == (10 if gpu_backend == "triton" else 0)
    with sne_fast.use_backend("reference"):
        assert relative_error(z, model.encoder(batch).detach()) < 1e-2


@pytest.mark.parametrize("dtype", [HALF, BRAIN], ids=str)
def test_attention_loses_at_most_twice_what_pytorch_does(gpu_backend, dtype: torch.dtype) -> None:
    call = attention(LENGTHS["long"], dtype)

    def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (4, -1)).transpose(0, 1) for t in (q, k, v))
        return (torch.softmax(q @ k.mT / math.sqrt(64), dim=-1) @ v).transpose(0, 1).flatten(1)

    usual, want, got = Call(eager, call.inputs, dtype).results(), call.exact(), call.results()
    for a, b, exact in zip(got, usual, want, strict=True):
        loses_at_most_twice(a, b, exact)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("dtype", [SINGLE, BRAIN], ids=str)
def test_the_same_bits_twice(gpu_backend, name: str, dtype: torch.dtype) -> None:
    call = call_of(gpu_backend, name, dtype)
    assert all(torch.equal(a, b) for a, b in zip(call.results(), call.results(), strict=True))


# ------------------------------------------------------------------------------- synchronisation, graphs, streams


@pytest.mark.parametrize("name", CALLS)
def test_no_host_synchronisation(gpu_backend, name: str) -> None:
    call = call_of(gpu_backend, name, BRAIN)
    want = call.results()  # compiles
    with no_host_synchronisation():
        got = call.results()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def model_and_batch() -> tuple[torch.nn.Module, sne_fast.WeightBatch]:
    torch.manual_seed(0)
    networks = [
        torch.nn.Sequential(torch.nn.Conv2d(1, 16, 3), torch.nn.Linear(32, 40), torch.nn.Linear(40, 10)),
        torch.nn.Sequential(torch.nn.Linear(20, 33), torch.nn.Linear(33, 1)),
    ]
    model = sne_fast.Predictor(sne_fast.SNE(hidden_dim=64), out_features=1).to(GPU)
    return model, model.encoder.pack(networks).detach().to(GPU)


def train_step(model: torch.nn.Module, batch: sne_fast.WeightBatch) -> Tensor:
    loss = model(batch).square().mean()
    loss.backward()
    return loss


def test_a_training_step_does_not_synchronise(gpu_backend) -> None:
    model, batch = model_and_batch()
    train_step(model, batch)
    with no_host_synchronisation():
        train_step(model, batch)


def test_cuda_graph_of_a_training_step(gpu_backend) -> None:
    model, batch = model_and_batch()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            model.zero_grad(set_to_none=True)
            train_step(model, batch)
    torch.cuda.current_stream().wait_stream(side)
    model.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = train_step(model, batch)
    captured = [p.grad for p in model.parameters()]
    for seed in (1, 2):
        g = torch.Generator(GPU).manual_seed(seed)
        batch.values.copy_(torch.randn(batch.values.shape, generator=g, device=GPU))
        graph.replay()
        torch.cuda.synchronize()
        other = copy.deepcopy(model)
        other.zero_grad(set_to_none=True)
        want = train_step(other, batch)
        torch.testing.assert_close(loss, want, rtol=1e-4, atol=1e-6)
        for got, parameter in zip(captured, other.parameters(), strict=True):
            assert (got is None) == (parameter.grad is None)
            if got is not None:
                # cuBLAS may choose another product inside a graph.
                torch.testing.assert_close(got, parameter.grad, rtol=1e-3, atol=1e-5)


def test_cuda_graph_of_gathering(gpu_backend) -> None:
    call = gathering(SINGLE)
    call.results()
    leaves = [t.clone().requires_grad_() for t in call.inputs]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            torch.autograd.grad(call.function(*leaves).square().sum(), leaves)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        values = call.function(*leaves)
        grads = torch.autograd.grad(values.square().sum(), leaves)
    with torch.no_grad():
        for leaf in leaves:
            leaf.mul_(3)
    graph.replay()
    torch.cuda.synchronize()
    with sne_fast.use_backend("reference"):
        want = call.function(*leaves)
        want_grads = torch.autograd.grad(want.square().sum(), leaves)
    torch.testing.assert_close(values, want)
    for a, b in zip(grads, want_grads, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", CALLS)
def test_several_streams(gpu_backend, name: str) -> None:
    call = call_of(gpu_backend, name, SINGLE)
    want = call.results()
    torch.cuda.synchronize()
    streams, got = [torch.cuda.Stream() for _ in range(3)], []
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            got.append(call.results())
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for results in got for a, b in zip(results, want, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_on_a_gpu_that_is_not_the_current_one(gpu_backend) -> None:
    x, logits, host = pool_case([5, 700], 64, 4, SINGLE)
    there = [t.to("cuda:1") for t in (x, logits, host)]
    got = functional.segment_pool(*there, ptr_host=host)
    with sne_fast.use_backend("reference"):
        torch.testing.assert_close(got.cpu(), functional.segment_pool(x, logits, host))


# ----------------------------------------------------------------------------------------------- compile and autocast


@pytest.mark.parametrize("name", [name for name in CALLS if name != "gather_chunks"])
def test_compiled_into_one_graph(gpu_backend, name: str) -> None:
    call = call_of(gpu_backend, name, SINGLE)
    compiled = Call(torch.compile(call.function, fullgraph=True), call.inputs, SINGLE)
    for got, want in zip(compiled.results(), call.results(), strict=True):
        torch.testing.assert_close(got, want)


def test_autocast(gpu_backend) -> None:
    model, batch = model_and_batch()
    with torch.autocast("cuda", BRAIN):
        z = model.encoder(batch)
    assert z.dtype == SINGLE and z.isfinite().all()
    assert relative_error(z.detach(), model.encoder(batch).detach()) < 0.1
    call = attention(LENGTHS["ragged"], SINGLE)
    with torch.autocast("cuda", HALF):
        out = call.function(*call.inputs)
    assert out.dtype == HALF and relative_error(out, call.exact()[0]) < 1e-2


# ----------------------------------------------------------------------------------------------- choice of the backend


def test_auto_tests_the_backend_and_takes_it(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setenv(selftest.CACHE_ENVIRONMENT_VARIABLE, str(tmp_path))
    monkeypatch.delenv(dispatch.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setattr(selftest, "_results", {})
    loaded = dict(found_backends.BACKENDS)
    taken: list[tuple[str, str]] = []

    def counted(name: str, op: str) -> Callable[..., object]:
        kernel = loaded[name].kernels[op]
        return lambda *args: (taken.append((name, op)), kernel(*args))[1]

    for name in ("triton", "cuda"):
        kernels = {op: counted(name, op) for op in loaded[name].kernels}
        monkeypatch.setitem(found_backends.BACKENDS, name, dataclasses.replace(loaded[name], kernels=kernels))
    with sne_fast.use_backend("auto"):
        for make in CALLS.values():
            make(BRAIN).results()
        assert not any(selftest._results.values()), selftest._results
        tested = len(taken)
        CALLS["segment_pool"](BRAIN).results()
    able = [name for name in ("triton", "cuda") if not loaded[name].unavailable()]
    assert able and [op for _, op in taken[tested:]] == ["segment_pool", "segment_pool_backward"]
    assert {name for name, _ in taken[tested:]} <= set(able)
    assert selftest.cache_file().exists()

"""The Triton backend behind the public functions, in the interpreter on CPU tensors."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

import sne_fast
from helpers.errors import relative_error
from helpers.op_cases import ChunkCase, attention_case, block_case, feed_forward_case, pool_case
from sne_fast import functional
from sne_fast.backends.triton.backend import BACKEND
from sne_fast.ops import selftest, selftest_cases
from sne_fast.ops.schema import OPTIONAL_OPS, REQUIRED_OPS

pytestmark = pytest.mark.build

DOUBLE, SINGLE = torch.float64, torch.float32


@pytest.fixture(autouse=True)
def by_name():
    with sne_fast.use_backend("triton"):
        yield


def attend(q, k, v):
    ptrs = torch.tensor([0, 3, 8]), torch.tensor([0, 20, 24])
    return functional.set_attention(q, k, v, *ptrs, 4)


def pool(x, logits):
    return functional.segment_pool(x, logits, torch.tensor([0, 3, 8]))


def gather(w, b, scale):
    plan = torch.tensor([[12, 9], [7, 1]])
    return functional.gather_chunks([w, b], scale, plan, torch.float32)


CALLS = {
    "set_attention": (attend, [(8, 32), (24, 32), (24, 32)]),
    "segment_pool": (pool, [(8, 48), (8, 3)]),
    "gather_chunks": (gather, [(4, 3, 3, 3), (7,), (2,)]),
    "feed_forward": (functional.feed_forward, [(40, 32), (40, 32), (32, 32), (32,), (4, 32)]),
    "feed_forward, plain": (functional.feed_forward, [(40, 32), (40, 32), (32, 32), (32,), (0, 32)]),
}


def results(name: str, call=None) -> list[torch.Tensor]:
    function, shapes = CALLS[name]
    g = torch.Generator().manual_seed(0)
    leaves = [torch.randn(s, generator=g).add(3 if s == (2,) else 0).requires_grad_() for s in shapes]
    out = (call or function)(*leaves)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), leaves)]


@pytest.mark.parametrize("name", CALLS)
def test_functions_and_autograd(name: str) -> None:
    got = results(name)
    with sne_fast.use_backend("reference"):
        want = results(name)
    assert all(relative_error(a, b) < 1e-5 for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("name", ["set_attention", "segment_pool", "feed_forward"])
def test_compiled_into_one_graph(name: str) -> None:
    compiled = torch.compile(CALLS[name][0], fullgraph=True, backend="aot_eager")
    got, want = results(name, compiled), results(name)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_opcheck() -> None:
    (q, k, v, q_ptr, k_ptr), ops = attention_case([2, 3], [4, 1], 32, SINGLE), torch.ops.sne_fast
    x, logits, ptr = pool_case([2, 3], 16, 3, SINGLE)
    out, lse = ops.set_attention(q, k, v, q_ptr, k_ptr, q_ptr, k_ptr, 4)
    pooled, pooled_lse = ops.segment_pool(x, logits, ptr, ptr)
    scale, plan = torch.ones(2), torch.tensor([[5, 16], [5, 3]])
    values = ops.gather_chunks([x, logits], scale, plan, SINGLE)
    rows = feed_forward_case(5, 32, dtype=SINGLE)
    q, _, q_ptr, _, *parameters = block_case([2, 3], [2, 3], (32, 32, 32), dtype=SINGLE)
    block = (q, None, *[q_ptr.clone() for _ in range(4)], *parameters, 4)
    pooling, codes = (
        selftest_cases.example(selftest_cases.Variant(name, SINGLE, 32, 4, True), torch.device("cpu"))
        for name in ("pool_block", "add_codes")
    )
    pooling = (pooling[0][:5], q_ptr, q_ptr.clone(), *pooling[3:])
    codes = (codes[0], codes[1], codes[2].clone(), *codes[3:])
    for op, args in (
        (ops.set_attention, (q, k, v, q_ptr, k_ptr, q_ptr, k_ptr, 4)),
        (ops.set_attention_backward, (out, q, k, v, out, lse, q_ptr, k_ptr, q_ptr, k_ptr, 4)),
        (ops.segment_pool, (x, logits, ptr, ptr)),
        (ops.segment_pool_backward, (pooled, x, logits, pooled, pooled_lse, ptr, ptr)),
        (ops.feed_forward, rows),
        (ops.feed_forward_backward, (rows[1], *rows)),
        (ops.set_block, block),
        (ops.set_block_backward, (block[0], *block)),
        (ops.pool_block, pooling),
        (ops.pool_block_backward, (pooling[0][:2], *pooling)),
        (ops.add_codes, codes),
        (ops.add_codes_backward, codes),
        (ops.gather_chunks, ([x, logits], scale, plan, SINGLE)),
        (ops.gather_chunks_backward, (values, values, [x, logits], scale, plan)),
    ):
        torch.library.opcheck(op, args)


def test_auto_never_takes_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    def taken(*args):
        raise AssertionError("auto took the interpreter")

    for op in BACKEND.kernels:
        monkeypatch.setitem(BACKEND.kernels, op, taken)
    with sne_fast.use_backend("auto"):
        results("segment_pool")


def test_why_not() -> None:
    x, logits, ptr = pool_case([2, 3], 24, 3, SINGLE)
    with pytest.raises(
        sne_fast.BackendError, match=r"segment_pool: backend 'triton' .* width must be a multiple of 16"
    ):
        functional.segment_pool(x, logits, ptr)
    x, logits, ptr = pool_case([2, 3], 16, 3, torch.bfloat16)
    with pytest.raises(sne_fast.BackendError, match="interpreter does not compute bfloat16"):
        functional.segment_pool(x, logits, ptr)


@pytest.mark.parametrize("op", [*REQUIRED_OPS, *(op for op in OPTIONAL_OPS if op in BACKEND.kernels)])
def test_the_backend_passes_its_self_test(op: str) -> None:
    case = selftest_cases.Variant(op, SINGLE, 32, 4, layer_norm=True)
    assert selftest.check(BACKEND, case, torch.device("cpu")) == []


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record the calls of the ops for which modules have ordinary torch operations."""
    calls: list[str] = []
    for op in (name for forward in OPTIONAL_OPS for name in (forward, f"{forward}_backward")):
        kernel = BACKEND.kernels[op]
        monkeypatch.setitem(
            BACKEND.kernels, op, lambda *args, op=op, kernel=kernel: (calls.append(op), kernel(*args))[1]
        )
    return calls


@pytest.mark.parametrize(("attention", "layer_norm"), [("isab", True), ("sab", False)])
def test_the_encoder_and_its_gradients(fused: list[str], attention: str, layer_norm: bool) -> None:
    torch.manual_seed(0)
    networks = [torch.nn.Sequential(torch.nn.Conv2d(1, 3, 3), torch.nn.Linear(7, 5)), torch.nn.Linear(3, 1)]
    # Norms at their eps make single precision meaningless for tiny networks, hence float64.
    encoder = sne_fast.SNE(
        hidden_dim=32, num_heads=4, chunk_size=16, layer_norm=layer_norm, set_attention=attention, num_inducing=4
    ).double()
    results = {}
    for name in ("triton", "reference"):
        encoder.zero_grad()
        with sne_fast.use_backend(name):
            z = encoder(encoder.pack(networks, dtype=DOUBLE))
            z.square().sum().backward()
        results[name] = [z.detach(), *(p.grad for p in encoder.parameters())]
    for a, b in zip(results["triton"], results["reference"], strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-8 * float(b.abs().max()) + 1e-12)
    # The scales of tensors have gradients here, so that ordinary operations add their codes.
    forward = {"set_block": 3 * (4 if attention == "isab" else 2), "pool_block": 4, "add_codes": 1}
    assert Counter(fused) == forward | {f"{op}_backward": count for op, count in forward.items()}


def test_autocast(fused: list[str]) -> None:
    torch.manual_seed(0)
    encoder = sne_fast.SNE(hidden_dim=32, num_heads=4, chunk_size=16)
    batch = encoder.pack([torch.nn.Linear(30, 20), torch.nn.Linear(20, 7)]).detach()
    with torch.autocast("cpu", torch.float16):
        half = encoder(batch)
    full = encoder(batch)
    half.sum().backward()
    assert half.dtype == SINGLE and all(p.grad is not None and p.grad.isfinite().all() for p in encoder.parameters())
    assert 0 < relative_error(half.detach(), full.detach()) < 0.03 and len(fused) == 3 * 12


def test_widths_without_kernels_are_ordinary_torch(fused: list[str]) -> None:
    """PMA's own op takes any multiple of 16."""
    pool = sne_fast.PMA(48, num_heads=3, num_seeds=1, layer_norm=True)
    assert pool(torch.randn(5, 48), torch.tensor([0, 2, 5])).shape == (2, 1, 48) and fused == []
    with pytest.raises(
        sne_fast.BackendError, match=r"feed_forward: backend 'triton' .* width must be one of 32, 64, 12"
    ):
        functional.feed_forward(*feed_forward_case(3, 48, dtype=SINGLE))


def test_chunk_encode_through_the_public_function() -> None:
    case = ChunkCase.make([[5, 16], [1]], width=32, heads=4, chunk_size=16, dtype=SINGLE)
    got = functional.chunk_encode(*case.args)
    with sne_fast.use_backend("reference"):
        assert relative_error(got, functional.chunk_encode(*case.args)) < 1e-5

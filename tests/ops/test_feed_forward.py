"""feed_forward on the reference backend, and when a MAB calls it rather than ordinary torch operations."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as nnf
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import sne_fast
from helpers.op_cases import feed_forward_case
from sne_fast import MAB, PMA
from sne_fast.ops import dispatch, functional, reference

DOUBLE, SINGLE = torch.float64, torch.float32
NAMES = ("q", "attended", "w_o", "b_o", "norm")


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(dispatch.ENVIRONMENT_VARIABLE, raising=False)


def with_gradients(function, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    out = function(*leaves)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=DOUBLE).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad, materialize_grads=True)]


def plain(q: Tensor, attended: Tensor, w: Tensor, b: Tensor, norm: Tensor) -> Tensor:
    """Compute the formula by torch's own functions."""
    h, o = (q.shape[1],), q + attended
    o = nnf.layer_norm(o, h, norm[0], norm[1]) if len(norm) else o
    o = o + torch.relu(o @ w.T + b)
    return nnf.layer_norm(o, h, norm[2], norm[3]) if len(norm) else o


# --------------------------------------------------------------------------------------------------------- reference


@pytest.mark.parametrize("layer_norm", [True, False])
@pytest.mark.parametrize("rows", [0, 1, 23])
def test_the_reference_is_the_formula(rows: int, layer_norm: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = feed_forward_case(rows, 12, layer_norm)
    want = with_gradients(plain, inputs)
    for elements in (reference.TILE_ELEMENTS, 60):  # all rows at once, or five
        monkeypatch.setattr(reference, "TILE_ELEMENTS", elements)
        got = with_gradients(functional.feed_forward, inputs)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layer_norm", [True, False])
def test_it_is_what_the_modules_of_a_block_compute(layer_norm: bool) -> None:
    mab = MAB(16, 16, 16, num_heads=2, layer_norm=layer_norm).double()
    q, attended = feed_forward_case(9, 16)[:2]
    norm = mab.norm_parameters()
    norm = torch.zeros(0, 16, dtype=DOUBLE) if norm is None else norm
    got = functional.feed_forward(q, attended, mab.fc_o.weight, mab.fc_o.bias, norm)
    torch.testing.assert_close(got, mab.feed_forward(q + attended), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layer_norm", [True, False])
@pytest.mark.parametrize("one_query", [True, False])
def test_gradcheck(layer_norm: bool, one_query: bool) -> None:
    inputs = [t.detach().requires_grad_(t.numel() > 0) for t in feed_forward_case(4, 6, layer_norm)]
    if one_query:
        inputs[0] = inputs[0].detach()[:1].requires_grad_()
    assert torch.autograd.gradcheck(lambda q, *rest: functional.feed_forward(q.expand(4, 6), *rest), inputs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_types_lose_one_rounding(dtype: torch.dtype) -> None:
    inputs = feed_forward_case(50, 32, dtype=dtype)
    got, want = functional.feed_forward(*inputs), functional.feed_forward(*(t.double() for t in inputs))
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), want, rtol=torch.finfo(dtype).eps, atol=1e-5)


def test_autocast_casts_once_and_gradients_return_in_the_inputs_dtype() -> None:
    leaves = [t.requires_grad_() for t in feed_forward_case(3, 32, dtype=SINGLE)]
    with torch.autocast("cpu", torch.bfloat16):
        out = functional.feed_forward(*leaves)
    out.float().sum().backward()
    assert out.dtype == torch.bfloat16 and all(t.grad is not None and t.grad.dtype == SINGLE for t in leaves)


def test_double_backward_is_refused_by_name() -> None:
    inputs = feed_forward_case(3, 8)
    out = functional.feed_forward(inputs[0].requires_grad_(), *inputs[1:])
    with pytest.raises(RuntimeError, match="feed_forward: double backward is not implemented"):
        torch.autograd.grad(out.sum(), inputs[0], create_graph=True)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"q": torch.zeros(5, 8).int()}, "feed_forward: q must be a tensor of float16, bfloat16, float32 or float64"),
        ({"q": torch.zeros(5)}, "feed_forward: q must have shape (rows, h), got float32 (5,)"),
        ({"attended": torch.zeros(4, 8)}, "attended must have shape that of q, (5, 8), got float32 (4, 8) on cpu"),
        ({"attended": torch.zeros(5, 8).double()}, "attended must have the dtype and device of q"),
        ({"w_o": torch.zeros(8, 4)}, "w_o must have shape (h, h) with h = 8, got float32 (8, 4)"),
        ({"b_o": torch.zeros(1, 8)}, "b_o must have shape (h,) with h = 8"),
        ({"norm": torch.zeros(2, 8)}, "norm must have shape (4, h), or (0, h) for no layer norm, with h = 8"),
        ({"norm": torch.zeros(0, 4)}, "norm must have shape (4, h), or (0, h) for no layer norm, with h = 8"),
        ({"norm": torch.tensor(1.0)}, "norm must have shape (4, h), or (0, h) for no layer norm, with h = 8"),
    ],
)  # fmt: skip
def test_errors(change: dict[str, Tensor], message: str) -> None:
    inputs = dict(zip(NAMES, feed_forward_case(5, 8, dtype=SINGLE), strict=True))
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        functional.feed_forward(**{**inputs, **change})


# --------------------------------------------------------------------------------------------- when a block calls it


def test_which_backends_fuse() -> None:
    said = {}
    for name in ("auto", *dispatch.backend_names()):
        with sne_fast.use_backend(name):
            said[name] = [dispatch.fuses("feed_forward", torch.device(kind)) for kind in ("cpu", "cuda")]
    no = [False, False]
    # Triton by name on a CPU is its interpreter: without it, the attention before has refused already.
    assert said == {"auto": [False, True], "reference": no, "cpu": no, "cuda": no, "triton": [True, True]}


@pytest.mark.parametrize("backend", ["cpu", "cuda"])
def test_a_backend_without_it_says_so(backend: str) -> None:
    reasons = {r.op: r.reasons for r in sne_fast.explain() if r.backend == backend}
    assert "does not implement feed_forward; modules do it by ordinary torch operations" in reasons["feed_forward"]
    with sne_fast.use_backend(backend), pytest.raises(sne_fast.BackendError, match="does not implement feed_forward"):
        functional.feed_forward(*feed_forward_case(3, 32))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of q, of every call of the op."""
    made: list[tuple[int, ...]] = []
    function = functional.feed_forward

    def counted(*args: Tensor) -> Tensor:
        made.append(tuple(args[0].shape))
        return function(*args)

    monkeypatch.setattr(functional, "feed_forward", counted)
    return made


@pytest.mark.parametrize("layer_norm", [True, False])
def test_on_a_cpu_a_block_is_ordinary_torch(calls, layer_norm: bool) -> None:
    mab, ptr = MAB(8, 8, 32, num_heads=4, layer_norm=layer_norm), torch.tensor([0, 3, 7])
    x = torch.randn(7, 8)
    query = mab.fc_q(x)
    with sne_fast.use_backend("reference"):
        attended = functional.set_attention(query, mab.fc_k(x), mab.fc_v(x), ptr, ptr, 4)
        assert torch.equal(mab(x, x, ptr, ptr), mab.feed_forward(query + attended))
    pool = PMA(32, num_heads=4, num_seeds=2, layer_norm=layer_norm)
    for name in ("auto", "reference"):
        with sne_fast.use_backend(name):
            mab(x, x, ptr, ptr)
            pool(torch.randn(7, 32), ptr)
    assert calls == []


def test_on_a_gpu_the_op_is_for_what_kernels_take() -> None:
    """Shapes only: there need not be a GPU."""
    with FakeTensorMode():
        takes = [
            functional.fuses_feed_forward(torch.empty(3, width, dtype=dtype, device="cuda"))
            for width, dtype in ((64, SINGLE), (256, torch.bfloat16), (32, torch.float16), (48, SINGLE), (64, DOUBLE))
        ]
        with sne_fast.use_backend("cuda"):
            assert not functional.fuses_feed_forward(torch.empty(3, 64, device="cuda"))
    assert takes == [True, True, True, False, False]


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks call the op as they do there, and none that fuses more; the reference runs it."""
    fuses, gpu = dispatch.fuses, torch.device("cuda")
    monkeypatch.setattr(dispatch, "fuses", lambda op, device: op == "feed_forward" and fuses(op, gpu))


def encoded(encoder: torch.nn.Module, batch: sne_fast.WeightBatch, run=None) -> list[Tensor]:
    """Return z and the gradients of every parameter."""
    encoder.zero_grad()
    z = (encoder if run is None else run)(batch)
    z.square().sum().backward()
    return [z.detach(), *(p.grad for p in encoder.parameters())]


def model_and_batch(dtype: torch.dtype = DOUBLE, **config) -> tuple[torch.nn.Module, sne_fast.WeightBatch]:
    torch.manual_seed(0)
    networks = [torch.nn.Sequential(torch.nn.Conv2d(1, 3, 3), torch.nn.Linear(7, 5)), torch.nn.Linear(3, 1)]
    encoder = sne_fast.SNE(hidden_dim=32, num_heads=4, chunk_size=16, num_inducing=4, **config).to(dtype)
    return encoder, encoder.pack(networks, dtype=dtype).detach()


@pytest.mark.parametrize("config", [{}, {"layer_norm": False}, {"set_attention": "isab"}], ids=str)
def test_the_whole_encoder_with_it(calls, as_on_a_gpu, config: dict[str, object]) -> None:
    encoder, batch = model_and_batch(**config)
    got = encoded(encoder, batch)
    assert len(calls) == (4 + 3 * 4 if config.get("set_attention") else 4 + 3 * 2)  # pools, and MABs
    assert all(t is not None for t in got), "DDP wants a gradient for every parameter"
    with sne_fast.use_backend("reference"):
        want = encoded(encoder, batch)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8 * float(b.abs().max()) + 1e-12)


def test_compiled_into_one_graph_that_follows_the_choice_of_backend(calls, as_on_a_gpu) -> None:
    mab = MAB(8, 8, 32, num_heads=4, layer_norm=True).double()
    x, ptr = torch.randn(7, 8, dtype=DOUBLE), torch.tensor([0, 3, 7])
    compiled = torch.compile(mab, fullgraph=True, backend="aot_eager")
    for name in ("auto", "reference", "auto"):
        with sne_fast.use_backend(name):
            got, want = (encoded(mab, x, lambda x, run=run: run(x, x, ptr, ptr, ptr, ptr)) for run in (compiled, mab))
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    assert calls.count((7, 32)) >= 3


@pytest.mark.slow
def test_the_encoder_compiled_with_it(as_on_a_gpu) -> None:
    encoder, batch = model_and_batch()
    got, want = (
        encoded(encoder, batch, torch.compile(encoder, fullgraph=True, backend="aot_eager")),
        encoded(encoder, batch),
    )
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8 * float(b.abs().max()) + 1e-12)


def test_autocast_with_it(calls, as_on_a_gpu) -> None:
    encoder, batch = model_and_batch(SINGLE)
    full = encoder(batch)
    with torch.autocast("cpu", torch.bfloat16):
        got = encoded(encoder, batch)
    assert got[0].dtype == SINGLE and not torch.equal(got[0], full) and len(calls) == 20
    assert all(t.dtype == SINGLE and t.isfinite().all() for t in got)
    torch.testing.assert_close(got[0], full, rtol=0.05, atol=0.05 * float(full.detach().abs().max()))


def test_sets_of_several_seeds(calls, as_on_a_gpu) -> None:
    pool, x, ptr = PMA(32, num_heads=4, num_seeds=3).double(), torch.randn(7, 32, dtype=DOUBLE), torch.tensor([0, 3, 7])
    got = encoded(pool, x, lambda x: pool(x, ptr))
    assert calls == [(6, 32)]
    with sne_fast.use_backend("reference"):
        want = encoded(pool, x, lambda x: pool(x, ptr))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    assert pool(x[:0], ptr[:1]).shape == (0, 3, 32)


def test_a_backward_under_another_backend_is_the_references() -> None:
    """Forward saves the same for all backends, and a backend without the op has no backward of it."""
    generator = torch.Generator().manual_seed(0)
    args = [torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
            for shape in ((5, 32), (5, 32), (32, 32), (32,), (4, 32))]  # fmt: skip
    expected = torch.autograd.grad(functional.feed_forward(*args).square().sum(), args)
    out = functional.feed_forward(*args)
    with sne_fast.use_backend("cpu"):
        found = torch.autograd.grad(out.square().sum(), args)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)

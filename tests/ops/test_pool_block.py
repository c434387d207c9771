"""pool_block and add_codes: the reference against the modules, and when the encoder calls them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import sne_fast
from helpers.op_cases import pool_block_case
from sne_fast import PMA
from sne_fast.ops import dispatch, functional

DOUBLE, SINGLE = torch.float64, torch.float32


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the fused ops that modules call as on a GPU, where the reference runs them."""
    made: list[str] = []
    gpu = {"feed_forward", "set_block", "pool_block", "add_codes"}
    monkeypatch.setattr(dispatch, "fuses", lambda op, device: op in gpu and dispatch._choice_of_the_process() == "auto")
    for name in ("pool_block", "add_codes"):
        function = getattr(functional, name)
        monkeypatch.setattr(functional, name, lambda *a, f=function, n=name, **k: (made.append(n), f(*a, **k))[1])
    return made


def encoded(encoder: torch.nn.Module, batch: object, run=None) -> list[Tensor]:
    """Return z and the gradients of every parameter."""
    encoder.zero_grad()
    z = (encoder if run is None else run)(batch)
    z.square().sum().backward()
    return [z.detach(), *(p.grad for p in encoder.parameters())]


def model_and_batch(dtype: torch.dtype = DOUBLE, **config) -> tuple[sne_fast.SNE, sne_fast.WeightBatch]:
    torch.manual_seed(0)
    networks = [torch.nn.Sequential(torch.nn.Conv2d(1, 3, 3), torch.nn.Linear(7, 5)), torch.nn.Linear(3, 1)]
    encoder = sne_fast.SNE(hidden_dim=32, num_heads=4, chunk_size=16, num_inducing=4, **config).to(dtype)
    with torch.no_grad():
        for parameter in encoder.parameters():  # biases, which start at 0
            parameter.add_(0.05 * torch.randn_like(parameter))
    return encoder, encoder.pack(networks, dtype=dtype).detach()


def all_close(got: list[Tensor], want: list[Tensor], tolerance: float) -> None:
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * float(b.abs().max()) + 1e-12)


@pytest.mark.parametrize(
    "config", [{}, {"layer_norm": False, "chunk_order": False}, {"set_attention": "isab", "scale": "none"}], ids=str
)
def test_the_whole_encoder(calls: list[str], config: dict[str, object]) -> None:
    encoder, batch = model_and_batch(**config)
    got = encoded(encoder, batch)
    assert sorted(calls) == ["add_codes"] * 2 + ["pool_block"] * 4
    assert all(t is not None for t in got), "DDP wants a gradient for every parameter"
    with sne_fast.use_backend("reference"):
        all_close(got, encoded(encoder, batch), 1e-8)


def test_autocast(calls: list[str]) -> None:
    encoder, batch = model_and_batch(SINGLE)
    with torch.autocast("cpu", torch.bfloat16):
        got = encoded(encoder, batch)
    want = encoder(batch).detach()
    assert len(calls) == 12 and all(t.dtype == SINGLE and t.isfinite().all() for t in got)
    torch.testing.assert_close(got[0], want, rtol=0.1, atol=0.1 * float(want.abs().max()))


def test_compiled_into_one_graph(calls: list[str]) -> None:
    pool, ptr = PMA(32, num_heads=4, num_seeds=1, layer_norm=True).double(), torch.tensor([0, 3, 3, 7])
    x = torch.randn(7, 32, dtype=DOUBLE)
    compiled = torch.compile(pool, fullgraph=True, backend="aot_eager")
    got, want = (encoded(pool, x, lambda x, run=run: run(x, ptr, ptr)) for run in (compiled, pool))
    all_close(got, want, 1e-10)
    assert set(calls) == {"pool_block"}


@pytest.mark.slow
def test_the_encoder_compiled(calls: list[str]) -> None:
    encoder, batch = model_and_batch()
    compiled = torch.compile(encoder, fullgraph=True, backend="aot_eager")
    all_close(encoded(encoder, batch, compiled), encoded(encoder, batch), 1e-8)


def test_torch_func_follows_the_codes(calls: list[str]) -> None:
    encoder, batch = model_and_batch()
    state = dict(encoder.named_parameters())

    def loss(gain: Tensor) -> Tensor:
        return torch.func.functional_call(encoder, {**state, "tensor_encoder.code_gain": gain}, (batch,)).square().sum()

    gain = encoder.tensor_encoder.code_gain
    (want,) = torch.autograd.grad(loss(gain), gain)
    calls.clear()
    torch.testing.assert_close(torch.func.grad(loss)(gain.detach()), want)
    assert calls.count("pool_block") == 4 and "add_codes" not in calls


def test_several_seeds_and_other_widths_go_part_by_part(calls: list[str]) -> None:
    ptr = torch.tensor([0, 3, 7])
    PMA(32, num_heads=4, num_seeds=2)(torch.randn(7, 32), ptr)
    PMA(48, num_heads=4, num_seeds=1)(torch.randn(7, 48), ptr)
    assert calls == []
    PMA(32, num_heads=4, num_seeds=1)(torch.randn(7, 32), ptr)
    assert calls == ["pool_block"]


def test_gradcheck_and_no_double_backward() -> None:
    x, ptr, *parameters = (t.requires_grad_() if t.is_floating_point() else t for t in pool_block_case([2, 0, 3], 8, 2))
    assert torch.autograd.gradcheck(lambda x, *p: functional.pool_block(x, ptr, *p), (x, *parameters))
    out = functional.pool_block(x, ptr, *parameters)
    with pytest.raises(RuntimeError, match="pool_block: double backward is not implemented"):
        torch.autograd.grad(out.sum(), x, create_graph=True)

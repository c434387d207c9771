"""Without gradients large inputs go through in runs: the same numbers, for any size of run, and only there."""

from __future__ import annotations

import pytest
import torch

import sne_fast
from helpers.networks import make
from sne_fast import SNE
from sne_fast.benchmark.networks import randomise_, zoo_cnn
from sne_fast.nn import bounded_memory

NETWORKS = ("mlp", "cnn", "oddities")


def networks() -> list[torch.nn.Module]:
    return [randomise_(zoo_cnn(), seed=n) for n in range(3)] + [make(name) for name in NETWORKS]


@pytest.mark.parametrize("set_attention", ["sab", "isab"])
@pytest.mark.parametrize("chunk_order", [True, False])
@pytest.mark.parametrize(("rows", "weights"), [(7, 10**9), (64, 6000), (10**9, 1), (200, 12_000)])
def test_runs_change_nothing(
    set_attention: str, chunk_order: bool, rows: int, weights: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    encoder = SNE(hidden_dim=32, set_attention=set_attention, num_inducing=4, chunk_order=chunk_order).double()
    randomise_(encoder, seed=1)
    batch = encoder.pack(networks(), dtype=torch.float64).detach()
    expected = encoder(batch).detach()  # with gradients: all at once
    monkeypatch.setattr(bounded_memory, "ROWS", {"cpu": rows})
    monkeypatch.setattr(bounded_memory, "WEIGHTS", {"cpu": weights})
    values = batch.values.clone()
    with torch.no_grad():
        torch.testing.assert_close(encoder(batch), expected, rtol=1e-11, atol=1e-12)
    assert torch.equal(batch.values, values)


def test_runs_of_networks_hold_the_budget_and_every_network_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded_memory, "WEIGHTS", {"cpu": 10})
    starts = torch.tensor([0, 4, 9, 30, 31, 41, 41, 45])
    with torch.no_grad():
        runs = bounded_memory.network_runs(starts, torch.device("cpu"))
    assert [(r.start, r.stop) for r in runs] == [(0, 2), (2, 3), (3, 4), (4, 6), (6, 7)]
    assert bounded_memory.network_runs(starts, torch.device("cpu")) == [slice(0, 7)]  # gradients are on here


def test_only_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded_memory, "ROWS", {"cpu": 7})
    monkeypatch.setattr(bounded_memory, "WEIGHTS", {"cpu": 10})
    encoder = SNE(hidden_dim=32)
    batch = encoder.pack(networks())
    calls: list[int] = []
    original = encoder.chunk_encoder.pooled_rows
    monkeypatch.setattr(encoder.chunk_encoder, "pooled_rows", lambda *a: calls.append(1) or original(*a))
    encoder(batch).sum().backward()
    assert len(calls) == 1 and encoder.chunk_encoder.code_gain.grad is not None
    with torch.no_grad():
        encoder(batch)
    assert len(calls) > 10


@pytest.mark.parametrize("layer_norm", [True, False])
def test_dtype_under_autocast_is_that_of_a_single_run(layer_norm: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    x, ptr = torch.randn(40, 32), torch.tensor([0, 30, 40])
    block = sne_fast.SAB(32, 32, 4, layer_norm)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        expected = block(x, ptr)
        monkeypatch.setattr(bounded_memory, "ROWS", {"cpu": 16})
        found = block(x, ptr)
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)

"""Captured steps on a GPU: the training of steps that are not captured, in fewer launches."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import sne_fast
from sne_fast.training import FitSettings, capture, fit

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def trained(count: int, settings: FitSettings) -> tuple[sne_fast.Predictor, list[float]]:
    torch.manual_seed(0)
    networks = [nn.Sequential(nn.Linear(4 + k % 3, 9), nn.Tanh(), nn.Linear(9, 2 + k % 2)) for k in range(count)]
    goals = torch.rand(count, 1)
    predictor = sne_fast.Predictor(sne_fast.SNE(hidden_dim=32), hidden_features=(16,)).cuda()
    history = fit(predictor, predictor.pack(networks), goals, settings)
    return predictor, history.train_loss


@pytest.mark.parametrize("amp", [None, "bfloat16", "float16"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_captured_steps_train_as_others(
    gpu_backend: str, amp: str | None, accumulate: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded = []
    record = capture.CudaGraphs.record
    monkeypatch.setattr(capture.CudaGraphs, "record", lambda *args: (recorded.append(args), record(*args))[1])
    options = {"epochs": 4, "batch_weights": 500, "accumulate": accumulate, "lr": 1e-3, "buckets": True, "amp": amp}
    _, want = trained(48, FitSettings(**options))
    assert not recorded
    _, got = trained(48, FitSettings(**options, capture=True))
    assert len(recorded) > 1
    assert got == pytest.approx(want, rel=1e-3 if amp is None else 2e-2)


def test_a_batch_of_many_tensors_is_captured(gpu_backend: str) -> None:
    """The gradient of an embedding sorts more than 3,072 indices, which must not wait for the device."""
    options = {"epochs": 3, "batch_weights": 1_000_000, "lr": 1e-3, "buckets": True}
    _, want = trained(1000, FitSettings(**options))
    _, got = trained(1000, FitSettings(**options, capture=True))
    assert got == pytest.approx(want, rel=1e-3)

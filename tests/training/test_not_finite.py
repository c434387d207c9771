"""A loss, gradient or state that is not finite ends a training before it does harm, and says where."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.small_trainings import SETTINGS, goals, make, packed, same
from sne_fast import Predictor
from sne_fast.training import FitSettings, fit, loop, steps


def spoil_gradient(predictor: Predictor, call: int, value: float = math.nan) -> None:
    """Make the gradient of a weight of the head not finite in the call-th backward pass, from 1."""
    calls = 0

    def hook(gradient: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return torch.full_like(gradient, value) if calls == call else gradient

    predictor.head[0].weight.register_hook(hook)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_in_the_last_step_spares_the_predictor(value: float, tmp_path: Path) -> None:
    path, predictor = tmp_path / "fit.pt", make()
    spoil_gradient(predictor, 6, value)
    message = r"gradients became not finite \(that of head.0.weight\) in epoch 1; .* batch 3 of 3 in it, network \d"
    with pytest.raises(ValueError, match=message):
        fit(predictor, packed(), goals(), SETTINGS, checkpoint=path)
    assert all(bool(t.isfinite().all()) for t in predictor.state_dict().values())
    resumed, whole = make(), make()
    fit(resumed, packed(), goals(), SETTINGS, checkpoint=path)
    fit(whole, packed(), goals(), SETTINGS)
    assert same(resumed, whole), "the checkpoint is that of the epoch before"


def test_the_networks_of_a_loss_that_is_not_finite_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    predictor = make()
    losses = predictor.losses

    def spoilt(outputs: Tensor, wanted: Tensor) -> Tensor:
        found = losses(outputs, wanted)
        return torch.where(wanted[:, 0] == predictor.normalise(goals())[3, 0], math.inf, found)

    monkeypatch.setattr(predictor, "losses", spoilt)
    with pytest.raises(
        ValueError, match=r"the loss became inf in epoch 0; .*, network 3 \('state_dict'\); no step was"
    ):
        fit(predictor, packed(), goals(), SETTINGS)


def test_a_parameter_that_is_not_finite_from_the_start_is_named() -> None:
    predictor = make()
    with torch.no_grad():
        predictor.encoder.type_embedding.weight[60] = math.nan  # of a type that no network has
    with pytest.raises(ValueError, match=r"predictor must have finite parameters, encoder.type_embedding.weight has"):
        fit(predictor, packed(), goals(), SETTINGS)


def test_a_state_that_is_not_finite_is_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, predictor = tmp_path / "fit.pt", make()

    def adamw(module: Any, lr: float, weight_decay: float) -> torch.optim.Optimizer:
        optimiser = original(module, lr, weight_decay)
        optimiser.register_step_post_hook(lambda *_: predictor.head[0].bias.data.fill_(math.inf))
        return optimiser

    original: Callable[..., torch.optim.Optimizer] = steps.adamw
    monkeypatch.setattr(steps, "adamw", adamw)
    with pytest.raises(ValueError, match=r"predictor.head.0.bias is not finite after epoch 0; lower lr"):
        fit(predictor, packed(), goals(), FitSettings(epochs=1), checkpoint=path)
    assert not path.exists()


def losses_of(monkeypatch: pytest.MonkeyPatch, values: list[float], **settings: Any) -> Any:
    given = iter(values)
    monkeypatch.setattr(loop, "mean_loss", lambda *_: next(given))
    options = {"epochs": len(values), "batch_weights": 80, **settings}
    return fit(make(), packed(), goals(), FitSettings(**options), validation=(packed(), goals()))


@pytest.mark.parametrize(
    ("losses", "kept"),
    [
        ([math.nan, 3.0, 2.0, 4.0], 2),
        ([3.0, math.nan, 2.0, math.nan], 2),
        ([1.0, math.nan, math.inf, 2.0], 0),
        ([math.inf, math.nan], 1),
    ],
)
def test_a_validation_loss_that_is_not_finite_is_the_worst(
    losses: list[float], kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert losses_of(monkeypatch, losses).kept == kept


def test_patience_counts_epochs_without_a_finite_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(losses_of(monkeypatch, [math.nan] * 6, patience=2).train_loss) == 3
    assert len(losses_of(monkeypatch, [math.nan, 5.0, math.nan, math.nan, 1.0, 1.0], patience=2).train_loss) == 4


def test_a_checkpoint_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "fit.pt"
    fit(make(), packed(), goals(), SETTINGS, checkpoint=path)
    state = torch.load(path, weights_only=True)
    state["optimiser"]["state"][0]["exp_avg"].view(-1)[0] = math.nan
    torch.save(state, path)
    with pytest.raises(ValueError, match=r"not finite, in optimiser.state.0.exp_avg; remove it to train anew"):
        fit(make(), packed(), goals(), SETTINGS, checkpoint=path)


def test_float16_skips_steps_whose_gradients_overflow_but_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = FitSettings(epochs=10, batch_weights=80, amp="float16")
    plain, skipping = make(), make()
    spoil_gradient(skipping, 25, math.inf)
    assert len(fit(skipping, packed(), goals(), settings).train_loss) == 10
    fit(plain, packed(), goals(), settings)
    assert all(bool(t.isfinite().all()) for t in skipping.state_dict().values()) and not same(plain, skipping)
    monkeypatch.setattr(steps, "MOST_SKIPPED", 4)
    endless = make()
    endless.head[0].weight.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(ValueError, match=r"gradients became not finite .* in 5 steps in a row, the last in epoch 1;"):
        fit(endless, packed(), goals(), settings)

"""Padding to buckets, and captured steps: with a recorder in place of CUDA graphs, which does the work again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sne_fast
from helpers import small_trainings
from helpers.recorded_graphs import Recorder
from sne_fast import WeightBatch
from sne_fast.data.buckets import bucket_of, buffers_like, copy_into, padded_rows, rounded_up
from sne_fast.nn.preparation import Preparation
from sne_fast.training import (
    Contrastive,
    ContrastiveModel,
    FitSettings,
    Views,
    capture,
    fit,
    fit_contrastive,
    loop,
    pad_to_bucket,
    steps,
)
from sne_fast.training.networks import PackedNetworks
from sne_fast.training.planning import Plan


def networks(count: int = 24) -> list[nn.Module]:
    """Return multilayer perceptrons of several sizes."""
    torch.manual_seed(0)
    return [nn.Sequential(nn.Linear(4 + k % 3, 9), nn.Tanh(), nn.Linear(9, 2 + k % 2)) for k in range(count)]


def goals(count: int = 24) -> Tensor:
    return torch.rand(count, 1, generator=torch.Generator().manual_seed(1))


def encoder(**options: Any) -> sne_fast.SNE:
    torch.manual_seed(0)
    found = sne_fast.SNE(**{"hidden_dim": 32, "chunk_size": 32, **options})
    for parameter in found.parameters():
        nn.init.normal_(parameter, std=0.3)
    return found


def test_sizes_are_rounded_up_to_a_few() -> None:
    assert [rounded_up(n, 2) for n in (0, 1, 2, 3, 5, 9, 12, 13, 16, 17)] == [0, 1, 2, 3, 6, 12, 12, 16, 16, 24]
    found = {rounded_up(n, 8) for n in range(1024, 4097)}
    assert found == {*range(1024, 2048, 128), *range(2048, 4097, 256)}


@pytest.mark.parametrize("chunk_size", [1, 2, 16, 32, 64])
def test_there_is_room_for_padding_between_all_levels(chunk_size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        rows = [int(torch.randint(1, 40, (), generator=generator))]
        for most in (4, 3, 30, chunk_size):
            rows.append(rows[-1] * int(torch.randint(1, most + 1, (), generator=generator)))
        before = tuple(rows[::-1])
        weights, chunks, tensors, layers, networks = (
            a - b for a, b in zip(padded_rows(before, chunk_size), before, strict=True)
        )
        assert 1 <= networks <= layers <= tensors < chunks <= weights <= chunk_size * chunks or chunk_size == 1
        assert chunks <= 64 * tensors


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"set_attention": "isab"},
        {"chunk_size": 16},
        {"statistics": "relative"},
        {"statistics": "tensor", "chunks": False},
    ],
    ids=str,
)
def test_padding_changes_neither_encodings_nor_gradients(options: dict[str, Any]) -> None:
    model = encoder(**options).double()
    with torch.no_grad():
        batch = model.pack(networks())
    padded = pad_to_bucket(batch)
    WeightBatch(**padded.fields())  # checks all of them
    assert len(padded) > len(batch) and padded.num_weights == rounded_up(padded.num_weights, 8)
    factor = torch.rand(len(batch), model.out_features, dtype=torch.float64)
    found = []
    for one in (batch, padded):
        z = model(one)[: len(batch)]
        found.append((z.detach(), torch.autograd.grad((z * factor).sum(), list(model.parameters()), allow_unused=True)))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-11, atol=1e-11)
    for got, want in zip(found[1][1], found[0][1], strict=True):
        assert (got is None) == (want is None)
        if got is not None and want is not None:
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)


def test_buffers_take_other_batches_of_their_bucket() -> None:
    model = encoder(statistics="relative")
    batch = model.pack(networks())
    one, other = pad_to_bucket(batch[:14]), pad_to_bucket(batch[1:14])
    assert bucket_of(one) == bucket_of(other) != bucket_of(pad_to_bucket(batch[:3]))
    buffers = buffers_like(one)
    with torch.no_grad():
        first = model(buffers)
        copy_into(buffers, other)
        assert torch.equal(model(buffers), model(other)) and not torch.equal(first, model(other))
    assert bucket_of(buffers) == bucket_of(one)
    with pytest.raises(ValueError, match="must be padded; use pad_to_bucket"):
        bucket_of(batch)


CALL = ("augment", "checkpoint", "checkpoint_seconds", "on_batch", "targets")
SETTINGS: dict[str, Any] = {"epochs": 3, "batch_weights": 500, "warmup": 0.3, "clip": 0.1, "lr": 2**-7}


def trained(monkeypatch: pytest.MonkeyPatch | None = None, **options: Any) -> Any:
    """Return the predictor, its history and the recorder of captured steps."""
    made = {name: options.pop(name) for name in ("loss", "preparation", "out_features") if name in options}
    call = {name: options.pop(name) for name in CALL if name in options}
    predictor = small_trainings.make(32, **made)
    if "amp" not in options:  # AdamW makes rounding of gradients that are almost 0 visible
        predictor = predictor.double()
    recorder = Recorder()
    if monkeypatch is not None:
        monkeypatch.setattr(loop, "check_capture", lambda *_: recorder)
        options["capture"] = True
    settings = FitSettings(**{**SETTINGS, **options})
    history = fit(predictor, predictor.pack(networks()), call.pop("targets", goals()), settings, **call)
    return predictor, history, recorder


def alike(one: nn.Module, other: nn.Module) -> None:
    for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


JITTER = Preparation(units="canonical", jitter=0.2)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"accumulate": 2},
        {"preparation": JITTER, "invariance": 0.5, "ranking": 0.5},
        {"amp": "float16"},
        {"loss": "cross_entropy", "out_features": 3, "targets": torch.arange(24) % 3},
    ],
    ids=lambda options: ",".join(options) or "plain",
)
def test_captured_steps_train_as_padded_ones_and_those_as_plain_ones(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "warm_cosine", lambda step, *_: 2.0 ** -(step % 3))  # which float32 holds exactly
    padded, padded_history, _ = trained(buckets=True, **options)
    captured, history, recorder = trained(monkeypatch, buckets=True, **options)
    assert small_trainings.same(captured, padded)
    assert history.train_loss == pytest.approx(padded_history.train_loss, rel=1e-6)
    if "amp" not in options:
        plain, plain_history, _ = trained(**options)
        alike(padded, plain)
        assert padded_history.train_loss == pytest.approx(plain_history.train_loss, rel=1e-7)
    assert recorder.recorded > 1 and recorder.replayed >= recorder.ran


def test_a_graph_is_recorded_for_each_bucket_that_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[capture.CapturedSteps] = []
    kept = capture.CapturedSteps.__init__

    def remember(self: capture.CapturedSteps, *args: Any) -> None:
        kept(self, *args, **({"most": 2} if made else {}))
        made.append(self)

    monkeypatch.setattr(capture.CapturedSteps, "__init__", remember)
    one, _, recorder = trained(monkeypatch, buckets=True, epochs=5)
    other, _, fewer = trained(monkeypatch, buckets=True, epochs=5)
    alike(one, other)
    first, second = made
    seen = len(first.parts) + len(first.seen)
    assert recorder.recorded == len(first.parts) + 1 > 3, "and one of the update"
    assert recorder.ran == seen + 1, "what is new runs as usual"
    assert len(second.parts) == 2 and fewer.recorded > recorder.recorded, "dropped ones are recorded again"
    plan = Plan(PackedNetworks(one.pack(networks()), goals()), FitSettings(**{**SETTINGS, "epochs": 5}))
    assert recorder.replayed + recorder.ran == 2 * plan.steps


def test_a_captured_training_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "warm_cosine", lambda step, *_: 2.0 ** -(step % 3))
    whole, history, _ = trained(monkeypatch, buckets=True)

    class Stop(Exception):
        pass

    def stop(done: int) -> None:
        if len(times := [*times_called, done]) == 7:
            raise Stop
        times_called[:] = times

    times_called: list[int] = []
    path = {"checkpoint": tmp_path / "fit.pt", "checkpoint_seconds": 0.0}
    with pytest.raises(Stop):
        trained(monkeypatch, buckets=True, on_batch=stop, **path)
    resumed, resumed_history, _ = trained(buckets=True, **path)  # and not captured
    alike(resumed, whole)
    assert resumed_history.train_loss == pytest.approx(history.train_loss, rel=1e-6)


@pytest.mark.parametrize("amp", [None, "float16"])
def test_a_captured_loss_that_is_not_finite_ends_the_training(
    amp: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    predictor = small_trainings.make(32)
    monkeypatch.setattr(loop, "check_capture", lambda *_: Recorder())
    states = []
    batch = predictor.pack(networks())
    broken = batch.with_fields(values=batch.values.clone())
    broken.values[-1] = torch.inf
    settings = FitSettings(**{**SETTINGS, "buckets": True, "capture": True, "amp": amp, "epochs": 1})
    with pytest.raises(ValueError, match=r"the loss became (nan|inf) in epoch 0; lower lr .*, network 23.*; no step"):
        fit(predictor, broken, goals(), settings, on_batch=lambda _: states.append(predictor.head[0].weight.clone()))
    assert all(bool(t.isfinite().all()) for t in predictor.state_dict().values())
    assert len(states) > 2 and torch.equal(states[-1], states[-2]) and not torch.equal(states[-1], states[0])
    assert torch.equal(states[-1], predictor.head[0].weight)


def test_what_cannot_be_captured_is_refused() -> None:
    predictor = small_trainings.make(32)
    batch = predictor.pack(networks())
    with pytest.raises(
        ValueError, match="FitSettings: capture replays steps whose sizes repeat; it needs buckets=True"
    ):
        FitSettings(capture=True)
    with pytest.raises(TypeError, match="FitSettings: buckets must be True or False, got 2"):
        FitSettings(buckets=2)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="the predictor is on cpu; move it to a CUDA device, or use"):
        fit(predictor, batch, goals(), FitSettings(buckets=True, capture=True))
    model = ContrastiveModel(encoder())
    with pytest.raises(ValueError, match="fit_contrastive: buckets must be False"):
        fit_contrastive(model, batch, Contrastive(model, Views()), FitSettings(buckets=True))


def test_the_learning_rate_of_captured_steps_follows_the_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, history, _ = trained()
    captured, captured_history, _ = trained(monkeypatch, buckets=True)
    alike(captured, plain)
    assert captured_history.train_loss == pytest.approx(history.train_loss, rel=1e-6)

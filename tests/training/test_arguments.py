"""`fit` takes targets as tensors, arrays and lists, and names an argument that does not fit."""

from __future__ import annotations

import os
import re
import resource
import stat
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from helpers.small_trainings import SETTINGS, goals, make, networks, packed, same
from sne_fast import SNE, Predictor
from sne_fast.training import CsvLog, FitSettings, fit, predict


def test_targets_are_tensors_arrays_or_lists_of_the_same_numbers() -> None:
    expected = make()
    fit(expected, packed(), goals(), SETTINGS)
    column = goals()[:, 0]
    for targets in (goals().tolist(), column, column.tolist(), column.numpy(), tuple(column), list(goals()),
                    goals().requires_grad_()):  # fmt: skip
        found = make()
        fit(found, packed(), targets, SETTINGS)
        assert same(found, expected), type(targets)
    for targets in ([0, 1, 0, 1, 1, 0], np.array([0, 1, 0, 1, 1, 0], np.uint16), np.array([0, 1, 0, 1, 1, 0]) > 0):
        fit(make(), packed(), targets, SETTINGS)


def test_classes_are_integers_of_any_kind() -> None:
    expected = make(loss="cross_entropy", out_features=3)
    fit(expected, packed(), torch.tensor([0, 1, 2, 0, 1, 2]), SETTINGS)
    for targets in ([0, 1, 2, 0, 1, 2], np.array([0, 1, 2, 0, 1, 2], np.uint16), np.array([0, 1, 2, 0, 1, 2], np.int8)):
        found = make(loss="cross_entropy", out_features=3)
        fit(found, packed(), targets, SETTINGS)
        assert same(found, expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"predictor": SNE(hidden_dim=32)}, "TypeError: fit: predictor must be a sne_fast.Predictor, got SNE"),
        ({"predictor": make().to("meta")}, "ValueError: fit: predictor must lie on one device, got meta"),
        ({"predictor": make().requires_grad_(False)}, "ValueError: fit: predictor must have a parameter that requires"),
        ({"batch": networks()}, r"TypeError: fit: batch must be a WeightBatch, got list; use predictor.pack"),
        (
            {"batch": make(chunk_size=8).encoder.pack(networks())},
            "ValueError: fit: batch must be packed with chunk_",
        ),
        ({"targets": ["a"] * 6}, "TypeError: fit: targets must be a tensor, an array or a list of numbers, got list"),
        ({"targets": None}, "TypeError: fit: targets must be given with a WeightBatch, got None"),
        ({"targets": "targets"}, "TypeError: fit: targets must be a tensor, an array or a list of numbers, got 'targ"),
        (
            {"targets": [[1], [2, 3], [1], [1], [1], [1]]},
            "TypeError: fit: targets must be a tensor, an array or a list",
        ),
        ({"targets": 3.0}, r"(Type|Value)Error: fit: targets must"),
        (
            {"targets": goals().to(torch.complex64)},
            "TypeError: fit: targets must be real numbers in memory, got t",
        ),
        ({"targets": goals()[:4]}, r"ValueError: fit: targets must have one row per network \(6\), got 4"),
        ({"targets": goals().double() * 1e300}, "ValueError: fit: targets must fit torch.float32, got up to"),
        ({"targets": goals() * np.nan}, "ValueError: fit: targets do not fit the predictor: .* must be finite"),
        (
            {"targets": torch.zeros(6, 2)},
            r"ValueError: fit: targets do not .*must have shape \(n, 1\), got \(6, 2\)",
        ),
        (
            {"settings": 3},
            r"TypeError: fit: settings must be a FitSettings, got 3; 3 epochs are FitSettings\(ep",
        ),
        ({"settings": {"epochs": 3}}, "TypeError: fit: settings must be a FitSettings, got dict"),
        (
            {"validation": packed()},
            r"TypeError: .* must be a pair \(batch, targets\) or a NetworkStream, got WeightBatch",
        ),
        ({"validation": (packed(), goals(), 1)}, "TypeError: fit: validation must be a pair .*, got tuple of 3"),
        ({"validation": (networks(), goals())}, "TypeError: fit: validation networks must be a WeightBatch, got list"),
        ({"validation": (packed(), goals()[:3])}, "ValueError: fit: validation targets must have one row per network"),
        ({"validation": (packed(), goals() * np.inf)}, "ValueError: fit: validation targets do not fit .* be finite"),
        ({"augment": 0.1}, "TypeError: fit: augment must be callable, got 0.1"),
        ({"log": print}, r"TypeError: fit: log must have a method resume\(epochs\), as CsvLog has"),
        ({"on_epoch": "print"}, "TypeError: fit: on_epoch must be callable, got 'print'"),
        ({"checkpoint": 3}, "TypeError: fit: checkpoint must be the path of a file, got 3"),
        ({"checkpoint": "."}, "IsADirectoryError: fit: checkpoint '.' is a folder; give a file in it"),
    ],
)
def test_an_argument_that_does_not_fit_is_named(changes: dict[str, Any], message: str) -> None:
    call = {"predictor": make(), "batch": packed(), "targets": goals(), "settings": SETTINGS, **changes}
    with pytest.raises((TypeError, ValueError, OSError)) as raised:
        fit(**call)
    assert re.match(message, f"{type(raised.value).__name__}: {raised.value}"), raised.value


def test_predict_names_an_argument_that_does_not_fit() -> None:
    with pytest.raises(TypeError, match=r"predict: predictor must be a sne_fast.Predictor, got SNE"):
        predict(make().encoder, packed())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="predict: batch must be a WeightBatch, got list; use predictor"):
        predict(make(), networks())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"predict: batch must be packed with chunk_size 16 .* got 8"):
        predict(make(), packed(make(chunk_size=8)))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"batch_weights": 0}, ValueError, "predict: batch_weights must be at least 1, got 0"),
        ({"batch_weights": 1e5}, TypeError, "predict: batch_weights must be an integer, got 100000.0"),
        ({"batch_weights": "5"}, TypeError, "predict: batch_weights must be an integer, got '5'"),
        ({"settings": 5}, TypeError, "predict: settings must be a FitSettings, got 5"),
    ],
)
def test_predict_checks_its_limit_and_settings(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        predict(make(), packed(), **changes)


def test_no_networks_are_predicted_also_by_a_wrapped_encoder() -> None:
    wrapped = Predictor(torch.nn.DataParallel(make().encoder), hidden_features=(4,))
    values, z = predict(wrapped, packed()[0:0])
    assert values.shape == (0, 1) and z.shape == (0, 32)


def test_what_else_a_training_is_made_of_is_compared(tmp_path: Path) -> None:
    path = tmp_path / "fit.pt"
    fit(make(), packed(), goals(), SETTINGS, checkpoint=path, made_of={"drawn by": "seed 3"})
    fit(make(), packed(), goals(), SETTINGS, checkpoint=path, made_of={"drawn by": "seed 3"})
    for other in ({"drawn by": "seed 4"}, {}, None):
        with pytest.raises(
            ValueError, match=r"is of another training: .*(drawn by 'seed 3' then|no record of made of)"
        ):
            fit(make(), packed(), goals(), SETTINGS, checkpoint=path, made_of=other)


def test_float_targets_are_no_classes() -> None:
    with pytest.raises(ValueError, match="targets of the loss 'cross_entropy' must be integers"):
        fit(make(loss="cross_entropy", out_features=2), packed(), goals(), SETTINGS)


def test_modes_of_autograd_around_a_training() -> None:
    expected, found = make(), make()
    fit(expected, packed(), goals(), SETTINGS)
    with torch.no_grad():
        fit(found, packed(), goals(), SETTINGS)
    assert same(found, expected)
    with torch.inference_mode():
        batch = packed()
        with pytest.raises(ValueError, match=r"cannot train under torch.inference_mode"):
            fit(make(), batch, goals(), SETTINGS)
    with pytest.raises(ValueError, match=r"batch was packed under torch.inference_mode"):
        fit(make(), batch, goals(), SETTINGS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 2.5}, "TypeError: FitSettings: epochs must be an integer, got 2.5"),
        ({"epochs": "5"}, "TypeError: FitSettings: epochs must be an integer, got '5'"),
        ({"seed": 2**70}, "ValueError: FitSettings: seed must fit 64 bits"),
        ({"patience": -1}, "ValueError: FitSettings: patience must be at least 0, or None, got -1"),
        ({"lr": "high"}, "TypeError: FitSettings: lr must be a number, got 'high'"),
        ({"lr": float("nan")}, "ValueError: FitSettings: lr and clip must be above 0, got nan"),
        ({"lr": float("inf")}, "ValueError: FitSettings: lr and clip must be above 0, got inf"),
        ({"weight_decay": float("nan")}, "ValueError: FitSettings: weight_decay must be at least 0, got nan"),
        ({"keep_best": "no"}, "TypeError: FitSettings: keep_best must be True or False, got 'no'"),
    ],
)
def test_settings_are_checked(changes: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError)) as raised:
        FitSettings(**changes)
    assert f"{type(raised.value).__name__}: {raised.value}".startswith(message)


# ---------------------------------------------------------------------------------------------- files of a checkpoint


def test_a_damaged_or_foreign_checkpoint_is_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "fit.pt"
    fit(make(), packed(), goals(), SETTINGS, checkpoint=path)
    whole = path.read_bytes()
    state = torch.load(path, weights_only=True)
    foreign = [b"", whole[:5000], whole[:-100], b"text", bytes(100)]
    for key in ("fingerprint", "history", "optimiser", "scaler", "epoch", "best"):
        damaged = {k: v for k, v in state.items() if k != key}
        torch.save(damaged, path)
        foreign.append(path.read_bytes())
    for change in ({"epoch": "2"}, {"history": [1]}, {"fingerprint": 3}, {"format": "2"}):
        torch.save({**state, **change}, path)
        foreign.append(path.read_bytes())
    for content in foreign:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"fit.pt' is damaged or is not one of fit's; give another path or"):
            fit(make(), packed(), goals(), SETTINGS, checkpoint=path)
    torch.save({**state, "format": 1}, path)
    with pytest.raises(ValueError, match=r"has format 1, this version reads 3 only.*remove it to train anew"):
        fit(make(), packed(), goals(), SETTINGS, checkpoint=path)


def test_a_pipe_is_no_checkpoint(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fit.pt")
    with pytest.raises(ValueError, match="must be a regular file, is a named pipe"):
        fit(make(), packed(), goals(), SETTINGS, checkpoint=tmp_path / "fit.pt")
    assert stat.S_ISFIFO((tmp_path / "fit.pt").stat().st_mode)


def test_a_second_training_of_a_checkpoint_is_told_who_writes_it(tmp_path: Path) -> None:
    path = tmp_path / "fit.pt"

    def second(epoch: int, history: object) -> None:
        with pytest.raises(BlockingIOError, match=rf"fit.pt' is in use by process {os.getpid()} on .*; wait until"):
            fit(make(), packed(), goals(), SETTINGS, checkpoint=path)

    fit(make(), packed(), goals(), SETTINGS, checkpoint=path, on_epoch=second)
    assert [file.name for file in tmp_path.iterdir()] == ["fit.pt"]


def test_threads_that_train_into_one_file_exclude_each_other(tmp_path: Path) -> None:
    path, outcomes, start = tmp_path / "fit.pt", [], threading.Barrier(3)
    settings = FitSettings(epochs=4, batch_weights=80)

    def train() -> None:
        predictor, batch = make(), packed()
        start.wait()
        try:
            fit(predictor, batch, goals(), settings, checkpoint=path)
            outcomes.append("done")
        except BlockingIOError:
            outcomes.append("refused")

    threads = [threading.Thread(target=train) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert "done" in outcomes and set(outcomes) <= {"done", "refused"} and len(outcomes) == 3
    assert torch.load(path, weights_only=True)["epoch"] == 4 and len(list(tmp_path.iterdir())) == 1


def test_a_full_disk_keeps_the_checkpoint_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "fit.pt"
    whole = make()
    fit(whole, packed(), goals(), SETTINGS)

    def full(epoch: int, history: object) -> None:
        monkeypatch.setattr(
            os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(28, "No space left on device"))
        )

    with pytest.raises(OSError, match=r"fit.pt' cannot be written: No space left on device; the last") as raised:
        fit(make(), packed(), goals(), SETTINGS, checkpoint=path, on_epoch=full)
    monkeypatch.undo()
    assert raised.value.errno == 28 and [file.name for file in tmp_path.iterdir()] == ["fit.pt"]
    resumed = make()
    fit(resumed, packed(), goals(), SETTINGS, checkpoint=path)
    assert same(resumed, whole)


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"fit: checkpoint '.*fit.pt' cannot be written: (Not a directory|File exists)"):
        fit(make(), packed(), goals(), SETTINGS, checkpoint=tmp_path / "file" / "fit.pt")


def test_a_log_with_half_a_line_resumes(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text("epoch,train_loss\n0,0.5\n1,0.25\n2,0.1\n3")
    log = CsvLog(path)
    log.resume(2)
    assert path.read_text().split() == ["epoch,train_loss", "0,0.5", "1,0.25"]
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"log.csv' is no log of a training|log.csv"):
        log.resume(2)


def test_a_log_on_a_full_disk_is_named(tmp_path: Path) -> None:
    log = CsvLog(tmp_path / "log.csv")
    log.resume(0)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
    try:
        with pytest.raises(OSError) as raised:
            log(0, {"train_loss": 0.5})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert raised.value.filename == str(tmp_path / "log.csv") and raised.value.strerror == "File too large"

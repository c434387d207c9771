"""A predictor that was trained and saved predicts of files what its training reported, whatever was done to them."""

from __future__ import annotations

import csv
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

import sne_fast
from sne_fast.cli.commands import app
from sne_fast.tasks.baselines import Problem
from sne_fast.tasks.definitions import Experiment
from sne_fast.tasks.networks import Networks
from sne_fast.tasks.settings import TrainSettings
from sne_fast.tasks.sne_method import train_sne
from sne_fast.tasks.train import train
from sne_fast.training.recipes import TrainingRecipe
from sne_fast.zoo import Zoo, make_classifier_zoo

pytest.importorskip("pyarrow")

TARGET = "test_accuracy"
QUICK = TrainingRecipe(epochs=1, batch_weights=8_000, chunks=True)
SETTINGS = {
    "as they are": QUICK,
    "by tensor": dataclasses.replace(QUICK, input_scale="tensor"),
    "by fan-in": dataclasses.replace(QUICK, input_scale="fan_in"),
    "unscaled": dataclasses.replace(QUICK, input_scale="none"),
    "relative": dataclasses.replace(QUICK, relative=True, input_scale="fan_in"),
    "relative by zoo": dataclasses.replace(QUICK, relative=True),
    "canonical": dataclasses.replace(QUICK, units="canonical", jitter=0.0),
    "canonical with jitter and invariance": dataclasses.replace(QUICK, units="canonical", jitter=0.5, invariance=0.1),
    "canonical and relative": dataclasses.replace(QUICK, units="canonical", relative=True, input_scale="tensor"),
    "permuted": dataclasses.replace(QUICK, units="permuted"),
    "kernels": dataclasses.replace(QUICK, chunking="kernel", chunk_size=5),
    "neurons without order": dataclasses.replace(QUICK, chunking="neuron", order=False),
}


def command(*arguments):
    done = CliRunner().invoke(app, [str(a) for a in arguments])
    assert done.exit_code == 0, done.output
    return done


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    names = ["mlp-10", "cnn3-flatten", "cnn3-pool-groupnorm", "cnn3-pool-batchnorm", "vit"]
    return make_classifier_zoo(tmp_path_factory.mktemp("zoo") / "zoo", 30, architectures=names, max_steps=10)


@pytest.fixture(scope="module")
def files(zoo: Zoo, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("files")
    paths = [folder / f"{i:02}.safetensors" for i in range(len(zoo))]
    for i, path in enumerate(paths):
        zoo.export(i, path)
    return paths


@pytest.mark.parametrize("name", SETTINGS)
def test_a_method_of_a_task_predicts_files_as_it_reported(name, zoo, files, tmp_path):
    settings = SETTINGS[name]
    data = Networks([zoo], TARGET)
    parts = data.split(Experiment("all"), 0)
    problem = Problem(data.packed(settings), data.targets, parts["train"], parts["validation"], 0, logit=True)
    run = train_sne(problem, settings, data.preparation(settings), data.symmetries, parts["test"], target=TARGET)
    run.predictor.save_pretrained(tmp_path / "m")
    loaded = sne_fast.Predictor.from_pretrained(tmp_path / "m")
    with torch.no_grad():
        for networks in (zoo, files):
            np.testing.assert_allclose(loaded(networks)[:, 0].double().numpy(), run.predicted, rtol=1e-5)
            encodings = loaded.encode(networks).double().numpy()
            np.testing.assert_allclose(encodings, run.encodings, rtol=1e-4, atol=1e-5)
    command("predict", *files[:7], "--model", tmp_path / "m", "--out", tmp_path / "p.json")
    rows = json.loads((tmp_path / "p.json").read_text())
    np.testing.assert_allclose([row[TARGET] for row in rows], run.predicted[:7], rtol=1e-5)
    command("encode", zoo.folder, "--model", tmp_path / "m", "--out", tmp_path / "z.npz")
    np.testing.assert_allclose(np.load(tmp_path / "z.npz")["vector"], run.encodings, rtol=1e-4, atol=1e-5)


TRAININGS = {
    "by tensor": {},
    "by fan-in": {"input_scale": "fan_in"},
    "by zoo": {"input_scale": "zoo", "code_gain": 1.0},
    "unscaled": {"input_scale": "none"},
    "permuted": {"units": "permuted", "chunks": True, "invariance": 0.1},
    "stacked": {"stack": True},
    "kernels with isab": {"chunking": "kernel", "chunk_size": 7, "set_attention": "isab"},
    "bfloat16": {"amp": "bfloat16"},
    "two targets": {"targets": (TARGET, "train_accuracy"), "input_scale": "zoo"},
    "logit": {"transform": "logit"},
    "bce": {"loss": "bce"},
    "classes": {"loss": "cross_entropy", "targets": ("architecture",)},
}


@pytest.mark.parametrize("name", TRAININGS)
def test_train_predicts_files_as_it_reported(name, zoo, tmp_path):
    options = {"targets": (TARGET,), "epochs": 1, "hidden_dim": 32, "head": (16,), **TRAININGS[name]}
    train(TrainSettings(zoo=zoo.folder, out=tmp_path / "run", **options), Console(quiet=True))
    with open(tmp_path / "run" / "predictions.csv", newline="") as file:
        reported = list(csv.DictReader(file))
    paths = [tmp_path / f"{i}.safetensors" for i in range(len(reported))]
    for path, row in zip(paths, reported, strict=True):
        zoo.export(zoo.find(row["name"]), path)
    command("predict", *paths, "--model", tmp_path / "run" / "predictor", "--out", tmp_path / "p.json")
    rows = json.loads((tmp_path / "p.json").read_text())
    for row, told in zip(rows, reported, strict=True):
        for column in (key for key in told if key.startswith("predicted ")):
            assert row[column.removeprefix("predicted ")] == pytest.approx(float(told[column]), rel=1e-4, abs=1e-6)

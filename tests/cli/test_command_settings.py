"""Settings of the commands: choices are checked, and defaults agree with those of the classes that they set."""

from __future__ import annotations

import dataclasses
import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest

from sne_fast import SNE, Predictor
from sne_fast.nn.input_scales import INPUT_SCALES
from sne_fast.tasks import TASKS, run_task, settings
from sne_fast.tasks.settings import Demo, DemoSettings, TaskSettings, TrainSettings
from sne_fast.training import FitSettings, recipes


def defaults_of(function: Any) -> dict[str, Any]:
    return {name: parameter.default for name, parameter in inspect.signature(function).parameters.items()}


def test_choices_are_those_of_the_package() -> None:
    assert get_args(settings.TaskName) == tuple(TASKS)
    assert get_args(recipes.InputScale) == ("tensor", *INPUT_SCALES, "none")


def test_an_input_scale_is_the_encoders_or_the_predictors() -> None:
    scales = get_args(recipes.InputScale)
    assert [recipes.scale_of_encoder(scale) for scale in scales] == ["tensor", "none", "none", "none"]
    assert [recipes.scale_of_predictor(scale) for scale in scales] == [False, "zoo", "fan_in", False]


def test_options_that_are_not_given_are_those_of_the_recipe() -> None:
    for name, recipe in recipes.RECIPES.items():
        assert TrainSettings(Path("zoo"), Path("out"), recipe=name).chosen == recipe
    changed = TrainSettings(Path("zoo"), Path("out"), chunks=True, head=(8,), epochs=3).chosen
    assert changed == recipes.RECIPES["best"].replace(chunks=True, head=(8,), epochs=3)
    given, of_predictor = TrainSettings(Path("zoo"), Path("out")), defaults_of(Predictor)
    assert (given.loss, given.transform) == (of_predictor["loss"], of_predictor["target_transform"])
    of_task = {field.name: field.default for field in dataclasses.fields(TaskSettings)}
    by_function = defaults_of(run_task)
    assert all(by_function[name] == of_task[name] for name in ("seeds", "methods", "networks", "epochs"))


def test_a_recipe_sets_arguments_that_exist() -> None:
    of_sne, of_fit = defaults_of(SNE), {field.name for field in dataclasses.fields(FitSettings)}
    for recipe in recipes.RECIPES.values():
        assert set(recipe.encoder) < set(of_sne) and SNE(**recipe.encoder).config["hidden_dim"] == recipe.hidden_dim
        assert set(dataclasses.asdict(recipe.fit_settings(3))) == of_fit and recipe.fit_settings(3).seed == 3


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"loss": "mae"}, "train: loss must be one of mse, bce, cross_entropy, got 'mae'"),
        ({"log": "none"}, "train: log must be one of csv, tensorboard, got 'none'"),
        ({"amp": "float64"}, "train: amp must be one of bfloat16, float16, got 'float64'"),
        ({"chunking": "round"}, "train: chunking must be one of flat, neuron, kernel, got 'round'"),
        ({"invariance": 0.5}, "the invariance loss compares copies that are drawn"),
    ],
)
def test_mistakes_are_told(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainSettings(Path("zoo"), Path("out"), **changed)


def test_the_demo_takes_what_is_asked_for_and_else_the_defaults() -> None:
    assert DemoSettings().demo == Demo() and DemoSettings(quick=True, seed=3).demo == Demo.quick(3)
    assert DemoSettings(quick=True, epochs=2).demo == Demo.quick().replace(epochs=2)


def test_every_option_says_what_it_is() -> None:
    for command in (DemoSettings, TrainSettings, TaskSettings):
        without = [field.name for field in dataclasses.fields(command) if "help" not in field.metadata]
        assert without == []
        assert all(str(field.metadata["help"]).endswith(".") for field in dataclasses.fields(command) if field.metadata)


def test_settings_import_nothing_heavy() -> None:
    modules = "sne_fast.tasks.settings, sne_fast.training.settings, sne_fast.nn.choices, sne_fast.data.choices"
    command = f"import sys, {modules}; assert not {{'torch', 'numpy', 'rich'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", command], check=True)

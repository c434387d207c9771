"""Recipes: named, checked, saved, and the predictors, preparations and augmentations that they ask for."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import sne_fast
from sne_fast.symmetry import PermutationAugmentation, chain_symmetry
from sne_fast.training import (
    RECIPES,
    FitSettings,
    TrainingRecipe,
    augmentation_of,
    find_recipe,
    fit,
    make_predictor,
    predict,
    preparation_of,
)


def networks(count: int = 8) -> list[nn.Module]:
    torch.manual_seed(0)
    return [nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)) for _ in range(count)]


def symmetries(count: int = 8) -> list[Any]:
    return [chain_symmetry(networks(1)[0].state_dict())] * count


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_trains_and_its_predictor_is_saved_whole(name: str, tmp_path: Path) -> None:
    recipe = RECIPES[name].replace(epochs=2)
    batch = sne_fast.pack(networks(), scale=recipe.scale, chunk_size=recipe.chunk_size).detach()
    preparation = preparation_of(recipe, batch, symmetries())
    predictor = make_predictor(recipe, ["spread"], preparation=preparation, seed=3)
    augment = augmentation_of(recipe, symmetries(), preparation)
    targets = torch.rand(8, 1, generator=torch.Generator().manual_seed(0))
    fit(predictor, batch, targets, recipe.fit_settings(seed=3), augment=augment)
    predictor.save_pretrained(tmp_path)
    loaded = sne_fast.Predictor.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(networks()), predict(predictor, batch)[0], atol=1e-5, rtol=1e-4)


def test_the_seed_decides_the_first_parameters_and_the_generator_is_left_alone() -> None:
    state = torch.get_rng_state()
    one, same, other = (make_predictor(RECIPES["best"], ["a"], seed=seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert any(not torch.equal(one[key], other[key]) for key in one)


def test_units_decide_preparation_and_augmentation() -> None:
    batch = sne_fast.pack(networks(), scale="none").detach()
    given, inr = RECIPES["best"], RECIPES["inr"]
    permuted = given.replace(units="permuted", chunks=True)
    assert augmentation_of(given, [], preparation_of(given)) is None
    assert isinstance(augmentation_of(permuted, symmetries(), preparation_of(permuted)), PermutationAugmentation)
    preparation = preparation_of(inr, batch, symmetries())
    assert (preparation.units, preparation.odd, preparation.jitter) == ("canonical", True, 0.2)
    assert augmentation_of(inr, symmetries(), preparation) == preparation.augment
    with pytest.raises(ValueError, match="preparation_of: the recipe's units are canonical, which needs the networks"):
        make_predictor(inr, ["a"])


def test_a_recipe_is_saved_and_found_again(tmp_path: Path) -> None:
    recipe = RECIPES["across"].replace(head=(7, 5), patience=3, chunks=True)
    recipe.save(tmp_path / "recipe.json")
    assert find_recipe(tmp_path / "recipe.json") == recipe and find_recipe("paper") is RECIPES["paper"]
    assert TrainingRecipe.from_values(recipe.values) == recipe
    older = {name: value for name, value in recipe.values.items() if name != "accumulate"}
    assert TrainingRecipe.from_values(older) == recipe


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"statistics": "some"}, "recipe: statistics must be one of none, tensor, relative, got 'some'"),
        ({"units": "sorted"}, "recipe: units must be one of given, canonical, permuted"),
        ({"epochs": 0}, "FitSettings: epochs must be at least 1"),
        ({"epochs": "many"}, "epochs must be an integer"),
        ({"invariance": 0.5}, "the invariance loss compares copies that are drawn"),
        ({"colour": 1}, "recipe: unknown colour"),
        ({"chunks": None}, "recipe: missing chunks"),
        ({"head": "wide"}, "recipe: head must be a list of integers"),
        ({"odd": 1}, "recipe: odd must be True or False, got 1"),
        ({"threads": 0}, "recipe: threads must be at least 1, or None, got 0"),
        ({"code_gain": "large"}, "recipe: code_gain must be a number, got 'large'"),
    ],
)
def test_files_with_mistakes_are_told(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    values = {**RECIPES["best"].values, **changes}
    if changes.get("chunks", 0) is None:
        del values["chunks"]
    (tmp_path / "r.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=f"r.json': .*{message}"):
        find_recipe(tmp_path / "r.json")


def test_files_that_are_no_recipe_are_told(tmp_path: Path) -> None:
    for content in ("[1]", "{", ""):
        (tmp_path / "r.json").write_text(content)
        with pytest.raises(ValueError, match=r"r\.json"):
            find_recipe(tmp_path / "r.json")
    with pytest.raises(
        ValueError, match="recipe: must be one of best, across, datasets, inr, paper, or a JSON file, got 'good'"
    ):
        find_recipe("good")


def test_a_recipe_names_all_settings_of_the_loop() -> None:
    names = {field.name for field in dataclasses.fields(FitSettings)} - {"seed", "amp", "buckets", "capture"}
    assert names <= set(RECIPES["best"].values)
    settings = RECIPES["best"].fit_settings(5, "bfloat16", buckets=True)
    assert (settings.seed, settings.amp, settings.epochs) == (5, "bfloat16", RECIPES["best"].epochs)
    assert settings.buckets and not settings.capture

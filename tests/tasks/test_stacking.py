"""Boosted trees as arrays, and the mean of a predictor and trees: what they predict, and their files."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch

import sne_fast
from sne_fast.data.checkpoints import load_state_dict, save_state_dict
from sne_fast.nn.preparation import Preparation
from sne_fast.tasks import StackedPredictor, average_predictions
from sne_fast.tasks.trees import ABSENT, BoostedTrees, fit_trees
from sne_fast.training import predict

pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def features() -> np.ndarray:
    generator = np.random.default_rng(0)
    found = generator.standard_normal((120, 6))
    found[generator.random((120, 6)) < 0.1] = np.nan
    return found


@pytest.mark.parametrize("logit", [False, True])
def test_trees_as_arrays_predict_what_scikit_learn_does(features, logit, monkeypatch):
    from sklearn.ensemble import GradientBoostingRegressor

    made = []
    monkeypatch.setattr(GradientBoostingRegressor, "fit", _keeping(GradientBoostingRegressor.fit, made))
    targets = 1 / (1 + np.exp(-np.nan_to_num(features[:, 0])))
    trees = fit_trees(features, targets, seed=1, logit=logit)
    wanted = made[0].predict(np.where(np.isnan(features), ABSENT, features).astype(np.float32))
    np.testing.assert_allclose(trees.predict(features), 1 / (1 + np.exp(-wanted)) if logit else wanted, rtol=1e-10)
    assert np.abs(trees.predict(features) - targets).mean() < 0.05


@pytest.mark.parametrize("classes", [[0, 1, 2], [0, 2], [1]])
def test_trees_of_classes_predict_what_scikit_learn_does(features, classes, monkeypatch):
    from sklearn.ensemble import HistGradientBoostingClassifier

    made = []
    monkeypatch.setattr(HistGradientBoostingClassifier, "fit", _keeping(HistGradientBoostingClassifier.fit, made))
    targets = np.asarray(classes)[np.nan_to_num(features[:, 1] > 0).astype(int) % len(classes)]
    targets[:5] = classes[-1]
    found = fit_trees(features, targets, classes=3).predict(features)
    wanted = np.zeros((120, 3))
    if made:
        x = np.where(np.isnan(features), ABSENT, features).astype(np.float32)
        wanted[:, made[0].classes_] = made[0].predict_proba(x)
    else:
        wanted[:, classes[0]] = 1
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-12)


def _keeping(fit, made):
    def keep(self, *args):
        made.append(self)
        return fit(self, *args)

    return keep


def test_trees_are_saved_and_damaged_files_are_refused(features, tmp_path):
    trees = fit_trees(features, np.nan_to_num(features[:, 0]))
    trees.save(tmp_path / "t.safetensors", {"layers": 2})
    loaded, about = BoostedTrees.load(tmp_path / "t.safetensors")
    assert about == {"layers": 2}
    np.testing.assert_array_equal(loaded.predict(features), trees.predict(features))
    with pytest.raises(ValueError, match=r"features must be of shape \(n, 6\), got \(120, 5\)"):
        trees.predict(features[:, :5])
    tensors = load_state_dict(tmp_path / "t.safetensors")
    known = {"boosted_trees": json.dumps({"features": 6, "link": "identity"})}
    for name, change, message in (
        ("left", lambda t: t * 0, "must lead to later nodes"),
        ("right", lambda t: t + 10**9, "must lead to later nodes"),
        ("feature", lambda t: t + 6, r"feature must lie in \[0, 6\)"),
        ("roots", lambda t: t - 1, r"roots must lie in"),
        ("output", lambda t: t + 1, r"output must lie in \[0, 1\)"),
        ("value", lambda t: t[1:], "one entry per node"),
        ("value", lambda t: t.float(), "is damaged or holds no trees"),
    ):
        save_state_dict({**tensors, name: change(tensors[name])}, tmp_path / "d.safetensors", known)
        with pytest.raises(ValueError, match=message):
            BoostedTrees.load(tmp_path / "d.safetensors")
    for text in ("null", "[]", "{", '{"features": 6, "link": "cube"}', '{"link": "identity"}'):
        save_state_dict(tensors, tmp_path / "d.safetensors", {"boosted_trees": text})
        with pytest.raises(ValueError, match="is damaged or holds no trees"):
            BoostedTrees.load(tmp_path / "d.safetensors")


def test_averages():
    one, other = np.array([0.5, 0.0, 1.0]), np.array([0.9, 0.5, 1.0])
    np.testing.assert_allclose(average_predictions([one, other]), [0.7, 0.25, 1])
    logits = average_predictions([one, other], logit=True)
    assert logits[0] == pytest.approx(0.75) and 0 < logits[1] < 0.01 and logits[2] == pytest.approx(1, abs=1e-5)
    with pytest.raises(ValueError, match=r"arrays of one shape, got \(3,\), \(2,\)"):
        average_predictions([one, other[:2]])
    with pytest.raises(ValueError, match="got none"):
        average_predictions([])


def networks(count: int = 30) -> tuple[list[dict[str, torch.Tensor]], torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    targets = torch.rand(count, 2, generator=generator)
    return [
        {"a.weight": (0.2 + t[0]) * torch.randn(6, 4, generator=generator), "a.bias": t[1] + torch.zeros(6),
         "b.weight": torch.randn(1, 6, generator=generator)}
        for t in targets
    ], targets  # fmt: skip


KINDS = {
    "numbers": {"target_names": ("x", "y"), "out_features": 2},
    "logits": {"target_names": ("x", "y"), "out_features": 2, "target_transform": "logit"},
    "relative": {"target_names": ("x", "y"), "out_features": 2, "preparation": Preparation(relative=True)},
    "classes": {"target_names": ("low", "high", "never"), "out_features": 3, "loss": "cross_entropy"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_stacked_predictor_averages_and_is_saved(kind, tmp_path):
    states, targets = networks()
    torch.manual_seed(0)
    predictor = sne_fast.Predictor(sne_fast.SNE(hidden_dim=32), hidden_features=(8,), **KINDS[kind]).eval()
    wanted = (targets[:, 0] > 0.5).long() if kind == "classes" else targets
    batch = predictor.pack(states)
    stacked = StackedPredictor.fit(predictor, batch, wanted, rows=range(20), seed=3)
    found = stacked(batch)
    own, trees = predict(predictor, batch)[0], stacked.predict_trees(batch)
    assert found.shape == own.shape == trees.shape and found.dtype == own.dtype
    mean = average_predictions([own.detach().double().numpy(), trees], logit=kind == "logits")
    np.testing.assert_allclose(found, mean, rtol=1e-6)
    if kind == "classes":
        np.testing.assert_allclose(found.sum(1), 1, rtol=1e-5)
    else:
        assert np.abs(trees[:20] - targets[:20].numpy()).mean() < 0.05
    stacked.save_pretrained(tmp_path / "m")
    assert {path.suffix for path in (tmp_path / "m").iterdir()} == {".json", ".safetensors"}
    loaded = StackedPredictor.from_pretrained(tmp_path / "m")
    torch.testing.assert_close(loaded(states[:7]), found[:7])
    alone = sne_fast.Predictor.from_pretrained(tmp_path / "m")
    torch.testing.assert_close(alone(states[:7]), own[:7])
    predictor.target_mean += 1
    predictor.save_pretrained(tmp_path / "m")
    with pytest.raises(ValueError, match="were saved with another predictor"):
        StackedPredictor.from_pretrained(tmp_path / "m")


def test_what_does_not_fit_a_stacked_predictor(tmp_path):
    states, targets = networks(4)
    predictor = sne_fast.Predictor(sne_fast.SNE(hidden_dim=32), target_names=["x"])
    with pytest.raises(ValueError, match="targets must have 4 rows, one per network, got 3"):
        StackedPredictor.fit(predictor, predictor.pack(states), targets[:3, :1])
    with pytest.raises(ValueError, match="trees must be 1, one for each output, got 0"):
        StackedPredictor(predictor, [], 1)
    predictor.save_pretrained(tmp_path / "m")
    with pytest.raises(FileNotFoundError, match=r"has no trees-0\.safetensors"):
        StackedPredictor.from_pretrained(tmp_path / "m")
    stacked = StackedPredictor.fit(predictor, predictor.pack(states), targets[:, :1])
    with pytest.raises(ValueError, match="features must be of shape"):
        dataclasses.replace(stacked.trees[0], features=3 + stacked.trees[0].features).predict(np.zeros((1, 3)))

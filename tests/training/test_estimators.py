"""The estimators of scikit-learn: their protocol, sources of networks, targets and errors."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import sne_fast
from sne_fast.zoo import Zoo

sklearn = pytest.importorskip("sklearn")
from sklearn.base import clone, is_classifier, is_regressor  # noqa: E402
from sklearn.exceptions import NotFittedError  # noqa: E402
from sklearn.model_selection import GridSearchCV, cross_val_score  # noqa: E402
from sklearn.pipeline import make_pipeline  # noqa: E402

SMALL = {"hidden_dim": 32, "head": (32,), "epochs": 2}


def networks(count: int = 12) -> tuple[list[nn.Module], np.ndarray]:
    torch.manual_seed(0)
    made = [nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)) for _ in range(count)]
    for i, network in enumerate(made):
        network[0].weight.data *= 0.2 + 4 * i / count
    return made, np.array([network[0].weight.detach().std().item() for network in made])


@pytest.fixture(scope="module")
def problem() -> tuple[list[nn.Module], np.ndarray]:
    return networks()


def as_zoo(made: list[nn.Module], y: np.ndarray) -> Zoo:
    columns = {
        "name": [f"net{i}" for i in range(len(made))],
        "spread": y.tolist(),
        "kind": ["ab"[i % 2] for i in range(len(made))],
    }
    return Zoo(columns, source=_Source(made))


class _Source:
    def __init__(self, made: list[nn.Module]) -> None:
        self.made = made

    def read(self, i: int) -> dict[str, torch.Tensor]:
        return self.made[i].state_dict()


@pytest.mark.parametrize("cls", [sne_fast.SNERegressor, sne_fast.SNEClassifier])
def test_clone_copies_every_parameter_and_nothing_learnt(cls, problem):
    made, y = problem
    model = cls(**SMALL, lr=1e-2, chunk_size=16, random_state=3)
    model.fit(made, y if cls is sne_fast.SNERegressor else y > y.mean())
    copy = clone(model)
    assert copy.get_params() == model.get_params()
    assert set(model.get_params()) >= {"hidden_dim", "chunk_size", "epochs", "random_state", "device"}
    with pytest.raises(NotFittedError):
        copy.predict(made)
    assert copy.set_params(epochs=5).epochs == 5


def test_a_regressor_learns_predicts_in_units_of_y_and_scores_by_r2(problem):
    made, y = problem
    model = sne_fast.SNERegressor(hidden_dim=32, head=(32,), epochs=30, lr=3e-3, batch_weights=200).fit(made, y)
    predicted = model.predict(made)
    assert predicted.shape == y.shape and predicted.dtype == np.float64
    expected = 1 - ((predicted - y) ** 2).sum() / ((y - y.mean()) ** 2).sum()
    assert model.score(made, y) == pytest.approx(expected)
    assert model.score(made, y) > 0.5
    assert len(model.history_.train_loss) == 30 and is_regressor(model)


def test_all_sources_of_networks_give_the_same_predictions(problem, tmp_path: Path):
    made, y = problem
    model = sne_fast.SNERegressor(**SMALL).fit(made, y)
    paths = []
    for i, network in enumerate(made):
        paths.append(tmp_path / f"net{i}.pt")
        torch.save(network.state_dict(), paths[-1])
    expected = model.predict(made)
    batch = model.predictor_.encoder.pack(made)
    for source in (
        [network.state_dict() for network in made],
        paths,
        np.array([str(path) for path in paths]),
        as_zoo(made, y),
        batch,
        list(batch),
    ):
        np.testing.assert_allclose(model.predict(source), expected, rtol=1e-5, atol=1e-6)


def test_a_zoo_names_its_targets(problem):
    made, y = problem
    zoo = as_zoo(made, y)
    named = sne_fast.SNERegressor(**SMALL).fit(zoo, "spread")
    given = sne_fast.SNERegressor(**SMALL).fit(zoo, y)
    np.testing.assert_array_equal(named.predict(zoo), given.predict(zoo))
    assert named.predictor_.target_names == ("spread",)
    assert named.score(zoo, "spread") == given.score(zoo, y)
    twice = zoo.with_column("again", zoo.column("spread").tolist())
    both = sne_fast.SNERegressor(**SMALL).fit(twice, ["spread", "again"])
    assert both.predict(zoo).shape == (len(made), 2) and both.n_outputs_ == 2


def test_a_classifier_has_the_classes_of_y(problem):
    made, y = problem
    labels = np.where(y > np.median(y), "wide", "narrow")
    model = sne_fast.SNEClassifier(hidden_dim=32, head=(32,), epochs=30, lr=3e-3, batch_weights=200).fit(made, labels)
    probabilities = model.predict_proba(made)
    assert is_classifier(model) and model.classes_.tolist() == ["narrow", "wide"]
    np.testing.assert_allclose(probabilities.sum(1), 1, rtol=1e-5)
    predicted = model.predict(made)
    np.testing.assert_array_equal(predicted, model.classes_[probabilities.argmax(1)])
    assert model.score(made, labels) == (predicted == labels).mean() > 0.7
    assert sne_fast.SNEClassifier(**SMALL).fit(as_zoo(made, y), "kind").classes_.tolist() == ["a", "b"]


def test_cross_validation_grid_search_and_pipelines_take_it(problem):
    made, y = problem
    scores = cross_val_score(sne_fast.SNERegressor(**SMALL), made, y, cv=3, error_score="raise")
    assert scores.shape == (3,) and np.isfinite(scores).all()
    batch = sne_fast.pack(made)
    search = GridSearchCV(sne_fast.SNERegressor(**SMALL), {"lr": [1e-3, 1e-2]}, cv=2, error_score="raise")
    assert search.fit(batch, y).predict(batch).shape == y.shape
    from sklearn.linear_model import Ridge

    chained = make_pipeline(sne_fast.SNERegressor(**SMALL), Ridge()).fit(made, y)
    assert chained.predict(made).shape == y.shape
    assert chained[0].transform(made).shape == (len(made), 96)


def test_the_same_seed_gives_the_same_bits_and_leaves_the_global_generator_alone(problem):
    made, y = problem
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    one, other = (sne_fast.SNERegressor(**SMALL).fit(made, y).predict(made) for _ in range(2))
    np.testing.assert_array_equal(one, other)
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_fitted_estimator_can_be_pickled_and_its_predictor_saved(problem, tmp_path: Path):
    made, y = problem
    model = sne_fast.SNERegressor(**SMALL, validation_fraction=0.25).fit(made, y)
    assert len(model.history_.validation_loss) == 2
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(model)).predict(made), model.predict(made))
    model.predictor_.save_pretrained(tmp_path / "p")
    loaded = sne_fast.Predictor.from_pretrained(tmp_path / "p")
    with torch.no_grad():
        np.testing.assert_allclose(loaded(made)[:, 0].numpy(), model.predict(made), rtol=1e-5)


@pytest.mark.parametrize(
    ("X", "y", "error", "message"),
    [
        (lambda made: made[0], [1.0], TypeError, "one Sequential"),
        (lambda made: 3, [1.0], TypeError, "sequence of networks"),
        (lambda made: made, [1.0, 2.0], ValueError, "12 networks and 2"),
        (lambda made: made, ["a"] * 12, ValueError, "y must hold numbers"),
        (lambda made: made, [float("nan")] * 12, ValueError, "finite"),
        (lambda made: made, 1.0, ValueError, "shape"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(X, y, error, message, problem):
    with pytest.raises(error, match=message):
        sne_fast.SNERegressor(**SMALL).fit(X(problem[0]), y)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"validation_fraction": 1.5}, "validation_fraction"),
        ({"random_state": "x"}, "random_state"),
        ({"epochs": 0}, "epochs"),
        ({"hidden_dim": 0}, "hidden_dim"),
        ({"target_transform": "log"}, "target_transform"),
    ],
)
def test_parameters_are_checked_by_fit(options, message, problem):
    made, y = problem
    model = sne_fast.SNERegressor(**{**SMALL, **options})
    with pytest.raises(ValueError, match=message):
        model.fit(made, y)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "abacus"}, "device 'abacus' cannot be used: "),
        ({"head": 5}, "Predictor: hidden_features must be "),
        ({"validation_fraction": "half"}, r"validation_fraction must lie in \[0, 1\), got 'half'"),
        ({"random_state": -1}, "random_state must lie in .*, got -1"),
        ({"random_state": 2**70}, "random_state must lie in "),
        ({"code_gain": "large"}, "the code gain must be a finite number, got 'large'"),
    ],
)
def test_parameters_of_another_kind_are_named(options, message, problem):
    made, y = problem
    with pytest.raises(ValueError, match=message):
        sne_fast.SNERegressor(**{**SMALL, **options}).fit(made, y)


def test_complex_targets_and_tables_of_layers_are_refused(problem):
    made, y = problem
    model = sne_fast.SNERegressor(**SMALL)
    with pytest.raises(ValueError, match="y must hold real numbers, got complex ones"):
        model.fit(made, y * 1j)
    with pytest.raises(TypeError, match=r"one network in each row, got an array of shape \(12, 3\); numpy takes"):
        model.fit(np.asarray(made), y)


def test_an_augmentation_gets_positions_in_X_beside_a_validation_share(problem):
    made, y = problem
    batch = sne_fast.SNE(hidden_dim=32).pack(made).detach()
    seen = set()

    def check(part, rows, generator):
        assert torch.equal(part.values, batch[list(rows)].values)
        seen.update(rows)
        return part

    sne_fast.SNERegressor(**SMALL, validation_fraction=0.25, augment=check).fit(batch, y)
    assert len(seen) == 9 and max(seen) < 12


def test_a_classifier_refuses_one_class_and_missing_ones(problem):
    made, _ = problem
    with pytest.raises(ValueError, match="at least 2 classes"):
        sne_fast.SNEClassifier(**SMALL).fit(made, ["a"] * 12)
    with pytest.raises(ValueError, match="every network"):
        sne_fast.SNEClassifier(**SMALL).fit(made, np.array([None, *"abababababa"], object))


def test_without_scikit_learn_an_estimator_says_what_to_install():
    code = (
        "import sys; sys.modules['sklearn'] = None\n"
        "import sne_fast\nfrom sne_fast import *\n"
        "try:\n    sne_fast.SNERegressor()\nexcept ModuleNotFoundError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "SNERegressor needs scikit-learn" in done.stdout and "sne_fast[sklearn]" in done.stdout

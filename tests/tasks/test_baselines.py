"""The methods that SNE is compared with: they learn, are invariant where they claim it, repeat, and do not peek."""

from __future__ import annotations

import functools
import itertools
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

import sne_fast
from sne_fast.reports.measures import class_measures
from sne_fast.symmetry import PermutationAugmentation, chain_symmetry, permute
from sne_fast.tasks.baselines import BASELINES, MLP, NFN, DeepSets, Mean, Probes, Problem, Statistics
from sne_fast.tasks.baselines.deepsets import SetOfWeights
from sne_fast.tasks.baselines.mlp import FlatWeights
from sne_fast.tasks.baselines.neural import Neural, raw_weights
from sne_fast.tasks.baselines.nfn import NeuralFunctional
from sne_fast.zoo.runnable import Runnable
from sne_fast.zoo.sirens import Siren

TRAIN, VALIDATION, TEST = list(range(80)), list(range(80, 100)), list(range(100, 120))
NEURAL = {"deepsets": DeepSets, "mlp": MLP, "nfn": NFN, "probes": Probes}
RUNNABLE = Runnable(functools.partial(Siren, (2, 6, 5, 1), 1.0), (2,), 1.0, False)


def network(scale: float, generator: torch.Generator, widths: tuple[int, ...] = (2, 6, 5, 1)) -> dict[str, Tensor]:
    """Make an MLP whose first matrix holds magnitudes around `scale`."""
    state = {}
    for layer, (n, m) in enumerate(itertools.pairwise(widths)):
        size = scale if layer == 0 else 1.0
        state[f"{layer}.weight"] = size * (1 + 0.1 * torch.randn(m, n, generator=generator))
        state[f"{layer}.bias"] = 0.1 * torch.randn(m, generator=generator)
    return state


def problem(chunking: str = "flat", **changes) -> Problem:
    generator = torch.Generator().manual_seed(0)
    targets = torch.rand(120, generator=generator).double()
    networks = [network(0.2 + float(t), generator) for t in targets]
    batch = sne_fast.pack(networks, 8, chunking, scale="tensor")
    return replace(Problem(batch, targets.numpy(), TRAIN, VALIDATION, runnable=RUNNABLE), **changes)


def mixed() -> Problem:
    """Make networks of two depths and many widths."""
    generator = torch.Generator().manual_seed(1)
    targets = torch.rand(120, generator=generator).double()
    widths = [(2, 3 + i % 5, 1) if i % 2 else (2, 4, 3 + i % 3, 1) for i in range(120)]
    networks = [network(0.2 + float(t), generator, w) for t, w in zip(targets, widths, strict=True)]
    return Problem(sne_fast.pack(networks, 8, scale="tensor"), targets.numpy(), TRAIN, VALIDATION)


def classes(**changes) -> Problem:
    """Make a problem of three classes, by the target."""
    task = problem()
    return replace(task, targets=np.digitize(task.targets, (1 / 3, 2 / 3)) * 1.0, classes=("a", "b", "c"), **changes)


def need(key: str) -> None:
    for module in {"nfn": ("nfn", "einops")}.get(key, ("sklearn",) if key.startswith("statistics") else ()):
        pytest.importorskip(module)


def make(key: str, epochs: int):
    return NEURAL[key](epochs=epochs) if key in NEURAL else BASELINES[key]


def test_the_table_has_the_baselines_in_order():
    trees = ["statistics", "statistics_fan_in", "statistics_rich", "statistics_relative"]
    assert list(BASELINES) == ["mean", *trees, "deepsets", "mlp", "nfn", "probes"]
    assert len({baseline.name for baseline in BASELINES.values()}) == 9


@pytest.mark.slow
@pytest.mark.parametrize("logit", [False, True])
@pytest.mark.parametrize("key", [key for key in BASELINES if key != "mean"])
def test_a_baseline_beats_the_mean(key, logit):
    need(key)
    task = problem(logit=logit)
    predicted = make(key, 80 if key == "deepsets" else 15).fit_predict(task)
    assert predicted.shape == (120,) and predicted.dtype == np.float64
    if logit:
        assert ((predicted > 0) & (predicted < 1)).all()
    error, mean_error = (np.square(p[TEST] - task.targets[TEST]).mean() for p in (predicted, Mean().fit_predict(task)))
    assert error < 0.25 * mean_error


@pytest.mark.slow
@pytest.mark.parametrize("key", [key for key in BASELINES if key != "mean"])
def test_a_baseline_tells_classes_apart(key):
    need(key)
    task = classes()
    predicted = make(key, 80 if key == "deepsets" else 15).fit_predict(task)
    assert predicted.shape == (120, 3) and predicted.dtype == np.float64
    np.testing.assert_allclose(predicted.sum(1), 1, rtol=1e-6)
    assert class_measures(predicted[TEST], task.targets[TEST])["accuracy"] >= 0.8


def test_the_mean_of_classes_is_their_share():
    task = classes()
    known = task.targets[:100]
    assert Mean().fit_predict(task)[7].tolist() == [float((known == k).mean()) for k in range(3)]


def test_classes_that_do_not_train_have_no_chance():
    need("statistics")
    task = classes()
    train, validation = ([i for i in part if task.targets[i] != 1] for part in (TRAIN, VALIDATION))
    predicted = Statistics().fit_predict(replace(task, train=train, validation=validation))
    assert (predicted[:, 1] == 0).all() and (predicted[:, ::2] > 0).all()
    only = [i for i in TRAIN if task.targets[i] == 2]
    assert (Statistics().fit_predict(replace(task, train=only, validation=[])) == [0, 0, 1]).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    "key", ["statistics", "statistics_fan_in", "statistics_rich", "statistics_relative", "deepsets"]
)
def test_any_architecture(key):
    need(key)
    task = mixed()
    predicted = make(key, 80 if key == "deepsets" else 15).fit_predict(task)
    error, mean_error = (np.square(p[TEST] - task.targets[TEST]).mean() for p in (predicted, Mean().fit_predict(task)))
    assert error < 0.5 * mean_error


def test_statistics_by_fan_in_do_not_tell_widths_apart():
    """A layer twice as wide whose weights are smaller by the root of two is the same to them."""
    need("statistics_fan_in")
    states = [{"0.weight": torch.full((3, n), value / n**0.5)} for n in (4, 8) for value in range(1, 61)]
    targets = np.tile(np.linspace(0, 1, 60), 2)
    task = Problem(sne_fast.pack(states, 8, scale="tensor"), targets, list(range(60)), [])
    errors = [np.abs(BASELINES[k].fit_predict(task) - targets)[60:].mean() for k in ("statistics_fan_in", "statistics")]
    assert errors[0] < 0.03 < 0.1 < errors[1]


def test_the_mean_is_that_of_training_and_validation():
    task = problem(logit=True)
    assert (Mean().fit_predict(task) == task.targets[:100].mean()).all()


@pytest.mark.parametrize("chunking", ["flat", "neuron", "kernel"])
@pytest.mark.parametrize("module", [SetOfWeights, NeuralFunctional, FlatWeights])
def test_invariance_under_permutations_of_hidden_units(module, chunking):
    if module is NeuralFunctional:
        need("nfn")
    task = problem(chunking)
    generator = torch.Generator().manual_seed(0)
    symmetry = chain_symmetry(network(1.0, generator))
    model = module(task.batch[TRAIN])
    permuted = permute(task.batch, symmetry, generator)
    assert not torch.equal(permuted.values, task.batch.values)
    with torch.no_grad():
        change = (model(permuted) - model(task.batch)).abs().max()
    assert change > 1e-4 if module is FlatWeights else change < 1e-5


@pytest.mark.parametrize("widths", [(2, 5, 1), (20, 6, 5, 3)])
def test_neural_functionals_of_two_layers_and_of_many_inputs(widths):
    need("nfn")
    generator = torch.Generator().manual_seed(0)
    states = [network(1.0, generator, widths) for _ in range(6)]
    batch = sne_fast.pack(states, 8, scale="tensor")
    model = NeuralFunctional(batch)
    with torch.no_grad():
        torch.testing.assert_close(
            model(permute(batch, chain_symmetry(states[0]), generator)), model(batch), rtol=0, atol=1e-5
        )
        # Inputs are no hidden units: which is which must matter.
        swapped = [{**s, "0.weight": s["0.weight"].flip(1)} for s in states]
        assert (model(sne_fast.pack(swapped, 8, scale="tensor")) - model(batch)).abs().max() > 1e-5


@pytest.mark.parametrize("chunking", ["flat", "neuron", "kernel"])
def test_neural_functionals_see_the_matrices(chunking):
    need("nfn")
    generator = torch.Generator().manual_seed(0)
    states = [network(1.0, generator) for _ in range(4)]
    batch = sne_fast.pack(states, 4, chunking, scale="tensor")
    model = NeuralFunctional(batch)
    model.scale.fill_(1.0)
    features = model.features(batch)
    for layer, (weight, bias) in enumerate(features):
        expected = torch.stack([s[f"{layer}.weight"] for s in states])[:, None]
        torch.testing.assert_close(weight, expected)
        torch.testing.assert_close(bias, torch.stack([s[f"{layer}.bias"] for s in states])[:, None])


def convolutional(generator: torch.Generator) -> dict[str, Tensor]:
    """Make a CNN of two convolutions and a linear layer behind a mean over positions."""
    shapes = {"0": (5, 2, 3, 3), "1": (4, 5, 2, 3), "2": (3, 4)}
    state = {}
    for layer, shape in shapes.items():
        state[f"{layer}.weight"] = torch.randn(shape, generator=generator)
        state[f"{layer}.bias"] = torch.randn(shape[:1], generator=generator)
    return state


@pytest.mark.parametrize("chunking", ["flat", "neuron", "kernel"])
def test_neural_functionals_of_convolutions(chunking):
    need("nfn")
    generator = torch.Generator().manual_seed(0)
    states = [convolutional(generator) for _ in range(6)]
    batch = sne_fast.pack(states, 4, chunking, scale="tensor")
    model = NeuralFunctional(batch)
    with torch.no_grad():
        torch.testing.assert_close(
            model(permute(batch, chain_symmetry(states[0]), generator)), model(batch), rtol=0, atol=1e-5
        )
        # Positions of a kernel are no units: which is which must matter.
        turned = [{**s, "1.weight": s["1.weight"].flip(3)} for s in states]
        assert (model(sne_fast.pack(turned, 4, chunking, scale="tensor")) - model(batch)).abs().max() > 1e-5
    model.scale.fill_(1.0)
    for layer, (weight, _) in enumerate(model.features(batch)):
        torch.testing.assert_close(weight, torch.stack([s[f"{layer}.weight"] for s in states])[:, None])


def test_raw_weights_are_those_that_were_packed():
    generator = torch.Generator().manual_seed(0)
    state = network(3.0, generator)
    packed = sne_fast.pack([state], 4, scale="tensor")
    torch.testing.assert_close(raw_weights(packed), torch.cat([t.flatten() for t in state.values()]))


@pytest.mark.parametrize("key", [key for key in BASELINES if key != "mean"])
def test_a_seed_gives_the_same_bits_and_leaves_global_randomness_alone(key):
    need(key)
    symmetry = chain_symmetry(network(1.0, torch.Generator().manual_seed(0)))
    task = problem(augment=PermutationAugmentation(symmetry))
    before = torch.get_rng_state()
    first = make(key, 2).fit_predict(task)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    np.testing.assert_array_equal(make(key, 2).fit_predict(task), first)
    assert (make(key, 2).fit_predict(replace(task, seed=1)) != first).any()


@pytest.mark.parametrize("key", list(BASELINES))
def test_targets_of_test_networks_are_not_looked_at(key):
    need(key)
    task = problem(logit=True)
    targets = task.targets.copy()
    targets[TEST] = np.nan
    first, second = (make(key, 2).fit_predict(t) for t in (task, replace(task, targets=targets)))
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("key", list(NEURAL))
def test_validation_targets_only_choose_the_epoch(key):
    need(key)
    task = problem()
    one = make(key, 1)
    targets = task.targets.copy()
    targets[VALIDATION] = -5.0
    np.testing.assert_array_equal(one.fit_predict(task), one.fit_predict(replace(task, targets=targets)))
    np.testing.assert_array_equal(one.fit_predict(task), one.fit_predict(replace(task, validation=[])))


def test_the_epoch_of_the_lowest_validation_loss_is_kept():
    task = problem()

    class Watched(DeepSets):
        def _outputs(self, model, batch):
            out = super()._outputs(model, batch)
            if len(batch) == len(VALIDATION):
                errors.append(float((out.squeeze(1).double() - goals).square().mean()))
            return out

    known = task.targets[TRAIN]
    goals = torch.from_numpy((task.targets[VALIDATION] - known.mean()) / known.std())
    errors: list[float] = []
    predicted = Watched(epochs=6, lr=2e-2).fit_predict(task)
    kept = np.square((predicted - task.targets)[VALIDATION]).mean() / known.var()
    assert len(errors) == 6 and kept == pytest.approx(min(errors), rel=1e-5)


def test_the_augmentation_gets_training_networks_and_their_places():
    task = problem(train=TRAIN[::-1])
    known = task.batch[task.train]
    seen: list[int] = []
    draws = []

    def augment(part, rows, generator):
        assert torch.equal(part.values, known[rows].values)
        seen.extend(rows)
        draws.append(float(torch.rand((), generator=generator)))
        return part

    DeepSets(epochs=2).fit_predict(replace(task, augment=augment))
    assert sorted(seen[:80]) == sorted(seen[80:]) == TRAIN and seen[:80] != seen[80:]
    assert len(set(draws)) == len(draws) == 10


def refusals():
    task = problem()
    generator = torch.Generator().manual_seed(0)
    plain = {"0.weight": torch.randn(3, 2), "1.weight": torch.randn(1, 3)}
    convolution = {"0.weight": torch.randn(3, 1, 2), "0.bias": torch.zeros(3)}
    one = network(1.0, generator, (2, 1))

    def of(*states, copies: int = 6) -> Problem:
        batch = sne_fast.pack(list(states) * copies, 8, scale="tensor")
        return Problem(batch, np.linspace(0, 1, len(batch)), [0, 1], [2])

    nan = np.full(120, np.nan)
    yield from ((key, replace(task, targets=nan), "not finite") for key in BASELINES)
    yield from ((key, replace(task, train=[]), "no networks to train on") for key in BASELINES)
    yield from ((key, replace(task, targets=task.targets[:5]), "5 targets for 120 networks") for key in BASELINES)
    yield from ((key, replace(task, targets=task.targets + 1, logit=True), r"outside \[0, 1\]") for key in BASELINES)
    numbers = replace(task, classes=("a", "b"))
    yield from ((key, numbers, "targets that are no positions among 2 classes") for key in BASELINES)
    yield from ((key, mixed(), "networks of different shapes: network 0 .* and network 1 ") for key in ("mlp", "nfn"))
    unknown = replace(task, batch=type(task.batch)(**{**task.batch.fields(), "shapes": ()}))
    yield from ((key, unknown, "without the shapes") for key in ("mlp", "nfn"))
    yield from (("nfn", of(state), "no chain of Linear and Conv2d layers") for state in (plain, convolution))
    yield "nfn", of(one), "without a hidden layer"


REFUSALS = list(refusals())


@pytest.mark.parametrize(("key", "task", "text"), REFUSALS, ids=[f"{k}: {t[:24]}" for k, _, t in REFUSALS])
def test_what_it_cannot_do_is_said_and_refused(key, task, text):
    need(key)
    baseline = BASELINES[key]
    assert len(baseline.why_not(task)) == 1
    with pytest.raises(ValueError, match=f"{baseline.name}: .*{text}"):
        baseline.fit_predict(task)


def test_nothing_is_said_against_what_it_can_do():
    for key in BASELINES:
        need(key)
        assert BASELINES[key].why_not(problem()) == []


@pytest.mark.parametrize(
    ("baseline", "module", "text"),
    [(NFN(), "nfn.layers", "nfn is not installed"), (Statistics(), "sklearn", "scikit-learn is not installed")],
)
def test_a_missing_package_is_said(monkeypatch, baseline, module, text):
    monkeypatch.setitem(sys.modules, module, None)
    assert baseline.why_not(problem()) == [f'{text}: pip install "sne_fast[tasks]"']


def test_a_loss_that_is_not_finite_is_an_error():
    class Never(SetOfWeights):
        def forward(self, batch):
            return super().forward(batch) * float("nan")

    class Broken(Neural):
        name = "broken"
        module = Never

    with pytest.raises(ValueError, match="broken: the loss became nan in epoch 0; lower lr"):
        Broken(epochs=1).fit_predict(problem())

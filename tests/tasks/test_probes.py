"""Learnt probes: what they read is what the networks answer, whatever the form in which the weights are packed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import sne_fast
from sne_fast.symmetry import permute
from sne_fast.tasks.baselines import Probes, Problem
from sne_fast.tasks.baselines.probes import Probing, stacked_tensors
from sne_fast.tasks.networks import Networks
from sne_fast.zoo import Zoo, make_classifier_zoo, make_sine_zoo
from sne_fast.zoo.architectures import ARCHITECTURES
from sne_fast.zoo.runnable import Runnable, runnable
from sne_fast.zoo.sirens import Siren
from sne_fast.zoo.symmetries import symmetries_of

pytest.importorskip("pyarrow")

CNN = "cnn3-pool-batchnorm"


@pytest.fixture(scope="module")
def cnns(tmp_path_factory) -> Zoo:
    folder = tmp_path_factory.mktemp("cnns") / "zoo"
    return make_classifier_zoo(folder, 6, dataset="shapes", architectures=[CNN], max_steps=30, spread="trained")


@pytest.fixture(scope="module")
def sines(tmp_path_factory) -> Zoo:
    return make_sine_zoo(
        tmp_path_factory.mktemp("sines") / "zoo", 60, init="dwsnets", steps=150, frequencies=(0.5, 3.0)
    )


@pytest.mark.parametrize("scale", ["tensor", "none"])
@pytest.mark.parametrize("chunking", ["flat", "neuron", "kernel"])
def test_tensors_are_those_that_were_packed(cnns, chunking, scale):
    batch = sne_fast.pack(cnns, 5, chunking, scale=scale)
    found = stacked_tensors(batch)
    for i in range(len(cnns)):
        state = {name: t for name, t in cnns.state_dict(i).items() if t.is_floating_point()}
        assert set(state) == set(found)
        for name, tensor in state.items():
            torch.testing.assert_close(found[name][i], tensor)


@pytest.mark.parametrize("chunking", ["flat", "kernel"])
def test_answers_are_those_of_the_networks(cnns, chunking):
    model = Probing(sne_fast.pack(cnns, 5, chunking), 1, runnable=runnable([cnns]), probes=7)
    with torch.no_grad():
        answers = model.answers(sne_fast.pack(cnns, 5, chunking))
        for i in range(len(cnns)):
            module = ARCHITECTURES[CNN]().eval()
            module.load_state_dict(cnns.state_dict(i))
            wanted = module(model.probes).softmax(-1).flatten()
            torch.testing.assert_close(answers[i], wanted, rtol=1e-4, atol=1e-5)


def test_answers_of_sirens(sines):
    model = Probing(sne_fast.pack(sines), 1, runnable=runnable([sines]), probes=9)
    with torch.no_grad():
        siren = Siren()
        siren.load_state_dict(sines.state_dict(4))
        torch.testing.assert_close(
            model.answers(sne_fast.pack(sines[[4]]))[0], siren(model.probes)[:, 0], rtol=1e-3, atol=1e-4
        )


def test_permutations_of_hidden_units_change_nothing(cnns):
    batch = sne_fast.pack(cnns)
    model = Probing(batch, 3, runnable=runnable([cnns]), probes=5)
    permuted = permute(batch, symmetries_of(cnns), torch.Generator().manual_seed(0))
    assert not torch.equal(permuted.values, batch.values)
    with torch.no_grad():
        assert model(batch).shape == (6, 3)
        torch.testing.assert_close(model(permuted), model(batch), rtol=1e-3, atol=1e-4)


def test_the_probes_are_learnt(cnns):
    model = Probing(sne_fast.pack(cnns), 1, runnable=runnable([cnns]), probes=5)
    model(sne_fast.pack(cnns)).sum().backward()
    assert model.probes.grad is not None and model.probes.grad.abs().amin((1, 2, 3)).shape == (5,)
    assert (model.probes.grad.flatten(1).abs().sum(1) > 0).all()
    assert set(dict(model.named_parameters())) == {
        "probes",
        *(f"head.{k}.{own}" for k in (0, 2, 4) for own in ("weight", "bias")),
    }


def test_answers_that_are_not_finite_are_bounded(sines):
    wild = [dict(sines.state_dict(0)) for _ in range(2)]
    wild[0]["2.bias"] = torch.tensor([torch.inf])
    wild[1]["2.weight"] = wild[1]["2.weight"] * 1e30
    model = Probing(sne_fast.pack(sines), 1, runnable=runnable([sines]), probes=4)
    with torch.no_grad():
        assert model.answers(sne_fast.pack(wild, nonfinite="keep")).isfinite().all()


@pytest.mark.slow
def test_frequencies_of_sines_are_read_off(sines):
    data = Networks([sines], "a")
    problem = Problem(
        sne_fast.pack(sines, scale="tensor"), data.targets, range(45), range(45, 50), runnable=data.runnable
    )
    predicted = Probes(epochs=60, lr=3e-3).fit_predict(problem)
    test = slice(50, 60)
    assert np.square(predicted - data.targets)[test].mean() < 0.05 * data.targets.var()


def test_what_it_cannot_run_is_said(cnns, sines):
    problem = Problem(sne_fast.pack(sines, scale="tensor"), sines.column("a"), range(40), range(40, 50))
    assert Probes().why_not(problem) == ["no module is known that runs all of the networks"]
    with pytest.raises(ValueError, match="learnt probes, which run the networks: no module is known"):
        Probes().fit_predict(problem)
    (reason,) = Probes().why_not(replace(problem, runnable=runnable([cnns])))
    assert reason.startswith("networks that do not fit their module: {'0.weight': (32, 1)")
    assert Probes().why_not(replace(problem, runnable=runnable([sines]))) == []


def test_networks_of_several_architectures_or_unknown_sources_are_not_run(cnns, sines):
    assert isinstance(runnable([cnns, cnns]), Runnable)
    with pytest.raises(ValueError, match=rf"must be of one architecture, got {CNN} of 8 x 8 images, SIREN of sines"):
        runnable([cnns, sines])
    with pytest.raises(ValueError, match="must be of one architecture, got none"):
        runnable([])
    with pytest.raises(ValueError, match="no way is known to run networks of source 'mine'"):
        runnable([Zoo({"name": ["a"]}, cnns.source, {"source": "mine"})])
    assert Networks([cnns], "test_accuracy").runnable == runnable([cnns])

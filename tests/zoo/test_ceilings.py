"""The tau that a perfect predictor of accuracies reaches, against a loop and where it is known."""

import numpy as np
import pytest
import torch
from scipy.stats import kendalltau

from sne_fast.reports.measures import tau_above
from sne_fast.zoo import make_classifier_zoo, make_sine_zoo
from sne_fast.zoo.architectures import ARCHITECTURES
from sne_fast.zoo.ceilings import accuracy_ceiling, image_hits
from sne_fast.zoo.images import load_images

pytest.importorskip("pyarrow")


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    names = ["mlp-10", "cnn3-pool-batchnorm"]
    folder = tmp_path_factory.mktemp("ceiling") / "zoo"
    return make_classifier_zoo(folder, 30, dataset="shapes", architectures=names, max_steps=150, spread="trained")


def test_hits_are_those_of_each_network(zoo):
    chosen = zoo[[20, 3, 16, 0]]
    hits = image_hits(chosen)
    images, labels = load_images("shapes")[1]
    assert hits.shape == (4, 600) and hits.dtype == torch.bool
    for i, row in enumerate(chosen.rows):
        module = ARCHITECTURES[row["architecture"]]().eval()
        module.load_state_dict(chosen.state_dict(i))
        with torch.no_grad():
            same = (module(images).argmax(1) == labels) == hits[i]
        assert same.float().mean() > 0.998  # two logits may be equal but for rounding
    assert np.abs(hits.double().mean(1).numpy() - chosen.column("test_accuracy")).max() < 0.002


def test_the_ceiling_is_the_mean_tau_over_resamples(zoo):
    hits = image_hits(zoo).double().numpy()
    generator = torch.Generator().manual_seed(5)
    taus, above = [], []
    for _ in range(3):
        drawn = torch.randint(600, (600,), generator=generator).numpy()
        known, sample = hits.mean(1), hits[:, drawn].mean(1)
        taus.append(kendalltau(known, sample).statistic)
        above.append(kendalltau(known[sample > 0.5], sample[sample > 0.5]).statistic)
    found = accuracy_ceiling(zoo, threshold=0.5, resamples=3, seed=5)
    assert found["tau"] == pytest.approx(np.mean(taus)) and found["tau_above"] == pytest.approx(np.mean(above))
    assert 0.6 < found["tau"] < 1


def test_zoos_of_several_data_sets(zoo, tmp_path):
    other = make_classifier_zoo(tmp_path / "z", 2, dataset="glyphs", architectures=["mlp-10"], max_steps=20)
    found = accuracy_ceiling(zoo[:5], other, resamples=2)
    assert found["tau"] is not None and found == accuracy_ceiling(zoo[:5], other, resamples=2)


def test_what_is_not_defined_is_none(zoo):
    assert accuracy_ceiling(zoo[:1]) == {"tau": None, "tau_above": None}
    assert accuracy_ceiling(zoo, threshold=1.0)["tau_above"] is None


def test_tau_above_a_threshold():
    generator = np.random.default_rng(0)
    true, predicted = generator.random((2, 50))
    chosen = [i for i in range(50) if true[i] > 0.3]
    assert tau_above(predicted, true, 0.3) == pytest.approx(kendalltau(predicted[chosen], true[chosen]).statistic)
    assert tau_above(predicted, true, 2.0) is None
    assert tau_above(np.full(50, np.nan), true, 0.3) is None


def test_bad_arguments(zoo, tmp_path):
    with pytest.raises(ValueError, match="accuracy_ceiling: needs networks, got none"):
        accuracy_ceiling()
    with pytest.raises(ValueError, match="needs a zoo of make_classifier_zoo, got source 'sine_inrs'"):
        accuracy_ceiling(make_sine_zoo(tmp_path / "s", 2, steps=2))

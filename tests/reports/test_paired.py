"""Paired differences: values and standard errors against resampling, repeated experiments and the plain formulas."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sne_fast.reports.measures import class_measures, measures
from sne_fast.reports.paired import INFLUENCES, PairedRun, paired_difference, tau_influence

kendalltau = pytest.importorskip("scipy.stats").kendalltau


def draw(generator: np.random.Generator, n: int, noise: tuple[float, float], shared: float = 0.5, decimals: int = 9):
    """Return true values and the predictions of two methods with errors of which `shared` is common."""
    true = generator.random(n).round(decimals)
    common = generator.standard_normal(n)
    predicted = [true + size * (shared * common + generator.standard_normal(n)) for size in noise]
    return true, *(p.round(decimals) for p in predicted)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(3, 60), st.integers(1, 4))
def test_tau_with_ties_is_that_of_scipy_and_influences_are_centred(seed, n, decimals):
    true, predicted, _ = draw(np.random.default_rng(seed), n, (0.3, 0.3), decimals=decimals)
    found, wanted = tau_influence(predicted, true), kendalltau(predicted, true).statistic
    if not np.isfinite(wanted):
        assert found is None
        return
    assert found is not None and found[0] == pytest.approx(wanted) and found[1].sum() == pytest.approx(0, abs=1e-9)


def test_influences_predict_what_leaving_a_network_out_does():
    """To first order, the measure without network i is smaller by its influence, n / (n - 1) times over."""
    generator = np.random.default_rng(0)
    true, predicted, _ = draw(generator, 300, (0.2, 0.2), decimals=2)
    shares = generator.dirichlet(np.ones(4), 300)
    classes = generator.integers(0, 4, 300).astype(float)
    for name, influence in INFLUENCES.items():
        p, y = (shares, classes) if name in ("accuracy", "cross_entropy") else (predicted, true)
        value, moves = influence(p, y)
        without = [influence(np.delete(p, i, 0), np.delete(y, i))[0] for i in range(300)]
        change = value - np.array(without)
        assert np.corrcoef(change, moves)[0, 1] > 0.99 and change.std() == pytest.approx(moves.std(), rel=0.02), name


def test_measures_are_those_of_the_tables():
    generator = np.random.default_rng(1)
    true, predicted, _ = draw(generator, 50, (0.2, 0.2))
    known = measures(predicted, true)
    for name in ("tau", "r2", "mae"):
        assert INFLUENCES[name](predicted, true)[0] == pytest.approx(known[name])
    assert INFLUENCES["mse"](predicted, true)[0] == pytest.approx(known["rmse"] ** 2)
    chosen = true > 0.2
    assert INFLUENCES["tau_above"](predicted, true)[0] == pytest.approx(kendalltau(predicted[chosen], true[chosen])[0])
    shares, classes = generator.dirichlet(np.ones(3), 50), generator.integers(0, 3, 50)
    for name, value in class_measures(shares, classes).items():
        assert INFLUENCES[name](shares, classes)[0] == pytest.approx(value)


def test_the_standard_error_of_tau_is_that_of_the_paired_bootstrap():
    generator = np.random.default_rng(2)
    true, one, other = draw(generator, 200, (0.15, 0.25), shared=1.0, decimals=2)
    found = paired_difference([PairedRun(np.arange(200), true, one, other)], "tau")
    assert found.mean == pytest.approx(kendalltau(one, true)[0] - kendalltau(other, true)[0])
    draws = []
    for _ in range(500):
        rows = generator.integers(0, 200, 200)
        draws.append(kendalltau(one[rows], true[rows])[0] - kendalltau(other[rows], true[rows])[0])
    assert found.standard_error == pytest.approx(np.std(draws), rel=0.12)
    alone = paired_difference([PairedRun(np.arange(200), true, one, generator.permutation(other))], "tau")
    assert found.standard_error < alone.standard_error


@pytest.mark.parametrize("tested", ["the same", "others", "some"])
@pytest.mark.parametrize("spread", [0.0, 0.1])
def test_the_standard_error_covers_test_networks_and_seeds(tested, spread):
    """Over many repetitions of a whole experiment of three seeds it is the spread of the mean difference."""
    generator = np.random.default_rng(3)
    means, variances = [], []
    for _ in range(400):
        true, _, common = draw(generator, 150, (0.2, 0.2))
        errors = common - true
        runs = []
        for seed in range(3):
            rows = {
                "the same": np.arange(50), "others": np.arange(50 * seed, 50 * seed + 50),
                "some": generator.permutation(150)[:50],
            }[tested]  # fmt: skip
            bias = spread * generator.standard_normal()
            one = true + errors + 0.1 * generator.standard_normal(150) + bias
            other = true + errors + 0.15 * generator.standard_normal(150)
            runs.append(PairedRun(rows, true[rows], one[rows], other[rows]))
        found = paired_difference(runs, "mse")
        means.append(found.mean)
        variances.append(found.standard_error**2)
    # The share of seeds is cut at 0, which makes errors of few seeds too large rather than too small.
    assert 0.93 < np.mean(variances) ** 0.5 / np.std(means) < 1.25


def test_what_is_not_defined_or_wrong():
    n = np.arange(5)
    true = np.linspace(0, 1, 5)
    constant = PairedRun(n, true, np.zeros(5), true)
    assert paired_difference([], "tau") is None and paired_difference([constant], "tau") is None
    assert paired_difference([PairedRun(n, true, true, np.full(5, np.nan))], "tau") is None
    assert paired_difference([PairedRun(n[:1], true[:1], true[:1], true[:1])], "mse") is None
    assert paired_difference([constant], "mse").mean == pytest.approx(np.square(true).mean())
    equal = paired_difference([PairedRun(n, true, true, true)] * 2, "tau")
    assert (equal.mean, equal.standard_error, equal.seeds) == (0.0, 0.0, 2)
    with pytest.raises(ValueError, match=r"paired_difference: measure must be one of tau, .*got 'rho'"):
        paired_difference([constant], "rho")
    with pytest.raises(ValueError, match=r"a run must have arrays of one length, got \[4, 5\]"):
        paired_difference([PairedRun(n, true, true[:4], true)], "mse")

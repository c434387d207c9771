"""Measures of predictions, and those that are not defined."""

from __future__ import annotations

import numpy as np
import pytest

from sne_fast.reports.measures import measure_rows, measures

pytest.importorskip("scipy")


def test_perfect_and_reversed_predictions():
    true = np.array([0.1, 0.4, 0.9])
    perfect = measures(true, true)
    assert perfect["tau"] == pytest.approx(1) and (perfect["r2"], perfect["mae"], perfect["rmse"]) == (1, 0, 0)
    assert measures(-true, true)["tau"] == pytest.approx(-1)


def test_the_same_target_everywhere_has_neither_tau_nor_r2():
    found = measures(np.array([1.0, 2.0]), np.array([1.5, 1.5], np.float32))
    assert found == {"tau": None, "tau_p": None, "r2": None, "mae": 0.5, "rmse": 0.5}


def test_the_same_prediction_everywhere_has_no_tau():
    found = measures(np.array([1.0, 1.0]), np.array([0.0, 2.0]))
    assert found == {"tau": None, "tau_p": None, "r2": 0.0, "mae": 1.0, "rmse": 1.0}


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_predictions_that_are_not_finite_have_no_measures(bad):
    assert set(measures(np.array([bad, 1.0]), np.array([0.0, 2.0])).values()) == {None}


def test_no_networks_have_no_measures():
    assert set(measures(np.zeros(0), np.zeros(0)).values()) == {None}


def test_rows_show_a_dash_for_what_is_not_defined():
    assert measure_rows({"m": measures(np.ones(2), np.ones(2))}) == [["m", "-", "-", "-", "0.000", "0.000"]]

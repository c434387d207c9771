"""Plots show names as they are, and measures that are not defined as a dash."""

from __future__ import annotations

import numpy as np
import pytest

from sne_fast.reports.measures import measures
from sne_fast.reports.plots import column_map, embedding_map, literal, new_figure, scatter

pytest.importorskip("matplotlib")
pytest.importorskip("scipy")

NAMES = ["a$b$", "$", "_hidden", "$\\frac{$", "net[v2].pt", "cost_in_$ and $"]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_drawn_as_it_is(name):
    figure = new_figure(2, 2)
    axis = figure.subplots()
    title = axis.set_title(literal(name))
    axis.plot([0, 1], [0, 1], label=literal(name))
    assert axis.get_legend_handles_labels()[1] == [literal(name)]
    assert title._preprocess_math(title.get_text()) == (name if not name.startswith("_") else f" {name}", False)
    figure.canvas.draw()


def test_plots_of_odd_names_and_of_a_constant_target(tmp_path):
    true = np.full(6, 0.5)
    models = {name: np.linspace(0, 1, 6) for name in NAMES[:4]}
    scatter(tmp_path / "s.png", true, models, NAMES, {name: measures(p, true) for name, p in models.items()})
    assert (tmp_path / "s.png").stat().st_size > 1000


@pytest.mark.slow
def test_maps_of_odd_names(tmp_path):
    places = np.random.default_rng(0).normal(size=(6, 2))
    embedding_map(tmp_path / "e.png", places, np.arange(6.0), NAMES, [0], label="$x$", limits=(None, None))
    column_map(tmp_path / "groups.png", places, NAMES, "$\\frac{$")
    column_map(tmp_path / "numbers.png", places, np.array([1.0, np.nan, 2, 3, 4, 5]), "$x$")
    column_map(tmp_path / "unknown.png", places, np.full(6, np.nan), "x")
    column_map(tmp_path / "bytes.png", places, ["no\udc80text", *NAMES[1:]], "no\udc80text")
    many = [f"group {i}" for i in range(40)]
    column_map(tmp_path / "many.png", np.tile(places, (7, 1))[:40], many, "group")
    assert all(file.stat().st_size > 1000 for file in tmp_path.iterdir())

"""Positions in the plane: groups of encodings stay together, and the same encodings are placed the same."""

import numpy as np
import pytest
import torch

from sne_fast.similarity import layout, nearest

pytest.importorskip("sklearn")


def groups(width, each=20, count=3):
    rng = np.random.default_rng(0)
    centres = 12 * np.arange(count)[:, None] * np.ones(width)
    return np.repeat(centres, each, 0) + rng.normal(size=(count * each, width)), np.repeat(np.arange(count), each)


@pytest.mark.parametrize("width", [1, 8, 80])
def test_networks_of_a_group_are_beside_each_other(width):
    vectors, group = groups(width)
    places = layout(torch.tensor(vectors))
    assert places.shape == (60, 2) and places.dtype == np.float32
    _, near = nearest(places, k=3, metric="euclidean", whiten=False)
    assert (group[near] == group[:, None]).mean() > 0.95
    np.testing.assert_array_equal(layout(vectors), places)
    # Each number counts alike, whatever its scale.
    np.testing.assert_allclose(layout(vectors * 1024), places)


def test_few_and_equal_vectors():
    assert layout(np.zeros((0, 4))).shape == (0, 2) and layout(np.zeros((2, 0))).tolist() == [[0, 0], [0, 0]]
    assert layout(np.ones((1, 4))).tolist() == [[0, 0]]
    two = layout(np.array([[0.0, 1], [4, 3]]))
    np.testing.assert_allclose(np.abs(two[:, 0]), 2**0.5, rtol=1e-5)
    np.testing.assert_allclose(two[:, 1], 0, atol=1e-5)
    assert np.ptp(layout(np.eye(3)), axis=0).min() > 1
    for vectors in (np.eye(4), np.ones((9, 4))):
        assert np.isfinite(layout(vectors)).all()


def test_errors():
    with pytest.raises(ValueError, match="layout: vectors must be finite, row 1 is not"):
        layout([[0.0], [float("inf")]])
    with pytest.raises(ValueError, match="layout: vectors must be a matrix of numbers, got float64"):
        layout([0.0, 1.0])
    with pytest.raises(ValueError, match="perplexity must be above 0, got -1"):
        layout(np.eye(4), perplexity=-1)
    for seed in (-1, 2**32):
        with pytest.raises(ValueError, match=rf"layout: seed must lie in \[0, 2\*\*32\), got {seed}"):
            layout(np.eye(4), seed=seed)

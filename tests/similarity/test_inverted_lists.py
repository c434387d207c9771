"""Approximate search: nearly the neighbours of the exact one, with the same distances."""

import numpy as np
import pytest

from sne_fast.similarity import nearest


@pytest.fixture
def gallery(monkeypatch):
    """Return encodings in families of twelve, as those of networks are, enough for approximate search."""
    monkeypatch.setattr("sne_fast.similarity.inverted_lists.SMALLEST", 2000)
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(200, 12))
    return (centres.repeat(12, 0) + 0.2 * rng.normal(size=(2400, 12))).astype(np.float32)


def test_most_neighbours_are_found_with_their_distances(gallery, capfd):
    pytest.importorskip("faiss")
    for queries in (None, gallery[::40] + 0.1):
        exact, wanted = nearest(gallery, queries, 5)
        distances, places = nearest(gallery, queries, 5, approximate=True)
        same = places == wanted
        assert same.mean() > 0.98
        np.testing.assert_array_equal(distances[same], exact[same])
        if queries is None:
            assert not (places == np.arange(len(gallery))[:, None]).any()
        again = nearest(gallery, queries, 5, approximate=True)[1]
        np.testing.assert_array_equal(places, again)
    assert capfd.readouterr().err == ""


def test_copies_and_lists_that_are_too_short(gallery):
    pytest.importorskip("faiss")
    copies = np.concatenate([gallery, gallery[:1].repeat(100, 0)])
    distances, places = nearest(copies, k=20, approximate=True)
    assert not (places == np.arange(len(copies))[:, None]).any() and (np.diff(distances) >= 0).all()
    np.testing.assert_allclose(distances[-100:], 0, atol=1e-6)
    most = len(gallery) - 1  # more than lie in the cells that are looked into
    distances, places = nearest(gallery, gallery[:2], most, approximate=True)
    np.testing.assert_array_equal(places, nearest(gallery, gallery[:2], most)[1])


def test_few_encodings_and_a_missing_package(gallery, monkeypatch):
    few = gallery[:50]
    monkeypatch.setattr("sne_fast.extras.installed", lambda module: False)
    with pytest.raises(
        ModuleNotFoundError, match=r"approximate search needs faiss-cpu: pip install \"sne_fast\[faiss\]"
    ):
        nearest(few, approximate=True)
    monkeypatch.setattr("sne_fast.extras.installed", lambda module: True)
    np.testing.assert_array_equal(nearest(few, k=3, approximate=True)[1], nearest(few, k=3)[1])

"""Similarity: exact search, sketches and their distances, duplicates, layers compared, and the trees of families."""

import copy

import numpy as np
import pytest
import torch

from sne_fast.data.checkpoints import save_state_dict
from sne_fast.similarity import compare, find_duplicates, lineage, nearest, sketch, sketch_distances
from sne_fast.symmetry import trace


def net(seed, outputs=3):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(30, 40), torch.nn.ReLU(), torch.nn.Linear(40, outputs))


def changed(module, change):
    """Return a state_dict with its matrices changed."""
    return {name: change(t) if t.ndim > 1 else t for name, t in module.state_dict().items()}


def noisy(size, seed=0):
    g = torch.Generator().manual_seed(seed)
    return lambda t: t + size * t.std() * torch.randn(t.shape, generator=g)


def prune(t, share=0.5):
    return t * (t.abs() > t.abs().flatten().quantile(share))


def rounded(t):
    step = t.abs().max() / 127
    return (t / step).round() * step


# -------------------------------------------------------------------------------------------------------------- nearest


@pytest.mark.parametrize("whiten", [True, False])
@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_nearest_is_the_brute_force_search(metric, whiten, monkeypatch):
    monkeypatch.setattr("sne_fast.similarity.searching._BLOCK_BYTES", 4000)  # several blocks
    monkeypatch.setattr("sne_fast.similarity.searching._ROWS", 17)
    rng = np.random.default_rng(0)
    gallery, queries = rng.normal(3, 2, (50, 6)), rng.normal(3, 2, (31, 6))
    gallery[:, 5] = queries[:, 5] = 4  # a number that tells nothing
    for given in (queries, None):
        a, b = gallery, gallery if given is None else queries
        if whiten:
            covariance = np.cov(gallery.T, bias=True)
            inverse = np.linalg.inv(covariance + 0.01 * np.trace(covariance) / 6 * np.eye(6))
            factor = np.linalg.cholesky(inverse)
            a, b = ((x - gallery.mean(0)) @ factor for x in (a, b))
        if metric == "cosine":
            a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))
            wanted = 1 - b @ a.T
        else:
            wanted = np.linalg.norm(b[:, None] - a, axis=2)
        if given is None:
            np.fill_diagonal(wanted, np.inf)
        distances, places = nearest(torch.tensor(gallery), given, 7, metric=metric, whiten=whiten)
        np.testing.assert_array_equal(places, wanted.argsort(1)[:, :7])
        np.testing.assert_allclose(distances, np.sort(wanted, 1)[:, :7], atol=1e-5)


@pytest.mark.parametrize("whiten", [True, False])
def test_nearest_tells_near_copies_apart(whiten):
    """Their distances are less than what a product of float32 loses."""
    rng = np.random.default_rng(0)
    others, query, direction = rng.normal(size=(500, 64)), rng.normal(size=64), rng.normal(size=64)
    apart = 1e-5 * (1 + rng.permutation(40))
    gallery = np.concatenate([others, query + apart[:, None] * direction / np.linalg.norm(direction)])
    _, places = nearest(gallery, query[None], 3, metric="euclidean", whiten=whiten)
    assert places[0].tolist() == (500 + np.argsort(apart)[:3]).tolist()


def test_nearest_of_few_and_equal_ones():
    same = np.ones((3, 4), np.float32)
    assert nearest(same, k=10)[1].tolist() == [[1, 2], [0, 2], [0, 1]]
    assert nearest(same, same[:1], k=2)[1].tolist() == [[0, 1]]
    assert nearest(same[:1])[1].shape == (1, 0)
    copies = np.concatenate([np.random.default_rng(0).normal(size=(50, 4))] * 4)
    assert nearest(copies, copies[:2], 3, whiten=False)[1].tolist() == [[0, 50, 100], [1, 51, 101]]
    assert nearest(copies, k=2, whiten=False)[1][:2].tolist() == [[50, 100], [51, 101]]
    huge = np.array([[1e20, 1], [-1e20, 1], [2e20, 1]], np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        assert nearest(huge, huge[:2], 2, metric="euclidean", whiten=False)[1].tolist() == [[0, 2], [1, 0]]
    for gallery in (same[:1], same):  # which say nothing of what networks share
        distances, _ = nearest(gallery, np.array([[2.0, 2, 2, 2], [1, 1, 1, -1], [-1, -1, -1, -1]]), k=1)
        np.testing.assert_allclose(distances[:, 0], [0, 0.5, 2], atol=1e-6)
    with pytest.raises(ValueError, match="k must be at least 1 and encodings of one width"):
        nearest(same, same[:, :2])
    with pytest.raises(ValueError, match="metric must be one of cosine, euclidean, got 'dot'"):
        nearest(same, metric="dot")
    with pytest.raises(ValueError, match="gallery must be finite, row 1 is not"):
        nearest(np.array([[1.0], [np.nan]]))
    with pytest.raises(ValueError, match="queries must be a matrix of numbers"):
        nearest(same, same[0])


# ------------------------------------------------------------------------------------------------------------- sketches


def test_distances_of_sketches_are_those_of_the_weights():
    one, other = net(0), net(1)
    near = changed(one, noisy(0.1))
    found = sketch_distances([sketch(m) for m in (one, near, other, one, net(0, outputs=5))]).distance
    w = [
        torch.cat([t.flatten() for t in s.values() if t.ndim > 1]) for s in (one.state_dict(), near, other.state_dict())
    ]
    for k in (1, 2):
        wanted = float((w[0] - w[k]).norm() / ((w[0].norm() ** 2 + w[k].norm() ** 2) / 2) ** 0.5)
        assert found[0, k] == pytest.approx(wanted, rel=0.25) == found[k, 0]
    assert found[0, 3] == 0 and found[0, 0] == 0 and found[0, 2] > 1
    head = float(one[2].weight.detach().square().sum())
    assert 0.1 < found[0, 4] < 1.2 and found[0, 4] ** 2 > 0.9 * head / float(w[0].square().sum())
    assert np.isinf(sketch_distances([sketch(one), sketch(torch.nn.Linear(3, 2))]).distance[0, 1])


def test_sketches_of_files_and_long_tensors(tmp_path, monkeypatch):
    one = net(0)
    save_state_dict(one.state_dict(), tmp_path / "one.safetensors")
    from_file = sketch(tmp_path / "one.safetensors")
    assert from_file.name == str(tmp_path / "one.safetensors") and from_file.weights == 30 * 40 + 40 + 120 + 3
    assert find_duplicates([sketch(one), from_file])[0].kind == "exact"
    assert sketch(one, name="mine").name == "mine" and [name for name, _ in from_file.layers] == ["0", "2"]
    state = {"weight": torch.randn(50, 41, generator=torch.Generator().manual_seed(0))}
    whole = sketch(state).tensors["weight"]
    monkeypatch.setattr("sne_fast.similarity.sketches._BLOCK", 256)
    parts = sketch(state).tensors["weight"]
    assert parts.digest == whole.digest and parts.unordered == whole.unordered
    assert parts.squares == pytest.approx(whole.squares) and parts.kurtosis == pytest.approx(whole.kurtosis)
    assert whole.kurtosis == pytest.approx(3, abs=0.4)
    shuffled = sketch({"weight": state["weight"][torch.randperm(50)]}).tensors["weight"]
    assert shuffled.unordered == whole.unordered and shuffled.digest != whole.digest
    assert (sketch({"w": torch.tensor([[0.0, -0.0]])}).tensors["w"].zeros, whole.zeros) == (1, 0)


def test_weights_that_are_not_finite_are_near_nothing():
    one, spoilt = net(0), changed(net(0), lambda t: t / 0)
    found = sketch_distances([sketch(one), sketch(spoilt), sketch(spoilt)])
    assert np.isinf(found.distance[0, 1]) and found.distance[0, 0] == 0
    assert [group.members for group in find_duplicates([sketch(one), sketch(spoilt), sketch(spoilt)])] == [(1, 2)]


# ----------------------------------------------------------------------------------------------------------- duplicates


def test_duplicates_of_every_kind():
    one, other = net(0), net(1)
    symmetry = trace(one, torch.zeros(2, 30))
    permuted = symmetry.permute_state_dict(one.state_dict(), torch.Generator().manual_seed(0))
    rounded_to = {name: t.bfloat16() for name, t in other.state_dict().items()}
    renamed = {f"model.{name}": t for name, t in one.state_dict().items()}
    fine_tuned = changed(other, noisy(0.1))
    sketches = [sketch(m) for m in (one, other, permuted, copy.deepcopy(one), rounded_to, renamed, fine_tuned)]
    found = find_duplicates(sketches)
    assert [(group.kind, group.members) for group in found] == [
        ("exact", (0, 3)),
        ("reordered", (0, 2, 5)),
        ("near", (1, 4)),
    ]
    assert found[0].distance == 0 and np.isnan(found[1].distance) and 0 < found[2].distance < 0.01
    assert [group.kind for group in find_duplicates(sketches, tolerance=0)] == ["exact", "reordered"]
    assert find_duplicates(sketches, tolerance=0.3)[-1].members == (1, 4, 6)
    assert find_duplicates([]) == []
    with pytest.raises(ValueError, match="tolerance must be at least 0"):
        find_duplicates(sketches, tolerance=-1)


# -------------------------------------------------------------------------------------------------------------- lineage


def test_lineage_finds_who_was_made_of_whom():
    base, stranger = net(0), net(1)
    tuned, other = changed(base, noisy(0.15, 1)), changed(base, noisy(0.12, 2))
    networks = {
        "pruned": changed(base, prune),
        "mean": {name: (t + other[name]) / 2 for name, t in tuned.items()},
        "tuned": tuned,
        "stranger": stranger,
        "rounded": {name: rounded(t) if t.ndim > 1 else t for name, t in tuned.items()},
        "base": base,
        "other": other,
        "head": {**base.state_dict(), **{f"2.{n}": t for n, t in net(5, outputs=2)[2].state_dict().items()}},
    }
    found = lineage([sketch(network, name=name) for name, network in networks.items()])
    edges = {(edge.parent, edge.child): edge for edge in found.edges}
    assert set(edges) == {
        ("base", "pruned"),
        ("base", "tuned"),
        ("base", "other"),
        ("tuned", "mean"),
        ("other", "mean"),
        ("tuned", "rounded"),
        ("base", "head"),
    }
    relations = {child: edge.relation for (_, child), edge in edges.items()}
    assert relations == {
        "pruned": "prune", "tuned": "train", "other": "train", "mean": "merge", "rounded": "round", "head": "head",
    }  # fmt: skip
    assert found.roots == ("stranger", "base") and len(found.families) == 1 and len(found.families[0]) == 7
    assert edges["base", "pruned"].evidence > 0.8 and edges["base", "tuned"].distance == pytest.approx(0.15, rel=0.3)
    lines = found.table().splitlines()
    assert lines[0] == "child,parent,relation,distance,evidence" and "stranger,,,," in lines and len(lines) == 10
    dot = found.dot()
    assert dot.startswith("digraph lineage {") and '[label="base"]' in dot and "stranger" not in dot
    assert dot.count("->") == 7


def test_lineage_of_strangers_copies_and_odd_names():
    one = net(0)
    found = lineage([sketch(one, name='a "b"\\'), sketch(one, name="copy"), sketch(net(1), name="c")])
    assert len(found.edges) == 1 and found.edges[0].relation == "copy" and found.edges[0].distance == 0
    assert '"a \\"b\\"\\\\"' in found.dot()
    assert lineage([]).edges == () and lineage([sketch(one)]).roots == ("Sequential",)
    with pytest.raises(ValueError, match="names of their own, got 'x' twice"):
        lineage([sketch(one, name="x"), sketch(one, name="x")])
    with pytest.raises(ValueError, match=r"unrelated must lie in \(0, 1.4\], got 2"):
        lineage([sketch(one)], unrelated=2)


# -------------------------------------------------------------------------------------------------------------- compare


def test_compare_says_what_changed_in_each_layer(tmp_path):
    torch.manual_seed(0)
    names = ["same", "changed", "reordered", "resized", "removed"]
    a = torch.nn.ModuleDict({name: torch.nn.Linear(8, 6) for name in names})
    b = copy.deepcopy(a)
    del b["removed"]
    with torch.no_grad():
        b["changed"].weight.mul_(2)
        b["changed"].weight[0] = 0
        b["reordered"].weight.copy_(b["reordered"].weight.flip(0))
    b["resized"], b["added"] = torch.nn.Linear(8, 2), torch.nn.Linear(2, 2)
    save_state_dict(b.state_dict(), tmp_path / "b.safetensors")
    found = {change.layer: change for change in compare(a, tmp_path / "b.safetensors")}
    assert {name: change.status for name, change in found.items()} == {**{n: n for n in names}, "added": "added"}
    assert found["same"].distance == 0 and found["same"].cosine == pytest.approx(1) and found["same"].norm_ratio == 1
    one, other = (
        torch.cat([m["changed"].weight.flatten(), m["changed"].bias]).detach().double() for m in (a, b)
    )  # fmt: skip
    wanted = (one - other).norm() / ((one.norm() ** 2 + other.norm() ** 2) / 2) ** 0.5
    assert found["changed"].distance == pytest.approx(float(wanted))
    assert found["changed"].zeros == (0, 8 / 54) and found["changed"].weights == 54
    assert found["resized"].distance is None and found["added"].zeros == (None, 0)
    assert found["removed"].norm_ratio is None


def test_compare_takes_the_key_of_a_path_and_leaves_nan_undefined(tmp_path):
    weight = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    for name, shift in (("a", 0.0), ("b", 1.0)):
        torch.save({"model": {"a.weight": weight + shift}, "ema": {"a.weight": weight}}, tmp_path / f"{name}.pt")
    paths = tmp_path / "a.pt", tmp_path / "b.pt"
    for given in (paths, tuple(map(str, paths))):
        assert [compare(*given, key=key)[0].status for key in ("ema", "model")] == ["same", "changed"]
    spoilt = weight.clone()
    spoilt[0, 0] = torch.nan
    (change,) = compare({"a.weight": weight}, {"a.weight": spoilt})
    assert (change.status, change.distance, change.cosine, change.norm_ratio) == ("changed", None, None, None)

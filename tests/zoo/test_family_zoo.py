"""The zoo of families: the tree and what each relation did, and that the same arguments give the same zoo."""

import json

import pytest
import torch

from sne_fast.zoo import Zoo, family_children, make_family_zoo, verify
from sne_fast.zoo.family_architectures import ARCHITECTURE_FAMILIES, Draws, build, draw_architecture, head_of
from sne_fast.zoo.family_children import FamilyRecipe, initial, train
from sne_fast.zoo.family_data import DATASETS, alike, find_task
from sne_fast.zoo.family_zoo import FAMILY_SIZE
from sne_fast.zoo.symmetries import symmetries_of

pytest.importorskip("pyarrow")
pytest.importorskip("sklearn")
pytest.importorskip("mlxtend")

ARGUMENTS = {"seed": 3, "max_steps": 12, "scale": 0.3, "architectures": ["cnn", "rnn"]}


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    return make_family_zoo(tmp_path_factory.mktemp("families") / "zoo", 2, **ARGUMENTS)


def floating(state):
    return {name: t for name, t in state.items() if t.is_floating_point()}


def test_rows_say_the_true_tree(families):
    names = [row["name"] for row in families.rows]
    relations = [row["relation"] for row in families.rows[:FAMILY_SIZE]]
    assert relations[:9] == ["root", "seed", *["fine-tune"] * 3, "prune", "round", "lora", "merge"]
    assert relations[-1] == "head" and len(families) == 2 * FAMILY_SIZE
    for row in families.rows:
        if row["parent"] is None:
            assert row["generation"] == 0 and row["root"] == row["name"] and row["relation"] in ("root", "seed")
            continue
        parent = families.rows[names.index(row["parent"])]
        assert row["root"] == parent["root"] and row["generation"] > parent["generation"]
        assert row["trained_steps"] >= parent["trained_steps"] and row["family"] == parent["family"]
    assert [families.rows[k]["recipe"] for k in (0, 1, 2)] == [0, 0, 2]
    assert families.rows[8]["second_parent"] == names[4] and families.rows[8]["generation"] == 2


def test_each_relation_did_what_it_says(families):
    root, *children = (families.state_dict(k) for k in range(FAMILY_SIZE))
    rows = families.rows
    matrices = {name for name, t in root.items() if t.ndim >= 2}
    for name in matrices:
        zeros = int(rows[5]["amount"] * root[name].numel())
        assert (children[4][name] == 0).sum() == zeros  # pruned
        assert len(children[5][name].unique()) <= 255  # rounded
        change = (children[6][name] - root[name]).flatten(1)  # lora
        assert torch.linalg.matrix_rank(change, rtol=1e-3) <= rows[7]["amount"]
        torch.testing.assert_close(children[7][name], (children[2][name] + children[3][name]) / 2)  # merged
    vectors = set(floating(root)) - matrices - {name for name in root if "running" in name}
    assert all(torch.equal(children[6][name], root[name]) for name in vectors)
    moved = [sum((s[n] - root[n]).square().sum() for n in matrices) for s in children[1:4]]
    assert moved[0] < moved[2]  # 1 % and 100 %
    head = children[-1]
    assert rows[FAMILY_SIZE - 1]["dataset"] != rows[0]["dataset"]
    assert {name for name in root if head[name].shape != root[name].shape} <= {"head.weight", "head.bias"}


def test_networks_run_again_and_their_symmetries_are_found(families):
    assert verify(families, tolerance=1e-5) < 1e-5
    assert all(symmetry.log10_order > 0 for symmetry in symmetries_of(families))


def test_an_interrupted_make_gives_the_same_zoo(families, tmp_path):
    class Stop(Exception):
        pass

    def stop(share):
        if share > 0.75:  # the first of the two families is done
            raise Stop

    with pytest.raises(Stop):
        make_family_zoo(tmp_path / "zoo", 2, **ARGUMENTS, on_progress=stop)
    with pytest.raises(FileNotFoundError):
        Zoo.open(tmp_path / "zoo")
    # One killed between the two shards of a family has written the first.
    shards = tmp_path / "zoo" / "shards"
    written = next(iter(shards.glob("?????.rows.json")))
    written.unlink()
    (shards / written.name.replace(".rows.json", ".safetensors")).unlink()
    again = make_family_zoo(tmp_path / "zoo", 2, **ARGUMENTS)
    assert again.rows == families.rows and again.about == families.about
    for k in range(len(again)):
        one, other = again.state_dict(k), families.state_dict(k)
        assert list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("family", ARCHITECTURE_FAMILIES)
def test_architectures_fit_their_tasks(family):
    for kind in ARCHITECTURE_FAMILIES[family]:
        for seed, names in enumerate(DATASETS[kind]):
            task = find_task(names[-1])
            architecture = draw_architecture(family, task, Draws(seed), scale=0.2)
            state = initial(architecture, 0)
            recipe = FamilyRecipe(2, 1e-3, 1e-3, "adam")
            trained, _ = train(architecture, state, task, recipe, 0)
            assert list(trained) == list(state) and not torch.equal(*(s[next(iter(s))] for s in (trained, state)))
            assert head_of(build(architecture))[1].out_features == task.outputs


def test_a_training_that_diverges_is_repeated_more_slowly(monkeypatch):
    task = find_task("friedman")
    architecture = draw_architecture("mlp", task, Draws(0), scale=0.2)
    start, recipe = initial(architecture, 0), FamilyRecipe(2, 0.1, 0.0, "sgd")
    once = family_children._train

    def diverge(architecture, start, task, recipe, *rest):
        found = once(architecture, start, task, recipe, *rest)
        return {name: t / 0 for name, t in found.items()} if recipe.lr > 0.05 else found

    monkeypatch.setattr(family_children, "_train", diverge)
    state, used = train(architecture, start, task, recipe, 0)
    assert used.lr == pytest.approx(0.01) and used.steps == 2 and all(t.isfinite().all() for t in state.values())
    start["head.bias"][0] = torch.nan
    with pytest.raises(FloatingPointError, match=r"mlp.* on friedman did not stay finite"):
        train(architecture, start, task, recipe, 0)


def test_errors_name_what_is_wrong(tmp_path):
    with pytest.raises(ValueError, match="unknown architecture 'gru'; known are mlp, cnn"):
        make_family_zoo(tmp_path, architectures=["gru"])
    with pytest.raises(ValueError, match="families and max_steps must be at least 1"):
        make_family_zoo(tmp_path, 0)
    with pytest.raises(ValueError, match="unknown data set 'cifar'"):
        find_task("cifar")
    with pytest.raises(ValueError, match="'wine' has no 9 classes"):
        find_task("wine/9")
    for text in ("{}", "no", "[1]", json.dumps({"family": "gpt"})):
        with pytest.raises(ValueError, match="must be an architecture of make_family_zoo"):
            build(text)
    with pytest.raises(ValueError, match=r"sizes must lie in 1\.\.2048, got 1000000"):
        build(json.dumps({"family": "rnn", "inputs": 1, "outputs": 2, "cell": "gru", "width": 10**6, "layers": 1}))
    with pytest.raises(ValueError, match="widths must be up to 16 numbers"):
        build(json.dumps({"family": "siren", "inputs": 1, "outputs": 2, "widths": [4] * 17}))
    assert alike("digits") == alike("shapes")

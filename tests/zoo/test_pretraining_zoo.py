"""The zoo for training without labels: what is drawn and what is trained, and that the same arguments give the same."""

import pytest
import torch

from sne_fast.zoo import Zoo, make_pretraining_zoo
from sne_fast.zoo.pretraining_zoo import CLUSTER
from sne_fast.zoo.random_weights import draw_distributions, draw_weights, near
from sne_fast.zoo.symmetries import symmetries_of

pytest.importorskip("pyarrow")
pytest.importorskip("sklearn")
pytest.importorskip("mlxtend")

ARGUMENTS = {"seed": 3, "max_steps": 5, "scale": 0.2, "architectures": ["mlp", "cnn"], "left_out": ["digits", "wine"]}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_pretraining_zoo(tmp_path_factory.mktemp("pretraining") / "zoo", 4, **ARGUMENTS)


def test_clusters_share_an_architecture_and_every_second_one_is_trained(made):
    assert len(made) == 4 * CLUSTER
    for k in range(4):
        rows = made.rows[k * CLUSTER : (k + 1) * CLUSTER]
        assert len({row["architecture"] for row in rows}) == len({row["dataset"] for row in rows}) == 1
        assert {row["family"] for row in rows} == {("mlp", "cnn")[k // 2]}
        assert {row["relation"] for row in rows} == {("random", "brief")[k % 2]}
        assert all((0 < row["trained_steps"] <= 5) == (k % 2 == 1) for row in rows)
        assert all((row["test_loss"] is None) == (k % 2 == 0) for row in rows)
    assert not {row["dataset"].split("/")[0] for row in made.rows} & {"digits", "wine"}
    assert len(symmetries_of(made)) == len(made)


def test_networks_differ_and_the_same_arguments_give_the_same(made, tmp_path):
    states = [made.state_dict(i) for i in range(CLUSTER)]
    name = next(name for name, t in states[0].items() if t.ndim == 2)
    assert len({states[i][name].norm().item() for i in range(CLUSTER)}) == CLUSTER
    again = make_pretraining_zoo(tmp_path / "again", 4, **ARGUMENTS)
    for i in (0, 17, 63):
        for name, tensor in made.state_dict(i).items():
            assert torch.equal(tensor, again.state_dict(i)[name])
    assert len(Zoo.open(tmp_path / "again")) == len(made)


def test_distributions_near_others_give_weights_near_theirs():
    state = {"weight": torch.randn(40, 30), "norm": torch.ones(40), "count": torch.tensor(3)}
    generator = torch.Generator().manual_seed(0)
    middle = draw_distributions(state, generator)
    same, other = near(middle, 0.0, generator), near(middle, 1.0, generator)
    assert all(torch.equal(same[name], middle[name]) for name in state)
    first, second, third = (draw_weights(state, of, 5) for of in (middle, same, other))
    assert torch.equal(first["weight"], second["weight"]) and not torch.allclose(first["weight"], third["weight"])
    assert bool((first["norm"] > 0).all()) and torch.equal(first["count"], state["count"])
    assert all(t.isfinite().all() for t in third.values())


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"clusters": 0}, "clusters and max_steps must be at least 1"),
        ({"architectures": []}, "architectures must not be empty"),
        ({"architectures": ["lstm"]}, "unknown architecture 'lstm'; known are"),
        ({"left_out": ["digits", "wines"]}, "left_out: no data set has a name that starts with 'wines'"),
        ({"left_out": "digits"}, "left_out: no data set has a name that starts with 'i'"),
        ({"left_out": ["digit", "shapes", "glyphs", "textures", "mnist"]}, "left_out leaves no data set for cnn"),
    ],
)
def test_bad_arguments(changes, text, tmp_path):
    arguments = {"clusters": 2, **ARGUMENTS, **changes}
    with pytest.raises(ValueError, match=text):
        make_pretraining_zoo(tmp_path / "zoo", **arguments)

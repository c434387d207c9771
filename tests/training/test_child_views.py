"""Views by children: they stand in for their parents, with their own places, by their share, and are seeded."""

from itertools import pairwise

import pytest
import torch

import sne_fast
from sne_fast.training import ChildViews, Contrastive, ContrastiveModel, Views, children_of
from sne_fast.training.fingerprint import of_object

OFF = {"permute": 0, "noise": 0, "prune": 0, "round": 0, "head": 0}


@pytest.fixture(scope="module")
def networks():
    torch.manual_seed(0)
    shapes = [(6, 8, 3), (6, 8, 3), (5, 3), (6, 8, 3), (5, 3)]
    return [torch.nn.Sequential(*(torch.nn.Linear(a, b) for a, b in pairwise(own))) for own in shapes]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_children_stand_in_by_their_share(networks):
    batch = sne_fast.pack(networks).detach()
    told = []

    def views(part, rows, source):
        told.append(list(rows))
        return part

    children = [[1, 3], [], [4], [], []]
    found = ChildViews(views, batch, children, share=1)(batch[[2, 0, 1]], [2, 0, 1], generator())
    (places,) = told
    assert places[0] == 4 and places[1] in (1, 3) and places[2] == 1
    wanted = batch[places]
    assert torch.equal(found.values, wanted.values) and found.shapes == wanted.shapes
    assert torch.equal(found.network_ptr, wanted.network_ptr) and torch.equal(found.layer_level, wanted.layer_level)
    ChildViews(views, batch, children, share=0)(batch, range(5), generator())
    assert told.pop() == [0, 1, 2, 3, 4]
    some = ChildViews(views, batch, children, share=0.5)
    for seed in range(40):
        some(batch, range(5), generator(seed))
    drawn = [places[0] for places in told[1:]]
    assert 10 <= drawn.count(0) <= 30 and drawn.count(1) > 2 < drawn.count(3)
    some(batch, range(5), generator(7))
    assert told[-1] == told[8]


def test_the_loss_and_the_fingerprint_take_them(networks):
    batch = sne_fast.pack(networks).detach()
    model = ContrastiveModel(sne_fast.SNE(hidden_dim=32), projected=8)
    views = ChildViews(Views(**OFF), batch, [[1], [0], [4], [], []], share=1)
    objective = Contrastive(model, views, groups=torch.tensor([0, 0, 1, 2, 1]))
    losses = objective(batch, range(5), generator(), model.encoder)
    assert losses.shown.isfinite().all()
    other = ChildViews(Views(**OFF), batch, [[1], [0], [4], [], []], share=0.5)
    assert of_object(views) == of_object(objective.views) != of_object(other)


def test_children_of_a_zoo_and_errors(networks):
    rows = [
        {"name": name, "parent": parent, "relation": relation}
        for name, parent, relation in (
            ("a", None, None), ("b", "a", "fine-tune"), ("c", "a", "prune"), ("d", "elsewhere", "fine-tune")
        )
    ]  # fmt: skip
    assert children_of(rows) == [[1], [], [], []]
    assert children_of(rows, ("fine-tune", "prune")) == [[1, 2], [], [], []]
    with pytest.raises(ValueError, match="two networks are called 'a'; give the rows of one zoo"):
        children_of([*rows, *rows])
    batch = sne_fast.pack(networks).detach()
    with pytest.raises(ValueError, match="children must be lists for 5 networks, got 1"):
        ChildViews(Views(), batch, [[]])
    with pytest.raises(ValueError, match="children must be places of 5 networks"):
        ChildViews(Views(), batch, [[5], [], [], [], []])
    with pytest.raises(ValueError, match=r"share must lie in \[0, 1\], got 2"):
        ChildViews(Views(), batch, [[]] * 5, share=2)

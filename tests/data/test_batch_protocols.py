"""Walkers of nested containers, loaders, pytrees and `torch.export` handle a `WeightBatch`."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterable, Mapping
from typing import Any

import pytest
import torch
from torch.utils import _pytree
from torch.utils.data import DataLoader, default_collate, default_convert

import sne_fast
from helpers.networks import make, randomise_
from sne_fast import WeightBatch


def batch_of(*names: str) -> WeightBatch:
    return sne_fast.pack([make(name, n) for n, name in enumerate(names)]).detach()


def same(one: WeightBatch, other: WeightBatch) -> bool:
    return repr(one) == repr(other) and torch.equal(one.values, other.values) and one.names == other.names


def leaves(data: Any) -> list[Any]:
    """Walk containers as training libraries do: whatever is a mapping or an iterable is looked into."""
    if isinstance(data, Mapping):
        return [leaf for value in data.values() for leaf in leaves(value)]
    if isinstance(data, Iterable) and not isinstance(data, (str, torch.Tensor)):
        return [leaf for value in data for leaf in leaves(value)]
    return [data]


@pytest.mark.parametrize("names", [("mlp",), ("mlp", "cnn"), ()])
def test_walkers_of_nested_containers_come_to_an_end(names: tuple[str, ...]) -> None:
    batch = batch_of(*names) if names else batch_of("mlp")[:0]
    found = leaves({"x": [batch, (batch, 3)], "y": torch.ones(2)})
    assert found[0] is batch and found[1] is batch and len(found) == 4


def test_iterating_gives_batches_of_one() -> None:
    batch = batch_of("mlp", "cnn", "one_scalar")
    assert [len(one) for one in batch] == [1, 1, 1]
    assert all(same(one, batch[n]) for n, one in enumerate(batch))
    (only,) = batch[1]
    assert len(only) == 1 and next(iter(batch[1])) is not batch[1]
    one = batch[1]
    assert next(iter(one)) is not one and same(next(iter(one)), one)
    assert list(batch[:0]) == []


def test_the_default_collate_joins_batches_inside_tuples_and_dicts() -> None:
    batch = batch_of("mlp", "cnn", "one_scalar")
    assert same(default_collate(list(batch)), batch)
    x, y = default_collate([(one, float(n)) for n, one in enumerate(batch)])
    assert same(x, batch) and y.tolist() == [0, 1, 2]
    joined = default_collate([{"x": one, "y": {"n": n}} for n, one in enumerate(batch)])
    assert same(joined["x"], batch) and joined["y"]["n"].tolist() == [0, 1, 2]
    assert default_convert(batch) is batch


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_loaders_take_batches_without_a_collate_function(workers: int) -> None:
    batch = batch_of("mlp", "cnn", "one_scalar", "mlp_tiny", "mlp")
    loader = DataLoader([(one, n) for n, one in enumerate(batch)], 2, num_workers=workers, pin_memory=False)
    parts = list(loader)
    assert same(WeightBatch.cat([x for x, _ in parts]), batch)
    assert torch.cat([y for _, y in parts]).tolist() == [0, 1, 2, 3, 4]
    assert same(WeightBatch.cat(list(DataLoader(batch, 2))), batch)  # a batch is a data set of its networks
    assert torch.isfinite(sne_fast.SNE(hidden_dim=32)(parts[0][0])).all()


def test_batches_are_nodes_of_pytrees() -> None:
    batch = batch_of("mlp", "cnn")
    again = _pytree.tree_map(lambda t: t.clone(), {"x": batch})["x"]
    assert same(again, batch) and again.shapes == batch.shapes
    encoder = sne_fast.SNE(hidden_dim=32)
    assert torch.equal(encoder(again), encoder(batch))
    other = batch_of("one_scalar")
    assert _pytree.tree_structure(batch) == _pytree.tree_structure(other), "names are not compared"
    assert _pytree.tree_structure(batch) != _pytree.tree_structure(sne_fast.pack([make("mlp")], 16))
    assert copy.copy(batch) is batch


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["sab", "isab"])
def test_an_exported_encoder_takes_other_batches(attention: str) -> None:
    encoder = randomise_(sne_fast.SNE(hidden_dim=32, set_attention=attention, num_inducing=3), 1, 0.2).eval()
    example, other = batch_of("mlp", "cnn"), batch_of("one_scalar", "mlp_tiny", "cnn")
    sizes = {"networks": [{0: torch.export.Dim.AUTO} for _ in _pytree.tree_leaves(example)]}
    program = torch.export.export(encoder, (example,), dynamic_shapes=sizes)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    with torch.serialization.safe_globals([WeightBatch]):  # the example is saved beside the program
        loaded = torch.export.load(file)
    for exported in (program.module(), loaded.module()):
        for batch in (example, other):
            torch.testing.assert_close(exported(batch), encoder(batch))

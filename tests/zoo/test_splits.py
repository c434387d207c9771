"""Parts of a zoo for training: which networks train, validate and test."""

from __future__ import annotations

import pytest
import torch

import sne_fast
from sne_fast.zoo import Zoo, ZooWriter
from sne_fast.zoo.splits import split_zoo

pytest.importorskip("pyarrow")


@pytest.fixture
def zoo(tmp_path) -> Zoo:
    with ZooWriter(tmp_path / "z") as writer:
        for k, part in enumerate(("train", "train", "val", "validation", "test")):
            writer.add(f"n{k}", torch.nn.Linear(2, 1).state_dict(), {"split": part})
    return Zoo.open(tmp_path / "z")


def test_val_is_validation(zoo):
    assert split_zoo(zoo, "split", 0) == {"train": [0, 1], "validation": [2, 3], "test": [4]}


def test_other_parts_are_refused(zoo):
    odd = zoo.with_column("split", ["train", "test", "dev", "train", "x"])
    with pytest.raises(ValueError, match="column 'split' must say train, validation, test, got dev, x"):
        split_zoo(odd, "split", 0)


def test_messages_and_batches_name_the_networks_of_a_zoo(zoo):
    assert [name for name, _ in sne_fast.pack(zoo[1:3]).names] == ["n1", "n2"]
    with pytest.raises(ValueError, match=r"network 0 \('n3'\)"):
        sne_fast.pack(zoo[3:], kinds={"nothing": "linear"})

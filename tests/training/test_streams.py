"""Training on networks that are read when a step needs them: as on a batch, with exact resumes within an epoch."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.small_trainings import goals, make, networks, packed, same
from sne_fast import Predictor, WeightBatch
from sne_fast.nn import Preparation
from sne_fast.training import FitSettings, History, NetworkStream, fit, predict
from sne_fast.zoo import Zoo, ZooDataset, ZooWriter, pack_options, zoo_loader

pytest.importorskip("pyarrow")
COUNT = 24
SETTINGS = FitSettings(epochs=3, batch_weights=80, lr=1e-3)


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    """Networks of one shape, in shards of four."""
    folder = tmp_path_factory.mktemp("zoo")
    weights = networks(COUNT)
    with ZooWriter(folder / "z", source="mine") as writer:
        for first in range(0, COUNT, 4):
            stacked = {name: torch.stack([n[name] for n in weights[first : first + 4]]) for name in weights[0]}
            rows = [(f"n{i:02d}", {"x": i / COUNT}) for i in range(first, first + 4)]
            writer.add_group(f"s{first:02d}", first, stacked, rows)
    return Zoo.open(folder / "z")


def stream(zoo: Zoo, predictor: Predictor, **options: Any) -> ZooDataset:
    return ZooDataset(zoo, goals(COUNT), pack_options(predictor), buffer=8, **options)


class InOneOrder:
    """A stream whose order is that of a batch, to compare with it."""

    def __init__(self, inner: ZooDataset) -> None:
        self.sizes, self.targets, self.parts = inner.sizes, inner.targets, inner.parts
        self.network_name, self.fingerprint = inner.network_name, inner.fingerprint

    def order(self, generator: torch.Generator) -> list[int]:
        return torch.randperm(len(self.sizes), generator=generator).tolist()


def test_the_order_keeps_shards_together(zoo: Zoo) -> None:
    data = stream(zoo, make())
    assert isinstance(data, NetworkStream)
    orders = [data.order(torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2] and sorted(orders[2]) == list(range(COUNT))
    for start in range(0, COUNT, 8):
        assert len({row // 4 for row in orders[0][start : start + 8]}) == 2, "a stretch is two whole shards"
    assert orders[0][:8] != sorted(orders[0][:8])
    assert sorted(ZooDataset(zoo[[5, 1]]).order(torch.Generator())) == [0, 1]


@pytest.mark.parametrize(
    "options",
    [
        {"encoder": {"statistics": "tensor"}},
        {
            "encoder": {"scale": "none"},
            "normalise_inputs": "zoo",
            "preparation": Preparation(units="canonical", jitter=0.1),
        },
        {"preparation": Preparation(relative=True)},
    ],
)
def test_a_stream_trains_as_a_batch(zoo: Zoo, options: dict[str, Any]) -> None:
    one, other = make(**options), make(**options)
    batch = one.pack(zoo).detach()
    expected = fit(one, batch, goals(COUNT), SETTINGS, validation=(batch[:5], goals(COUNT)[:5]))
    read = InOneOrder(stream(zoo, other))
    watched = ZooDataset(zoo[:5], goals(COUNT)[:5], pack_options(other))
    found = fit(other, read, settings=SETTINGS, validation=watched)
    assert found.train_loss == pytest.approx(expected.train_loss, rel=1e-5)
    assert found.validation_loss == pytest.approx(expected.validation_loss, rel=1e-5)
    for name, value in one.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], value, rtol=1e-4, atol=1e-6, msg=name)
    values = predict(other, ZooDataset(zoo, goals(COUNT), pack_options(other)), 80)[0]
    torch.testing.assert_close(values, predict(other, batch)[0])


class Killed(Exception):
    pass


def test_a_run_killed_after_any_step_resumes_to_the_same_bits(zoo: Zoo, tmp_path: Path) -> None:
    whole = make(encoder={"statistics": "tensor"})
    expected = fit(whole, stream(zoo, whole), settings=SETTINGS, checkpoint=tmp_path / "whole.pt")
    path = tmp_path / "cut.pt"
    kills = iter([3, 1, 0, 7, 4, 2, 40])
    steps: list[int] = []

    def kill() -> Any:
        after = next(kills)

        def on_batch(weights: int) -> None:
            nonlocal after
            steps.append(weights)
            after -= 1
            if after < 0:
                raise Killed

        return on_batch

    while True:
        cut = make(encoder={"statistics": "tensor"})
        try:
            found = fit(
                cut, stream(zoo, cut), settings=SETTINGS, checkpoint=path, checkpoint_seconds=0, on_batch=kill()
            )
        except Killed:
            continue
        break
    assert found.train_loss == expected.train_loss and same(cut, whole)
    # A step whose checkpoint was not written is taken again, and no other one.
    assert len(steps) == 3 * COUNT // 2 + 6


def test_workers_read_the_same(zoo: Zoo) -> None:
    here, there = make(), make()
    one = FitSettings(epochs=1, batch_weights=80)
    state = torch.random.get_rng_state()
    expected: History = fit(here, stream(zoo, here), settings=one)
    assert fit(there, stream(zoo, there, workers=1), settings=one).train_loss == expected.train_loss
    assert same(here, there) and torch.equal(torch.random.get_rng_state(), state)


def test_a_loader_stands_for_its_networks(zoo: Zoo) -> None:
    one, other = make(), make()
    loader = zoo_loader(zoo, "x", encoder=one, budget=10**6)
    data = ZooDataset(zoo, "x", pack_options(one))
    expected = fit(one, data, settings=SETTINGS, validation=data)
    found = fit(other, loader, settings=SETTINGS, validation=loader)
    assert (found.train_loss, found.validation_loss) == (expected.train_loss, expected.validation_loss)
    assert torch.equal(predict(other, loader)[0], predict(one, data)[0])
    with pytest.raises(ValueError, match="fit: validation must have at least one network, got an empty stream"):
        fit(other, loader, settings=SETTINGS, validation=ZooDataset(zoo[[]], "x", pack_options(one)))


def test_a_checkpoint_of_other_networks_is_refused(zoo: Zoo, tmp_path: Path) -> None:
    predictor, path = make(), tmp_path / "fit.pt"
    fit(predictor, stream(zoo, predictor), settings=SETTINGS, checkpoint=path)
    with pytest.raises(ValueError, match=r"networks differ \(24 networks .* read from disk then, 12 networks"):
        fit(make(), ZooDataset(zoo[:12], goals(12), pack_options(predictor)), settings=SETTINGS, checkpoint=path)
    with pytest.raises(ValueError, match=r"networks differ \(.* in a buffer of 8, .* then, .* in a buffer of 4, "):
        fit(make(), ZooDataset(zoo, goals(COUNT), stream(zoo, predictor).options, buffer=4), settings=SETTINGS,
            checkpoint=path)  # fmt: skip
    changed = Zoo.open(zoo.folder or "")
    read = changed.source.read
    changed.source.read = lambda i: {name: t + (i == 20) for name, t in read(i).items()}  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=r"fit.pt' is of another training: networks differ; "):
        fit(make(), stream(changed, predictor), settings=SETTINGS, checkpoint=path)


class Other:
    """A stream with one mistake."""

    def __init__(self, zoo: Zoo, **wrong: Any) -> None:
        self.inner = ZooDataset(zoo, goals(COUNT), pack_options(make()))
        self.sizes, self.targets, self.order = self.inner.sizes, self.inner.targets, self.inner.order
        self.network_name, self.fingerprint = self.inner.network_name, self.inner.fingerprint
        self.wrong = wrong
        self.sizes = wrong.get("sizes", self.sizes)

    def parts(self, rows: Any) -> Iterator[Any]:
        yield from islice((self.wrong.get("part", part) for part in self.inner.parts(rows)), self.wrong.get("most"))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"part": 3}, "fit: batch must be a WeightBatch, got 3"),
        ({"part": packed(make(chunk_size=8))}, "fit: batch must be packed with chunk_size 16"),
        ({"sizes": torch.full((COUNT,), 36)}, r"fit: network \d+ \('n\d+'\) must have the 36 weights .* got 35"),
        ({"most": 2}, r"fit: the stream must give a batch for each of \d+ parts, got 2"),
        ({"sizes": torch.zeros(0)}, "fit: batch must have at least one network, got an empty stream"),
    ],
)
def test_what_a_stream_gives_is_checked(zoo: Zoo, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        fit(make(), Other(zoo, **wrong), settings=SETTINGS)


def test_other_iterables_are_refused_with_what_to_do(zoo: Zoo) -> None:
    def pairs() -> Iterator[tuple[WeightBatch, torch.Tensor]]:
        yield packed(), goals()

    with pytest.raises(TypeError, match=r"got generator, which does not tell .* use sne_fast.zoo.ZooDataset"):
        fit(make(), pairs(), settings=SETTINGS)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="fit: targets must be given with a WeightBatch, got None"):
        fit(make(), packed(), settings=SETTINGS)
    with pytest.raises(ValueError, match=r"targets must have one row per network \(24\), got 6"):
        ZooDataset(zoo, goals(6))

"""A zoo's own form: what is written comes back, lazily, and what is damaged or foreign is refused."""

import json
import os
import pickle

import numpy as np
import pytest
import torch
from torch import nn

import sne_fast
from sne_fast.data.checkpoints import CheckpointError, load_state_dict
from sne_fast.nn import Preparation
from sne_fast.training import network_sizes
from sne_fast.zoo import WeightBudgetSampler, Zoo, ZooDataset, ZooWriter, networks_at, pack_options, zoo_loader

pa = pytest.importorskip("pyarrow")
import pyarrow.parquet as pq  # noqa: E402


def networks(count=7, seed=0):
    """Make networks of two architectures in turn, their tensors not in the order of their names."""
    torch.manual_seed(seed)
    makers = (
        lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 3)),
        lambda: nn.ModuleDict({"z": nn.Linear(4, 3), "a": nn.Linear(3, 2)}),
    )
    return [makers[i % 2]() for i in range(count)]


def written(folder, count=7, **options):
    modules = networks(count)
    with ZooWriter(folder, source="mine", targets=["accuracy"], **options) as writer:
        for i, module in enumerate(modules):
            writer.add(f"n{i}", module.state_dict(), {"accuracy": i / 10, "kind": "ab"[i % 2], "note": None})
    return Zoo.open(folder), modules


def same(a, b):
    assert list(a) == list(b)
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("shard_bytes", [1, 500, 1 << 20])
def test_what_is_written_comes_back_in_order(tmp_path, shard_bytes):
    zoo, modules = written(tmp_path / "z", shard_bytes=shard_bytes)
    assert (
        len(zoo) == 7 and zoo.targets == ["accuracy"] and zoo.columns == ["name", "accuracy", "kind", "note", "weights"]
    )
    for i, module in enumerate(modules):
        same(zoo.state_dict(i), module.state_dict())
    floats = [sum(t.numel() for t in m.state_dict().values() if t.is_floating_point()) for m in modules]
    assert zoo.sizes.tolist() == floats
    assert zoo.sizes.tolist() == network_sizes(sne_fast.pack(zoo)).tolist()
    assert sorted(p.name for p in (tmp_path / "z").iterdir()) == ["index.parquet", "shards", "zoo.json"]
    assert {p.suffix for p in (tmp_path / "z" / "shards").iterdir()} == {".safetensors"}
    assert pq.read_table(tmp_path / "z" / "index.parquet").num_rows == 7
    assert json.loads((tmp_path / "z" / "zoo.json").read_text())["source"] == "mine"


def test_packing_a_zoo_equals_packing_its_modules(tmp_path):
    zoo, modules = written(tmp_path / "z")
    got, expected = sne_fast.pack(zoo), sne_fast.pack([m.state_dict() for m in modules])
    assert torch.equal(got.values, expected.values) and torch.equal(got.tensor_type, expected.tensor_type)
    from_modules = sne_fast.pack(modules).detach()
    torch.testing.assert_close(got.values, from_modules.values)
    assert torch.equal(got.layer_level, from_modules.layer_level)


def test_choosing_networks(tmp_path):
    zoo, modules = written(tmp_path / "z")
    same(zoo[-1], modules[6].state_dict())
    assert [n.name for n in zoo[zoo.column("kind") == "b"]] == ["n1", "n3", "n5"]
    part = zoo[2:6][[3, 0]]
    assert part.column("accuracy").tolist() == [0.5, 0.2] and part.rows[1]["name"] == "n2"
    same(part.state_dict(0), modules[5].state_dict())
    assert zoo[torch.tensor([1])].find("n1") == 0 and len(zoo[[]]) == 0
    assert zoo.column("note").dtype == object and zoo.column("accuracy").dtype == np.float64
    network = zoo[4]
    assert network.row["accuracy"] == 0.4 and str(network) == str(tmp_path / "z" / "n4") and network == network
    with pytest.raises(IndexError, match="index 7 is outside a zoo of 7 networks"):
        zoo[7]
    with pytest.raises(IndexError, match=r"one entry per network \(7\)"):
        zoo[np.array([True])]
    with pytest.raises(TypeError, match="must be ints, booleans or a slice"):
        zoo["n1"]
    with pytest.raises(KeyError, match="no column 'tau'; it has name, accuracy"):
        zoo.column("tau")
    with pytest.raises(KeyError, match="no network 'x'"):
        zoo.find("x")


def test_a_saved_selection_is_a_zoo(tmp_path):
    zoo, modules = written(tmp_path / "z")
    shares = []
    zoo = zoo.with_column("split", np.array([0, 0, 0, 0, 1, 2, 2]))
    with pytest.raises(ValueError, match=r"'split' must have one value per network \(7\), got 1"):
        zoo.with_column("split", ["train"])
    saved = zoo[[5, 0, 2]].save(tmp_path / "part", on_progress=shares.append)
    assert saved.column("name").tolist() == ["n5", "n0", "n2"] and saved.column("split").tolist() == [2, 0, 0]
    assert saved.about["source"] == "mine"
    same(saved.state_dict(0), modules[5].state_dict())
    assert shares == sorted(shares) and shares[-1] == 1.0
    saved.export(1, tmp_path / "one.safetensors")
    same(load_state_dict(tmp_path / "one.safetensors"), modules[0].state_dict())


def test_paths_stand_for_networks(tmp_path):
    written(tmp_path / "z")
    assert [n.name for n in networks_at(tmp_path / "z")] == [f"n{i}" for i in range(7)]
    assert [n.name for n in networks_at(tmp_path / "z" / "n3")] == ["n3"]
    assert networks_at(tmp_path) is None and networks_at(tmp_path / "z" / "shards") is None
    found = networks_at(tmp_path / "z")
    assert torch.equal(sne_fast.pack(found).values, sne_fast.pack(Zoo.open(tmp_path / "z")).values)
    assert all(network._read is None for network in found)  # a list of all networks holds none of their weights
    assert len(found[0]) == len(list(found[0])) == len(found[0].values()) and "x" not in found[0]
    with pytest.raises(KeyError, match="no network 'n9'"):
        networks_at(tmp_path / "z" / "n9")


def resident():
    with open("/proc/self/statm") as stream:
        return int(stream.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="resident memory is read from /proc")
def test_reading_one_network_reads_its_pages_only(tmp_path):
    with ZooWriter(tmp_path / "z") as writer:
        stacked = {"weight": torch.randn(256, 256, 1024)}  # 256 MiB
        writer.add_group("big", 0, stacked, [(f"n{i}", {"x": i}) for i in range(256)])
        expected = stacked["weight"][77].clone()
        del stacked
    before = resident()
    zoo = Zoo.open(tmp_path / "z")
    got = zoo.state_dict(77)["weight"]
    assert torch.equal(got, expected)
    assert resident() - before < 48 << 20
    got.zero_()  # a copy: what was read can be changed without changing what is read next
    assert torch.equal(zoo.state_dict(77)["weight"], expected)


def test_a_zoo_goes_to_other_processes(tmp_path):
    zoo, modules = written(tmp_path / "z")
    zoo.state_dict(0)
    again = pickle.loads(pickle.dumps(zoo))
    assert len(pickle.dumps(zoo)) < 10_000
    same(again.state_dict(3), modules[3].state_dict())


def test_a_shard_is_no_checkpoint(tmp_path):
    written(tmp_path / "z")
    with pytest.raises(CheckpointError, match=r"sne_fast.order"):
        load_state_dict(next((tmp_path / "z" / "shards").iterdir()))


def test_writer_refuses_what_it_cannot_keep(tmp_path):
    row = {"loss": 0.5}
    weights = {"w": torch.ones(2)}
    with ZooWriter(tmp_path / "z") as writer:
        writer.add("a", weights, row)
        for name, state_dict, other, error, message in [
            ("b", weights, {"loss": float("nan")}, ValueError, "loss of b must be finite"),
            ("b", weights, {"accuracy": 0.5}, ValueError, "b must have the columns"),
            ("b", weights, {"loss": torch.ones(1)}, TypeError, "loss of b must be a number or a string, got Tensor"),
            ("b", weights, {"shard": 1}, ValueError, "a column cannot be called 'shard'"),
            ("a", weights, row, ValueError, "names must be unique and without slashes, got 'a'"),
            ("x/y", weights, row, ValueError, "names must be unique and without slashes, got 'x/y'"),
            ("c", {}, row, ValueError, "c must hold at least one tensor"),
        ]:
            with pytest.raises(error, match=message):
                writer.add(name, state_dict, other)
        with pytest.raises(ValueError, match=r"of group 'g' must be of shape \(1, ...\)"):
            writer.add_group("g", 1, {"w": torch.ones(2, 3)}, [("d", row)])
    assert [r["name"] for r in Zoo.open(tmp_path / "z").rows] == ["a"]
    with pytest.raises(FileExistsError, match="holds a zoo already"):
        ZooWriter(tmp_path / "z")
    with pytest.raises(ValueError, match="'x' must hold values of one type"), ZooWriter(tmp_path / "m") as writer:
        writer.add("a", weights, {"x": 1})
        writer.add("b", weights, {"x": "one"})


def test_a_failed_run_leaves_nothing_or_with_resume_what_is_done(tmp_path, monkeypatch):
    with pytest.raises(RuntimeError, match="stop"), ZooWriter(tmp_path / "z", shard_bytes=1) as writer:
        writer.add("a", {"w": torch.ones(2)}, {"x": 1})
        raise RuntimeError("stop")
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == []
    with pytest.raises(FileNotFoundError, match=r"holds no index\.parquet"):
        Zoo.open(tmp_path / "z")

    group = {"w": torch.arange(6.0).view(2, 3)}
    with pytest.raises(RuntimeError), ZooWriter(tmp_path / "r", resume=True, source="mine", seed=1) as writer:
        writer.add_group("second", 2, group, [("c", {"x": 3}), ("d", {"x": 4})])
        raise RuntimeError("stop")
    with pytest.raises(FileExistsError, match="holds an unfinished zoo"):
        ZooWriter(tmp_path / "r", source="mine", seed=1)
    with pytest.raises(ValueError, match=r"made with other arguments \(seed 1 there, 2 here\)"):
        ZooWriter(tmp_path / "r", resume=True, source="mine", seed=2)
    with (
        monkeypatch.context() as patch,
        pytest.raises(ValueError, match=r"other arguments \(torch .* there, '1.0' here"),
    ):
        patch.setattr(torch, "__version__", "1.0")
        ZooWriter(tmp_path / "r", resume=True, source="mine", seed=1)
    left = tmp_path / "r" / "shards" / ".first.safetensors.01234567.tmp"  # by a writer that was killed
    left.mkdir()
    (left / "content").write_bytes(b"half")
    with ZooWriter(tmp_path / "r", resume=True, source="mine", seed=1) as writer:
        assert writer.has("second") and not writer.has("first")
        with pytest.raises(ValueError, match="unique"):
            writer.add_group("first", 0, group, [("a", {"x": 1}), ("c", {"x": 2})])
    # nothing was added, the finished group alone is a zoo
    assert Zoo.open(tmp_path / "r").column("name").tolist() == ["c", "d"]
    assert [path.name for path in (tmp_path / "r" / "shards").iterdir()] == ["second.safetensors"]


def test_damaged_zoos_are_refused(tmp_path):
    zoo, _ = written(tmp_path / "z")
    index = pq.read_table(tmp_path / "z" / "index.parquet")
    shard = next((tmp_path / "z" / "shards").iterdir())

    def reopened(table):
        pq.write_table(table, tmp_path / "z" / "index.parquet")
        return Zoo.open(tmp_path / "z")

    with pytest.raises(ValueError, match=r"lacks the column\(s\) position"):
        reopened(index.drop_columns(["position"]))
    at = index.schema.get_field_index("shard")
    for bad in ("../shards/00000", "/etc/passwd", ".hidden", ""):
        with pytest.raises(ValueError, match="is no plain name"):
            reopened(index.set_column(at, "shard", pa.array([bad] * 7)))
    with pytest.raises(CheckpointError, match="names this shard, but it is missing"):
        reopened(index.set_column(at, "shard", pa.array(["gone"] * 7))).state_dict(0)
    at = index.schema.get_field_index("position")
    with pytest.raises(CheckpointError, match=r"holds . networks, the index wants 99"):
        reopened(index.set_column(at, "position", pa.array([99] * 7))).state_dict(0)
    reopened(index)
    shard.write_bytes(b"nonsense")
    damaged = [i for i in range(7) if pq.read_table(tmp_path / "z" / "index.parquet")["shard"][i].as_py() == shard.stem]
    with pytest.raises(CheckpointError, match="is damaged or no shard of a zoo"):
        Zoo.open(tmp_path / "z").state_dict(damaged[0])
    (tmp_path / "z" / "index.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="is damaged or no parquet file"):
        Zoo.open(tmp_path / "z")
    with pytest.raises(ValueError, match="equally long and one called 'name'"):
        Zoo({"name": ["a"], "x": []}, zoo.source)


def test_pyarrow_is_asked_for_by_name(tmp_path, monkeypatch):
    written(tmp_path / "z")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "sne_fast\[parquet\]"'):
        Zoo.open(tmp_path / "z")


def test_batches_hold_a_budget_of_weights_and_all_networks(tmp_path):
    zoo, modules = written(tmp_path / "z", 12)
    encoder = sne_fast.SNE(hidden_dim=32, chunk_size=16, scale="none")
    loader = zoo_loader(zoo, "accuracy", encoder=encoder, budget=90, seed=3)
    seen = []
    for batch, target in loader:
        assert batch.num_weights <= 90 and target.shape == (len(batch), 1) and batch.chunk_size == 16
        seen += [round(10 * t) for t in target[:, 0].tolist()]
        for b, t in zip(batch, target, strict=True):
            expected = encoder.pack([modules[round(10 * t.item())].state_dict()])
            assert torch.equal(b.values, expected.values)
    assert sorted(seen) == list(range(12))
    again = [round(10 * t) for _, target in loader for t in target[:, 0].tolist()]
    assert again != seen and sorted(again) == list(range(12))
    loader.batch_sampler.set_epoch(0)
    assert [round(10 * t) for _, target in loader for t in target[:, 0].tolist()] == seen
    kept = zoo_loader(zoo, "accuracy", encoder=encoder, budget=90, seed=3, keep=True)
    for (a, x), (b, y) in zip(zoo_loader(zoo, "accuracy", encoder=encoder, budget=90, seed=3), kept, strict=True):
        assert torch.equal(a.values, b.values) and torch.equal(x, y)


def test_batches_may_be_packed_for_a_predictor(tmp_path):
    zoo, _ = written(tmp_path / "z", 12)
    options = Preparation(units="canonical", nonfinite="zero")
    predictor = sne_fast.Predictor(sne_fast.SNE(hidden_dim=32, chunk_size=8), hidden_features=(8,), preparation=options)
    assert pack_options(predictor)["nonfinite"] == "zero"
    with torch.no_grad():
        expected = predictor(zoo)
        found = torch.cat(
            [predictor(batch) for batch, _ in zoo_loader(zoo, "accuracy", encoder=predictor, shuffle=False)]
        )
    torch.testing.assert_close(found, expected)


def test_batches_are_packed_in_worker_processes(tmp_path):
    zoo, _ = written(tmp_path / "z")
    here = list(zoo_loader(zoo, ["accuracy", "weights"], budget=90, shuffle=False))
    there = list(zoo_loader(zoo, ["accuracy", "weights"], budget=90, shuffle=False, workers=1))
    assert len(here) == len(there) > 2
    for (a, x), (b, y) in zip(here, there, strict=True):
        assert torch.equal(a.values, b.values) and torch.equal(x, y) and x.shape[1] == 2


def test_dataset_items_and_errors(tmp_path):
    zoo, _ = written(tmp_path / "z")
    encoder = sne_fast.SNE(hidden_dim=32)
    data = ZooDataset(zoo, "accuracy", pack_options(encoder))
    one = data.collate([data[1], data[2]])
    both = data.collate(data.__getitems__([1, 2]))
    assert torch.equal(one[0].values, both[0].values) and torch.equal(one[1], both[1]) and len(data) == 7
    assert encoder(both[0]).shape == (2, 32)
    assert ZooDataset(zoo)[0][1].shape == (0,)
    with pytest.raises(ValueError, match="the target 'note' must be a number for every network"):
        ZooDataset(zoo, "note")
    with pytest.raises(ValueError, match="budget must be at least 1, got 0"):
        WeightBudgetSampler(zoo.sizes, 0)
    assert len(WeightBudgetSampler(zoo.sizes, 10**6)) == 1


def test_tied_tensors_of_a_network_stay_tied_in_a_zoo(tmp_path):
    tied, free = (torch.nn.ModuleDict({"embed": torch.nn.Embedding(4, 3), "head": torch.nn.Linear(3, 4)}) for _ in "ab")
    tied["head"].weight = tied["embed"].weight
    with ZooWriter(tmp_path / "zoo", source="mine") as writer:
        for name, network in (("tied", tied), ("free", free)):
            writer.add(name, network.state_dict(), {})
    zoo = Zoo.open(tmp_path / "zoo")
    assert zoo.sizes.tolist() == [16, 28]
    for i, network in enumerate((tied, free)):
        found = zoo.state_dict(i)
        assert list(found) == list(network.state_dict())
        assert torch.equal(sne_fast.pack([found]).values, sne_fast.pack([network]).values)

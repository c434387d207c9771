"""Damaged files of published zoos and of this package's own: one sentence that names the file."""

from __future__ import annotations

import gzip
import json
import os
import random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from sne_fast.data.checkpoints import save_state_dict
from sne_fast.regular_files import FileError
from sne_fast.zoo import Zoo, ZooWriter, load_schuerholt, load_unterthiner

NESTED = "[" * 5000


# ------------------------------------------------------------------------------------------------ Unterthiner et al.

SHAPES = [(16,), (3, 3, 1, 16), (16,), (3, 3, 16, 16), (16,), (3, 3, 16, 16), (10,), (16, 10)]


@pytest.fixture
def unterthiner(tmp_path):
    """Write a folder of three networks of random weights."""
    lines, start = ["varname,start_idx,end_idx,shape"], 0
    for k, shape in enumerate(SHAPES):
        layer = ("conv2d", "conv2d_1", "conv2d_2", "dense")[k // 2]
        end = start + int(np.prod(shape))
        lines.append(f'sequential/{layer}/{"kernel" if k % 2 else "bias"}:0,{start},{end},"{shape}"')
        start = end
    (tmp_path / "layout.csv").write_text("\n".join(lines))
    np.save(tmp_path / "weights.npy", np.random.default_rng(0).normal(size=(3, start)).astype("float32"))
    metrics = "step,test_accuracy,test_loss,train_accuracy,train_loss\n" + "86,0.5,1.5,0.6,1.25\n" * 3
    (tmp_path / "metrics.csv.gz").write_bytes(gzip.compress(metrics.encode()))
    return tmp_path


def test_the_undamaged_folder_is_read(unterthiner):
    zoo = load_unterthiner(unterthiner)
    assert len(zoo) == 3 and zoo.state_dict(2)["dense.weight"].shape == (10, 16)


@pytest.mark.parametrize(
    "shape",
    ["((16,))", "(" * 5000, "(1e999,)", "(-16,)", "(16, 1)", "()", "9" * 5000, "lambda: 0", "(16,"],
    ids=lambda text: text[:9],
)
def test_a_shape_that_is_none(unterthiner, shape):
    layout = unterthiner / "layout.csv"
    layout.write_text(layout.read_text().replace("(16,)", shape, 1))
    with pytest.raises(FileError, match=r"layout\.csv: (the shape of|cannot read) sequential/conv2d/bias:0"):
        load_unterthiner(unterthiner)


@pytest.mark.parametrize(("column", "value"), [(1, "x"), (1, "-16"), (2, ""), (2, "1.5"), (2, "9" * 30)])
def test_columns_of_the_matrix_that_are_none(unterthiner, column, value):
    layout = unterthiner / "layout.csv"
    lines = layout.read_text().split("\n")
    cells = lines[1].split(",", 3)
    cells[column] = value
    lines[1] = ",".join(cells)
    layout.write_text("\n".join(lines))
    with pytest.raises(FileError, match=r"layout\.csv: cannot read sequential/conv2d/bias:0"):
        load_unterthiner(unterthiner)


def test_a_layout_that_describes_a_tensor_twice(unterthiner):
    layout = unterthiner / "layout.csv"
    layout.write_text(layout.read_text().replace("sequential/dense/kernel:0", "sequential/dense/bias:0"))
    with pytest.raises(FileError, match=r"layout\.csv: cannot read sequential/dense/bias:0"):
        load_unterthiner(unterthiner)
    lines = layout.read_text().split("\n")
    layout.write_text("\n".join([*lines[:2], lines[1], *lines[3:-1]]))
    with pytest.raises(FileError, match=r"layout\.csv: must describe three convolutions and a dense layer"):
        load_unterthiner(unterthiner)


def test_metrics_that_are_no_numbers(unterthiner):
    head = "step,test_accuracy,test_loss,train_accuracy,train_loss\n"
    (unterthiner / "metrics.csv.gz").write_bytes(gzip.compress((head + "86,high,1,1,1\n" * 3).encode()))
    with pytest.raises(FileError, match=r"metrics\.csv\.gz: the column test_accuracy must hold numbers"):
        load_unterthiner(unterthiner)
    (unterthiner / "metrics.csv.gz").write_bytes(gzip.compress((head + "NA,1,1,1,1\n18,1,1,1,1\n" * 2).encode()))
    np.save(unterthiner / "weights.npy", np.zeros((4, 4970), np.float32))
    with pytest.raises(ValueError, match=r"has no row with step 86; it has \[18, None\]"):
        load_unterthiner(unterthiner)


def test_a_matrix_without_a_finite_network(unterthiner):
    np.save(unterthiner / "weights.npy", np.full((3, 4970), np.nan, np.float32))
    with pytest.raises(ValueError, match="none of its 3 networks is finite"):
        load_unterthiner(unterthiner)


def npy(header: str, body: bytes = bytes(40)) -> bytes:
    encoded = header.encode()
    return b"\x93NUMPY\x01\x00" + len(encoded).to_bytes(2, "little") + encoded + body


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x93NUMPY",
        b"PK\x03\x04" + bytes(30),
        b"PK\x05\x06" + bytes(18),  # an empty zip, which numpy opens as an .npz
        npy("{'descr': '<f4', 'fortran_order': False, 'shape': (3, 4970), "),
        npy("("),
        npy("'''"),
        npy("(" * 4000),
        npy("{'descr': '<f4', 'fortran_order': False, 'shape': (3, 99999999)}\n"),
        npy("{'descr': '<f4', 'fortran_order': False, 'shape': (-3, -1)}\n"),
        npy("{'descr': '<f4', 'fortran_order': False, 'shape': (" + "9" * 40 + ", 3)}\n"),
        npy("{'descr': '<f4', 'fortran_order': False, 'shape': (10,)}\n"),
        npy("{'descr': '<i8', 'fortran_order': False, 'shape': (1, 5)}\n"),
        npy("{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (2, 5)}\n"),
        npy("{'descr': '|O', 'fortran_order': False, 'shape': (1, 5)}\n"),
        npy("{'descr': 7, 'fortran_order': False, 'shape': (1, 5)}\n"),
    ],
)
def test_a_matrix_that_is_none(unterthiner, content):
    (unterthiner / "weights.npy").write_bytes(content)
    with pytest.raises(FileError, match=r"weights\.npy: is (damaged or )?no matrix of"):
        load_unterthiner(unterthiner)


@pytest.mark.parametrize("name", ["weights.npy", "layout.csv", "metrics.csv.gz"])
def test_a_pipe_in_the_place_of_a_file(unterthiner, name):
    (unterthiner / name).unlink()
    os.mkfifo(unterthiner / name)
    with pytest.raises(FileError, match=f"{name}: must be a regular file, is a named pipe"):
        load_unterthiner(unterthiner)


def test_any_damage_of_the_compressed_metrics(unterthiner):
    file = unterthiner / "metrics.csv.gz"
    whole = file.read_bytes()
    generator = random.Random(0)
    for _ in range(60):
        damaged = bytearray(whole)
        damaged[generator.randrange(len(damaged))] ^= 1 << generator.randrange(8)
        file.write_bytes(damaged[: generator.choice([None, None, generator.randrange(len(damaged))])])
        try:
            assert len(load_unterthiner(unterthiner)) == 3
        except ValueError as error:
            assert str(file) in str(error)


# ----------------------------------------------------------------------------------------------------- Schürholt et al.


@pytest.fixture
def run(tmp_path):
    """Write the folder of one run of Ray Tune, with a checkpoint of epoch 1."""
    folder = tmp_path / "zoo" / "NN_0"
    (folder / "checkpoint_000001").mkdir(parents=True)
    torch.save({"w": torch.ones(2)}, folder / "checkpoint_000001" / "checkpoints")
    (folder / "params.json").write_text('{"model::type": "CNN", "lr": NaN}')
    (folder / "result.json").write_text('{"training_iteration": 1, "test_acc": 0.5, "train_loss": Infinity}\n')
    return folder


def test_numbers_that_are_not_finite_are_not_known(run):
    row = load_schuerholt(run.parent).rows[0]
    assert row["test_acc"] == 0.5 and row["train_loss"] is None and row["config.lr"] is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"training_iteration": 1}\n' + NESTED, "line 2 is no JSON object: is nested too deeply"),
        ("[1]", "line 1 is no JSON object: must hold a JSON object, holds a JSON list"),
        ('{"training_iteration": "one"}', "its training_iteration must be an integer, one is 'one'"),
        ('{"training_iteration": null}', "its training_iteration must be an integer, one is None"),
        ('{"training_iteration": 1e999}', "its training_iteration must be an integer, one is inf"),
        (b"\xff", "is not text in UTF-8"),
    ],
)
def test_damaged_results(run, content, message):
    (run / "result.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(FileError, match=rf"result\.json: {message}"):
        load_schuerholt(run.parent)


@pytest.mark.parametrize("content", [NESTED, "[]", "{", '{"a": 1, "a": 2}'])
def test_damaged_configurations(run, content):
    (run / "params.json").write_text(content)
    with pytest.raises(FileError, match=r"params\.json: "):
        load_schuerholt(run.parent)


def test_a_configuration_in_the_results_that_is_none(run):
    (run / "params.json").unlink()
    (run / "result.json").write_text('{"training_iteration": 1, "config": [1]}\n')
    with pytest.raises(FileError, match=r"result\.json: its config must be a JSON object, is \[1\]"):
        load_schuerholt(run.parent)


# -------------------------------------------------------------------------------------------------- the package's own


@pytest.fixture
def zoo(tmp_path):
    """Write a zoo of two networks and return its folder."""
    with ZooWriter(tmp_path / "z", targets=["a"]) as writer:
        for k in range(2):
            writer.add(f"n{k}", torch.nn.Linear(2, 1).state_dict(), {"a": 0.5 * k})
    return tmp_path / "z"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (NESTED, "is nested too deeply"),
        ("[1]", "must hold a JSON object"),
        ('{"targets": "a"}', "'targets' must list names of columns, got 'a'"),
        ('{"targets": [[]]}', "'targets' must list names of columns"),
        ('{"hyperparameters": 3}', "'hyperparameters' must list names of columns"),
    ],
)
def test_a_damaged_description(zoo, content, message):
    (zoo / "zoo.json").write_text(content)
    with pytest.raises(FileError, match=rf"zoo\.json: {message}"):
        Zoo.open(zoo)


def test_an_index_of_other_types(zoo):
    table = pq.read_table(zoo / "index.parquet")

    def opened(name, values):
        pq.write_table(table.set_column(table.schema.get_field_index(name), name, values), zoo / "index.parquet")
        return Zoo.open(zoo)

    for name, values, message in (
        ("weights", pa.array(["a", "b"]), "column 'weights' must hold integers"),
        ("weights", pa.array([3, None]), "column 'weights' must hold integers"),
        ("position", pa.array([0, -1]), "column 'position' must hold integers"),
        ("name", pa.array([1, 2]), "column 'name' must hold text"),
        ("shard", pa.array([1, 2]), "names the shard 1, which is no plain name"),
        ("a", pa.array([[1], [2]]), "column 'a' must hold numbers or text, holds a list"),
        ("a", pa.array([b"\xff", b"a"]), "column 'a' must hold numbers or text, holds a bytes"),
        ("a", pa.array([2**62, 0], pa.timestamp("us")), "is damaged or no parquet file"),
    ):
        with pytest.raises(FileError, match=rf"index\.parquet.* {message}"):
            opened(name, values)
    pq.write_table(pa.table([[1], [2]], names=["name", "name"]), zoo / "index.parquet")
    with pytest.raises(FileError, match=r"index\.parquet is damaged .*two columns of one name"):
        Zoo.open(zoo)


def test_an_index_or_a_shard_that_is_a_pipe(zoo):
    shard = next((zoo / "shards").iterdir())
    shard.unlink()
    os.mkfifo(shard)
    with pytest.raises(ValueError, match=r"00000\.safetensors: is damaged or no shard of a zoo: .*a named pipe"):
        Zoo.open(zoo).state_dict(0)
    (zoo / "zoo.json").unlink()
    os.mkfifo(zoo / "zoo.json")
    with pytest.raises(FileError, match=r"zoo\.json: must be a regular file, is a named pipe"):
        Zoo.open(zoo)


@pytest.mark.parametrize("order", [NESTED, "[1, 2]", "{}", '["weight"]', '["weight", "bias", "bias"]', "null"])
def test_a_shard_that_orders_other_tensors(zoo, order):
    tensors = {"stack.weight": torch.ones(2, 1, 2), "stack.bias": torch.ones(2, 1)}
    save_state_dict(tensors, next((zoo / "shards").iterdir()), metadata={"sne_fast.order": order})
    with pytest.raises(ValueError, match=r"00000\.safetensors: is damaged or no shard of a zoo"):
        Zoo.open(zoo).state_dict(0)


@pytest.mark.parametrize("bias", [torch.tensor(1.0), torch.ones(3, 1)])
def test_a_shard_of_tensors_for_other_numbers_of_networks(zoo, bias):
    tensors = {"stack.weight": torch.ones(2, 1, 2), "stack.bias": bias}
    order = json.dumps(["weight", "bias"])
    save_state_dict(tensors, next((zoo / "shards").iterdir()), metadata={"sne_fast.order": order})
    with pytest.raises(ValueError, match=r"00000\.safetensors: is no shard of a zoo: its tensors are not of one shape"):
        Zoo.open(zoo).state_dict(0)


@pytest.mark.parametrize("content", [NESTED, "[]", "[1]", '[{"name": 3, "order": 0}]', '[{"name": "a"}]'])
def test_an_unfinished_zoo_with_damaged_rows(tmp_path, content):
    for name in ("unfinished.json", "shards/g.rows.json"):
        folder = tmp_path / name.replace("/", "-")
        with pytest.raises(RuntimeError, match="stop"), ZooWriter(folder, resume=True) as writer:
            writer.add_group("g", 0, {"w": torch.ones(1, 2)}, [("a", {})])
            raise RuntimeError("stop")
        (folder / name).write_text(content)
        with pytest.raises(FileError, match=r"(unfinished|rows)\.json: "):
            ZooWriter(folder, resume=True)

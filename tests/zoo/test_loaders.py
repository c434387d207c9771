"""Loaders of published classifier zoos and of one's own checkpoints, on files of their exact layout.

Each file holds networks that were trained here, so that `verify` proves every transposition: a wrong one gives a
network of the right size that does something else.
"""

import csv
import gzip
import json
import pickle

import numpy as np
import pytest
import torch
from torch import nn

import sne_fast
from sne_fast.data.checkpoints import CheckpointError, save_state_dict
from sne_fast.zoo import VerifyError, Zoo, load_checkpoints, load_schuerholt, load_unterthiner, verify
from sne_fast.zoo.architectures import unterthiner_cnn
from sne_fast.zoo.images import load_images
from sne_fast.zoo.rebuilding import accuracy
from sne_fast.zoo.schuerholt import SchuerholtCNN

pytest.importorskip("pyarrow")


def images(side):
    """Return shapes enlarged to `side`: (train, test), each images (n, 1, side, side) and labels."""
    resize = torch.nn.functional.interpolate
    return tuple((resize(x[:800], size=(side, side)), y[:800]) for x, y in load_images("shapes"))


def trained(module, side, steps, lr=3e-3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    (x, y), test = images(side)
    optimiser = torch.optim.Adam(module.parameters(), lr=lr)
    for _ in range(steps):
        rows = torch.randint(len(y), (64,), generator=generator)
        optimiser.zero_grad()
        nn.functional.cross_entropy(module(x[rows]), y[rows]).backward()
        optimiser.step()
    with torch.no_grad():
        return accuracy(module.eval(), *test)


# Unterthiner et al.

LAYERS = [("conv0", "conv2d"), ("conv1", "conv2d_1"), ("conv2", "conv2d_2"), ("dense", "dense")]


def keras_flat(module):
    """Return the flat vector of a network as the data set has it, and the lines of its layout."""
    parts, layout, start = [], [], 0
    weights = module.state_dict()
    for name, keras in LAYERS:
        kernel = weights[f"{name}.weight"]
        kernel = kernel.permute(2, 3, 1, 0) if kernel.ndim == 4 else kernel.t()
        for own, tensor in (("bias:0", weights[f"{name}.bias"]), ("kernel:0", kernel)):
            layout.append([f"sequential/{keras}/{own}", start, start + tensor.numel(), str(tuple(tensor.shape))])
            parts.append(tensor.reshape(-1))
            start += tensor.numel()
    return torch.cat(parts).numpy(), layout


def write_unterthiner(folder, flats, layout, rows, index=False):
    folder.mkdir(exist_ok=True)
    np.save(folder / "weights.npy", np.stack(flats))
    with open(folder / "layout.csv", "w", newline="") as stream:
        lines = [["varname", "start_idx", "end_idx", "shape"], *layout]
        csv.writer(stream).writerows([[i - 1 if i else "", *line] for i, line in enumerate(lines)] if index else lines)
    with gzip.open(folder / "metrics.csv.gz", "wt", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def metrics(step, test_accuracy, activation, **changes):
    return {
        "config.activation": activation, "config.dataset": "shapes", "config.dnn_architecture": "cnn",
        "config.dropout": 0.1, "config.learning_rate": 3e-3, "config.w_init": "he_normal",
        "modeldir": f"/run/{activation}", "step": step, "test_accuracy": test_accuracy, "test_loss": 0.5,
        "train_accuracy": 0.5, "train_loss": 0.5, **changes,
    }  # fmt: skip


@pytest.fixture(scope="module")
def unterthiner(tmp_path_factory):
    """Two networks at steps 0 and 86, and two final rows that are not finite."""
    folder = tmp_path_factory.mktemp("unterthiner") / "shapes"
    flats, rows, modules = [], [], []
    torch.manual_seed(1)
    for k, activation in enumerate(("relu", "tanh")):
        module = unterthiner_cnn(activation)
        for step, more in ((0, 0), (86, 150)):
            found = trained(module, 16, more, seed=k)
            flat, layout = keras_flat(module)
            flats.append(flat.copy())
            rows.append(metrics(step, found, activation))
        modules.append(module)
    flats += [np.full(4970, np.nan, np.float32), flats[0]]
    rows += [metrics(86, 0.1, "relu"), metrics(86, 0.1, "relu", test_loss="nan")]
    assert min(rows[1]["test_accuracy"], rows[3]["test_accuracy"]) > 0.5
    write_unterthiner(folder, flats, layout, rows, index=True)
    return folder, modules, flats, layout, rows


def test_unterthiner_final_networks(unterthiner):
    folder, modules, *_ = unterthiner
    with pytest.warns(UserWarning, match="2 of 4 networks are not finite and left out"):
        zoo = load_unterthiner(folder)
    assert len(zoo) == 2 and zoo.about["dropped"] == 2 and zoo.sizes.tolist() == [4970, 4970]
    assert zoo.column("config.activation").tolist() == ["relu", "tanh"] and zoo.column("step").tolist() == [86, 86]
    assert zoo.targets == ["test_accuracy", "test_loss", "train_accuracy", "train_loss"]
    for i, module in enumerate(modules):
        got, expected = zoo.state_dict(i), module.state_dict()
        assert list(got) == list(expected) and all(torch.equal(got[name], expected[name]) for name in got)
    batch, direct = sne_fast.pack(zoo), sne_fast.pack(modules).detach()
    assert torch.equal(batch.values, direct.values) and torch.equal(batch.tensor_type, direct.tensor_type)
    assert len(load_unterthiner(folder, step=0)) == 2
    assert len(load_unterthiner(folder, step=None, invalid="keep")) == 6
    with pytest.raises(ValueError, match="row 4 and 1 more hold weights or metrics that are not finite"):
        load_unterthiner(folder, invalid="raise")


@pytest.mark.filterwarnings("ignore:.*not finite and left out")
def test_unterthiner_networks_do_what_the_table_says(unterthiner, tmp_path):
    folder = unterthiner[0]
    zoo = load_unterthiner(folder)
    x, y = images(16)[1]
    assert verify(zoo, images=x, labels=y, tolerance=1e-3) <= 1e-3
    saved = zoo.save(tmp_path / "saved")
    assert verify(saved, images=x, labels=y, tolerance=1e-3) <= 1e-3
    assert saved.rows[1]["config.w_init"] == "he_normal" and saved.about["dropped"] == 2
    with pytest.raises(ValueError, match=r"zoos of source 'unterthiner' hold no images: give images= \(n, 1, h, w\)"):
        verify(zoo)


@pytest.mark.filterwarnings("ignore:.*not finite and left out")
@pytest.mark.parametrize("axes", [(3, 2, 1, 0), (2, 3, 0, 1), (3, 2, 0, 1)])
@pytest.mark.parametrize("dense", ["transposed", "reshaped"])
def test_a_wrong_transposition_fails_verify(unterthiner, monkeypatch, axes, dense):
    def wrong(name, tensor):
        if not name.endswith("weight"):
            return tensor
        if tensor.ndim == 2:
            return tensor.t().contiguous() if dense == "transposed" else tensor.reshape(tensor.t().shape)
        kernel = tensor.permute(axes)
        return kernel.reshape(tensor.shape[3], tensor.shape[2], 3, 3).contiguous()

    x, y = images(16)[1]
    right = axes == (3, 2, 0, 1) and dense == "transposed"
    zoo = load_unterthiner(unterthiner[0])
    monkeypatch.setattr("sne_fast.zoo.unterthiner.to_torch", wrong)
    if right:
        assert verify(zoo, images=x, labels=y, tolerance=1e-3) <= 1e-3
    else:
        with pytest.raises(VerifyError, match="differs by"):
            verify(zoo, images=x, labels=y, tolerance=0.05)


def test_unterthiner_files_that_do_not_fit(unterthiner, tmp_path):
    _, _, flats, layout, rows = unterthiner

    def load(flats=flats[:4], layout=layout, rows=rows[:4], **options):
        write_unterthiner(tmp_path / "z", flats, layout, rows)
        return load_unterthiner(tmp_path / "z", **options)

    assert len(load()) == 2
    with pytest.raises(ValueError, match=r"weights.npy: must be of shape \(4, 4970\)"):
        load(flats=flats[:3])
    with pytest.raises(ValueError, match=r"has no row with step 18; it has \[0, 86\]"):
        load(step=18)
    with pytest.raises(ValueError, match="invalid must be 'drop', 'raise' or 'keep', got 'fix'"):
        load(invalid="fix")
    with pytest.raises(ValueError, match=r"cannot read sequential/conv2d/bias:0, columns 0 to 16 of shape \(3, 3\)"):
        load(layout=[["sequential/conv2d/bias:0", 0, 16, "(3, 3)"], *layout[1:]])
    with pytest.raises(ValueError, match=r"the shape of .* must be a tuple, got .__import__"):
        load(layout=[["sequential/conv2d/bias:0", 0, 16, "__import__('os').abort()"], *layout[1:]])
    with pytest.raises(ValueError, match="must describe three convolutions and a dense layer"):
        load(flats=[f[:4800] for f in flats[:4]], layout=layout[:6])
    with pytest.raises(ValueError, match=r"only networks of architecture 'cnn' are known, got .*'cnnbn'"):
        load(rows=[{**row, "config.dnn_architecture": "cnnbn"} for row in rows[:4]])
    with pytest.raises(ValueError, match=r"lacks the column\(s\) test_loss"):
        load(rows=[{k: v for k, v in row.items() if k != "test_loss"} for row in rows[:4]])
    load()
    np.save(tmp_path / "z" / "weights.npy", np.array([{}, {}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="is damaged or no matrix of numbers"):
        load_unterthiner(tmp_path / "z")
    for name in ("weights.npy", "layout.csv", "metrics.csv.gz"):
        load()
        (tmp_path / "z" / name).unlink()
        with pytest.raises(FileNotFoundError, match=name):
            load_unterthiner(tmp_path / "z")


# Schürholt et al.


def write_run(folder, module, epochs, first_epoch, side, *, kind="CNN", named=True, padded=True, dropout=0.0, seed=0):
    """Write a network as Ray Tune leaves it: a checkpoint and a line per epoch, epoch 0 with train metrics of -999."""
    folder.mkdir(parents=True)
    config = {
        "seed": seed, "cuda": False, "model::type": kind, "model::channels_in": 1, "model::nlin": "tanh",
        "model::dropout": dropout, "optim::lr": 3e-3, "dataset::dump": "/data/dataset.pt", "callbacks": [1, 2],
    }  # fmt: skip
    (folder / "params.json").write_text(json.dumps(config))
    lines = []
    for epoch in range(epochs + 1):
        found = trained(module, side, 25 if epoch else 0, seed=seed + epoch)
        checkpoint = folder / (f"checkpoint_{epoch:06d}" if padded else f"checkpoint_{epoch}")
        checkpoint.mkdir()
        torch.save(module.state_dict(), checkpoint / "checkpoints")
        torch.save({"state": {}, "param_groups": []}, checkpoint / "optimizer")
        line = {"train_loss": 1.0, "train_acc": found + 0.05, "test_loss": 1.5, "test_acc": found}
        if epoch == 0:
            line.update(train_loss=-999, train_acc=-999)
        if named:
            line.update(training_iteration=epoch, config=config)
        if epoch >= first_epoch:
            lines.append(json.dumps(line))
    (folder / "result.json").write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="module")
def schuerholt(tmp_path_factory):
    """Four networks of four epochs whose lines begin with epoch 0 or 1 and name their epoch or do not."""
    folder = tmp_path_factory.mktemp("schuerholt")
    torch.manual_seed(0)
    for k, (first, named) in enumerate([(0, True), (1, True), (0, False), (1, False)]):
        module = SchuerholtCNN("CNN", 1, "tanh", dropout=k == 3)
        name = f"NN_tune_trainable_{k:05d}_{k}_seed={k}"
        options = {"named": named, "padded": k != 1, "dropout": 0.1 if k == 3 else 0.0, "seed": k}
        write_run(folder / name, module, 4, first, 28, **options)
    return folder


@pytest.mark.slow
def test_schuerholt_epochs_match_their_lines(schuerholt):
    x, y = images(28)[1]
    zoo = load_schuerholt(schuerholt)
    assert len(zoo) == 4 and set(zoo.column("epoch")) == {4} and zoo.about["epoch_offset"] == [0, 1]
    assert set(zoo.column("architecture")) == {"schuerholt-CNN"} and zoo.sizes.tolist() == [2464] * 4
    assert zoo.column("ggap").tolist() == pytest.approx([0.05] * 4)
    assert zoo.rows[0]["config.callbacks"] == "[1, 2]" and zoo.rows[2]["config.seed"] == 2
    assert zoo.column("test_acc").max() > 0.3
    assert verify(zoo, images=x, labels=y, tolerance=1e-3) <= 1e-3
    every = load_schuerholt(schuerholt, epochs=[2, 3])
    assert every.column("epoch").tolist() == [2, 3] * 4
    assert len(set(every.column("test_acc"))) > 4
    assert verify(every, images=x, labels=y, tolerance=1e-3) <= 1e-3


@pytest.mark.slow
def test_schuerholt_shifted_by_an_epoch_fails_verify(schuerholt):
    x, y = images(28)[1]
    zoo = load_schuerholt(schuerholt, epochs=[1, 2, 3, 4])
    columns = {name: list(zoo.column(name)) for name in zoo.columns}
    columns["test_acc"] = [a for k in range(4) for a in ([*columns["test_acc"][4 * k + 1 : 4 * k + 4], 0.5])]
    columns = {name: [v.item() if isinstance(v, np.generic) else v for v in values] for name, values in columns.items()}
    with pytest.raises(VerifyError):
        verify(Zoo(columns, zoo.source, zoo.about), images=x, labels=y, tolerance=0.01)


def test_schuerholt_saves_and_drops(schuerholt, tmp_path):
    x, y = images(28)[1]
    with pytest.warns(UserWarning, match="2 checkpoints are not finite or without results and left out"):
        zoo = load_schuerholt(schuerholt, epochs=0)  # two runs have no line for it
    assert len(zoo) == 2 and zoo.rows[0]["train_acc"] is None and zoo.rows[0]["ggap"] is None
    saved = zoo.save(tmp_path / "saved")
    assert verify(saved, images=x, labels=y, tolerance=1e-3) <= 1e-3
    assert np.isnan(saved.column("train_loss").astype(float)).all()
    with pytest.raises(ValueError, match=r"result.json has no line for this epoch"):
        load_schuerholt(schuerholt, epochs=0, invalid="raise")
    assert len(load_schuerholt(schuerholt, epochs="all", invalid="keep")) == 20
    with pytest.raises(FileNotFoundError, match="none of its 4 networks has a usable checkpoint of epoch 9"):
        load_schuerholt(schuerholt, epochs=9)


@pytest.mark.parametrize(("kind", "side", "weights"), [("CNN", 28, 2464), ("CNN2", 28, 3047), ("CNN3", 32, 10565)])
def test_schuerholt_architectures(kind, side, weights):
    for dropout in (False, True):
        module = SchuerholtCNN(kind, 1, "leakyrelu", dropout).eval()
        assert module(torch.zeros(2, 1, side, side)).shape == (2, 10)
        assert sum(p.numel() for p in module.parameters()) == weights
        layers = [int(name.split(".")[1]) for name in module.state_dict() if name.endswith("weight")]
        plain = {"CNN3": [0, 4, 8, 13, 16]}.get(kind, [0, 4, 8, 11, 14] if dropout else [0, 3, 6, 9, 11])
        assert layers == plain
    with pytest.raises(ValueError, match="cannot rebuild a network of type 'ResNet18'"):
        SchuerholtCNN("ResNet18", 3, "relu", False)


class Foreign:
    pass


def test_pickled_data_sets_are_refused(tmp_path, schuerholt):
    torch.save({"trainset": Foreign()}, tmp_path / "dataset.pt")
    for path in (tmp_path / "dataset.pt", tmp_path):
        with pytest.raises(CheckpointError, match="refused, a pickled data set holds objects of foreign classes"):
            load_schuerholt(path)
    torch.save(Foreign(), tmp_path / "a.pt")
    (tmp_path / "index.csv").write_text("file,accuracy\na.pt,0.5\n")
    zoo = load_checkpoints(tmp_path)
    with pytest.raises(CheckpointError, match=r"a.pt: holds an object of .*Foreign and no tensors"):
        zoo.state_dict(0)
    run = tmp_path / "raw" / "NN_0"
    (run / "checkpoint_000001").mkdir(parents=True)
    (run / "result.json").write_text(json.dumps({"training_iteration": 1, "test_acc": 0.5}))
    with open(run / "checkpoint_000001" / "checkpoints", "wb") as stream:
        pickle.dump(Foreign(), stream, protocol=2)
    with pytest.raises(CheckpointError, match=r"checkpoints: holds an object of .*Foreign and no tensors"):
        load_schuerholt(tmp_path / "raw")


def test_schuerholt_folders_that_do_not_fit(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no such folder"):
        load_schuerholt(tmp_path / "no")
    with pytest.raises(FileNotFoundError, match="holds no networks"):
        load_schuerholt(tmp_path)
    run = tmp_path / "NN_0"
    (run / "checkpoint_000050").mkdir(parents=True)
    torch.save({"w": torch.ones(2)}, run / "checkpoint_000050" / "checkpoints")
    (run / "result.json").write_text('{"test_acc": 0.5}\n' * 7)
    with pytest.raises(ValueError, match="its 7 lines do not name their epochs"):
        load_schuerholt(tmp_path)
    (run / "result.json").write_text('{"training_iteration": 1}\n{"train')
    with pytest.raises(ValueError, match=r"result.json: line 2 is no JSON object"):
        load_schuerholt(tmp_path)
    with pytest.raises(ValueError, match="epochs must be 'last', 'all' or integers, got 'best'"):
        load_schuerholt(tmp_path, epochs="best")
    with pytest.raises(ValueError, match="invalid must be"):
        load_schuerholt(tmp_path, invalid="fix")
    (run / "result.json").write_text('{"training_iteration": 50, "test_acc": 0.5}\n')
    torch.save({"w": torch.full((2,), torch.inf)}, run / "checkpoint_000050" / "checkpoints")
    with pytest.raises(ValueError, match="holds weights that are not finite"):
        load_schuerholt(tmp_path, invalid="raise")


# Checkpoints and a table


def test_a_folder_of_checkpoints_and_a_table(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(50, 4)
    (tmp_path / "runs").mkdir()
    lines, modules = [], []
    for k, ending in enumerate(("safetensors", "pt", "pth")):
        module = nn.Sequential(nn.Linear(4, 3 + k), nn.ReLU(), nn.Linear(3 + k, 1))
        file = tmp_path / "runs" / f"net{k}.{ending}"
        save_state_dict(module.state_dict(), file) if k == 0 else torch.save({"model": module.state_dict()}, file)
        lines.append([f"runs/net{k}.{ending}", 3 + k, module(x).mean().item(), "" if k == 1 else "nice"])
        modules.append(module)
    with open(tmp_path / "results.csv", "w", newline="") as stream:
        csv.writer(stream).writerows([["checkpoint", "width", "output", "note"], *lines])
    zoo = load_checkpoints(tmp_path, "results.csv", targets=["output"])
    assert zoo.targets == ["output"] and zoo.column("width").tolist() == [3, 4, 5]
    assert zoo.column("note").tolist() == ["nice", None, "nice"] and zoo.rows[0]["name"] == "runs-net0.safetensors"
    check = {
        "build": lambda row: nn.Sequential(nn.Linear(4, row["width"]), nn.ReLU(), nn.Linear(row["width"], 1)),
        "measure": lambda module, row: module(x).mean().item(),
        "column": "output",
    }
    assert verify(zoo, **check) < 1e-6
    saved = zoo.save(tmp_path / "saved")
    assert verify(saved, **check, tolerance=1e-6) < 1e-6 and saved.sizes.tolist() == [19, 25, 31]
    assert torch.equal(sne_fast.pack(saved).values, sne_fast.pack([m.state_dict() for m in modules]).values)
    with pytest.raises(ValueError, match=r"runs-net0.safetensors has no number in column 'note'"):
        verify(saved, **{**check, "column": "note"})
    with pytest.raises(ValueError, match="has no column 'tau' for a target"):
        load_checkpoints(tmp_path, "results.csv", targets=["tau"])
    with pytest.raises(ValueError, match=r"must have a column with the files \(weights\)"):
        load_checkpoints(tmp_path, "results.csv", file_column="weights")
    (tmp_path / "runs" / "net1.pt").unlink()
    with pytest.raises(FileNotFoundError, match=r"names .*net1.pt, which is missing"):
        load_checkpoints(tmp_path, "results.csv")
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        load_checkpoints(tmp_path)

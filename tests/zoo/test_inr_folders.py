"""Loaders of published INRs, on files of the layouts of DWSNets and NFN that hold networks fitted here."""

import json

import numpy as np
import pytest
import torch

import sne_fast
from sne_fast.data.checkpoints import CheckpointError
from sne_fast.zoo import VerifyError, load_dwsnets, load_nfn, verify
from sne_fast.zoo.inrs import Siren

pytest.importorskip("pyarrow")

SIDE = 7
IMAGES = 4


def pictures():
    """Return four pictures (n, 7, 7) in [0, 1], none of them its own transpose."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, SIDE), torch.linspace(-1, 1, SIDE), indexing="ij")
    return torch.stack([0.5 + 0.4 * (2 * x + k * y).sin() for k in range(IMAGES)])


def fitted(siren, inputs, values, steps=150):
    optimiser = torch.optim.Adam(siren.parameters(), lr=2e-3)
    for _ in range(steps):
        optimiser.zero_grad()
        loss = (siren(inputs)[:, 0] - values).square().mean()
        loss.backward()
        optimiser.step()
    assert loss < 2e-3
    return siren


def small_start(siren):
    """Initialise as DWSNets does: no layer's weights beyond sqrt(6 / in) / 30, no biases."""
    with torch.no_grad():
        for layer in list(siren)[:-1]:
            layer.weight.uniform_(-1, 1).mul_((6 / layer.in_features) ** 0.5 / 30)
            layer.bias.zero_()
    return siren


def coordinates(x_first):
    at = torch.linspace(-1, 1, SIDE)
    rows, columns = at.repeat_interleave(SIDE), at.repeat(SIDE)
    return torch.stack([columns, rows] if x_first else [rows, columns], 1)


@pytest.fixture(scope="module")
def sirens():
    """Per convention the networks fitted to the pictures: DWSNets' on [0, 1] and 0.5 added, NFN's on [-1, 1]."""
    torch.manual_seed(0)
    found = {"dwsnets": [], "nfn": []}
    for picture in pictures():
        siren = small_start(Siren((2, 32, 32, 1), offset=0.5))
        found["dwsnets"].append(fitted(siren, coordinates(True), picture.flatten()))
        siren = small_start(Siren((2, 32, 32, 1)))
        found["nfn"].append(fitted(siren, coordinates(False), 2 * picture.flatten() - 1))
    return found


def renamed(siren, pattern, last):
    names = [pattern.format(0), pattern.format(1), last]
    return {f"{names[k]}.{own}": siren.state_dict()[f"{k}.{own}"] for k in range(3) for own in ("weight", "bias")}


@pytest.fixture(scope="module")
def dwsnets(sirens, tmp_path_factory):
    """mnist_png_<split>_<label>_<image>/checkpoints/model_final.pth and a JSON with paths of another machine."""
    folder = tmp_path_factory.mktemp("dwsnets")
    splits = {name: {"path": [], "label": []} for name in ("train", "val", "test")}
    for k, siren in enumerate(sirens["dwsnets"]):
        part = "testing" if k == 3 else "training"
        file = folder / "mnist-inrs" / f"mnist_png_{part}_{k + 5}_{100 + k}" / "checkpoints" / "model_final.pth"
        file.parent.mkdir(parents=True)
        torch.save(renamed(siren, "seq.{}", "seq.2"), file)
        chosen = splits[("train", "train", "val", "test")[k]]
        chosen["path"].append(f"/home/them/DWSNets/dataset/{file.relative_to(folder)}")
        chosen["label"].append(str(k + 5))
    (folder / "mnist_splits.json").write_text(json.dumps(splits))
    return folder


def test_dwsnets_splits_labels_and_pictures(dwsnets, sirens, tmp_path):
    zoo = load_dwsnets(dwsnets / "mnist_splits.json")
    assert zoo.column("split").tolist() == ["train", "train", "val", "test"]
    assert zoo.column("label").tolist() == [5, 6, 7, 8] and zoo.column("image").tolist() == [100, 101, 102, 103]
    assert zoo.targets == ["label"] and len(set(zoo.column("name"))) == 4
    assert list(zoo.state_dict(0))[:2] == ["seq.0.weight", "seq.0.bias"]
    assert verify(zoo, images=pictures()[:, None], tolerance=2e-3) < 2e-3
    assert verify(zoo, [2], images=lambda row: pictures()[row["image"] - 100], tolerance=2e-3) < 2e-3
    saved = zoo.save(tmp_path / "saved")
    assert verify(saved, images=pictures(), tolerance=2e-3) < 2e-3 and saved.sizes.tolist() == [1185] * 4
    direct = sne_fast.pack([siren.state_dict() for siren in sirens["dwsnets"]])
    assert torch.equal(sne_fast.pack(saved).values, direct.values)
    for wrong in (pictures().transpose(1, 2), pictures().flip(0)):
        with pytest.raises(VerifyError):
            verify(zoo, images=wrong, tolerance=0.01)
    with pytest.raises(ValueError, match="INRs of images need images="):
        verify(zoo)
    validation = load_dwsnets(dwsnets / "mnist_splits.json", root=dwsnets / "mnist-inrs", splits_to_take=["val"])
    assert validation.column("label").tolist() == [7]


def test_dwsnets_folder_without_splits(dwsnets):
    zoo = load_dwsnets(dwsnets / "mnist-inrs")
    order = np.argsort(zoo.column("image"))
    assert zoo[order].column("split").tolist() == ["train", "train", "train", "test"]
    assert verify(zoo[order], images=pictures(), tolerance=2e-3) < 2e-3


@pytest.mark.parametrize("points", ["numpy", "tensor"])
def test_dwsnets_sine_waves(tmp_path, points):
    torch.manual_seed(0)
    listed = []
    x = np.arange(-np.pi, np.pi, np.pi / 100)
    for k, (a, b) in enumerate([(0.8, 1.5), (1.5, 2.0)]):
        y = a * np.sin(b * x)
        siren = small_start(Siren((1, 32, 32, 1), offset=0.5))
        fitted(siren, torch.tensor(x).float()[:, None], torch.tensor(y).float(), steps=300)
        content = renamed(siren, "seq.{}", "seq.2")
        content["coef"] = [a, b]
        content["x"], content["y"] = (x, y) if points == "numpy" else (torch.tensor(x), torch.tensor(y))
        torch.save(content, tmp_path / f"model_{k}.pth")
        listed.append(f"artifacts/model_{k}.pth")
    (tmp_path / "ssl_splits.json").write_text(json.dumps({"train": listed[:1], "test": listed[1:], "val": []}))
    zoo = load_dwsnets(tmp_path / "ssl_splits.json")
    assert zoo.targets == ["coef_0", "coef_1"] and zoo.column("coef_1").tolist() == [1.5, 2.0]
    assert zoo.column("split").tolist() == ["train", "test"] and zoo.sizes.tolist() == [1153] * 2  # x, y left out
    assert verify(zoo, tolerance=5e-3) < 5e-3
    assert verify(zoo.save(tmp_path / "saved"), tolerance=5e-3) < 5e-3


def test_dwsnets_that_do_not_fit(dwsnets, tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no such file or folder"):
        load_dwsnets(tmp_path / "no.json")
    with pytest.raises(FileNotFoundError, match="holds no <data>_png_"):
        load_dwsnets(tmp_path)
    splits = tmp_path / "splits.json"
    for content in ('{"train": {"path": ["a"]}}', "[1", '{"train": {"path": ["a"], "label": [1, 2]}}'):
        splits.write_text(content)
        with pytest.raises(ValueError, match="must map splits to paths and labels, or to paths"):
            load_dwsnets(splits)
    splits.write_text('{"all": []}')
    with pytest.raises(FileNotFoundError, match="names no networks in the splits train, val, test"):
        load_dwsnets(splits)
    splits.write_text('{"train": {"path": ["/x/gone.pth"], "label": ["1"]}}')
    with pytest.raises(FileNotFoundError, match=r"names /x/gone.pth, which is missing, also below .*; give root="):
        load_dwsnets(splits)
    splits.write_text('{"train": ["/x/a.pth"]}')
    torch.save({"w": torch.ones(1), "coef": object()}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="refused, it holds"):
        load_dwsnets(splits)
    torch.save({"w": torch.ones(1)}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"a.pth: holds no coef, the label of a sine wave"):
        load_dwsnets(splits)


def test_nfn_folders(sirens, tmp_path):
    for k, siren in enumerate(sirens["nfn"]):
        file = tmp_path / f"randinit_smaller_{k + 3}s" / f"net{k}.pth"
        file.parent.mkdir(parents=True)
        torch.save(renamed(siren, "net.{}.linear", "net.2"), file)
        other = tmp_path / f"randinit_smaller_aug0_{k + 3}s" / f"net{k}.pth"
        other.parent.mkdir()
        torch.save(renamed(sirens["dwsnets"][k], "net.{}.linear", "net.2"), other)
    zoo = load_nfn(tmp_path, split_points=(2, 3))
    assert zoo.column("label").tolist() == [3, 4, 5, 6] and zoo.column("image").tolist() == [0, 1, 2, 3]
    assert zoo.column("split").tolist() == ["train", "train", "val", "test"]
    assert zoo.column("name").tolist() == [f"net{k}" for k in range(4)]
    assert verify(zoo, images=2 * pictures() - 1, tolerance=8e-3) < 8e-3
    assert verify(zoo.save(tmp_path / "saved"), images=2 * pictures() - 1, tolerance=8e-3) < 8e-3
    with pytest.raises(VerifyError):
        verify(zoo, images=2 * pictures().transpose(1, 2) - 1, tolerance=0.05)
    assert len(load_nfn(tmp_path, "randinit_smaller_aug0", split_points=None)) == 4
    with pytest.raises(FileNotFoundError, match=r"holds no other_<label>s/net<image>.pth, but randinit_smaller_3s"):
        load_nfn(tmp_path, "other")
    with pytest.raises(FileNotFoundError, match="there is no such folder"):
        load_nfn(tmp_path / "no")

"""Loaders of published INRs, on files of the layouts of DWSNets and NFN that hold networks fitted here."""

import json

import numpy as np
import pytest
import torch

import sne_fast
from sne_fast.data.checkpoints import CheckpointError
from sne_fast.regular_files import FileError
from sne_fast.zoo import VerifyError, load_dwsnets, load_nfn, verify
from sne_fast.zoo.sirens import Siren

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
    for content in (
        '{"train": {"path": ["a"]}}', '{"train": {"path": ["a"], "label": [1, 2]}}', '{"train": "a.pth"}',
        '{"train": [1]}', '{"train": {"path": "a", "label": "b"}}', '{"train": 3}', '{"train": null}',
    ):  # fmt: skip
        splits.write_text(content)
        with pytest.raises(FileError, match=r"splits\.json: must map splits to paths and labels, or to paths"):
            load_dwsnets(splits)
    for content, message in (
        ("[1", "is not valid JSON"), ("[1]", "must hold a JSON object"), ("[" * 5000, "is nested too deeply"),
        ('{"train": {"path": ["a"], "label": [[1]]}}', "the labels of 'train' must be numbers or text, one is a list"),
    ):  # fmt: skip
        splits.write_text(content)
        with pytest.raises(FileError, match=rf"splits\.json: {message}"):
            load_dwsnets(splits)
    splits.write_text(json.dumps({"train": ["a/" * 1_000_000]}))
    with pytest.raises(FileNotFoundError, match="which is missing"):
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


# ----------------------------------------------------------------------------------------------- paths in the JSON


def write_network(file, number):
    """Write a network whose only weight is a number, which tells it from others."""
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"seq.0.weight": torch.full((1, 2), float(number))}, file)
    return file


def numbers_read(folder, *paths, root=None):
    """Return the numbers of the networks that a JSON in the folder names."""
    splits = folder / "splits.json"
    splits.write_text(json.dumps({"train": {"path": [str(path) for path in paths], "label": ["1"] * len(paths)}}))
    zoo = load_dwsnets(splits, root=root)
    return [int(zoo.state_dict(i)["seq.0.weight"][0, 0]) for i in range(len(zoo))]


@pytest.fixture
def nested(tmp_path, monkeypatch):
    """Networks of one name at several depths of a folder, and others in the folder where the program runs."""
    folder = tmp_path / "inrs"
    for number, path in enumerate(["x.pth", "sub/x.pth", "sub/sub/x.pth", "other/sub/x.pth", "sub/y.pth"]):
        write_network(folder / path, number)
        write_network(tmp_path / "here" / path, 100 + number)
    write_network(tmp_path / "outside.pth", 200)
    write_network(tmp_path / "here" / "only_here.pth", 300)
    monkeypatch.chdir(tmp_path / "here")
    return folder


def test_a_relative_path_names_the_file_below_the_folder_of_the_json(nested):
    for path, number in (
        ("x.pth", 0), ("sub/x.pth", 1), ("sub/sub/x.pth", 2), ("other/sub/x.pth", 3), ("./sub/x.pth", 1),
        ("sub//x.pth", 1), ("sub/../x.pth", 0), ("sub/../sub/y.pth", 4),
    ):  # fmt: skip
        assert numbers_read(nested, path) == [number], path
        assert numbers_read(nested.parent, path, root=nested) == [number], path
    assert numbers_read(nested, "sub/x.pth", "x.pth", "sub/x.pth", "./x.pth") == [1, 0, 1, 0]
    assert numbers_read(nested, nested / "sub" / "x.pth", "x.pth") == [1, 0]


def test_a_relative_json_and_root_are_taken_from_where_the_program_runs(nested, monkeypatch):
    monkeypatch.chdir(nested.parent)
    relative = nested.relative_to(nested.parent)
    assert numbers_read(relative, "sub/x.pth", nested / "x.pth", "x.pth") == [1, 0, 0]
    assert numbers_read(nested.parent, "sub/x.pth", root="inrs") == [1]


def test_the_longest_end_of_a_path_of_another_machine_is_taken(nested):
    assert numbers_read(nested, "/home/them/inrs/sub/x.pth", "/home/them/inrs/x.pth") == [1, 0]
    assert numbers_read(nested, "/home/them/run/../inrs/sub/sub/x.pth") == [2]
    assert numbers_read(nested, "artifacts/x.pth", "artifacts/sub/y.pth") == [0, 4]
    assert numbers_read(nested, "/a/inrs/sub/x.pth", "/b/inrs/sub/y.pth") == [1, 4]


@pytest.mark.parametrize("paths", [
    ["gone/x.pth", "sub/x.pth"], ["sub/gone/x.pth", "sub/y.pth"], ["/them/inrs/gone/y.pth", "/them/inrs/sub/x.pth"],
    ["gone/x.pth", "/them/inrs/sub/x.pth", "sub/y.pth"],
])  # fmt: skip
def test_a_missing_network_is_not_taken_from_another_place(nested, paths):
    (nested / "y.pth").write_bytes((nested / "sub" / "y.pth").read_bytes())
    for order in (paths, paths[::-1]):
        with pytest.raises(FileNotFoundError, match=r"splits.json names .*, which is missing where its other networks"):
            numbers_read(nested, *order)


def test_two_networks_are_never_read_from_one_file(nested):
    with pytest.raises(
        FileNotFoundError, match=r"names /a/x.pth and /b/x.pth, for which there is only one file, .*x.pth"
    ):
        numbers_read(nested, "/a/x.pth", "/b/x.pth")
    assert numbers_read(nested, "/a/x.pth", "/a/x.pth", "/a/./x.pth") == [0, 0, 0]


def test_a_missing_path_is_not_looked_for_where_the_program_runs(nested):
    for path in (
        "only_here.pth", "sub/only_here.pth", "", ".", "sub", "/", "x" * 5000 + ".pth", "a\0.pth", "x.pth\0",
        "/x/a\n.pth", nested / "gone" / "x.pth",
    ):  # fmt: skip
        with pytest.raises(FileNotFoundError, match=r"splits.json names .*, which is missing, also below") as raised:
            numbers_read(nested, path)
        assert "\n" not in str(raised.value)


def test_paths_outside_the_folder_are_refused(nested):
    outside = nested.parent / "outside.pth"
    write_network(nested / "outside.pth", 9)  # not what these paths name
    for path in ("../outside.pth", "sub/../../outside.pth", "../inrs/../outside.pth", "../here/x.pth", "..", outside,
                 f"{nested}/../outside.pth"):  # fmt: skip
        with pytest.raises(
            CheckpointError, match=r"splits.json: refused, it names .*, which lies outside .*; give root="
        ):
            numbers_read(nested, path)
    assert numbers_read(nested, outside, root=nested.parent) == [200]
    assert numbers_read(nested, outside, root=nested) == [9]  # the user says that the networks lie there
    with pytest.raises(CheckpointError, match="which lies outside"):
        numbers_read(nested, nested.parent / "here" / "only_here.pth", root=nested)


def test_folders_made_of_links_are_read(nested, tmp_path):
    links = tmp_path / "links"
    links.mkdir()
    try:
        (links / "x.pth").symlink_to(nested / "sub" / "x.pth")
        (tmp_path / "again").symlink_to(nested, target_is_directory=True)
    except OSError:
        pytest.skip("no links on this system")
    assert numbers_read(links, "x.pth") == [1]
    assert numbers_read(tmp_path / "again", tmp_path / "again" / "x.pth", nested / "sub" / "x.pth") == [0, 1]


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

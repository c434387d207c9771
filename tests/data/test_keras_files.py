"""Weights of Keras' files, written by Keras: the same as those of torch's twin, which computes the same."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from sne_fast import CheckpointError, pack
from sne_fast.data.checkpoints import load_state_dict, read_checkpoint

os.environ.setdefault("KERAS_BACKEND", "torch")
h5py = pytest.importorskip("h5py")
keras = pytest.importorskip("keras")

FORMS = ["n.keras", "n.h5", "n.weights.h5"]


def saved(model: Any, file: Path) -> Path:
    with torch.no_grad():
        for variable in model.variables:
            if "float" in str(variable.dtype):
                variable.assign(np.random.default_rng(len(variable.path)).random(variable.shape) + 0.1)
    (model.save_weights if file.name.endswith(".weights.h5") else model.save)(file)
    return file


def images() -> tuple[Any, nn.Module]:
    layers = keras.layers
    model = keras.Sequential(
        [
            layers.Input((9, 9, 3)),
            layers.Conv2D(4, 3),
            layers.BatchNormalization(),
            layers.DepthwiseConv2D(3),
            layers.Conv2DTranspose(6, 2),
            layers.GlobalAveragePooling2D(),
            layers.Dense(3),
        ]
    )
    twin = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, eps=1e-3), nn.Conv2d(4, 4, 3, groups=4), nn.ConvTranspose2d(4, 6, 2),
        nn.AdaptiveAvgPool2d(1), nn.Linear(6, 3),
    )  # fmt: skip
    return model, twin


def twin_names(read: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return tensors by the names of a sequence in torch: the number in front, without the layer's name."""
    return {f"{name.split('.')[0]}.{name.rpartition('.')[2]}": tensor for name, tensor in read.items()}


@pytest.mark.parametrize("form", FORMS[:2])
def test_images(tmp_path: Path, form: str) -> None:
    model, twin = images()
    found = read_checkpoint(saved(model, tmp_path / form))
    assert found.keeps_order
    read = twin_names(found.tensors)
    missing = twin.load_state_dict(read, strict=False)
    assert set(missing.missing_keys) <= {"1.num_batches_tracked"} and not missing.unexpected_keys
    x = torch.randn(2, 3, 9, 9)
    wanted = model(x.permute(0, 2, 3, 1)).detach().cpu()
    twin.eval()
    h = twin[4](twin[3](twin[2](twin[1](twin[0](x))))).flatten(1)
    torch.testing.assert_close(twin[5](h), wanted, rtol=1e-4, atol=1e-4)
    ours, theirs = pack([twin], kinds="names"), pack([found])
    assert torch.equal(ours.values, theirs.values) and torch.equal(ours.tensor_type, theirs.tensor_type)


def test_the_forms_agree(tmp_path: Path) -> None:
    model, _ = images()
    archive, old, numbered = (read_checkpoint(saved(model, tmp_path / form)) for form in FORMS)
    assert list(archive.tensors) == list(old.tensors)
    assert not numbered.keeps_order
    for name, tensor in archive.tensors.items():
        assert torch.equal(old.tensors[name], tensor)
        assert torch.equal(numbered.tensors[name.partition(".")[2]], tensor)


@pytest.mark.parametrize("form", FORMS)
def test_words(tmp_path: Path, form: str) -> None:
    layers = keras.layers
    inputs = keras.Input((5,))
    h = layers.Embedding(11, 8, name="embedding")(inputs)
    h = layers.MultiHeadAttention(2, 4, name="attention")(h, h)
    h = layers.LayerNormalization(name="norm")(h)
    h = layers.Bidirectional(layers.LSTM(6, return_sequences=True), name="both")(h)
    h = layers.GRU(5, name="gru")(h)
    outputs = keras.Sequential([layers.Dense(7, name="first"), layers.Dense(2, name="second")], name="inner")(h)
    model = keras.Model(inputs, outputs)
    model.compile("adam", "mse")
    model.fit(np.zeros((4, 5)), np.zeros((4, 2)), verbose=0)
    found = read_checkpoint(saved(model, tmp_path / form))
    assert "an optimiser's state" in found.left_out.values() and len(found.left_out) == 1
    read = {".".join(part for part in name.split(".") if not part.isdigit()): t for name, t in found.tensors.items()}
    rename = {"query_dense": "query", "key_dense": "key", "value_dense": "value", "output_dense": "attention_output"}
    for long, short in rename.items():
        read = {name.replace(long, short): tensor for name, tensor in read.items()}
    assert read["attention.query.weight"].shape == (8, 8) and read["attention.attention_output.bias"].shape == (8,)

    def put(module: nn.Module, layer: str) -> nn.Module:
        own = {n.removeprefix(f"{layer}."): t for n, t in read.items() if n.startswith(f"{layer}.")}
        for name, tensor in module.state_dict().items():
            tensor.copy_(own.get(name, torch.zeros_like(tensor)))
        assert own.keys() <= module.state_dict().keys()
        return module

    x = torch.randint(11, (2, 5))
    with torch.no_grad():
        at, weights = put(nn.Embedding(11, 8), "embedding")(x), read
        q, k, v = (
            (at @ weights[f"attention.{n}.weight"].T + weights[f"attention.{n}.bias"]).unflatten(-1, (2, 4))
            for n in ("query", "key", "value")
        )
        mixed = nn.functional.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)))
        at = put(nn.Linear(8, 8), "attention.attention_output")(mixed.transpose(1, 2).flatten(2))
        at = put(nn.LayerNorm(8, eps=1e-3), "norm")(at)
        at, _ = put(nn.LSTM(8, 6, bidirectional=True, batch_first=True), "both")(at)
        at, _ = put(nn.GRU(12, 5, batch_first=True), "gru")(at)
        at = put(nn.Linear(7, 2), "inner.second")(put(nn.Linear(5, 7), "inner.first")(at[:, -1]))
        torch.testing.assert_close(at, model(x).cpu(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("file", ["tf_keras.h5", "tf_keras.keras"])
def test_files_of_tf_keras_compute_the_same(file: str) -> None:
    folder = Path(__file__).parent / "formats"
    read = {name.partition(".")[2]: tensor for name, tensor in load_state_dict(folder / file).items()}
    example = load_state_dict(folder / "tf_keras_example.npz")

    def put(module: nn.Module, layer: str) -> nn.Module:
        own = {n.removeprefix(f"{layer}."): t for n, t in read.items() if n.startswith(f"{layer}.")}
        for name, tensor in module.state_dict().items():
            tensor.copy_(own.get(name, torch.zeros_like(tensor)))
        return module.eval()

    with torch.no_grad():
        h = put(nn.Conv2d(2, 3, 3), "first")(example["x"].permute(0, 3, 1, 2))
        h = put(nn.BatchNorm2d(3, eps=1e-3), "norm")(h)
        h = put(nn.Conv2d(3, 3, 2, groups=3, bias=False), "apart.depthwise")(h)
        h = put(nn.Conv2d(3, 4, 1), "apart.pointwise")(h).flatten(2).mT
        lstm = put(nn.LSTM(4, 2, bidirectional=True, batch_first=True), "both")
        _, (last, _) = lstm(h)
        y = put(nn.Linear(4, 2), "last")(torch.cat([last[0], last[1]], 1))
    torch.testing.assert_close(y, example["y"], rtol=1e-4, atol=1e-4)


def test_files_of_keras_2_and_of_transformers(tmp_path: Path) -> None:
    file = tmp_path / "tf_model.h5"
    with h5py.File(file, "w") as root:
        root.attrs["layer_names"] = [b"bert", b"classifier"]
        names = {"bert": ["tf_bert/bert/encoder/layer_._0/attention/self/query/kernel:0",
                          "tf_bert/bert/encoder/layer_._0/output/LayerNorm/gamma:0"],
                 "classifier": ["tf_bert/classifier/kernel:0", "tf_bert/classifier/bias:0"]}  # fmt: skip
        for layer, weights in names.items():
            group = root.create_group(layer)
            group.attrs["weight_names"] = [name.encode() for name in weights]
            for name in weights:
                group[name] = np.zeros((3, 2) if "kernel" in name else 2, np.float32)
    assert {name: tuple(tensor.shape) for name, tensor in load_state_dict(file).items()} == {
        "bert.encoder.layer.0.attention.self.query.weight": (2, 3),
        "bert.encoder.layer.0.output.LayerNorm.weight": (2,),
        "classifier.weight": (2, 3),
        "classifier.bias": (2,),
    }


def test_arrays_of_another_program_are_read_as_they_are(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "n.h5", "w") as root:
        root["fc/weight"] = np.ones((2, 3), np.float32)
        root["fc/notes"] = "text"
        root["elsewhere"] = h5py.ExternalLink("other.h5", "/x")
    found = read_checkpoint(tmp_path / "n.h5")
    assert found.tensors.keys() == {"fc.weight"} and found.tensors["fc.weight"].shape == (2, 3)
    assert found.left_out == {"fc/notes": "no array of numbers (object)", "elsewhere": "a link to another place"}


def test_hostile_and_damaged_files(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "n.h5", "w") as root:
        root.create_dataset("w", (1 << 40,), "f4", chunks=(1 << 20,))
    with pytest.raises(CheckpointError, match="has fewer bytes in the file than its shape takes"):
        load_state_dict(tmp_path / "n.h5")
    data = saved(images()[0], tmp_path / "n.weights.h5").read_bytes()
    for keep in (10, 600, len(data) // 2):
        (tmp_path / "n.h5").write_bytes(data[:keep])
        with pytest.raises(CheckpointError, match=r"n\.h5: is damaged or no HDF5 file"):
            load_state_dict(tmp_path / "n.h5")
    with zipfile.ZipFile(tmp_path / "n.keras", "w") as archive:
        archive.writestr("model.weights.h5", data[:600])
    with pytest.raises(CheckpointError, match=r"n\.keras: is damaged or no file of Keras"):
        load_state_dict(tmp_path / "n.keras")

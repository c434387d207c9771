"""Archives and files of numpy, and what is common to formats from outside PyTorch."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sne_fast import CheckpointError, extras, pack
from sne_fast.data.checkpoints import load_state_dict, read_checkpoint
from sne_fast.data.readers import formats

STATE = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)).state_dict()


def arrays() -> dict[str, Any]:
    return {name: tensor.numpy() for name, tensor in STATE.items()}


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_archives_keep_names_and_order(tmp_path: Path, save: Any) -> None:
    save(tmp_path / "n.npz", **arrays(), epoch=3, label="text", picked=np.array([{}], dtype=object))
    found = read_checkpoint(tmp_path / "n.npz")
    assert found.keeps_order and [*found.tensors] == [*STATE, "epoch"]
    assert all(torch.equal(found.tensors[name], STATE[name]) for name in STATE)
    assert found.left_out == {
        "label": "no array of numbers (<U4)",
        "picked": "an array of Python objects, which are pickled",
    }
    assert torch.equal(pack([found]).values, pack([STATE]).values)


def test_order_of_dimensions_and_of_bytes(tmp_path: Path) -> None:
    held = np.arange(6.0).reshape(2, 3)
    np.savez(tmp_path / "n.npz", **{"f.weight": np.asfortranarray(held), "b/weight": held.astype(">f4")})
    read = load_state_dict(tmp_path / "n.npz")
    assert torch.equal(read["f.weight"], torch.tensor(held))
    assert torch.equal(read["b.weight"], torch.tensor(held, dtype=torch.float32))


def test_folders_of_arrays(tmp_path: Path) -> None:
    for name, array in arrays().items():
        np.save(tmp_path / f"{name}.npy", array)
    (tmp_path / "README").write_text("text")
    found = read_checkpoint(tmp_path)
    assert not found.keeps_order and [*found.tensors] == sorted(STATE)
    assert all(torch.equal(found.tensors[name], STATE[name]) for name in STATE)
    assert [*load_state_dict(tmp_path / "0.weight.npy")] == ["0.weight"]
    torch.save(STATE, tmp_path / "n.pt")
    np.savez(tmp_path / "predictions.npz", x=np.ones(3))
    assert read_checkpoint(tmp_path).keeps_order


def test_one_model_in_several_formats(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "pytorch_model.bin")
    for name in ("tf_model.h5", "flax_model.msgpack", "model.onnx"):
        (tmp_path / name).write_bytes(b"not read")
    found = read_checkpoint(tmp_path)
    assert [*found.tensors] == [*STATE]
    assert found.left_out["tf_model.h5"] == "the same model as pytorch_model.bin by its name"


def test_hostile_archives_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "n.npz"

    def header(shape: tuple[int, ...], data: bytes = b"", dtype: str = "<f4") -> bytes:
        held = io.BytesIO()
        np.lib.format.write_array_header_1_0(held, {"descr": dtype, "fortran_order": False, "shape": shape})
        return held.getvalue() + data

    for content, message in (
        (header((1 << 50,)), "does not fit into its file"),
        (header((3,), bytes(8)), "does not fit into its file|ends 4 bytes too early"),
        (b"\x93NUMPY\x09\x00" + bytes(20), "the version .9, 0. of an array is not known"),
        (b"no array", "is damaged or no archive of numpy"),
        (header((2,), bytes(16), "|O"), "holds no weights but 'w'"),
    ):
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("w.npy", content)
        with pytest.raises(CheckpointError, match=message):
            load_state_dict(file)
    with zipfile.ZipFile(file, "w", zipfile.ZIP_BZIP2) as archive:
        archive.writestr("w.npy", header((1 << 20,), bytes(1 << 22)))
    with pytest.raises(CheckpointError, match="is encrypted or larger than it can be"):
        load_state_dict(file)


MISSING = [
    (b"GGUF\3\0\0\0", "n.gguf", "is a GGUF file, and reading it needs gguf", "gguf"),
    (b"\x08\x09\x12\x07pytorch", "n.onnx", "is an ONNX file, and reading it needs onnx", "onnx"),
    (b"\x89HDF\r\n\x1a\n", "n.h5", "is an HDF5 file, and reading it needs h5py", "keras"),
    (b"\x81\xa6params\x80", "n.msgpack", "is a file of msgpack, and reading it needs msgpack", "flax"),
    (b"\x1c\0\0\0TFL3", "n.tflite", "is a file of TFLite, and reading it needs tflite", "tflite"),
]


@pytest.mark.parametrize("first, name, message, extra", MISSING)
def test_a_missing_library_is_named(
    tmp_path: Path, monkeypatch: Any, first: bytes, name: str, message: str, extra: str
) -> None:
    monkeypatch.setattr(extras, "installed", lambda module: False)
    for file in (tmp_path / name, tmp_path / "renamed.bin"):
        file.write_bytes(first)
        with pytest.raises(CheckpointError, match=rf"{message}: pip install .sne_fast\[{extra}\].$"):
            load_state_dict(file)


def test_a_key_chooses_only_in_pickles(tmp_path: Path) -> None:
    np.savez(tmp_path / "n.npz", **arrays())
    with pytest.raises(CheckpointError, match="key= chooses among what a pickled file holds; a file of npz is flat"):
        load_state_dict(tmp_path / "n.npz", key="x")


@pytest.mark.parametrize(
    "names, message",
    [
        (["[Content_Types].xml"], "is an Office document"),
        (["a/b.mlmodel"], "is a Core ML package; give the checkpoint that it was made from"),
    ],
)
def test_archives_of_something_else_are_named(tmp_path: Path, names: list[str], message: str) -> None:
    with zipfile.ZipFile(tmp_path / "n.zip", "w") as archive:
        for name in names:
            archive.writestr(name, b"")
    with pytest.raises(CheckpointError, match=message):
        formats.format_of(tmp_path / "n.zip")


def test_files_of_formats_that_are_not_read_are_named(tmp_path: Path) -> None:
    for name, content, message in (
        ("saved_model.pb", b"\x08\x01\x12\x00", "is a SavedModel of TensorFlow; save its weights with"),
        ("weight.bin", b"\x15\0\0\0\x02" + bytes(59) + b"\xef\xbe\xad\xde", "is a part of a Core ML package"),
        ("n.ort", b"\x20\0\0\0ORTM", "is a model of ONNX Runtime"),
        ("variables.data-00000-of-00001", bytes(16), "is by its name a part of a checkpoint of TensorFlow"),
        ("frozen.pb", b"\x0a\x10abc", "is by its name a graph of TensorFlow; convert it to ONNX"),
        ("n.engine", b"ptrt", "is by its name compiled by TensorRT; give the file that it was built from"),
        ("n.pte", b"\x20\0\0\0ET12", "is a program of ExecuTorch"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=message):
            load_state_dict(tmp_path / name)
    for name in ("weight.bin", "n.ort", "n.pte"):
        (tmp_path / name).unlink()
    with pytest.raises(CheckpointError, match="is a SavedModel of TensorFlow"):
        load_state_dict(tmp_path)

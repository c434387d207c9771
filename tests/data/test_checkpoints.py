"""Reading checkpoints: order, forms, folders, shards; damaged and malicious files; writing all or nothing."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file, save_model
from torch import Tensor, nn

from helpers.networks import make
from sne_fast import CheckpointError, pack
from sne_fast.data import checkpoints as module_under_test
from sne_fast.data.checkpoints import ORDER_KEY, load_state_dict, read_checkpoint, save_state_dict
from sne_fast.data.layer_order import natural_key


@pytest.fixture
def state() -> dict[str, Tensor]:
    """Out of alphabetical order, with numbers that sort wrongly as text."""
    names = ["stem.weight", "layers.2.weight", "layers.10.weight", "layers.10.bias", "a.weight"]
    return {name: torch.full((2, i + 1), float(i)) for i, name in enumerate(names)}


NATURAL = ["a.weight", "layers.2.weight", "layers.10.bias", "layers.10.weight", "stem.weight"]


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert list(one) == list(other)
    for name in one:
        assert one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]), name


def write_shards(folder: Path, state: dict[str, Tensor], metadata: dict | None = None) -> Path:
    names = list(state)
    shards = {"model-00001-of-00002.safetensors": names[:2], "model-00002-of-00002.safetensors": names[2:]}
    for shard, held in shards.items():
        save_file({name: state[name] for name in held}, folder / shard)
    weight_map = {name: shard for shard, held in shards.items() for name in held}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1, **(metadata or {})}, "weight_map": weight_map}))
    return index


# ---------------------------------------------------------------------------------------------------------------------
# Forms and order


def test_safetensors_keep_the_order_that_we_wrote(tmp_path, state) -> None:
    save_state_dict(state, tmp_path / "n.safetensors", {"note": "hello"})
    same(load_state_dict(tmp_path / "n.safetensors"), state)
    same(load_state_dict(str(tmp_path / "n.safetensors")), state)


def test_safetensors_without_an_order_are_sorted_naturally(tmp_path, state) -> None:
    save_file(state, tmp_path / "n.safetensors")
    read = load_state_dict(tmp_path / "n.safetensors")
    assert list(read) == NATURAL
    same({name: read[name] for name in state}, state)


@pytest.mark.parametrize("length", [0x0280, 0x4B50, 0x8B1F, 0x5A42])
def test_safetensors_are_told_whatever_the_length_of_their_header_begins_with(tmp_path, length: int) -> None:
    """The lengths begin as a pickle, a zip archive and compressed files do."""
    header = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode().ljust(length)
    (tmp_path / "n.safetensors").write_bytes(length.to_bytes(8, "little") + header + b"\0\0\x80?")
    assert load_state_dict(tmp_path / "n.safetensors")["w"].tolist() == [1.0]


def test_natural_order() -> None:
    names = ["b1.w", "a10.w", "a9.w", "a", "a9.b", "10.w", "2.w", "a01.w", "a1.w"]
    assert sorted(names, key=natural_key) == ["2.w", "10.w", "a", "a01.w", "a1.w", "a9.b", "a9.w", "a10.w", "b1.w"]


@pytest.mark.parametrize("order", ["{", "3", '["a.weight"]', '["x"]', "null", '{"a.weight": 1}', "[1, 2, 3, 4, 5]"])
def test_an_order_that_does_not_fit_is_refused(tmp_path, state, order: str) -> None:
    save_file(state, tmp_path / "n.safetensors", {ORDER_KEY: order})
    with pytest.raises(CheckpointError, match=r"n.safetensors: its metadata 'sne_fast.order' must be a JSON list of"):
        load_state_dict(tmp_path / "n.safetensors")


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt"])
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("key", [None, "state_dict", "model", "model_state_dict"])
def test_pickled_checkpoints(tmp_path, state, suffix: str, zipped: bool, key: str | None) -> None:
    file = tmp_path / f"n{suffix}"
    content = {key: state, "epoch": 3, "optimizer": {"lr": 0.1}} if key else state | {"epoch": 3}
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    same(load_state_dict(file), state)


def test_pack_reads_every_form_alike(tmp_path) -> None:
    network = make("resnet_block")
    save_state_dict(network.state_dict(), tmp_path / "a.safetensors")
    torch.save({"model": {f"module.{k}": v for k, v in network.state_dict().items()}}, tmp_path / "b.pt")
    index = write_shards(tmp_path, network.state_dict(), {ORDER_KEY: json.dumps(list(network.state_dict()))})
    with torch.no_grad():
        b = pack([network, tmp_path / "a.safetensors", tmp_path / "b.pt", index, str(index)])
    for i in range(1, 5):
        for field in ("values", "chunk_ptr", "tensor_type", "tensor_scale", "layer_ptr"):
            assert torch.equal(getattr(b[0], field), getattr(b[i], field)), (i, field)
        assert b.names[i][1] == b.names[0][1]
    assert b.network_name(1) == f"network 1 ({str(tmp_path / 'a.safetensors')!r})"


def test_shards(tmp_path, state) -> None:
    assert list(load_state_dict(write_shards(tmp_path, state))) == NATURAL
    order = list(state)
    for given in (order, json.dumps(order)):
        same(load_state_dict(write_shards(tmp_path, state, {ORDER_KEY: given})), state)
    with pytest.raises(CheckpointError, match="must be a JSON list of the names of its 5 tensors"):
        load_state_dict(write_shards(tmp_path, state, {ORDER_KEY: order[:3]}))


@pytest.mark.skipif(sys.platform == "win32", reason="needs links")
def test_shards_may_be_links_as_in_the_cache_of_the_hub(tmp_path, state) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir(), snapshot.mkdir()
    write_shards(blobs, state)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(file)
    assert list(load_state_dict(snapshot)) == NATURAL


def test_folders(tmp_path, state) -> None:
    def folder(*names: str) -> Path:
        path = tmp_path / "-".join(names or ("none",))
        path.mkdir()
        for name in names:
            if name == "index":
                write_shards(path, state)
            elif name.endswith(".safetensors"):
                save_state_dict(state, path / name)
            elif name.endswith((".bin", ".pt", ".ckpt")):
                torch.save(state, path / name)
            else:
                (path / name).write_text("{}")
        return path

    same(load_state_dict(folder("model.safetensors", "other.safetensors", "x.bin", "config.json")), state)
    assert list(load_state_dict(folder("index", "y.bin"))) == NATURAL
    same(load_state_dict(folder("only.safetensors", "only.bin")), state)
    with pytest.raises(CheckpointError, match=r"several checkpoints, only.safetensors, x.bin; give the path of one"):
        load_state_dict(folder("only.safetensors", "x.bin"))
    same(load_state_dict(folder("x.bin", "readme.md")), state)
    with pytest.raises(
        CheckpointError, match=r"several checkpoints, a.safetensors, b.safetensors; give the path of one"
    ):
        load_state_dict(folder("a.safetensors", "b.safetensors"))
    with pytest.raises(CheckpointError, match=r"several checkpoints, a.pt, b.ckpt"):
        load_state_dict(folder("b.ckpt", "a.pt"))
    with pytest.raises(CheckpointError, match=r"holds no checkpoint \(safetensors, .* but config.json"):
        load_state_dict(folder("config.json"))
    with pytest.raises(CheckpointError, match="but no files"):
        load_state_dict(folder())


def test_large_files_are_mapped_and_dtypes_survive(tmp_path) -> None:
    dtypes = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.int64, torch.bool)
    state = {str(d): torch.ones(3).to(d) for d in dtypes}
    save_state_dict(state, tmp_path / "n.safetensors")
    torch.save(state, tmp_path / "n.pt")
    for name in ("n.safetensors", "n.pt"):
        same(load_state_dict(tmp_path / name), state)
    assert pack(tmp_path / "n.pt").num_tensors == 5


# ---------------------------------------------------------------------------------------------------------------------
# Missing, damaged, refused


def refused(path: Path, message: str) -> None:
    """Check that load_state_dict refuses, naming the file, and pack, naming the network as well."""
    with pytest.raises(CheckpointError, match=message) as raised:
        load_state_dict(path)
    assert str(path) in str(raised.value)
    with pytest.raises(CheckpointError, match="pack: network 1: .*" + message):
        pack([nn.Linear(1, 1), path])


def test_missing_files_and_unknown_formats(tmp_path) -> None:
    assert issubclass(CheckpointError, ValueError)
    refused(tmp_path / "n.safetensors", "there is no such file")
    refused(tmp_path / "n.pt", "there is no such file")
    refused(tmp_path / ("n" * 5000), "cannot be read: File name too long")
    refused(tmp_path / "n.onnx", "there is no such file")
    (tmp_path / "n.onnx").write_bytes(b"\x08\x07\x12\x07pytorch")
    refused(tmp_path / "n.onnx", "holds no weights")
    (tmp_path / "n.bin").write_bytes(b"\x00\x07\x12\x07pytorch")
    refused(tmp_path / "n.bin", "cannot tell what it is by its first bytes; readable are safetensors")
    (tmp_path / "config.json").write_text('{"hidden_size": 8}')
    refused(tmp_path / "config.json", "is damaged or no index of shards: it must map tensors to files in weight_map")
    for first, said in (
        (b"GGUF\3\0", "is damaged or no GGUF file"),
        (b"0000ORTM0000", "is a model of ONNX Runtime"),
        (b"PAR1", "is a table of Parquet"),
        (b"\x1f\x8b\x08", "is compressed by gzip"),
        (b"version https://git-lfs.github.com/spec/v1", "is a pointer of Git LFS"),
        (b"<!DOCTYPE html>", "is a web page"),
        (b"\0" * 257 + b"ustar", "is a tar archive"),
    ):
        (tmp_path / "n.pt").write_bytes(first)
        refused(tmp_path / "n.pt", said)


@pytest.mark.parametrize("keep", [0, 4, 8, 50, -1, -100])
def test_truncated_safetensors(tmp_path, state, keep: int) -> None:
    save_state_dict(state, tmp_path / "n.safetensors")
    data = (tmp_path / "n.safetensors").read_bytes()
    (tmp_path / "n.safetensors").write_bytes(data[:keep])
    refused(tmp_path / "n.safetensors", "is damaged or no safetensors file")


@pytest.mark.parametrize("keep", [0, 2, 4, 300, -1, -100])
@pytest.mark.parametrize("zipped", [True, False])
def test_truncated_pickles(tmp_path, state, zipped: bool, keep: int) -> None:
    torch.save(state, tmp_path / "n.pt", _use_new_zipfile_serialization=zipped)
    data = (tmp_path / "n.pt").read_bytes()
    (tmp_path / "n.pt").write_bytes(data[:keep])
    refused(tmp_path / "n.pt", "is damaged or no checkpoint of torch")


def test_files_of_something_else(tmp_path) -> None:
    for name in ("n.safetensors", "n.pt"):
        (tmp_path / name).write_bytes(b"hello, this is a text file and not a checkpoint at all")
        refused(tmp_path / name, "is damaged or no")
    header = json.dumps({"w": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}).encode()
    (tmp_path / "n.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    refused(tmp_path / "n.safetensors", "is damaged or no safetensors file")


class Touch:
    """A malicious object, whose pickle runs a command when it is loaded."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return os.system, (f"touch {self.file}",)


@pytest.mark.parametrize("zipped", [True, False])
def test_malicious_pickles_are_never_run(tmp_path, zipped: bool) -> None:
    proof = tmp_path / "pwned"
    torch.save({"w": torch.ones(2), "x": Touch(proof)}, tmp_path / "n.pt", _use_new_zipfile_serialization=zipped)
    found = read_checkpoint(tmp_path / "n.pt")
    same(found.tensors, {"w": torch.ones(2)})
    assert found.left_out == {"x": f"an object of {os.system.__module__}.system, which was not made"}
    for protocol in range(6):
        (tmp_path / "n.bin").write_bytes(pickle.dumps(Touch(proof), protocol=protocol))
        refused(tmp_path / "n.bin", "holds an object of (posix|nt).system and no tensors")
    assert not proof.exists()
    os.system(f"touch {proof}")  # the proof that the command would have worked
    assert proof.exists()


def test_checkpoints_without_weights(tmp_path) -> None:
    file = tmp_path / "n.pt"
    optimiser = torch.optim.Adam([torch.ones(2, requires_grad=True)]).state_dict()
    for content, message in (
        (optimiser, r"holds only an optimiser's state \('state', 'param_groups'\)"),
        ({"optimizer": optimiser, "epoch": 3}, r"holds only an optimiser's state \('optimizer', 'epoch'\)"),
        ({"epoch": 3}, r"holds no tensors by name at any depth \('epoch'\)"),
        ({}, r"holds no tensors .*\(nothing\)"),
        ({"model": {"epoch": 3}}, r"holds no tensors .*\('model'\)"),
        ([torch.ones(2)], "refused, it holds tensors without names in a list at the top"),
        (torch.ones(2), "must hold a state_dict, got a tensor"),
        (3, "must hold a state_dict, got int"),
    ):
        torch.save(content, file)
        refused(file, message)
    loop: dict = {"epoch": 3}
    loop["model"] = loop
    torch.save(loop, file)
    refused(file, "holds no tensors")
    save_file({}, tmp_path / "n.safetensors")
    refused(tmp_path / "n.safetensors", "holds no tensors")
    torch.save({"steps": torch.tensor(3)}, file)
    with pytest.raises(ValueError, match=r"network 0 \('.*n.pt'\) has no floating-point parameters"):
        pack([file])


def test_shards_that_are_missing_or_lack_a_tensor(tmp_path, state) -> None:
    index = write_shards(tmp_path, state)
    second = tmp_path / "model-00002-of-00002.safetensors"
    save_file({"layers.10.weight": state["layers.10.weight"], "a.weight": state["a.weight"]}, second)
    with pytest.raises(CheckpointError, match=r"00002.safetensors: lacks the tensor 'layers.10.bias' that the index"):
        load_state_dict(index)
    second.unlink()
    refused(index, "its shard model-00002-of-00002.safetensors is missing; fetch it into")
    second.write_bytes(b"12345678901")
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002.safetensors: is damaged"):
        load_state_dict(index)


@pytest.mark.parametrize(
    "shard",
    ["../outside.safetensors", "/etc/outside.safetensors", "a/../../outside.safetensors", "..\\outside.safetensors",
     "C:\\outside.safetensors", ""],
)  # fmt: skip
def test_shards_outside_the_folder_are_refused(tmp_path, shard: str) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    save_file({"w": torch.ones(2)}, tmp_path / "outside.safetensors")
    index = inside / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": shard}}))
    refused(index, "refused, its shard .* is not a file inside the index's folder")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is damaged or no index of shards"),
        ("[]", "is damaged or no index of shards"),
        ("{}", "it must map tensors to files in weight_map"),
        ('{"weight_map": ["a"]}', "is damaged or no index of shards"),
        ('{"weight_map": {"a": 3}}', "weight_map must map names to files"),
        ('{"weight_map": {"a": {}}}', "is damaged or no index of shards"),
        ('{"weight_map": {"a": "b.safetensors"}, "metadata": 3}', "is damaged or no index of shards"),
        ('{"weight_map": {}}', "holds no tensors"),
        (b"\xff\xfe", "is damaged or no index of shards"),
    ],
    ids=str,
)
def test_damaged_indices(tmp_path, text: str | bytes, message: str) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(index, message)


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def test_writing_keeps_tied_strided_and_device_tensors(tmp_path) -> None:
    weight = torch.randn(3, 4, requires_grad=True)
    state = {"b": weight, "a": weight, "t": weight.t(), "part": weight[1], "n": torch.tensor(3)}
    save_state_dict(state, tmp_path / "n.safetensors")
    loaded = load_state_dict(tmp_path / "n.safetensors")
    same(loaded, {name: t.detach() for name, t in state.items()})
    assert loaded["a"].data_ptr() == loaded["b"].data_ptr() != loaded["part"].data_ptr()
    b, other = pack([state]), pack([tmp_path / "n.safetensors"])
    assert b.names[0][1] == other.names[0][1] == ("a", "part", "t") and torch.equal(b.values, other.values)


def test_tensors_saved_under_one_of_their_names_have_the_others_too(tmp_path) -> None:
    network = torch.nn.ModuleDict({"decoder": torch.nn.Linear(3, 4, bias=False), "embed": torch.nn.Embedding(4, 3)})
    network["decoder"].weight = network["embed"].weight
    save_model(network, str(tmp_path / "n.safetensors"))
    loaded = load_state_dict(tmp_path / "n.safetensors")
    assert sorted(loaded) == ["decoder.weight", "embed.weight"]
    assert loaded["decoder.weight"].data_ptr() == loaded["embed.weight"].data_ptr()
    for source in (network, network.state_dict(), tmp_path / "n.safetensors"):
        batch = pack([source])
        assert batch.names[0][1] == ("embed.weight",) and batch.tensor_type.tolist() == [32]


def test_writing_is_all_or_nothing(tmp_path, state, monkeypatch) -> None:
    file = tmp_path / "n.safetensors"
    save_state_dict(state, file)
    before = file.read_bytes()
    with pytest.raises(TypeError, match="'x' must name a tensor, got int"):
        save_state_dict({"x": 3}, file)  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="at least one tensor, got none"):
        save_state_dict({}, file)
    with pytest.raises(TypeError, match="metadata must map strings to strings"):
        save_state_dict(state, file, {"a": 3})  # type: ignore[dict-item]

    def full(*_) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(module_under_test.os, "replace", full)
    with pytest.raises(CheckpointError, match=r"n.safetensors: cannot be written: No space left"):
        save_state_dict({"w": torch.ones(1)}, file)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="cannot be written"):
        save_state_dict(state, tmp_path / "nowhere" / "n.safetensors")
    assert file.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["n.safetensors"]


@pytest.mark.skipif(sys.platform == "win32", reason="permission bits")
def test_written_files_have_ordinary_permissions(tmp_path, state) -> None:
    save_state_dict(state, tmp_path / "n.safetensors")
    (tmp_path / "plain").write_text("")
    assert (tmp_path / "n.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_importing_it_does_not_import_safetensors() -> None:
    code = "import sys, sne_fast.data.checkpoints; print('safetensors' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert run.stdout.strip() == "False", run.stderr


@pytest.mark.parametrize("length", [0x280, 0x380, 0x480, 0x580])
def test_a_header_whose_length_looks_like_the_mark_of_a_pickle_is_one_of_safetensors(length, tmp_path):
    plain = json.dumps({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    header = plain + b" " * (length - len(plain))
    file = tmp_path / "model"
    file.write_bytes(length.to_bytes(8, "little") + header + torch.tensor([1.0, 2.0]).numpy().tobytes())
    assert load_state_dict(file)["w"].tolist() == [1.0, 2.0]


def test_a_checkpoint_that_was_read_packs_as_its_path_does(tmp_path):
    torch.save({"net": nn.BatchNorm1d(3).state_dict(), "epoch": 3}, tmp_path / "a.pt")
    from_path, from_read = (pack(one) for one in (tmp_path / "a.pt", read_checkpoint(tmp_path / "a.pt")))
    assert torch.equal(from_path.values, from_read.values) and from_path.skipped == from_read.skipped
    assert from_path.names[0][1] == from_read.names[0][1]
    save_file({"w.weight": torch.ones(2, 2)}, tmp_path / "b.safetensors")
    with pytest.raises(CheckpointError, match=r"network 0 \('checkpoint'\) does not say in which order"):
        pack(read_checkpoint(tmp_path / "b.safetensors"), order="definition")

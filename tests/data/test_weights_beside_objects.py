"""Checkpoints whose weights stand beside objects: read without running code, the rest accounted for."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import enum
import functools
import io
import os
import pathlib
import pickle
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sne_fast import CheckpointError, pack
from sne_fast.data.checkpoints import load_state_dict, read_checkpoint


class Colour(enum.Enum):
    """An enumeration of the program that wrote a file."""

    RED = 1


@dataclasses.dataclass
class Settings:
    """Settings of the program that wrote a file; `extra` may be anything."""

    width: int = 3
    extra: Any = None


class Attributes(dict):
    """A dict whose entries are attributes too, as several packages for settings have it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.__dict__.update(self)


class Sneaky(nn.Module):
    """A module with all that a module can hold."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(2, 3)
        self.norm = nn.BatchNorm1d(3)
        self.tied = nn.Linear(2, 3)
        self.tied.weight = self.first.weight
        self.register_buffer("kept", torch.arange(3.0))
        self.register_buffer("temporary", torch.ones(7), persistent=False)
        self.register_parameter("none", None)
        self.layers = nn.ModuleList([nn.Conv2d(1, 2, 3), nn.ReLU()])
        self.act = torch.tanh
        self.settings = Settings()


STATE = OrderedDict([("b.weight", torch.arange(6.0).view(2, 3)), ("b.bias", torch.ones(2)), ("a.n", torch.tensor(3))])
FORMS = ("zip", "old", "pickle")


def write(file: Path, content: Any, form: str = "zip") -> Path:
    if form == "pickle":
        file.write_bytes(pickle.dumps(content, protocol=4))
    else:
        torch.save(content, file, _use_new_zipfile_serialization=form == "zip")
    return file


def same(read: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert list(read) == list(wanted)
    for key, tensor in wanted.items():
        assert read[key].dtype == tensor.dtype and torch.equal(read[key], tensor.detach()), key
        assert not read[key].requires_grad and type(read[key]) is Tensor


@pytest.mark.parametrize("form", FORMS)
def test_objects_beside_weights_are_put_aside(tmp_path: Path, form: str) -> None:
    objects = {
        "args": argparse.Namespace(lr=0.1, path=pathlib.Path("x")),
        "best": np.float64(0.5),
        "losses": np.arange(3),
        "path": pathlib.Path("a/b"),
        "colour": Colour.RED,
        "settings": Settings(4, {"deep": [Settings()]}),
        "cfg": Attributes(width=3),
        "factory": collections.defaultdict(list, {"a": [1]}),
        "function": torch.nn.functional.relu,
        "kind": nn.Linear,
        "names": {"a", "b"},
        "dtype": torch.float32,
        "epoch": 3,
        "nothing": None,
    }
    file = write(tmp_path / "run", {**objects, "weights": STATE}, form)
    found = read_checkpoint(file)
    same(found.tensors, STATE)
    assert found.keeps_order and found.key == "weights" and set(found.left_out) == set(objects)
    assert found.left_out["args"] == "an object of argparse.Namespace, which was not made"
    assert found.left_out["epoch"] == "no tensor (int)"
    with torch.no_grad():
        assert pack(file).names[0][1] == pack(STATE).names[0][1]


KEYS = ("state_dict", "model", "model_state_dict", "model_state", "net", "network", "weights", "params", "params_ema",
        "ema", "generator", "module", "encoder", "student", "policy", "a key, with.dots", "")  # fmt: skip


@pytest.mark.parametrize("key", KEYS)
def test_the_one_mapping_of_tensors_is_found_under_any_key(tmp_path: Path, key: str) -> None:
    optimiser = torch.optim.Adam([nn.Parameter(torch.ones(2))])
    optimiser.param_groups[0]["params"][0].grad = torch.ones(2)
    optimiser.step()
    content = {key: STATE, "optimizer": optimiser.state_dict(), "opt_whole": optimiser, "acc": torch.tensor(0.5),
               "rng_state": torch.get_rng_state(), "lr_scheduler": {"last": torch.ones(2)}}  # fmt: skip
    found = read_checkpoint(write(tmp_path / "run.pth.tar", content))
    same(found.tensors, STATE)
    assert set(found.left_out) == set(content) - {key} and found.left_out["optimizer"] == "an optimiser's state"
    same(read_checkpoint(write(tmp_path / "deep", {"run": [{"x": content}]})).tensors, STATE)


def test_files_of_trainers_are_read(tmp_path: Path) -> None:
    deepspeed = {
        "module": STATE, "buffer_names": ["a.n"], "optimizer": None,
        "param_shapes": [OrderedDict(w=torch.Size([2, 3]))],
        "frozen_param_shapes": None, "shared_params": {}, "lr_scheduler": None, "data_sampler": None,
        "sparse_tensor_module_names": set(), "global_steps": 10, "dp_world_size": 1, "mp_world_size": 1,
        "ds_config": {"zero": {}}, "ds_version": "0.14",
    }  # fmt: skip
    same(load_state_dict(write(tmp_path / "mp_rank_00_model_states.pt", deepspeed)), STATE)
    lightning = {
        "epoch": 3, "global_step": 10, "pytorch-lightning_version": "2.0", "state_dict": STATE, "loops": {"x": {}},
        "callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(0.1), "kth": {"a": torch.ones(2)}}},
        "optimizer_states": [{"state": {0: {"m": torch.ones(2)}}, "param_groups": [{}]}], "lr_schedulers": [],
        "hparams_name": "kwargs", "hyper_parameters": {"net": Settings()},
    }  # fmt: skip
    same(load_state_dict(write(tmp_path / "last.ckpt", lightning)), STATE)
    yolo = {"epoch": -1, "model": nn.Sequential(nn.Linear(2, 2)), "ema": None, "opt": argparse.Namespace(), "date": "x"}
    same(load_state_dict(write(tmp_path / "yolo", yolo)), yolo["model"].state_dict())
    described = {"model": {"name": "resnet"}, "model_state_dict": STATE}
    same(load_state_dict(write(tmp_path / "described", described)), STATE)


@pytest.mark.parametrize("form", FORMS)
def test_modules_that_were_saved_whole_are_read_as_their_state_dict(tmp_path: Path, form: str) -> None:
    module = Sneaky()
    for content in (module, {"model": module, "epoch": 1}, [module], nn.DataParallel(module).module):
        same(load_state_dict(write(tmp_path / "m", content, form)), module.state_dict())
    read = load_state_dict(write(tmp_path / "m", nn.Sequential(module), form))
    assert list(read) == list(nn.Sequential(module).state_dict())
    assert read["0.tied.weight"].data_ptr() == read["0.first.weight"].data_ptr()  # tied as they were saved
    weights = {"encoder": module, "head": nn.Linear(2, 2)}
    with pytest.raises(CheckpointError, match=r"tensors in 2 places, 'encoder' \(12\), 'head' \(2\)"):
        load_state_dict(write(tmp_path / "m", weights, form))
    same(load_state_dict(tmp_path / "m", key="head"), weights["head"].state_dict())
    same(load_state_dict(tmp_path / "m", key="encoder.layers.0"), module.layers[0].state_dict())


def test_moving_averages_of_the_weights_are_left_out(tmp_path: Path) -> None:
    average = {key: tensor + 1 for key, tensor in STATE.items()}
    for keys in (("params", "params_ema"), ("model", "ema"), ("state_dict", "state_dict_ema"), ("net", "ema_model"),
                 ("model", "swa_model"), ("model", "model_ema.module")):  # fmt: skip
        found = read_checkpoint(write(tmp_path / "x", {keys[1]: average, keys[0]: STATE}))
        same(found.tensors, STATE)
        assert found.left_out == {keys[1]: "a moving average of the weights"}
        same(load_state_dict(tmp_path / "x", key=keys[1]), average)
    other = {"model": STATE, "ema": {"shadow": torch.ones(2)}}
    with pytest.raises(CheckpointError, match="tensors in 2 places"):
        load_state_dict(write(tmp_path / "x", other))


@pytest.mark.parametrize("form", FORMS)
def test_tensors_in_several_places_are_listed_and_chosen_by_key(tmp_path: Path, form: str) -> None:
    file = write(tmp_path / "gan", {"nets": {"g.x": STATE, "d": {"w": torch.ones(4)}}, "e": {"w": torch.ones(5)}}, form)
    with pytest.raises(
        CheckpointError, match=r"gan: holds tensors in 3 places, 'nets.g.x' \(3\), 'nets.d' \(1\), 'e' \(1\)"
    ):
        load_state_dict(file)
    found = read_checkpoint(file, key="nets.g.x")
    same(found.tensors, STATE)
    assert found.left_out == {"nets.d": "tensors in another place", "e": "tensors in another place"}
    assert list(load_state_dict(file, key="nets")) == [*(f"g.x.{key}" for key in STATE), "d.w"]
    assert list(load_state_dict(file, key=""))[-1] == "e.w"
    for key, message in (
        ("x", r"has no key 'x'; there are 'nets', 'e'"),
        ("nets.q", r"has no key 'nets.q'; there are 'g.x', 'd'"),
        ("e.w", r"holds a tensor at the key 'e.w'"),
        ("e.w.v", r"holds a tensor at the key"),
    ):
        with pytest.raises(CheckpointError, match=f"gan: {message}"):
            load_state_dict(file, key=key)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model": STATE, "w": torch.ones(3)}, r"tensors in 2 places, the top \(1\), 'model' \(3\)"),
        ({"model": STATE, "classifier": {"w": torch.ones(3)}}, r"tensors in 2 places, 'model' \(3\), 'classifier'"),
        ({**STATE, "decoder": {"w": torch.ones(3)}}, r"tensors in 2 places, the top \(3\), 'decoder' \(1\)"),
        ([STATE, {"w": torch.ones(3)}], r"tensors in 2 places, '0' \(3\), '1' \(1\)"),
        ({"model": STATE, "x": Settings(1, torch.ones(3))}, r"tensors in 2 places, 'model' \(3\), 'x' \(1\)"),
        ({"model": STATE, "x": [torch.ones(3)]}, r"tensors in 2 places, the top \(1\), 'model' \(3\)"),
        ({"model": STATE, "x": collections.deque([torch.ones(3)])}, r"tensors in 2 places, 'model' \(3\), 'x' \(1\)"),
        ({"model": STATE, "x": functools.partial(Settings, torch.ones(3))}, r"tensors without names"),
        ({"model": STATE, "x": torch.ones(3).untyped_storage()}, r"tensors without names in a dict at the top"),
        ((torch.ones(3), torch.ones(3)), r"tensors without names in a tuple at the top"),
    ],
    ids=range(10),
)  # fmt: skip
def test_what_could_be_weights_is_never_left_out_without_a_word(tmp_path: Path, content: Any, message: str) -> None:
    file = write(tmp_path / "x", content)
    with pytest.raises(CheckpointError, match=message) as raised:
        load_state_dict(file)
    assert str(raised.value).startswith(f"{file}: ") and "\n" not in str(raised.value)
    if isinstance(content, dict) and "model" in content:
        same(load_state_dict(file, key="model"), STATE)


def test_weights_inside_objects_are_found_by_attribute(tmp_path: Path) -> None:
    agent = Settings(3, {"policy": STATE})
    found = read_checkpoint(write(tmp_path / "agent", agent))
    same(found.tensors, STATE)
    assert found.key == "extra.policy"
    same(load_state_dict(write(tmp_path / "agent", Attributes(weights=Attributes(STATE)))), STATE)
    same(load_state_dict(write(tmp_path / "agent", collections.UserDict(x=STATE))), STATE)


@pytest.mark.parametrize("protocol", range(6))
def test_arrays_of_numpy_are_weights_where_there_are_no_tensors(tmp_path: Path, protocol: int) -> None:
    arrays = {
        "w": np.arange(6.0).reshape(2, 3), "f": np.asfortranarray(np.arange(6, dtype=np.float32).reshape(3, 2)),
        "half": np.ones(2, np.float16), "big": np.arange(3, dtype=">f4"), "n": np.array(3),
        "b": np.array([True, False]), "empty": np.zeros((0, 2)), "c": np.array([1 + 2j]),
    }  # fmt: skip
    for content in (arrays, {"model": arrays, "epoch": 1, "name": np.array(["a"]), "any": np.array([None])}):
        (tmp_path / "x.pkl").write_bytes(pickle.dumps(content, protocol=protocol))
        read = load_state_dict(tmp_path / "x.pkl")
        assert list(read) == list(arrays)
        for key, array in arrays.items():
            assert read[key].numpy().dtype == array.dtype.newbyteorder("=") and np.array_equal(read[key].numpy(), array)
    torch.save({"w": torch.ones(2), "b": np.ones(2)}, tmp_path / "x")
    with pytest.raises(CheckpointError, match="holds an array of numpy, 'b', among tensors, which could be a weight"):
        load_state_dict(tmp_path / "x")
    torch.save({"model": STATE, "mean": np.ones(2)}, tmp_path / "x")
    same(load_state_dict(tmp_path / "x"), STATE)


def test_two_tensors_of_one_name_are_refused(tmp_path: Path) -> None:
    for content in ({0: torch.ones(1), "0": torch.ones(2)}, {"a": [torch.ones(1)], "a.0": torch.ones(2)}):
        with pytest.raises(CheckpointError, match=r"two entries that are called '(0|a\.0)'"):
            load_state_dict(write(tmp_path / "x", content))


def test_lists_of_tensors_are_named_by_place(tmp_path: Path) -> None:
    content = {"layers": [torch.ones(1), (torch.ones(2), None)], "w": torch.ones(3)}
    assert list(load_state_dict(write(tmp_path / "x", content))) == ["layers.0", "layers.1.0", "w"]


@pytest.mark.parametrize("form", FORMS)
def test_tensors_of_every_form_come_back(tmp_path: Path, form: str) -> None:
    dtypes = [torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.uint8, torch.int16, torch.int32,
              torch.bool, torch.complex64, torch.complex128]  # fmt: skip
    if form != "pickle":
        dtypes += [torch.float8_e4m3fn, torch.uint16]
    state = {str(dtype): torch.arange(3).to(dtype) for dtype in dtypes}
    base = torch.arange(24.0).view(2, 3, 4)
    state |= {
        "transposed": base.transpose(0, 2), "part": base[1, :, ::2], "empty": torch.zeros(0, 3),
        "single": torch.tensor(2.0), "parameter": nn.Parameter(base[0]), "conjugated": torch.tensor([1 + 2j]).conj(),
        "same": base,
    }  # fmt: skip
    read = load_state_dict(write(tmp_path / "x", state, form))
    assert list(read) == list(state)
    for key, tensor in state.items():
        assert read[key].dtype == tensor.dtype and read[key].shape == tensor.shape
        assert torch.equal(read[key].to(torch.complex128), tensor.detach().to(torch.complex128)), key
    assert read["part"].stride() == state["part"].stride()


@pytest.mark.filterwarnings("ignore:torch.quantize:UserWarning", "ignore:torch.ao:DeprecationWarning")
def test_quantised_and_sparse_tensors_are_handed_over(tmp_path: Path) -> None:
    weight = torch.randn(3, 4)
    state = {
        "tensor": torch.quantize_per_tensor(weight, 0.1, 3, torch.quint8),
        "channel": torch.quantize_per_channel(
            weight, torch.rand(3).double() + 0.1, torch.zeros(3).long(), 0, torch.qint8
        ),
        "sparse": torch.eye(3).to_sparse(),
        "meta": torch.ones(2, 2, device="meta"),
    }
    for form in ("zip", "old"):
        read = load_state_dict(write(tmp_path / "x", state, form))
        for key in ("tensor", "channel"):
            assert read[key].dtype == state[key].dtype and torch.equal(read[key].dequantize(), state[key].dequantize())
        assert torch.equal(read["sparse"].to_dense(), torch.eye(3)) and read["meta"].is_meta


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_quantised_modules_that_were_saved_whole_lose_no_weights(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 3))
    quantised = torch.ao.quantization.quantize_dynamic(module, {nn.Linear})
    read = load_state_dict(write(tmp_path / "x", quantised))
    assert {key for key in read if "_packed" in key} == {
        f"{i}._packed_params._packed_params.{k}" for i in "02" for k in "01"
    }
    assert torch.equal(read["0._packed_params._packed_params.0"].dequantize(), quantised[0].weight().dequantize())
    assert pack(tmp_path / "x").num_weights == pack(module).num_weights
    packed = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.LSTM(2, 3)), {nn.LSTM})
    with pytest.raises(CheckpointError, match="keeps tensors in an object of C"):
        load_state_dict(write(tmp_path / "x", packed))


@pytest.mark.parametrize("form", FORMS)
def test_a_tensor_of_more_elements_than_are_stored_is_refused(tmp_path: Path, form: str) -> None:
    for tensor in (
        torch.zeros(1).expand(2**20, 2**20), torch.zeros(3).expand(2, 3), torch.zeros(4).unfold(0, 2, 1),
        torch.zeros(1).expand(2**61),
    ):  # fmt: skip
        file = write(tmp_path / "x", {"w": tensor}, form)
        assert file.stat().st_size < 4096
        with pytest.raises(CheckpointError, match=r"x: refused, it holds a tensor of shape .* over \d stored elements"):
            load_state_dict(file)
        with pytest.raises(CheckpointError, match=r"pack: network 0: .*stored elements"):
            pack(file)


def test_many_views_of_one_storage_are_refused(tmp_path: Path) -> None:
    base = torch.zeros(2000)
    content = {str(i): base[i : i + 1900] for i in range(90)}
    with pytest.raises(CheckpointError, match="overlap more than 64 times in one storage"):
        load_state_dict(write(tmp_path / "x", content))
    tied = {str(i): base for i in range(900)}
    assert len({tensor.data_ptr() for tensor in load_state_dict(write(tmp_path / "x", tied)).values()}) == 1


@pytest.mark.parametrize("form", [*FORMS, "safetensors"])
def test_values_stay_when_the_file_is_overwritten_cut_short_or_removed(tmp_path: Path, form: str) -> None:
    from safetensors.torch import save_file

    state = {"w": torch.randn(100_000), "b": torch.ones(3)}

    def store(tensors: dict[str, Tensor]) -> None:
        if form == "safetensors":
            save_file(tensors, tmp_path / "x")
        else:
            write(tmp_path / "x", tensors, form)

    store(state)
    read = load_state_dict(tmp_path / "x")
    store({key: tensor + 1 for key, tensor in read.items()})
    os.truncate(tmp_path / "x", 10)
    (tmp_path / "x").unlink()
    assert all(torch.equal(read[key], tensor) for key, tensor in state.items())
    read["w"].zero_()  # in memory of its own


def test_big_endian_files_and_files_without_checksums(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        write(tmp_path / "x", STATE)
    finally:
        torch.serialization.set_crc32_options(True)
    same(load_state_dict(tmp_path / "x"), STATE)
    write(tmp_path / "x", STATE)
    with zipfile.ZipFile(tmp_path / "x") as source, zipfile.ZipFile(tmp_path / "y", "w") as out:
        for entry in source.namelist():
            held = source.read(entry)
            if "/data/" in entry:
                width = 8 if entry.endswith("/2") else 4
                held = b"".join(held[i : i + width][::-1] for i in range(0, len(held), width))
            out.writestr(entry, b"big" if entry.endswith("/byteorder") else held)
    same(load_state_dict(tmp_path / "y"), STATE)


def test_damage_to_values_is_noticed_where_the_file_has_checksums(tmp_path: Path) -> None:
    content = bytearray(write(tmp_path / "x", {"w": torch.zeros(1000)}).read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(CheckpointError, match="is damaged or no checkpoint of torch: Bad CRC-32"):
        load_state_dict(tmp_path / "x")


def test_old_protocols_and_names_of_python_2(tmp_path: Path) -> None:
    content = {
        "model": STATE,
        "args": argparse.Namespace(a=1),
        "t": (1, 2, 3, 4),
        "s": {1},
        "n": None,
        "f": frozenset([2]),
    }
    for protocol in range(6):
        (tmp_path / "x.pkl").write_bytes(pickle.dumps(content, protocol=protocol))
        same(load_state_dict(tmp_path / "x.pkl"), STATE)
    plain = io.BytesIO()
    torch.save(dict(STATE), plain, _use_new_zipfile_serialization=False)
    text = b"X" + struct.pack("<I", 8) + b"b.weight"
    assert text in plain.getvalue()
    (tmp_path / "x").write_bytes(plain.getvalue().replace(text, b"U\x08b.weight"))  # text of Python 2
    same(load_state_dict(tmp_path / "x"), STATE)

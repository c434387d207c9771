"""Checkpoints of several files: read whole or refused by what is missing, never in part."""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from sne_fast import CheckpointError, pack
from sne_fast.data.checkpoints import load_state_dict, read_checkpoint

STATE = OrderedDict(
    [("stem.weight", torch.ones(2, 3)), ("layers.2.weight", torch.full((2, 2), 2.0)),
     ("layers.10.weight", torch.full((2, 2), 3.0)), ("head.bias", torch.arange(2.0))]
)  # fmt: skip
HALVES = ({key: STATE[key] for key in list(STATE)[:2]}, {key: STATE[key] for key in list(STATE)[2:]})


def save(file: Path, tensors: dict[str, Tensor]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.name.endswith(".safetensors"):
        save_file(tensors, file)
    else:
        torch.save(tensors, file)
    return file


def same(read: dict[str, Tensor], wanted: dict[str, Tensor] = STATE) -> None:
    assert set(read) == set(wanted) and all(torch.equal(read[key], wanted[key]) for key in wanted)


def refused(path: Path, message: str) -> None:
    for reader in (load_state_dict, lambda path: pack([path])):
        with pytest.raises(CheckpointError, match=message) as raised:
            reader(path)
        assert str(path if path.is_dir() else path.parent) in str(raised.value) and "\n" not in str(raised.value)


PAIRS = [
    ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"),
    ("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"),
    ("diffusion_model.fp16-00001-of-00002.safetensors", "diffusion_model.fp16-00002-of-00002.safetensors"),
    ("net_0_of_2.pt", "net_1_of_2.pt"),
    ("part.1-of-2.ckpt", "part.2-of-2.ckpt"),
]  # fmt: skip


@pytest.mark.parametrize("pair", PAIRS)
def test_files_that_count_themselves_are_read_whole_or_refused(tmp_path: Path, pair: tuple[str, str]) -> None:
    first = save(tmp_path / "m" / pair[0], HALVES[0])
    for path in (first, first.parent):
        refused(
            path, rf"{pair[0]}: is one of 2 parts of a checkpoint, of which {pair[1]} is missing; fetch all of them"
        )
    second = save(tmp_path / "m" / pair[1], HALVES[1])
    for path in (first, second, first.parent):
        same(load_state_dict(path))
        assert read_checkpoint(path).keeps_order == (not pair[0].endswith(".safetensors"))
    first.unlink()
    refused(second, rf"{pair[1]}: is one of 2 parts of a checkpoint, of which .* is missing")
    save(first, STATE)
    refused(second, "holds .*, which another part of the checkpoint holds too")


def test_many_missing_parts_are_named_by_the_first_of_them(tmp_path: Path) -> None:
    file = save(tmp_path / "model-00003-of-00040.safetensors", STATE)
    refused(file, r"of which model-00001-of-00040.safetensors, .*00005-of-00040.safetensors and 35 more are missing")
    refused(save(tmp_path / "model-00007-of-00003.safetensors", STATE), "is one of 3 parts")
    same(load_state_dict(save(tmp_path / "only" / "model-00001-of-00001.safetensors", STATE)))


def write_index(folder: Path, ending: str, weight_map: dict[str, str]) -> Path:
    index = folder / f"model{ending}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


@pytest.mark.parametrize("ending", [".safetensors", ".bin"])
def test_shards_of_any_name_belong_to_the_index_that_names_them(tmp_path: Path, ending: str) -> None:
    files = [save(tmp_path / f"{name}{ending}", half) for name, half in zip(("lower", "upper"), HALVES, strict=True)]
    weight_map = {key: file.name for file, half in zip(files, HALVES, strict=True) for key in half}
    index = write_index(tmp_path, ending, weight_map)
    if ending == ".bin":
        index = index.rename(tmp_path / "pytorch_model.bin.index.json")
    for path in (index, tmp_path, *files):
        same(load_state_dict(path))
    files[1].unlink()
    for path in (index, tmp_path, files[0]):
        refused(path, f"its shard upper{ending} is missing")


@pytest.mark.parametrize("ending", [".safetensors", ".bin"])
def test_an_index_names_every_tensor_of_its_shards(tmp_path: Path, ending: str) -> None:
    names = [f"model-0000{i}-of-00002{ending}" for i in (1, 2)]
    files = [save(tmp_path / name, half) for name, half in zip(names, HALVES, strict=True)]
    weight_map = {key: name for name, half in zip(names, HALVES, strict=True) for key in half}
    index = write_index(tmp_path, ending, weight_map)
    for path in (index, tmp_path, *files):  # a shard stands for the whole
        same(load_state_dict(path))
    assert read_checkpoint(index).keeps_order == (ending == ".bin")
    if ending == ".bin":
        assert list(load_state_dict(index)) == list(STATE)
    write_index(tmp_path, ending, {key: name for key, name in weight_map.items() if key != "head.bias"})
    for path in (index, tmp_path, files[0]):
        refused(path, rf"00002{ending}: holds 'head.bias', which the index model{ending}.index.json does not name")
    write_index(tmp_path, ending, weight_map | {"more": names[0]})
    refused(index, rf"00001-of-00002{ending}: lacks the tensor 'more' that the index looks for")
    write_index(tmp_path, ending, weight_map)
    files[1].unlink()
    for path in (index, tmp_path, files[0]):
        refused(path, rf"its shard model-00002-of-00002{ending} is missing; fetch it")


@pytest.mark.parametrize(
    ("first", "second"),
    [("mp_rank_00_model_states.pt", "mp_rank_01_model_states.pt"), ("consolidated.00.pth", "consolidated.01.pth"),
     ("mp_rank_00/model.pt", "mp_rank_01/model.pt")],
)  # fmt: skip
def test_parts_of_model_parallelism_are_refused(tmp_path: Path, first: str, second: str) -> None:
    same(load_state_dict(save(tmp_path / first, {"module": STATE})))
    save(tmp_path / second, {"module": STATE})
    for name in (first, second):
        refused(tmp_path / name, "is the part of one process of a model-parallel checkpoint .* lies beside it")
    (tmp_path / first).unlink()
    if "/" not in first:
        refused(tmp_path / second, rf"model-parallel checkpoint \({first} is missing\); merge the parts")
    split = save(tmp_path / "alone.pt", {"module": STATE, "mp_world_size": 2})
    refused(split, "is the part of one of 2 processes of a model-parallel checkpoint")


def test_files_beside_the_weights_that_are_none_do_not_count(tmp_path: Path) -> None:
    save(tmp_path / "pytorch_model.bin", STATE)
    for name in ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state_0.pth", "optimizer.bin", "scaler.pt",
                 "random_states_0.pkl", "zero_pp_rank_0_mp_rank_00_optim_states.pt"):  # fmt: skip
        save(tmp_path / name, {"lr": torch.ones(2)})
    same(load_state_dict(tmp_path))
    assert "training_args.bin" in read_checkpoint(tmp_path).left_out
    save(tmp_path / "model.safetensors", {key: tensor + 1 for key, tensor in STATE.items()})
    same(load_state_dict(tmp_path), {key: tensor + 1 for key, tensor in STATE.items()})
    assert read_checkpoint(tmp_path).left_out["pytorch_model.bin"] == "the same model as model.safetensors by its name"


def test_folders_of_several_checkpoints_are_refused(tmp_path: Path) -> None:
    save(tmp_path / "gan" / "generator.pt", STATE)
    save(tmp_path / "gan" / "discriminator.pt", STATE)
    refused(tmp_path / "gan", "holds several checkpoints, discriminator.pt, generator.pt; give the path of one")
    save(tmp_path / "many" / "model.safetensors", STATE)
    save(tmp_path / "many" / "model_1.safetensors", STATE)
    refused(tmp_path / "many", "holds several checkpoints, model.safetensors, model_1.safetensors")
    adapter = save(tmp_path / "lora" / "adapter_model.safetensors", STATE)
    same(load_state_dict(tmp_path / "lora"))
    same(load_state_dict(adapter))
    save(tmp_path / "lora" / "model.safetensors", STATE)
    refused(tmp_path / "lora", "holds several checkpoints, adapter_model.safetensors, model.safetensors")


def test_a_folder_without_weights_says_where_there_are_some(tmp_path: Path) -> None:
    save(tmp_path / "run" / "optimizer.bin", STATE)
    refused(tmp_path / "run", "holds no checkpoint .* but optimizer.bin$")
    save(tmp_path / "run" / "global_step10" / "mp_rank_00_model_states.pt", {"module": STATE})
    save(tmp_path / "run" / "empty" / "scheduler.pt", STATE)
    (tmp_path / "run" / "model_fsdp_0").mkdir()
    (tmp_path / "run" / "model_fsdp_0" / ".metadata").touch()
    refused(tmp_path / "run", "but optimizer.bin; give the path of a folder in it, as global_step10, model_fsdp_0$")


def sentence_transformer(folder: Path, *modules: tuple[str, str]) -> Path:
    listing = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(modules)
    ]
    folder.mkdir(exist_ok=True)
    (folder / "modules.json").write_text(json.dumps(listing))
    for path, _ in modules:
        (folder / path).mkdir(exist_ok=True)
    return folder


@pytest.mark.parametrize("ending", ["model.safetensors", "pytorch_model.bin"])
def test_a_sentence_transformers_folder_is_read_with_all_its_modules(tmp_path: Path, ending: str) -> None:
    folder = sentence_transformer(tmp_path / "st", ("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Dense", "Dense"))
    save(folder / ending, STATE)
    refused(folder, r"its module '2_Dense' \(sentence_transformers.models.Dense\) has no weights")
    dense = {"linear.weight": torch.ones(3, 2), "linear.bias": torch.zeros(3)}
    save(folder / "2_Dense" / ending, dense)
    wanted = {f"0.{key}": tensor for key, tensor in STATE.items()} | {f"2.{key}": t for key, t in dense.items()}
    same(load_state_dict(folder), wanted)
    (folder / ending).unlink()
    refused(folder, r"its module '' \(sentence_transformers.models.Transformer\) has no weights")
    pooled = sentence_transformer(tmp_path / "pooled", ("", "Transformer"), ("1_Pooling", "Pooling"))
    save(pooled / ending, STATE)
    same(load_state_dict(pooled))


def test_json_is_not_taken_for_another_format_by_its_layout(tmp_path: Path) -> None:
    save(tmp_path / "s.safetensors", STATE)
    for text in ('{\n  "x":{},', '{"map": {},', "\ufeff\n {"):
        index = tmp_path / "any.json"
        index.write_text(text + '"weight_map": ' + json.dumps(dict.fromkeys(STATE, "s.safetensors")) + "}")
        same(load_state_dict(index))


def test_damaged_lists_of_modules_are_refused(tmp_path: Path) -> None:
    folder = sentence_transformer(tmp_path / "st", ("", "Transformer"))
    save(folder / "model.safetensors", STATE)
    for text, message in (
        ("[", "is not valid JSON"), ("{}", "must hold a JSON list"), ("[3]", "must list modules by path and type"),
        ('[{"path": "../x", "type": "Dense"}]', "refused, its module '../x' lies outside the folder"),
        ('[{"path": "/etc", "type": "Dense"}]', "refused, its module '/etc' lies outside the folder"),
        ('[{"path": "3_Dense", "type": "x.Dense"}]', "its module '3_Dense' is missing"), ("[]", "without weights"),
        ('[{"path": "", "type": "A"}, {"path": "", "type": "B"}, {"idx": 1, "path": "", "type": "C"}]', "same number"),
    ):  # fmt: skip
        (folder / "modules.json").write_text(text)
        refused(folder, message)


def test_the_first_bytes_decide_and_not_the_name(tmp_path: Path) -> None:
    save(tmp_path / "a.safetensors", STATE)
    save(tmp_path / "b.pt", STATE)
    for source, names in (
        ("a.safetensors", ("x.pt", "x.bin", "x", "x.pth.tar", "x.txt")),
        ("b.pt", ("y.safetensors", "y", "y.PTH", "y.tar", "y.pth.tar", "y.pkl", "y.json")),
    ):
        for name in names:
            (tmp_path / name).write_bytes((tmp_path / source).read_bytes())
            same(load_state_dict(tmp_path / name))


@pytest.mark.parametrize("length", [640, 896, 19_280, 35_615, 0x685A42])
def test_headers_whose_length_begins_another_format_are_read(tmp_path: Path, length: int) -> None:
    """As a pickle of protocol 2 and 3, a zip, gzip and bzip2 begin."""
    header = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode().ljust(length)
    (tmp_path / "x").write_bytes(length.to_bytes(8, "little") + header + b"\0\0\x80?")
    same(load_state_dict(tmp_path / "x"), {"w": torch.ones(1)})

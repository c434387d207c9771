"""Folders of transformers: packed as they are, and rebuilt as the module that they were saved from."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import agreement
import named_networks
import pytest
import tiny_configs
import torch
from safetensors.torch import load_file, save_file

import sne_fast
from sne_fast import extras
from sne_fast.data.checkpoints import read_checkpoint
from sne_fast.data.transformers_folders import read_transformers_folder

transformers = pytest.importorskip("transformers", minversion="5")

ALIKE = {  # their folder is packed as their module, without rebuilding
    "albert": "AlbertForMaskedLM", "bart": "BartForConditionalGeneration", "bert": "BertLMHeadModel",
    "bloom": "BloomForCausalLM", "clip": "CLIPModel", "convnext": "ConvNextForImageClassification",
    "deberta-v2": "DebertaV2ForMaskedLM", "distilbert": "DistilBertForMaskedLM", "electra": "ElectraForCausalLM",
    "falcon_mamba": "FalconMambaModel", "gpt2": "GPT2LMHeadModel", "gpt_neox": "GPTNeoXForCausalLM",
    "ibert": "IBertForMaskedLM", "llama": "LlamaForCausalLM", "opt": "OPTForCausalLM",
    "roberta": "RobertaForCausalLM", "swin": "SwinForImageClassification", "t5": "T5ForConditionalGeneration",
    "vit": "ViTForImageClassification", "wav2vec2": "Wav2Vec2ForCTC", "whisper": "WhisperForConditionalGeneration",
}  # fmt: skip
RENAMED = {  # joined, split or renamed on saving: experts apart, fused projections, other parents
    "nomic_bert": "NomicBertForMaskedLM", "olmoe": "OlmoeForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM",
    "segformer": "SegformerForImageClassification", "vit_msn": "ViTMSNForImageClassification",
}  # fmt: skip


def tiny(name: str) -> Any:
    network = tiny_configs.tiny_model((ALIKE | RENAMED)[name], name)
    agreement.randomise(network)
    return network.eval()


@pytest.fixture
def encoder() -> sne_fast.SNE:
    torch.manual_seed(0)
    return sne_fast.SNE(hidden_dim=16, num_heads=2, set_attention="isab").eval()


@pytest.mark.parametrize("name", sorted(ALIKE | RENAMED))
def test_a_module_and_all_that_is_saved_of_it_are_packed_alike(name: str, tmp_path: Path) -> None:
    row = agreement.compare(tiny(name), tmp_path)
    assert row["differs"] == {
        "state_dict": "", "bin": "", "folder": "" if name in ALIKE else row["differs"]["folder"], "folder_rebuilt": "",
    }  # fmt: skip
    assert name in ALIKE or row["differs"]["folder"]


def test_networks_with_names_of_torchvision_and_timm_are_packed_alike(tmp_path: Path) -> None:
    for i, name in enumerate(("torchvision/resnet18", "torchvision/swin_t", "timm/convnext_atto", "timm/repvgg_a0")):
        (tmp_path / str(i)).mkdir()
        network = named_networks.build(*name.split("/"))
        assert agreement.compare(network, tmp_path / str(i))["differs"] == dict.fromkeys(agreement.SOURCES[:3], "")


def test_z_of_a_rebuilt_folder_is_that_of_the_module(encoder: sne_fast.SNE, tmp_path: Path) -> None:
    network = tiny("nomic_bert")
    network.save_pretrained(tmp_path)
    with torch.no_grad():
        want, rebuilt = (encoder([source]) for source in (network, read_transformers_folder(tmp_path)))
    torch.testing.assert_close(rebuilt, want, rtol=1e-5, atol=1e-5)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    tiny("bert").save_pretrained(tmp_path)
    return tmp_path


def change_config(folder: Path, **entries: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


def test_a_rebuilt_folder_has_kinds_and_order_of_definition(saved: Path) -> None:
    network = transformers.BertLMHeadModel.from_pretrained(saved)
    for options in ({}, {"order": "definition"}):
        want, batch = (sne_fast.pack([s], **options) for s in (network, read_transformers_folder(saved)))
        assert torch.equal(batch.tensor_type, want.tensor_type)
        assert batch.names[0][1] == want.names[0][1] and torch.equal(batch.values, want.values)


def test_values_are_not_rounded_to_the_dtype_of_the_configuration(saved: Path) -> None:
    want = sne_fast.pack([saved])
    change_config(saved, dtype="bfloat16")
    assert torch.equal(sne_fast.pack([read_transformers_folder(saved)]).values, want.values)


def test_entries_without_a_place_in_the_class_are_left_out_with_the_reason(saved: Path) -> None:
    tensors = load_file(saved / "model.safetensors")
    more = {"other.weight": torch.ones(3, 3), "bert.embeddings.position_ids": torch.arange(64)[None]}
    save_file({**tensors, **more}, saved / "model.safetensors", {"format": "pt"})
    left_out = read_transformers_folder(saved).left_out
    assert {name: left_out[name] for name in more} == {
        "other.weight": "no weight of BertLMHeadModel", "bert.embeddings.position_ids": "position_ids table",
    }  # fmt: skip


def test_nothing_of_the_folder_runs_and_nothing_is_fetched(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def connect(*args: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", connect)
    (saved / "modeling_own.py").write_text("raise SystemExit('ran')")
    auto_map = {"AutoModelForCausalLM": "modeling_own.Own", "AutoConfig": "modeling_own.Config"}
    change_config(saved, auto_map=auto_map, fusion_config={"x": True}, attn_implementation="someone/kernel")
    assert read_transformers_folder(saved).tensors
    change_config(saved, architectures=["Own"])
    with pytest.raises(sne_fast.CheckpointError, match=r"is of the class 'Own', which transformers .* does not have"):
        read_transformers_folder(saved)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"quantization_config": {}}, "holds quantised weights, which are not rebuilt"),
        ({"architectures": ["CheckpointError"]}, "which transformers .* does not have"),
        ({"architectures": None}, "which transformers .* does not have"),
        ({"num_hidden_layers": 10**9}, "its config.json has 'num_hidden_layers' 1000000000, more than it has tensors"),
        ({"num_hidden_layers": 9}, "lacks 'bert.encoder.layer.*, which BertLMHeadModel has"),
        ({"hidden_size": 40}, "cannot be rebuilt by transformers"),
        ({"hidden_size": "wide"}, "cannot be rebuilt by transformers"),
        ({"model_type": "nothing"}, "cannot be rebuilt by transformers"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(saved: Path, entries: dict[str, Any], message: str) -> None:
    change_config(saved, **entries)
    with pytest.raises(sne_fast.CheckpointError, match=message):
        read_transformers_folder(saved)


def test_a_folder_without_configuration_is_refused(saved: Path) -> None:
    (saved / "config.json").write_text("[]")
    with pytest.raises(sne_fast.CheckpointError, match=r"config.json"):
        read_transformers_folder(saved)
    (saved / "config.json").unlink()
    with pytest.raises(sne_fast.CheckpointError, match=r"holds no config.json"):
        read_transformers_folder(saved)


def test_without_transformers_the_message_names_the_extra(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extras, "installed", lambda module: False)
    with pytest.raises(ModuleNotFoundError, match=r"sne_fast\[transformers\]"):
        read_transformers_folder(saved)
    assert len(sne_fast.pack([saved])) == 1


def both_embeddings(folder: Path, **config: Any) -> dict[str, torch.Tensor]:
    """Write a folder that holds input and output embeddings with the same values."""
    table = torch.randn(7, 4)
    tensors = {"model.embed_tokens.weight": table, "model.norm.weight": torch.ones(4), "lm_head.weight": table.clone()}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return tensors


@pytest.mark.parametrize("config", [{}, {"tie_word_embeddings": True}, {"text_config": {"tie_word_embeddings": True}}])
def test_embeddings_that_a_file_holds_twice_count_once_if_they_are_tied(tmp_path: Path, config: dict[str, Any]) -> None:
    both_embeddings(tmp_path, **config)
    for path in (tmp_path, tmp_path / "model.safetensors"):
        batch = sne_fast.pack([path])
        assert batch.names[0][1] == ("model.embed_tokens.weight", "model.norm.weight")
        assert batch.skipped[0] == (("lm_head.weight", "tied tensor: of 'model.embed_tokens.weight'"),)


@pytest.mark.parametrize("said", [{"tie_word_embeddings": False}, {"text_config": {"tie_word_embeddings": False}}])
def test_embeddings_that_are_said_not_to_be_tied_both_count(tmp_path: Path, said: dict[str, Any]) -> None:
    both_embeddings(tmp_path, **said)
    assert len(sne_fast.pack([tmp_path]).names[0][1]) == 3


def test_embeddings_of_other_values_or_without_configuration_both_count(tmp_path: Path) -> None:
    tensors = both_embeddings(tmp_path)
    save_file({**tensors, "lm_head.weight": torch.randn(7, 4)}, tmp_path / "model.safetensors")
    assert len(sne_fast.pack([tmp_path]).names[0][1]) == 3
    both_embeddings(tmp_path)
    for text in ("{", None):
        (tmp_path / "config.json").write_text(text) if text else (tmp_path / "config.json").unlink()
        assert len(sne_fast.pack([tmp_path]).names[0][1]) == 3
    assert read_checkpoint(tmp_path).tensors.keys() == tensors.keys()

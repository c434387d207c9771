"""Adapters saved by PEFT are read as networks, with the scale that their configuration says."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sne_fast import SNE, CheckpointError, WeightBatch, pack
from sne_fast.data.batch_summary import skipped_summary
from sne_fast.data.checkpoints import load_state_dict, read_checkpoint
from sne_fast.data.layer_stream import LayerStream

PREFIX = "base_model.model."


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb, self.fc, self.conv = nn.Embedding(20, 8), nn.Linear(8, 6), nn.Conv1d(6, 5, 3)
        self.head = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv(self.fc(self.emb(x)).mT)
        return self.head(hidden.mean(-1))


def adapted(folder: Path, config, **options) -> nn.Module:
    """Return a module of PEFT with random adapters, saved into a folder."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    network = peft.get_peft_model(Network(), getattr(peft, config)(**options))
    with torch.no_grad():
        for parameter in (p for name, p in network.named_parameters() if "lora_" in name or "ia3" in name):
            parameter.normal_()
    network.save_pretrained(folder)
    return network


def own_layers(batch: WeightBatch) -> dict[str, Tensor]:
    """Return the values of adapters' tensors by name."""
    starts = batch.chunk_ptr_host[batch.tensor_ptr_host].tolist()
    return {
        name: batch.values[starts[s] : starts[s + 1]].reshape(batch.shapes[0][s])
        for s, name in enumerate(batch.names[0][1])
        if int(batch.tensor_type[s]) >= 56
    }


CONFIGS = {
    "LoRA": ("LoraConfig", {"r": 3, "lora_alpha": 6, "target_modules": ["emb", "fc", "conv"]}),
    "a bias": ("LoraConfig", {"r": 3, "lora_alpha": 6, "target_modules": ["fc"], "lora_bias": True}),
    "patterns": ("LoraConfig", {"r": 3, "lora_alpha": 5, "target_modules": ["fc", "conv"],
                                "rank_pattern": {"conv": 2}, "alpha_pattern": {"^fc": 7}}),
    "a root": ("LoraConfig", {"r": 4, "lora_alpha": 6, "target_modules": ["fc"], "use_rslora": True}),
    "DoRA": ("LoraConfig", {"r": 3, "target_modules": ["fc", "conv"], "use_dora": True}),
    "IA3": ("IA3Config", {"target_modules": ["fc"], "feedforward_modules": []}),
}  # fmt: skip


@pytest.mark.parametrize("form", CONFIGS)
def test_a_folder_has_the_adapters_of_the_module_that_wrote_it(tmp_path: Path, form: str) -> None:
    config, options = CONFIGS[form]
    network = adapted(tmp_path / "lora", config, **options)
    with torch.no_grad():
        wanted = own_layers(pack([network], scale="none"))
    for path in (tmp_path / "lora", tmp_path / "lora" / "adapter_model.safetensors"):
        batch = pack([path], scale="none")
        found = own_layers(batch)
        assert found.keys() == wanted.keys() and not skipped_summary(batch)
        for name, tensor in found.items():
            torch.testing.assert_close(tensor, wanted[name])
    encoder = SNE(hidden_dim=32)
    z = encoder([tmp_path / "lora"])
    torch.save(load_state_dict(tmp_path / "lora"), tmp_path / "lora" / "adapter_model.bin")
    assert read_checkpoint(tmp_path / "lora").left_out["adapter_model.bin"].startswith("the same model as")
    (tmp_path / "lora" / "adapter_model.safetensors").unlink()
    torch.testing.assert_close(encoder([tmp_path / "lora"]), z)


def test_an_adapter_makes_the_update_of_its_module(tmp_path: Path) -> None:
    network = adapted(tmp_path, "LoraConfig", r=3, lora_alpha=6, target_modules=["fc"])
    found = own_layers(pack([tmp_path], scale="none"))
    update = found[f"{PREFIX}fc.lora_B"] @ found[f"{PREFIX}fc.lora_A"]
    torch.testing.assert_close(update, network.base_model.model.fc.get_delta_weight("default"))
    assert read_checkpoint(tmp_path).adapter_scales == {f"{PREFIX}fc": (2.0, 3)}


def test_weights_beside_the_adapters_are_taken(tmp_path: Path) -> None:
    adapted(tmp_path, "LoraConfig", r=3, target_modules=["fc"], modules_to_save=["head"])
    batch = pack([tmp_path])
    assert batch.names[0][1][-2:] == (f"{PREFIX}head.weight", f"{PREFIX}head.bias")


def written(folder: Path, **config) -> Path:
    folder.mkdir(exist_ok=True)
    factors = {f"{PREFIX}m.fc.lora_A.weight": torch.randn(2, 5), f"{PREFIX}m.fc.lora_B.weight": torch.randn(6, 2)}
    save_file(factors, folder / "adapter_model.safetensors")
    said = {"peft_type": "LORA", "r": 2, "lora_alpha": 8} | config
    (folder / "adapter_config.json").write_text(json.dumps({key: v for key, v in said.items() if v is not None}))
    return folder


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({}, 4.0), ({"use_rslora": True}, 8 / math.sqrt(2)), ({"alpha_pattern": {"fc": 3}}, 1.5),
        ({"alpha_pattern": {"^fc": 3}}, 4.0), ({"alpha_pattern": {"^m.fc": 3}}, 1.5),
        ({"alpha_pattern": {"c": 3}}, 4.0), ({"alpha_pattern": {"fc": 3, ".*": 9}}, 1.5),
        ({"alpha_pattern": {"(a+)+$": 3}}, None),
        ({"peft_type": "VERA"}, None),
    ],
)  # fmt: skip
def test_the_scale_of_a_configuration(tmp_path: Path, config: dict, scale: float | None) -> None:
    found = read_checkpoint(written(tmp_path, **config)).adapter_scales
    assert found == ({f"{PREFIX}m.fc": (pytest.approx(scale), 2)} if scale else {})
    assert ("unknown scale" in skipped_summary(pack([tmp_path]))) == (scale is None)


def test_a_rank_that_is_not_that_of_the_factors_leaves_them_as_they_are(tmp_path: Path) -> None:
    found = own_layers(pack([written(tmp_path, r=1)], scale="none"))  # two experts of rank 1
    stored = load_state_dict(tmp_path)
    assert torch.equal(found[f"{PREFIX}m.fc.lora_A"], stored[f"{PREFIX}m.fc.lora_A.weight"])
    assert torch.equal(found[f"{PREFIX}m.fc.lora_B"], 8 * stored[f"{PREFIX}m.fc.lora_B.weight"])


@pytest.mark.parametrize(
    ("config", "entry"),
    [({"r": None}, "r"), ({"r": 0}, "r"), ({"r": 1.5}, "r"), ({"r": "2"}, "r"), ({"lora_alpha": True}, "lora_alpha"),
     ({"rank_pattern": [1]}, "rank_pattern"), ({"lora_alpha": float("nan")}, "lora_alpha")],
)  # fmt: skip
def test_damaged_configurations_are_refused(tmp_path: Path, config: dict, entry: str) -> None:
    with pytest.raises(CheckpointError, match=rf"adapter_config.json: is damaged: its {entry} must be numbers"):
        read_checkpoint(written(tmp_path, **config))
    (tmp_path / "adapter_config.json").write_text("[")
    with pytest.raises(CheckpointError, match=r"adapter_config.json: is not valid JSON"):
        read_checkpoint(tmp_path)


def test_an_adapter_without_a_configuration_has_the_scale_1(tmp_path: Path) -> None:
    (written(tmp_path) / "adapter_config.json").unlink()
    batch = pack([tmp_path])
    assert skipped_summary(batch) == "left out: 1 unknown scale of an adapter"
    assert read_checkpoint(tmp_path).adapter_scales == {}


def test_an_adapter_is_streamed_as_it_is_packed(tmp_path: Path) -> None:
    options = {"r": 3, "lora_alpha": 6, "target_modules": ["fc", "conv"], "modules_to_save": ["head"]}
    adapted(tmp_path, "LoraConfig", **options)
    whole, stream = pack([tmp_path]), LayerStream(tmp_path)
    parts = list(stream.batches())
    assert torch.equal(torch.cat([part.values for part in parts]), whole.values)
    assert torch.equal(torch.cat([part.tensor_type for part in parts]), whole.tensor_type)
    assert tuple(stream.network.skipped) == whole.skipped[0] and stream.num_weights == whole.num_weights


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_that_diffusers_saves_has_its_configuration_in_its_metadata(tmp_path: Path) -> None:
    diffusers, peft = pytest.importorskip("diffusers"), pytest.importorskip("peft")
    from diffusers.training_utils import _collate_lora_metadata

    small = {"block_out_channels": (4, 8), "norm_num_groups": 2, "layers_per_block": 1, "attention_head_dim": 2}
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, cross_attention_dim=8, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), **small,
    )  # fmt: skip
    special = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    unet.add_adapter(peft.LoraConfig(r=2, lora_alpha=6, target_modules=["to_q"], alpha_pattern={special: 4}))
    diffusers.StableDiffusionPipeline.save_lora_weights(
        tmp_path, peft.get_peft_model_state_dict(unet), **_collate_lora_metadata({"unet": unet})
    )
    scales = read_checkpoint(tmp_path).adapter_scales
    assert scales.pop(f"unet.{special}") == (2.0, 2)
    assert set(scales.values()) == {(3.0, 2)} and len(scales) == 7
    batch = pack([tmp_path])
    assert not skipped_summary(batch) and len(batch.layer_ptr) == 9


@pytest.mark.parametrize(
    "text", ["[", "[3]", json.dumps({"unet.peft_type": "LORA", "unet.r": "x", "unet.lora_alpha": 3})]
)
def test_damaged_metadata_of_adapters_are_refused(tmp_path: Path, text: str) -> None:
    factors = {"unet.fc.lora_A.weight": torch.ones(2, 3), "unet.fc.lora_B.weight": torch.ones(3, 2)}
    save_file(factors, tmp_path / "x.safetensors", metadata={"lora_adapter_metadata": text})
    with pytest.raises(CheckpointError, match=r"x.safetensors: is damaged: its (metadata lora_adapter_metadata:|r ).*"):
        read_checkpoint(tmp_path / "x.safetensors")

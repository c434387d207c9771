"""Order of layers by names: known architectures, and the same batch from every source of one network."""

from __future__ import annotations

import json
import random
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file, save_model
from torch import Tensor, nn

import sne_fast
from helpers.networks import MIXED, SMALL, make
from sne_fast.data.layer_order import natural_key, order_by_names

FIELDS = ("values", "chunk_ptr", "tensor_ptr", "layer_ptr", "layer_level", "tensor_scale")


def arranged(*names: str) -> list[str]:
    """Return names in order, whatever order they are given in."""
    shuffled = sorted(names)
    random.Random(0).shuffle(shuffled)
    return [shuffled[i] for i in order_by_names(shuffled)]


def layers(*names: str) -> list[str]:
    return [name.removesuffix(".weight") for name in arranged(*(f"{name}.weight" for name in names))]


ARCHITECTURES = {
    "stem, body, head": ["stem", "body", "head"],
    "numbers by value": ["0", "2", "9", "10", "11"],
    "ResNet": [
        "conv1", "bn1", "layer1.0.conv1", "layer1.0.bn1", "layer1.0.conv2", "layer1.0.bn2", "layer2.0.conv1",
        "layer2.0.bn1", "layer2.0.conv2", "layer2.0.bn2", "layer2.0.downsample.0", "layer2.0.downsample.1", "fc",
    ],
    "VGG": ["features.0", "features.3", "features.10", "classifier.0", "classifier.3"],
    "LeNet": ["conv1", "conv2", "fc1", "fc2", "fc3"],
    "ViT": [
        "patch_embed.proj", "pos_embed", "blocks.0.norm1", "blocks.0.attn.qkv", "blocks.0.attn.proj",
        "blocks.0.norm2", "blocks.0.mlp.fc1", "blocks.0.mlp.fc2", "blocks.10.norm1", "norm", "head",
    ],
    "GPT-2": [
        "transformer.wte", "transformer.wpe", "transformer.h.0.ln_1", "transformer.h.0.attn.c_attn",
        "transformer.h.0.attn.c_proj", "transformer.h.0.ln_2", "transformer.h.0.mlp.c_fc",
        "transformer.h.0.mlp.c_proj", "transformer.h.2.ln_1", "transformer.h.10.ln_1", "transformer.ln_f", "lm_head",
    ],
    "LLaMA": [
        "model.embed_tokens", "model.layers.0.input_layernorm", "model.layers.0.self_attn.q_proj",
        "model.layers.0.self_attn.k_proj", "model.layers.0.self_attn.v_proj", "model.layers.0.self_attn.o_proj",
        "model.layers.0.post_attention_layernorm", "model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj",
        "model.layers.0.mlp.down_proj", "model.norm", "lm_head",
    ],
    "BERT": [
        "bert.embeddings.word_embeddings", "bert.embeddings.position_embeddings",
        "bert.embeddings.token_type_embeddings", "bert.embeddings.LayerNorm",
        "bert.encoder.layer.0.attention.self.query", "bert.encoder.layer.0.attention.self.key",
        "bert.encoder.layer.0.attention.self.value", "bert.encoder.layer.0.attention.output.dense",
        "bert.encoder.layer.0.attention.output.LayerNorm", "bert.encoder.layer.0.intermediate.dense",
        "bert.encoder.layer.0.output.dense", "bert.encoder.layer.0.output.LayerNorm", "bert.pooler.dense", "classifier",
    ],
    "T5": [
        "shared", "encoder.block.0.layer.0.layer_norm", "encoder.block.0.layer.0.SelfAttention.q",
        "encoder.block.0.layer.0.SelfAttention.k", "encoder.block.0.layer.0.SelfAttention.v",
        "encoder.block.0.layer.0.SelfAttention.o", "encoder.block.0.layer.1.layer_norm",
        "encoder.block.0.layer.1.DenseReluDense.wi", "encoder.block.0.layer.1.DenseReluDense.wo",
        "encoder.final_layer_norm", "decoder.block.0.layer.0.layer_norm", "decoder.final_layer_norm", "lm_head",
    ],
    "UNet": [
        "time_embedding.linear_1", "conv_in", "down_blocks.0.resnets.0.conv1", "mid_block.resnets.0.conv1",
        "up_blocks.0.resnets.0.conv1", "conv_norm_out", "conv_out",
    ],
    "EfficientNet": [
        "conv_stem", "bn1", "blocks.0.0.conv_dw", "blocks.0.0.bn1", "blocks.0.0.se.conv_reduce",
        "blocks.0.0.se.conv_expand", "blocks.0.0.conv_pw", "blocks.0.0.bn2", "conv_head", "bn2", "classifier",
    ],
    "DenseNet": [
        "features.conv0", "features.norm0", "features.denseblock1.denselayer1.conv1", "features.transition1.conv",
        "features.denseblock2.denselayer1.conv1", "features.norm5", "classifier",
    ],
    "language model": ["embedding", "lstm", "fc"],
    "short names": ["tok", "pos", "blocks.0.attn", "blocks.0.mlp", "ln_f", "head"],
    "autoencoder": ["encoder.0", "fc_mu", "fc_var", "decoder.0"],
    "numbered layers and norms": ["fc1", "bn1", "fc2", "bn2", "out"],
    "first and last layers of a chain": ["fc_in", "fc_hidden", "fc_out"],
    "projections around blocks": ["in_proj", "blocks.0", "blocks.10", "out_proj"],
    "lists of convolutions and norms": ["atom_encoder", "convs.0", "convs.1", "bns.0", "bns.1", "lin1", "lin2"],
    "attention in separate heads": [
        "token_embedding_table", "position_embedding_table", "blocks.0.ln1", "blocks.0.sa.heads.0.query",
        "blocks.0.sa.heads.0.key", "blocks.0.sa.heads.0.value", "blocks.0.sa.proj", "blocks.0.ln2",
        "blocks.0.ffwd.net.0", "blocks.0.ffwd.net.2", "ln_f", "lm_head",
    ],
    "super-resolution": ["head.0", "body.0.body.0", "body.0.body.2", "tail.0"],
    "underscores in front": [
        "_conv_stem", "_bn0", "_blocks.0._depthwise_conv", "_blocks.0._bn1", "_blocks.0._se_reduce",
        "_blocks.0._se_expand", "_blocks.0._project_conv", "_blocks.0._bn2", "_conv_head", "_bn1", "_fc",
    ],
    "convolution behind a decoder": ["encoder1.0", "bottleneck.0", "decoder1.0", "conv"],
    "upsampling, then convolution": ["inc", "down1", "up1.up", "up1.conv", "outc"],
    "last convolution before the classifier": ["stem", "layer1", "layer2", "conv_last", "fc"],
    "blocks of a diffusion network": ["resnets.0.conv1", "attentions.0.to_q", "downsamplers.0.conv"],
    "attention with a table of positions": [
        "attention.relative_position_bias", "attention.q_proj", "attention.k_proj", "attention.v_proj",
        "attention.o_proj",
    ],
    "the same under older names": [
        "attention.self.relative_position_bias", "attention.self.query", "attention.self.key", "attention.self.value",
        "attention.output.dense",
    ],
    "masked autoencoder": ["decoder_embed", "decoder_layers.0.mlp.fc1", "decoder_norm", "decoder_pred"],
    "prediction layer": ["transformer.embeddings", "transformer.layers.0", "pred_layer.proj"],
    "encoders and decoders with a prefix": [
        "vision_encoder.layers.0", "prompt_encoder.point_embed", "mask_decoder.transformer.layers.0",
    ],
    "towers of text and of images": [
        "text_model.encoder.layers.0.mlp.fc1", "vision_model.encoder.layers.0.mlp.fc1", "visual_projection",
        "text_projection",
    ],
    "images into a language model": ["vision_model.layers.0", "connector.proj", "text_model.layers.0", "lm_head"],
    "images beside a language model, as published": ["visual.patch_embed.proj", "model.embed_tokens", "lm_head"],
    "head inside a language model": ["model.vision_tower.conv", "language_model.lm_head"],
    "vector quantisation": [
        "encoder.conv_in", "quant_conv", "quantize.embedding", "post_quant_conv", "decoder.conv_in",
    ],
    "heads of a detector": ["model.backbone.conv", "model.decoder.layers.0.fc1", "bbox_embed.0", "class_embed.0"],
    "norm behind a whole model": ["model.stages.0.conv", "layer_norm"],
    "router before its experts": ["moe.router", "moe.input_linear", "moe.output_linear"],
    "embeddings of two languages": ["src_embed.0", "tgt_embed.0", "encoder.layers.0", "decoder.layers.0"],
}  # fmt: skip


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_known_architectures_stand_as_data_flows_through_them(name: str) -> None:
    assert layers(*ARCHITECTURES[name]) == ARCHITECTURES[name]


def test_a_module_that_owns_tensors_stands_before_the_modules_inside_it() -> None:
    names = [
        "cls_token",
        "pos_embed",
        "patch_embed.proj.weight",
        "blocks.0.gamma",
        "blocks.0.attn.qkv.weight",
        "head.bias",
    ]
    assert arranged(*names) == names


def test_tensors_of_a_layer_stand_as_their_module_has_them() -> None:
    lstm = nn.LSTM(2, 2, num_layers=2, bidirectional=True, proj_size=1)
    for module in (nn.BatchNorm1d(2), nn.Linear(2, 2), lstm, nn.GRUCell(2, 2)):
        names = [name for name, tensor in module.state_dict().items() if tensor.is_floating_point()]
        assert arranged(*names) == names


def test_numbers_are_compared_by_value_however_long_they_are() -> None:
    names = ["a2", "a10", "a0011", "b1", "c" + "9" * 5000, "c1" + "0" * 5000]
    shuffled = random.Random(0).sample(names, len(names))
    assert sorted(shuffled, key=natural_key) == names


PARTS = st.sampled_from(
    ["conv1", "bn1", "norm", "blocks", "0", "1", "10", "head", "fc", "embed", "encoder", "decoder", "q_proj", "k",
     "LN_2", "layers", "ln_f", "x", "in", "norm2", "conv", "bn", "stem"]
)  # fmt: skip
NAMES = st.lists(
    st.tuples(st.lists(PARTS, max_size=4), st.sampled_from(["weight", "bias", "running_mean", "scale"])).map(
        lambda pair: ".".join([*pair[0], pair[1]])
    ),
    min_size=1, max_size=12, unique=True,
)  # fmt: skip


def same(one: sne_fast.WeightBatch, other: sne_fast.WeightBatch) -> None:
    for field in FIELDS:
        assert torch.equal(getattr(one, field), getattr(other, field)), field
    assert one.names[0][1] == other.names[0][1] and one.shapes == other.shapes


@settings(max_examples=200, deadline=None, derandomize=True)
@given(NAMES, st.randoms(use_true_random=False))
def test_any_permutation_of_a_state_dict_gives_the_same_batch(names: list[str], rng: random.Random) -> None:
    state = {name: torch.full((2, 1) if name.endswith("weight") else (2,), float(i)) for i, name in enumerate(names)}
    shuffled = list(state)
    rng.shuffle(shuffled)
    same(sne_fast.pack([state]), sne_fast.pack([{name: state[name] for name in shuffled}]))


@pytest.mark.parametrize("name", sorted({*SMALL, *MIXED} - {"oddities"}))
def test_a_module_and_all_its_files_give_the_same_batch(name: str, tmp_path: Path) -> None:
    network = make(name)
    state = {key: tensor.contiguous() for key, tensor in network.state_dict().items()}
    torch.save(network.state_dict(), tmp_path / "a.pt")
    save_model(network, str(tmp_path / "b.safetensors"))
    keys = list(state)
    untied: dict[str, Tensor] = {}
    for key in keys:
        if all(state[key].data_ptr() != tensor.data_ptr() for tensor in untied.values()):
            untied[key] = state[key]
    save_file(untied, tmp_path / "c.safetensors")
    shards = {f"s{i}.safetensors": dict(list(untied.items())[i::2]) for i in range(2)}
    (tmp_path / "sharded").mkdir()
    for file, tensors in shards.items():
        save_file(tensors, tmp_path / "sharded" / file)
    index = {"weight_map": {key: file for file, tensors in shards.items() for key in tensors}}
    (tmp_path / "sharded" / "model.safetensors.index.json").write_text(json.dumps(index))
    want = sne_fast.pack([network], kinds="names")
    same(sne_fast.pack([network]), want)
    for source in (network.state_dict(), tmp_path / "a.pt", tmp_path / "b.safetensors", tmp_path / "c.safetensors",
                   tmp_path / "sharded" / "model.safetensors.index.json"):  # fmt: skip
        batch = sne_fast.pack([source])
        same(batch, want)
        assert torch.equal(batch.tensor_type, want.tensor_type)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.text(".01_aAbBnNcovm²ß", max_size=12), min_size=1, max_size=12, unique=True), st.randoms())
def test_names_of_any_form_have_one_order(names: list[str], rng: random.Random) -> None:
    shuffled = rng.sample(names, len(names))
    ordered = [names[i] for i in order_by_names(names)]
    assert ordered == [shuffled[i] for i in order_by_names(shuffled)] and sorted(ordered) == sorted(names)


def test_names_of_hostile_length_and_depth_are_ordered_too() -> None:
    names = ["a." * 100_000 + "w", "a." * 99_999 + "w", "position" * 20_000 + ".w", "bn3.w"]
    assert sorted(names) == sorted(names[i] for i in order_by_names(names))
    many = [f"bn{i}.w" for i in range(2000)]
    assert arranged(*many) == many


LEAVES = st.sampled_from(
    [
        lambda: nn.Linear(2, 3), lambda: nn.Conv2d(2, 3, 2), lambda: nn.BatchNorm2d(3), lambda: nn.LayerNorm(3),
        lambda: nn.Embedding(4, 2), lambda: nn.LSTM(2, 2), lambda: nn.MultiheadAttention(2, 1), lambda: nn.PReLU(),
    ]
)  # fmt: skip
MODULES = st.recursive(
    LEAVES.map(lambda make: make()),
    lambda inner: st.dictionaries(PARTS, inner, min_size=1, max_size=4).map(nn.ModuleDict),
    max_leaves=10,
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.dictionaries(PARTS, MODULES, min_size=1, max_size=4).map(nn.ModuleDict), st.booleans())
def test_any_module_and_its_files_give_the_same_batch(network: nn.ModuleDict, tied: bool) -> None:
    matrices = [module for module in network.modules() if isinstance(module, nn.Linear)]
    if tied and len(matrices) > 1 and matrices[0].weight.shape == matrices[-1].weight.shape:
        matrices[-1].weight = matrices[0].weight
    want = sne_fast.pack([network], kinds="names")
    with tempfile.TemporaryDirectory() as folder:
        torch.save(network.state_dict(), Path(folder) / "a.pt")
        save_model(network, str(Path(folder) / "b.safetensors"))
        sources = [network.state_dict(), Path(folder) / "a.pt", Path(folder) / "b.safetensors"]
        for batch in map(sne_fast.pack, sources):
            same(batch, want)
            assert torch.equal(batch.tensor_type, want.tensor_type)


class FrozenBatchNorm(nn.Module):
    """A normalisation whose tensors are buffers, as detectors have it."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(3))


class Detector(nn.Module):
    """Buffers of many kinds beside weights."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, 3, 3), FrozenBatchNorm()
        self.head = nn.Linear(3, 2)
        self.register_buffer("final_logits_bias", torch.zeros(1, 2))
        self.register_buffer("inv_freq", torch.rand(4))
        self.gate = nn.Linear(3, 2)
        self.gate.register_buffer("e_score_correction_bias", torch.zeros(2))


def test_buffers_count_alike_in_a_module_and_its_files(tmp_path: Path) -> None:
    network = Detector()
    torch.save(network.state_dict(), tmp_path / "a.pt")
    save_file(network.state_dict(), tmp_path / "b.safetensors")
    want = sne_fast.pack([network])
    assert want.num_weights == sum(p.numel() for p in network.parameters()) + 12
    for source in (network.state_dict(), tmp_path / "a.pt", tmp_path / "b.safetensors"):
        batch = sne_fast.pack([source])
        same(batch, want)
        assert torch.equal(batch.tensor_type, want.tensor_type)
        assert {name for name, _ in batch.skipped[0]} == {name for name, _ in want.skipped[0]}


def test_the_order_of_definition_is_refused_where_a_source_has_lost_it(tmp_path: Path) -> None:
    state = {"b.weight": torch.ones(2, 2), "a.weight": torch.ones(2, 2)}
    save_file(state, tmp_path / "x.safetensors")
    message = r"network 1 \('.*x.safetensors'\) does not say in which order .* use order='names'"
    with pytest.raises(sne_fast.CheckpointError, match=message):
        sne_fast.pack([state, tmp_path / "x.safetensors"], order="definition")
    torch.save(state, tmp_path / "x.pt")
    sne_fast.data.checkpoints.save_state_dict(state, tmp_path / "y.safetensors")
    for source in (state, tmp_path / "x.pt", tmp_path / "y.safetensors"):
        assert sne_fast.pack([source], order="definition").names[0][1] == tuple(state)
    with pytest.raises(ValueError, match="pack: order must be one of 'names', 'definition', got 'size'"):
        sne_fast.pack([state], order="size")  # type: ignore[arg-type]

"""Folders of diffusers pipelines: one of the networks, chosen by its name or path."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sne_fast import CheckpointError, pack
from sne_fast.data.checkpoints import load_state_dict, read_checkpoint
from sne_fast.data.readers.folders import independent_files


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_pipelines_that_diffusers_saves(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    small = {"block_out_channels": (4, 8), "norm_num_groups": 2, "layers_per_block": 1}
    unet = diffusers.UNet2DModel(sample_size=8, **small, **blocks)
    diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler()).save_pretrained(tmp_path / "one", max_shard_size="10kB")
    assert len(list((tmp_path / "one" / "unet").glob("*.safetensors"))) > 1
    wanted = unet.state_dict()
    for key in (None, "unet"):
        found = load_state_dict(tmp_path / "one", key)
        assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert (
        pack([tmp_path / "one"]).num_weights == pack([unet]).num_weights and independent_files(tmp_path / "one") is None
    )
    vqvae = diffusers.VQModel(block_out_channels=(4,), norm_num_groups=2, latent_channels=2)
    pipeline = diffusers.LDMPipeline(vqvae=vqvae, unet=unet, scheduler=diffusers.DDIMScheduler())
    pipeline.save_pretrained(tmp_path / "two")
    with pytest.raises(
        CheckpointError, match=r"two: holds a pipeline of diffusers with 2 networks, unet, vqvae; give the"
    ):
        pack([tmp_path / "two"])
    for name, network in (("unet", unet), ("vqvae", vqvae)):
        assert load_state_dict(tmp_path / "two", name).keys() == network.state_dict().keys()
        assert load_state_dict(tmp_path / "two" / name).keys() == network.state_dict().keys()
    assert read_checkpoint(tmp_path / "two", "unet").left_out == {"vqvae": "other network of the pipeline"}
    assert independent_files(tmp_path / "two") == [tmp_path / "two" / name for name in ("unet", "vqvae")]


def pipeline(folder: Path, **components: object) -> Path:
    (folder / "unet").mkdir(parents=True)
    (folder / "tokenizer").mkdir()
    save_file({"w": torch.ones(2)}, folder / "unet" / "diffusion_pytorch_model.safetensors")
    entries = {"_class_name": "P", "unet": ["diffusers", "UNet2DModel"], "tokenizer": ["transformers", "CLIPTokenizer"]}
    (folder / "model_index.json").write_text(json.dumps(entries | components))
    return folder


def test_what_is_no_network_of_a_pipeline(tmp_path: Path) -> None:
    more = {
        "scheduler": ["diffusers", "DDIMScheduler"],
        "safety_checker": [None, None],
        "requires_safety_checker": False,
    }
    assert list(load_state_dict(pipeline(tmp_path / "p", **more))) == ["w"]
    with pytest.raises(CheckpointError, match=r"its pipeline has no network 'tokenizer'; there are unet"):
        load_state_dict(tmp_path / "p", "tokenizer")
    (tmp_path / "p" / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"holds a pipeline of diffusers without weights; fetch its networks too"):
        load_state_dict(tmp_path / "p")


def test_networks_of_a_pipeline_that_cannot_be_read_are_said(tmp_path: Path) -> None:
    folder = pipeline(tmp_path / "p", vae=["diffusers", "AutoencoderKL"])
    with pytest.raises(CheckpointError, match="with 2 networks, unet, vae; give the path of one"):
        load_state_dict(folder)
    with pytest.raises(CheckpointError, match=r"p: its network 'vae' is missing; fetch it into .*p$"):
        load_state_dict(folder, "vae")
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_name("diffusion_pytorch_model-00001-of-00002.safetensors"))
    with pytest.raises(CheckpointError, match=r"is one of 2 parts of a checkpoint, of which .* is missing"):
        load_state_dict(folder, "unet")


@pytest.mark.parametrize("text", ["[", "[]", '{"../x": ["a", "b"]}', '{"a/b": ["a", "b"]}', '{"": ["a", "b"]}'])
def test_damaged_lists_of_components_are_refused(tmp_path: Path, text: str) -> None:
    (pipeline(tmp_path / "p") / "model_index.json").write_text(text)
    for key in (None, "unet"):
        with pytest.raises(CheckpointError, match=r"model_index.json: (is not valid|must hold|refused, its component)"):
            load_state_dict(tmp_path / "p", key)
    assert independent_files(tmp_path / "p") is None

"""find_networks: folders whose networks are named by a list in them, each network once."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from sne_fast.embedding.manifests import find_networks


def weights(folder: Path, name: str) -> None:
    folder.mkdir(parents=True)
    save_file({"w": torch.ones(2)}, folder / name)


def test_networks_of_pipelines_adapters_and_distributed_checkpoints_are_found_once(tmp_path: Path) -> None:
    for name in ("unet", "vae"):
        weights(tmp_path / "pipe" / name, "diffusion_pytorch_model.safetensors")
    entries = {"unet": ["diffusers", "UNet2DModel"], "vae": ["diffusers", "AutoencoderKL"]}
    (tmp_path / "pipe" / "model_index.json").write_text(json.dumps(entries))
    weights(tmp_path / "lora", "adapter_model.safetensors")
    (tmp_path / "step").mkdir()
    (tmp_path / "step" / ".metadata").touch()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "model_index.json").write_text("[")
    found = sorted(str(Path(uri).relative_to(tmp_path)) for uri in find_networks([str(tmp_path)]))
    assert found == ["broken", "lora", "pipe/unet", "pipe/vae", "step"]

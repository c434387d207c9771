"""`sne-fast encode` of large files: layer by layer, in bounded memory, or from a sample of chunks."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from helpers.command_line import call
from sne_fast import SNE, Predictor
from sne_fast.cli import encode
from sne_fast.nn import layered_encoding


@pytest.fixture
def large(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    names = ("embed_tokens.weight", "layers.0.fc.weight", "layers.1.fc.weight", "lm_head.weight")
    save_file({name: torch.randn(96, 64) for name in names}, tmp_path / "large.safetensors")
    return tmp_path / "large.safetensors"


@pytest.fixture
def small(tmp_path: Path) -> Path:
    save_file({"fc.weight": torch.randn(3, 4)}, tmp_path / "small.safetensors")
    return tmp_path / "small.safetensors"


def stored(out: Path) -> dict[str, np.ndarray]:
    with np.load(out) as arrays:
        return dict(arrays)


def test_large_files_are_encoded_layer_by_layer(
    large: Path, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert call("encode", large, small, "-o", tmp_path / "whole.npz").exit_code == 0
    monkeypatch.setattr(encode, "LARGE", 10_000)
    apart: list[int] = []
    original = layered_encoding.LayeredEncodingMixin.encode_layers
    monkeypatch.setattr(
        layered_encoding.LayeredEncodingMixin,
        "encode_layers",
        lambda self, stream, **options: apart.append(len(stream)) or original(self, stream, **options),
    )
    assert call("encode", large, small, "-o", tmp_path / "apart.npz").exit_code == 0
    assert apart == [4]
    whole, parts = stored(tmp_path / "whole.npz"), stored(tmp_path / "apart.npz")
    assert whole["name"].tolist() == parts["name"].tolist() and "spread" not in parts
    np.testing.assert_allclose(parts["vector"], whole["vector"], rtol=0, atol=1e-5)


def test_a_sample_of_chunks_has_its_error_beside_it(large: Path, small: Path, tmp_path: Path) -> None:
    pq = pytest.importorskip("pyarrow.parquet")
    model = saved_encoder(tmp_path)
    result = call("encode", large, small, "-o", tmp_path / "z.parquet", "--max-chunks", 64, "--model", model)
    assert result.exit_code == 0
    assert "estimates from at most 64 chunks per tensor; relative standard error up to 0." in result.stdout
    table = pq.read_table(tmp_path / "z.parquet").to_pydict()
    assert 0 < table["spread"][0] < 0.3 and table["spread"][1] == 0
    call("encode", large, small, "-o", tmp_path / "z.npz", "--max-chunks", 64, "--model", model)
    np.testing.assert_allclose(stored(tmp_path / "z.npz")["vector"], table["vector"], rtol=0, atol=1e-6)
    assert stored(tmp_path / "z.npz")["vector"].shape == (2, 32)


def saved_encoder(folder: Path) -> Path:
    torch.manual_seed(0)
    SNE(hidden_dim=32, set_attention="isab").save_pretrained(folder / "encoder")
    return folder / "encoder"


def test_a_network_that_needs_more_memory_is_named_and_others_are_encoded(
    large: Path, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode, "LARGE", 10_000)
    model = saved_encoder(tmp_path)
    result = call("encode", large, small, "-o", tmp_path / "z.npz", "--max-memory", "10M", "--model", model)
    assert result.exit_code == 1
    said = " ".join(result.stderr.split())
    assert f"{large}: encoding needs 0.1 GiB for layer 'embed_tokens' of 6,144 weights" in said
    assert "--max-chunks" in said and "--max-memory" in said
    assert stored(tmp_path / "z.npz")["name"].tolist() == [str(small)]
    assert call("encode", large, "-o", tmp_path / "z.npz", "--max-memory", "1.5 GiB").exit_code == 0


@pytest.mark.parametrize(("text", "size"), [("8G", 8 * 2**30), ("500m", 500 * 2**20), ("1.5 GiB", 1.5 * 2**30)])
def test_sizes_are_read(text: str, size: float) -> None:
    assert encode.parse_bytes(text) == size


def test_bad_options_are_refused(large: Path, tmp_path: Path) -> None:
    for size in ("plenty", "0"):
        result = call("encode", large, "-o", tmp_path / "z.npz", "--max-memory", size)
        assert result.exit_code == 2 and "--max-memory must be a number of bytes such as 8G" in result.stderr
    assert call("encode", large, "-o", tmp_path / "z.npz", "--max-chunks", 1).exit_code == 2
    result = call("encode", large, "-o", tmp_path / "z.npz", "--seed", 3)
    assert result.exit_code == 2 and "--seed 3 is of the sample of --max-chunks, which is not given" in result.stderr
    Predictor(SNE(hidden_dim=32)).save_pretrained(tmp_path / "predictor")
    result = call("encode", large, "-o", tmp_path / "z.npz", "--max-chunks", 8, "--model", tmp_path / "predictor")
    assert result.exit_code == 2 and "--max-chunks is for encoders" in result.stderr


def test_folders_of_transformers_are_rebuilt_as_modules(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", minversion="5")
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        vocab_size=20, hidden_size=8, intermediate_size=8, moe_intermediate_size=8, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, head_dim=4, num_experts=2, num_experts_per_tok=1,
    )  # fmt: skip
    module = transformers.Qwen3MoeForCausalLM(config).eval()  # whose files have its stacked experts one by one
    module.save_pretrained(tmp_path / "model")
    encoder = SNE(hidden_dim=32, set_attention="isab").eval()
    encoder.save_pretrained(tmp_path / "encoder")
    vectors = {}
    for name, options in {"file": [], "module": ["--rebuild"], "sample": ["--rebuild", "--max-chunks", 1000]}.items():
        out = tmp_path / f"{name}.npz"
        result = call("encode", tmp_path / "model", "-o", out, "--model", tmp_path / "encoder", *options)
        assert result.exit_code == 0, result.output
        vectors[name] = stored(out)["vector"][0]
    with torch.no_grad():
        want = encoder.pack([module])
        z = encoder(want)[0].numpy()
    np.testing.assert_allclose(vectors["module"], z, rtol=0, atol=1e-5)
    np.testing.assert_allclose(vectors["sample"], z, rtol=0, atol=1e-5)
    assert np.abs(vectors["file"] - z).max() > 1e-2
    result = call("encode", tmp_path / "model", "-o", tmp_path / "vectors", "--rebuild")
    assert result.exit_code == 2 and "--rebuild needs an .npz or .parquet file" in " ".join(result.stderr.split())


def test_a_key_names_a_network_of_a_pipeline(tmp_path: Path) -> None:
    pipeline = tmp_path / "pipeline"
    for part in ("unet", "vae"):
        (pipeline / part).mkdir(parents=True)
        save_file({"fc.weight": torch.randn(3, 4)}, pipeline / part / "diffusion_pytorch_model.safetensors")
    described = {"_class_name": "Pipeline", "unet": ["diffusers", "UNet"], "vae": ["diffusers", "VAE"]}
    (pipeline / "model_index.json").write_text(json.dumps(described))
    assert call("encode", pipeline, "-o", tmp_path / "all.npz").exit_code == 0
    assert call("encode", pipeline, "-o", tmp_path / "one.npz", "--key", "unet").exit_code == 0
    every, one = stored(tmp_path / "all.npz"), stored(tmp_path / "one.npz")
    assert [Path(name).name for name in every["name"]] == ["unet", "vae"] and one["name"].tolist() == [str(pipeline)]
    np.testing.assert_allclose(one["vector"][0], every["vector"][0], rtol=0, atol=1e-5)

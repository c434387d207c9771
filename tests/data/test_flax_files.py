"""Weights of Flax' files: a file that Flax wrote computes the same in torch, and damaged ones are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from sne_fast import CheckpointError, pack
from sne_fast.data.checkpoints import load_state_dict, read_checkpoint

msgpack = pytest.importorskip("msgpack")

WRITTEN = Path(__file__).parent / "formats"


def packed(array: Any) -> Any:
    """Return an array as flax.serialization packs it."""
    array = np.asarray(array)
    return msgpack.ExtType(1, msgpack.packb((array.shape, array.dtype.name, array.tobytes())))


def saved(file: Path, content: Any) -> Path:
    file.write_bytes(msgpack.packb(content))
    return file


class Twin(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.Conv_0, self.BatchNorm_0 = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4, eps=1e-5)
        self.ConvTranspose_0 = nn.ConvTranspose2d(4, 4, 3)
        self.LayerNorm_0 = nn.LayerNorm(4, eps=1e-6)
        self.MultiHeadDotProductAttention_0 = nn.ModuleDict(
            {n: nn.Linear(4, 4) for n in ("query", "key", "value", "out")}
        )
        self.Embed_0 = nn.Embedding(11, 4)
        self.OptimizedLSTMCell_0, self.GRUCell_0 = nn.LSTM(4, 5, batch_first=True), nn.GRU(5, 4, batch_first=True)
        self.Dense_0 = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        x = self.ConvTranspose_0(self.BatchNorm_0(self.Conv_0(x)))
        x = self.LayerNorm_0(x.flatten(2).mT)
        attention = self.MultiHeadDotProductAttention_0
        q, k, v = (attention[n](x).unflatten(-1, (2, 2)).transpose(1, 2) for n in ("query", "key", "value"))
        x = attention["out"](nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        x, _ = self.OptimizedLSTMCell_0(x + self.Embed_0(words))
        return self.Dense_0(self.GRUCell_0(x)[0][:, -1])


def test_a_file_of_flax_computes_the_same_in_torch() -> None:
    found = read_checkpoint(WRITTEN / "flax_model.msgpack")
    assert not found.keeps_order and not found.left_out
    twin = Twin().eval()
    for tensor in twin.state_dict().values():
        tensor.zero_()
    missing = twin.load_state_dict(found.tensors, strict=False)
    assert not missing.unexpected_keys
    assert {name.rpartition(".")[2] for name in missing.missing_keys} <= {
        "bias_ih_l0",
        "bias_hh_l0",
        "num_batches_tracked",
    }
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((1, 4, 4, 3)).astype(np.float32))
    with torch.no_grad():
        computed = twin(x.permute(0, 3, 1, 2), torch.tensor([[3]]))
    torch.testing.assert_close(computed, torch.from_numpy(np.load(WRITTEN / "flax_output.npy")), rtol=1e-4, atol=1e-4)
    assert len(pack([found]).names[0][1]) == len(found.tensors)


def test_states_of_training_and_bfloat16() -> None:
    found = read_checkpoint(WRITTEN / "flax_bfloat16.msgpack")
    assert {name: tensor.dtype for name, tensor in found.tensors.items()} == {
        "Dense_0.weight": torch.bfloat16,
        "Dense_0.bias": torch.bfloat16,
    }
    whole = load_state_dict(WRITTEN / "flax_model.msgpack")["Dense_0.weight"]
    assert torch.equal(found.tensors["Dense_0.weight"], whole.bfloat16())
    assert found.left_out == {"step": "bookkeeping of the training", "opt_state": "an optimiser's state"}


def test_names_of_transformers(tmp_path: Path) -> None:
    layer = {"query": {"kernel": packed(np.ones((3, 2), np.float32)), "bias": packed(np.ones(2, np.float32))},
             "LayerNorm": {"scale": packed(np.ones(2, np.float16))}}  # fmt: skip
    content = {"bert": {"embeddings": {"word_embeddings": {"embedding": packed(np.ones((5, 3), np.float32))}},
                        "encoder": {"layer": {"0": layer}}}}  # fmt: skip
    read = load_state_dict(saved(tmp_path / "flax_model.msgpack", content))
    assert {name: tuple(tensor.shape) for name, tensor in read.items()} == {
        "bert.embeddings.word_embeddings.weight": (5, 3),
        "bert.encoder.layer.0.LayerNorm.weight": (2,),
        "bert.encoder.layer.0.query.weight": (2, 3),
        "bert.encoder.layer.0.query.bias": (2,),
    }
    assert read["bert.encoder.layer.0.LayerNorm.weight"].dtype == torch.float16


@pytest.mark.parametrize(
    "value, message",
    [
        (
            msgpack.ExtType(1, msgpack.packb(((1 << 40,), "float32", b"1234"))),
            r"of shape \(1099511627776,\) with 4 bytes",
        ),
        (msgpack.ExtType(1, msgpack.packb(((1,), "object", b"12345678"))), "an array of 'object' that is not read"),
        (msgpack.ExtType(1, b"x"), "is damaged or no file of Flax"),
        ({"__msgpack_chunked_array__": True, "shape": {"0": 9}, "chunks": {"0": packed([1.0])}}, "do not make it up"),
        ("text", "holds no weights but 'w'"),
    ],
)
def test_hostile_files_are_refused(tmp_path: Path, value: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_state_dict(saved(tmp_path / "n.msgpack", {"w": value}))


@pytest.mark.parametrize("keep", [2, 50, -1])
def test_damaged_files_are_refused(tmp_path: Path, keep: int) -> None:
    (tmp_path / "n.msgpack").write_bytes((WRITTEN / "flax_model.msgpack").read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"n\.msgpack: is damaged or no file of Flax"):
        load_state_dict(tmp_path / "n.msgpack")


def test_maps_nested_too_deeply_are_refused(tmp_path: Path) -> None:
    content: Any = packed([1.0])
    for _ in range(200):
        content = {"a": content}
    with pytest.raises(CheckpointError, match="nested too deeply"):
        load_state_dict(saved(tmp_path / "n.msgpack", content))

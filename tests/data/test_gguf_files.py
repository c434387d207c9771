"""Tensors of GGUF files, written by the package gguf and decoded as it does."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from sne_fast import SNE, CheckpointError, pack
from sne_fast.data.checkpoints import load_state_dict, read_checkpoint
from sne_fast.data.readers.checkpoint import open_checkpoint
from sne_fast.data.readers.lazy_tensors import LazyTensor

gguf = pytest.importorskip("gguf")

VALUES = np.random.default_rng(0).standard_normal((16, 256)).astype(np.float32)
QUANTISED = ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0", "MXFP4"]
DECODED_ONLY = ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "IQ3_S", "IQ2_XS", "IQ1_M"]


def saved(file: Path, kinds: list[str]) -> Path:
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_array("tokenizer.ggml.tokens", ["a", "bc", "def"])
    writer.add_array("numbers", [1, 2, 3])
    writer.add_uint32("llama.block_count", 3)
    writer.add_tensor("token_embd.weight", VALUES)
    for kind in kinds:
        type_ = gguf.GGMLQuantizationType[kind]
        if kind in DECODED_ONLY:
            block, nbytes = gguf.GGML_QUANT_SIZES[type_]
            held = np.random.default_rng(1).integers(0, 60, (16, 256 // block * nbytes), dtype=np.uint8)
        else:
            held = gguf.quants.quantize(VALUES, type_)
        writer.add_tensor(f"blk.{len(kind)}.{kind}.weight", held, raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def test_tensors_are_those_of_the_package(tmp_path: Path) -> None:
    file = saved(tmp_path / "n.gguf", QUANTISED + DECODED_ONLY)
    found = read_checkpoint(file)
    assert not found.keeps_order and len(found.tensors) == 1 + len(QUANTISED + DECODED_ONLY)
    assert torch.equal(found.tensors["token_embd.weight"], torch.tensor(VALUES))
    for tensor in gguf.GGUFReader(file).tensors:
        wanted = torch.tensor(gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
        read = found.tensors[tensor.name]
        assert read.shape == (16, 256)
        torch.testing.assert_close(read.float(), wanted.reshape(16, 256), rtol=0, atol=0, equal_nan=True)
        if any(f".{kind}." in tensor.name for kind in ("F16", "BF16", "Q8_0")):
            torch.testing.assert_close(read.float(), torch.tensor(VALUES), rtol=0, atol=0.05)
    kinds = {tuple(name.split(".")[2:3]): tensor.dtype for name, tensor in found.tensors.items()}
    assert kinds[("F16",)] == torch.float16 and kinds[("BF16",)] == torch.bfloat16 and kinds[("Q4_K",)] == torch.float32


def test_tensors_are_decoded_when_they_are_asked_for(tmp_path: Path) -> None:
    found = open_checkpoint(saved(tmp_path / "n.gguf", ["Q8_0"]))
    lazy = found.tensors["blk.4.Q8_0.weight"]
    assert isinstance(lazy, LazyTensor) and lazy.shape == (16, 256) and lazy.dtype == torch.float32
    assert torch.equal(lazy.read(), found.read().tensors["blk.4.Q8_0.weight"])
    encoder = SNE(hidden_dim=16).eval()
    torch.testing.assert_close(
        encoder.encode(tmp_path / "n.gguf"), encoder([tmp_path / "n.gguf"])[0], rtol=2e-5, atol=2e-5
    )


def test_a_file_is_packed(tmp_path: Path) -> None:
    batch = pack([saved(tmp_path / "n.gguf", ["Q8_0"])])
    assert batch.names[0][1] == ("token_embd.weight", "blk.4.Q8_0.weight") and len(batch.values) == 2 * VALUES.size


@pytest.mark.parametrize("keep", [5, 20, 60, 200, -4])
def test_damaged_files_are_refused(tmp_path: Path, keep: int) -> None:
    file = saved(tmp_path / "n.gguf", ["Q8_0"])
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"n\.gguf: is damaged or no GGUF file"):
        load_state_dict(file)


def header(fields: int, tensors: int, rest: bytes) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, fields) + rest


@pytest.mark.parametrize(
    "data, message",
    [
        (header(1 << 60, 0, b""), "it ends within its header"),
        (header(0, 1 << 60, b""), "it says that it has"),
        (header(1, 0, struct.pack("<Q", 1 << 62)), "a name of"),
        (header(1, 0, struct.pack("<Q1sIIQ", 1, b"a", 9, 8, 1 << 62)), "it ends within its header"),
        (header(1, 0, struct.pack("<Q1sIIQ", 1, b"a", 9, 9, 1)), "of the unknown type 9"),
        (header(0, 1, struct.pack("<Q1sIQIQ", 1, b"a", 1, 1 << 50, 0, 0)), "its tensor 'a' does not fit into it"),
        (header(0, 1, struct.pack("<Q1sIQIQ", 1, b"a", 1, 4, 999, 0)), "is damaged or no GGUF file"),
        (
            header(0, 1, struct.pack("<Q1sIQIQ", 1, b"a", 1, 256, 15, 0) + bytes(500)),
            "the type Q8_K, which gguf does not",
        ),
        (b"GGUF\0\0\0\3" + bytes(16), "of a big-endian machine"),
        (b"GGUF\1\0\0\0" + bytes(16), "its version is 1"),
        (header(0, 0, bytes(32)), "holds no weights"),
    ],
)
def test_hostile_headers_are_refused(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "n.gguf").write_bytes(data)
    with pytest.raises(CheckpointError, match=message):
        load_state_dict(tmp_path / "n.gguf")

"""Write small networks in the formats in which networks are found: `WRITERS`, which return the path they wrote."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn


def _safetensors(network: nn.Module, at: Path) -> Path:
    path = at.with_suffix(".safetensors")
    if not hasattr(network, "save_pretrained"):
        save_file(network.state_dict(), path)
        return path
    network.save_pretrained(at)  # which knows what is tied
    os.replace(at / "model.safetensors", path)
    shutil.rmtree(at)
    return path


def _pt(network: nn.Module, at: Path) -> Path:
    torch.save(network.state_dict(), at.with_suffix(".pt"))
    return at.with_suffix(".pt")


def _checkpoint(network: nn.Module, at: Path) -> Path:
    optimiser = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    held = {"epoch": 1, "model_state_dict": network.state_dict(), "optimizer_state_dict": optimiser.state_dict()}
    torch.save(held, at.with_suffix(".ckpt"))
    return at.with_suffix(".ckpt")


def _folder(network: Any, at: Path) -> Path:
    network.save_pretrained(at)
    return at


def _shards(network: Any, at: Path) -> Path:
    network.save_pretrained(at, max_shard_size="40KB")
    return at


_LLAMA_NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    r"model.layers.(\d+).": r"blk.\1.", "self_attn.([qkv])_proj": r"attn_\1", "self_attn.o_proj": "attn_output",
    "mlp.(gate|up|down)_proj": r"ffn_\1", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def _gguf(network: nn.Module, at: Path) -> Path:
    """Write a Llama under the names of llama.cpp."""
    import gguf

    path = at.with_suffix(".gguf")
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    for name, tensor in network.state_dict().items():
        for old, new in _LLAMA_NAMES.items():
            name = re.sub(old, new, name)
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _onnx(network: nn.Module, at: Path) -> Path:
    """Write a SIREN as a graph of matrix products and sines."""
    from onnx import TensorProto, helper, numpy_helper, save

    held = [numpy_helper.from_array(tensor.numpy(), name) for name, tensor in network.state_dict().items()]
    frequency = numpy_helper.from_array(torch.tensor(6.0).numpy(), "/Constant_output_0")
    nodes, last = [helper.make_node("Constant", [], ["/Constant_output_0"], value=frequency)], "x"
    for k, layer in enumerate(["layers.0", "layers.1", "layers.2"]):
        out = "y" if k == 2 else f"h{k}"
        nodes.append(helper.make_node("Gemm", [last, f"{layer}.weight", f"{layer}.bias"], [out], transB=1))
        if k < 2:
            nodes.append(helper.make_node("Mul", [out, "/Constant_output_0"], [f"m{k}"]))
            nodes.append(helper.make_node("Sin", [f"m{k}"], [f"s{k}"]))
            last = f"s{k}"
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", size]) for name, size in (("x", 2), ("y", 1))]
    graph = helper.make_graph(nodes, "siren", ends[:1], ends[1:], held)
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]), at.with_suffix(".onnx"))
    return at.with_suffix(".onnx")


def _hdf5(network: nn.Module, at: Path) -> Path:
    """Write a CNN as Keras does, whose kernels have their inputs first and whose maps have their channels last."""
    os.environ.setdefault("KERAS_BACKEND", "torch")
    import keras

    first, second, head = network[0], network[2], network[5]
    model = keras.Sequential([
        keras.Input((8, 8, 1)), keras.layers.Conv2D(first.out_channels, 3, padding="same", activation="relu"),
        keras.layers.Conv2D(second.out_channels, 3, 2, padding="same", activation="relu"), keras.layers.Flatten(),
        keras.layers.Dense(head.out_features),
    ])  # fmt: skip
    columns = head.weight.unflatten(1, (second.out_channels, 4, 4)).permute(2, 3, 1, 0).flatten(0, 2)
    kernels = [
        *(t for conv in (first, second) for t in (conv.weight.permute(2, 3, 1, 0), conv.bias)),
        columns,
        head.bias,
    ]
    model.set_weights([t.detach().numpy() for t in kernels])
    model.save(at.with_suffix(".h5"))
    return at.with_suffix(".h5")


COMMON = ("safetensors", "pt", "folder", "checkpoint", "shards")
"""Formats that serve every network, but for the folders, which are those of `save_pretrained`."""
WRITERS: dict[str, Callable[[Any, Path], Path]] = {
    "safetensors": _safetensors, "pt": _pt, "checkpoint": _checkpoint, "folder": _folder, "shards": _shards,
    "gguf": _gguf, "onnx": _onnx, "hdf5": _hdf5,
}  # fmt: skip

"""The oracle: SNE in float64 by loops over every chunk, tensor, layer and network, straight from the contract.

Slow on purpose. Nothing is batched over sets, no pointer arithmetic, no packing code of the package: a network is a
list of layers, a layer a list of `Cut` tensors, a tensor a list of chunks, a chunk a 1-D float64 tensor. Everything is
ordinary autograd, so the oracle yields gradients too.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

State = Mapping[str, Tensor]  # parameter name -> float64 tensor
EPS = 1e-5

# ---------------------------------------------------------------------------------------------------------------------
# Section 1: which tensors, in which order, of which type


KINDS: list[tuple[type | tuple[type, ...], int]] = [  # first match counts
    (nn.modules.conv._ConvTransposeNd, 2),
    (nn.modules.conv._ConvNd, 1),
    (nn.MultiheadAttention, 6),
    ((nn.RNNBase, nn.RNNCellBase), 5),
    ((nn.Embedding, nn.EmbeddingBag), 4),
    ((nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm), 3),
    (nn.Linear, 0),
]
OTHER_KIND, OTHER_ROLE = 7, 4


def kind_of(module: nn.Module) -> int:
    return next((kind for classes, kind in KINDS if isinstance(module, classes)), OTHER_KIND)


def role_of(name: str) -> int:
    """Return the role of a name: `weight`, `bias`, or a form of recurrent layers and attention (`weight_ih_l0`)."""
    exact = {"running_mean": 2, "running_var": 3}
    if name in exact:
        return exact[name]
    words = name.split("_")
    if words[0] == "weight" or words[-1] == "weight":
        return 0
    if words[0] == "bias" or words[-1] == "bias":
        return 1
    return OTHER_ROLE


@dataclass
class Source:
    """One stored tensor before cutting."""

    name: str
    type: int
    tensor: Tensor


def layers_of(network: nn.Module) -> list[list[Source]]:
    """Return layers in definition order: per module its own parameters, then its running statistics.

    A complex parameter is its real and imaginary parts along the last dimension.
    """
    layers: list[list[Source]] = []
    seen: list[Tensor] = []
    for prefix, module in network.named_modules():
        dot = prefix + "." if prefix else ""
        kind = kind_of(module)
        layer = []
        for name, parameter in module._parameters.items():
            if parameter is None or any(parameter is s for s in seen):
                continue
            seen.append(parameter)
            parts = torch.view_as_real(parameter).flatten(-2) if parameter.is_complex() else parameter
            layer.append(Source(dot + name, 8 * kind + role_of(name), parts))
        if kind == 3:
            for name in ("running_mean", "running_var"):
                buffer = module._buffers.get(name)
                if buffer is not None:
                    layer.append(Source(dot + name, 8 * kind + role_of(name), buffer))
        if layer:
            layers.append(layer)
    return layers


# ---------------------------------------------------------------------------------------------------------------------
# Section 1: cutting, element by element


def cut_indices(
    shape: tuple[int, ...], chunk_size: int, chunking: str, kernels: bool = True
) -> list[list[tuple[int, ...]]]:
    """Return the index of every element, grouped into chunks, in the order of the batch.

    Without `kernels` a tensor of three and more dimensions is the matrix of its last dimension.
    """
    if len(shape) == 0:
        return [[()]]
    if len(shape) == 1:
        rows = [[(i,) for i in range(shape[0])]]
    elif len(shape) > 2 and not kernels:
        outer = list(itertools.product(*(range(n) for n in shape[:-1])))
        rows = [[(*o, i) for i in range(shape[-1])] for o in outer]
        rows = [list(itertools.chain(*rows))] if chunking == "flat" else rows
    else:
        n_out, n_in, *kernel = shape
        positions = list(itertools.product(*(range(k) for k in kernel)))  # row-major; [()] for a matrix
        if chunking == "flat":  # per kernel position the row-major out x in vector
            rows = [[(o, i, *p) for o in range(n_out) for i in range(n_in)] for p in positions]
        elif chunking == "neuron" or not kernel:  # also cut at every output neuron
            rows = [[(o, i, *p) for i in range(n_in)] for p in positions for o in range(n_out)]
        elif chunking == "kernel":  # one row per kernel, (out, in) outermost
            rows = [[(o, i, *p) for p in positions] for o in range(n_out) for i in range(n_in)]
        else:
            raise ValueError(chunking)
    return [row[start : start + chunk_size] for row in rows for start in range(0, len(row), chunk_size)]


@dataclass
class Cut:
    """One tensor of the batch: its chunks (already divided by `scale`), type and scale."""

    type: int
    scale: Tensor  # 0-d float64
    chunks: list[Tensor]
    name: str = ""
    shape: tuple[int, ...] = ()


def cut_tensor(source: Source, chunk_size: int, chunking: str, scale: str) -> Cut:
    tensor = source.tensor.double()
    factor = torch.ones((), dtype=torch.float64)
    if scale == "tensor":
        squares = [tensor[index] ** 2 for index in itertools.product(*(range(n) for n in tensor.shape))]
        mean = torch.stack(squares).sum() / len(squares)
        if mean.item() > 0:
            factor = mean.sqrt()
    chunks = [
        torch.stack([tensor[index] for index in piece]) / factor
        for piece in cut_indices(tuple(tensor.shape), chunk_size, chunking, source.type in (8, 16))
    ]
    return Cut(source.type, factor, chunks, source.name, tuple(tensor.shape))


Layer = list[Cut]
Network = list[Layer]  # the level of a layer is its place unless `levels` say otherwise


def cut_network(network: nn.Module, chunk_size: int = 32, chunking: str = "flat", scale: str = "tensor") -> Network:
    return [[cut_tensor(s, chunk_size, chunking, scale) for s in layer] for layer in layers_of(network)]


# ---------------------------------------------------------------------------------------------------------------------
# Section 2: the blocks, one set at a time


def linear(state: State, prefix: str, x: Tensor) -> Tensor:
    return x @ state[prefix + "weight"].T + state[prefix + "bias"]


def layer_norm(state: State, prefix: str, x: Tensor) -> Tensor:
    mean = x.mean(1, keepdim=True)
    variance = ((x - mean) ** 2).mean(1, keepdim=True)
    return (x - mean) / (variance + EPS).sqrt() * state[prefix + "weight"] + state[prefix + "bias"]


def softmax(logits: Tensor) -> Tensor:
    """Compute the softmax over the last dimension, written out."""
    e = (logits - logits.max(1, keepdim=True).values.detach()).exp()
    return e / e.sum(1, keepdim=True)


def mab(state: State, prefix: str, q_in: Tensor, k_in: Tensor, heads: int, norm: bool) -> Tensor:
    """Compute MAB: q_in (n, dq), k_in (m, dk) -> (n, h)."""
    q, k, v = (linear(state, prefix + f"fc_{name}.", x) for name, x in (("q", q_in), ("k", k_in), ("v", k_in)))
    h = q.shape[1]
    d = h // heads
    outputs = []
    for a in range(heads):
        own = slice(a * d, (a + 1) * d)
        outputs.append(q[:, own] + softmax(q[:, own] @ k[:, own].T / math.sqrt(h)) @ v[:, own])
    o = torch.cat(outputs, 1)
    if norm:
        o = layer_norm(state, prefix + "ln0.", o)
    o = o + linear(state, prefix + "fc_o.", o).clamp(min=0)
    return layer_norm(state, prefix + "ln1.", o) if norm else o


def sab(state: State, prefix: str, x: Tensor, heads: int, norm: bool) -> Tensor:
    return mab(state, prefix + "mab.", x, x, heads, norm)


def isab(state: State, prefix: str, x: Tensor, heads: int, norm: bool) -> Tensor:
    summary = mab(state, prefix + "mab0.", state[prefix + "I"][0], x, heads, norm)
    return mab(state, prefix + "mab1.", x, summary, heads, norm)


def pma(state: State, prefix: str, x: Tensor, heads: int, norm: bool) -> Tensor:
    """Pool x (n, h) -> (seeds, h)."""
    return mab(state, prefix + "mab.", state[prefix + "S"][0], x, heads, norm)


# ---------------------------------------------------------------------------------------------------------------------
# Section 3: the encoder


def position(n: int, h: int) -> Tensor:
    """Return P(n): sin and cos interleaved."""
    code = torch.zeros(h, dtype=torch.float64)
    for i in range(h // 2):
        angle = n / 10000 ** (2 * i / h)
        code[2 * i], code[2 * i + 1] = math.sin(angle), math.cos(angle)
    return code


def reversed_position(n: int, h: int) -> Tensor:
    """Return R(n): P(n) with its channels reversed."""
    return position(n, h).flip(0)


@dataclass
class Oracle:
    """`Oracle(state, **constructor arguments of SNE)`; `oracle(networks)` -> (B, h) float64."""

    state: State
    hidden_dim: int = 64
    num_heads: int = 4
    chunk_size: int = 32
    chunking: str = "flat"
    layer_norm: bool = True
    scale: str = "tensor"
    element_order: bool = True
    chunk_order: bool = True
    set_attention: str = "sab"
    num_inducing: int = 32

    def block(self, prefix: str, x: Tensor) -> Tensor:
        form = isab if self.set_attention == "isab" and not prefix.startswith("chunk_encoder") else sab
        return form(self.state, prefix, x, self.num_heads, self.layer_norm)

    def pool(self, stage: str, x: Tensor) -> Tensor:
        return pma(self.state, stage + ".pool.", x, self.num_heads, self.layer_norm)[0]

    def encode_chunk(self, chunk: Tensor, type_id: int, level: int) -> Tensor:
        h = self.hidden_dim
        x = self.block("chunk_encoder.blocks.0.", chunk.reshape(-1, 1))
        x = self.block("chunk_encoder.blocks.1.", x)
        codes = []
        for i in range(len(chunk)):
            code = self.state["type_embedding.weight"][type_id] + position(level, h)
            codes.append(code + reversed_position(i, h) if self.element_order else code)
        x = x + self.state["chunk_encoder.code_gain"] * torch.stack(codes)
        x = self.block("chunk_encoder.blocks.2.", x)
        x = self.block("chunk_encoder.blocks.3.", x)
        return self.pool("chunk_encoder", x)

    def encode_tensor(self, tensor: Cut, level: int) -> Tensor:
        h = self.hidden_dim
        x = torch.stack([self.encode_chunk(chunk, tensor.type, level) for chunk in tensor.chunks])
        x = self.block("tensor_encoder.blocks.0.", x)
        x = self.block("tensor_encoder.blocks.1.", x)
        codes = []
        for j in range(len(tensor.chunks)):
            code = position(level, h) + tensor.scale.log() * self.state["tensor_encoder.magnitude_code"]
            codes.append(code + reversed_position(j, h) if self.chunk_order else code)
        x = x + self.state["tensor_encoder.code_gain"] * torch.stack(codes)
        return self.pool("tensor_encoder", x)

    def encode_layer(self, layer: Layer, level: int) -> Tensor:
        x = torch.stack([self.encode_tensor(tensor, level) for tensor in layer])
        x = self.block("layer_encoder.blocks.0.", x)
        x = self.block("layer_encoder.blocks.1.", x)
        return self.pool("layer_encoder", x)

    def encode_network(self, network: Network, levels: list[int] | None = None) -> Tensor:
        levels = list(range(len(network))) if levels is None else levels
        rows = []
        for layer, level in zip(network, levels, strict=True):
            code = self.state["network_encoder.code_gain"] * position(level, self.hidden_dim)
            rows.append(self.encode_layer(layer, level) + code)
        x = torch.stack(rows)
        x = self.block("network_encoder.blocks.0.", x)
        x = self.block("network_encoder.blocks.1.", x)
        return self.pool("network_encoder", x)

    def cut(self, network: nn.Module) -> Network:
        return cut_network(network, self.chunk_size, self.chunking, self.scale)

    def __call__(self, networks: list[nn.Module] | list[Network]) -> Tensor:
        cuts = [self.cut(n) if isinstance(n, nn.Module) else n for n in networks]
        return torch.stack([self.encode_network(network) for network in cuts])


def oracle_for(encoder: nn.Module, **config: object) -> Oracle:
    """Make the oracle with an encoder's parameters, which gradients reach, and its constructor's arguments."""
    return Oracle({name: p.double() for name, p in encoder.named_parameters()}, **config)  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------------------------------
# The nested lists as the arrays of section 1


def arrays(networks: list[Network], levels: list[list[int]] | None = None) -> dict[str, Tensor]:
    """Build the fields of WeightBatch for these networks, built by appending."""
    if levels is None:
        levels = [list(range(len(network))) for network in networks]
    values: list[Tensor] = []
    pointers: dict[str, list[int]] = {name: [0] for name in ("chunk_ptr", "tensor_ptr", "layer_ptr", "network_ptr")}
    types: list[int] = []
    depths: list[int] = []
    scales: list[Tensor] = []
    for network, depth in zip(networks, levels, strict=True):
        for layer, level in zip(network, depth, strict=True):
            for tensor in layer:
                for chunk in tensor.chunks:
                    values.append(chunk)
                    pointers["chunk_ptr"].append(pointers["chunk_ptr"][-1] + len(chunk))
                pointers["tensor_ptr"].append(pointers["tensor_ptr"][-1] + len(tensor.chunks))
                types.append(tensor.type)
                scales.append(tensor.scale)
            pointers["layer_ptr"].append(pointers["layer_ptr"][-1] + len(layer))
            depths.append(level)
        pointers["network_ptr"].append(pointers["network_ptr"][-1] + len(network))
    return {
        "values": torch.cat(values),
        **{name: torch.tensor(pointer, dtype=torch.int64) for name, pointer in pointers.items()},
        "tensor_type": torch.tensor(types, dtype=torch.int64),
        "layer_level": torch.tensor(depths, dtype=torch.int64),
        "tensor_scale": torch.stack(scales),
    }

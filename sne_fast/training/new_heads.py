"""New output layers: the last layers of some networks of a batch drawn anew, also with other numbers of outputs."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from ..data.batch import WeightBatch
from ..data.cutting import cut_of
from ..data.tensor_types import CONVOLUTION, LINEAR

_LARGEST_OUTPUTS = 4096


def with_new_heads(batch: WeightBatch, which: Tensor, resized: Tensor, generator: torch.Generator) -> WeightBatch:
    """Return the batch with the last layer of some networks drawn anew.

    New weights are Gaussian with the spread of fresh linear layers, `1 / sqrt(3 fan_in)`, times a factor between 1/2
    and 2 per network. Networks of a single layer, and those whose last layer is neither linear nor a convolution, stay
    as they are.

    Args:
        batch: B networks, with names and shapes.
        which: (B,) bool, networks whose last layer is drawn anew.
        resized: (B,) bool, those of them that get another number of outputs, from 2 to twice as many.
        generator: on the CPU.
    """
    heads = {b: _Head(batch, b) for b in which.nonzero()[:, 0].tolist()}
    heads = {b: head for b, head in heads.items() if head.replaceable}
    if not heads:
        return batch
    for b, head in heads.items():
        head.draw(bool(resized[b]), generator)
    layers = _as_layers(batch)
    new = _packed(batch, list(heads.values()))
    ends = (batch.network_ptr_host[1:] - 1).tolist()
    order = list(range(batch.num_layers))
    for k, b in enumerate(heads):
        order[ends[b]] = batch.num_layers + k
    found = WeightBatch.cat([layers, new])[order]
    return _as_networks(found, batch)


class _Head:
    """The last layer of a network: the shapes of its tensors, and after `draw` its new values."""

    def __init__(self, batch: WeightBatch, b: int) -> None:
        first, last = batch.network_ptr_host[b : b + 2].tolist()
        self.layer = last - 1
        start = int(batch.layer_ptr_host[first])
        self.tensors = range(*batch.layer_ptr_host[last - 1 : last + 1].tolist())
        self.names = tuple(batch.names[b][1][s - start] for s in self.tensors)
        self.shapes = [batch.shapes[b][s - start] for s in self.tensors]
        matrices = [shape for shape in self.shapes if len(shape) >= 2]
        kinds = {int(batch.tensor_type[s]) // 8 for s in self.tensors}
        self.outputs = matrices[0][0] if matrices else 0
        self.fan_in = max(1, torch.Size(matrices[0][1:]).numel()) if matrices else 1
        alone = all(shape and shape[0] == self.outputs for shape in self.shapes)
        self.replaceable = bool(matrices) and alone and kinds <= {LINEAR, CONVOLUTION} and last - first > 1
        self.values: list[Tensor] = []

    def draw(self, resize: bool, generator: torch.Generator) -> None:
        """Draw the number of outputs and the values."""
        if resize:
            self.outputs = int(
                torch.randint(2, max(3, min(2 * self.outputs, _LARGEST_OUTPUTS) + 1), (), generator=generator)
            )
        self.shapes = [(self.outputs, *shape[1:]) for shape in self.shapes]
        factor = 2 ** (2 * float(torch.rand((), generator=generator)) - 1)
        spread = factor / (3 * self.fan_in) ** 0.5
        self.values = [spread * torch.randn(torch.Size(shape).numel(), generator=generator) for shape in self.shapes]


def _packed(batch: WeightBatch, heads: Sequence[_Head]) -> WeightBatch:
    """Return a batch of networks of one layer each, packed as `batch` is."""
    tensors = [s for head in heads for s in head.tensors]
    kernels = batch.kernels[tensors]
    shapes = [shape for head in heads for shape in head.shapes]
    values = [value for head in heads for value in head.values]
    scales = torch.ones(len(values), dtype=torch.float64)
    if batch.scale != "none":
        scales = torch.stack([value.double().square().mean().sqrt() for value in values])
    lengths: list[int] = []
    chunks = [0]
    for shape, kernel in zip(shapes, kernels.tolist(), strict=True):
        cut = cut_of(shape, kernel, batch.chunking)
        row = cut.matrix[0] * cut.matrix[1] // cut.rows
        pieces = [batch.chunk_size] * (row // batch.chunk_size)
        lengths += (pieces + [row % batch.chunk_size] * (row % batch.chunk_size > 0)) * cut.rows
        chunks.append(len(lengths))
    hosts = {
        "chunk_ptr": torch.tensor([0, *accumulate(lengths)]),
        "tensor_ptr": torch.tensor(chunks),
        "layer_ptr": torch.tensor([0, *accumulate(len(head.tensors) for head in heads)]),
        "network_ptr": torch.arange(len(heads) + 1),
    }
    device = batch.device
    flat = torch.cat([value / scale for value, scale in zip(values, scales.tolist(), strict=True)])
    return WeightBatch.trusted(
        hosts if device.type != "cpu" else None,
        kernels=kernels,
        values=flat.to(device, batch.dtype),
        **{field: host.to(device) for field, host in hosts.items()},
        tensor_type=batch.tensor_type[tensors],
        layer_level=batch.layer_level[[head.layer for head in heads]],
        tensor_scale=scales.to(device, batch.tensor_scale.dtype),
        chunk_size=batch.chunk_size,
        chunking=batch.chunking,
        scale=batch.scale,
        order=batch.order,
        prepared=batch.prepared,
        names=tuple(("", head.names) for head in heads),
        shapes=tuple(tuple(head.shapes) for head in heads),
        skipped=((),) * len(heads),
    )


def _as_layers(batch: WeightBatch) -> WeightBatch:
    """Return the same weights with every layer as a network of its own."""
    layers, networks = batch.layer_ptr_host.tolist(), batch.network_ptr_host.tolist()
    names, shapes = [], []
    for b, (first, last) in enumerate(pairwise(networks)):
        start = layers[first]
        for layer in range(first, last):
            own = slice(layers[layer] - start, layers[layer + 1] - start)
            names.append(("", batch.names[b][1][own]))
            shapes.append(batch.shapes[b][own])
    pointer = torch.arange(batch.num_layers + 1)
    return _regrouped(batch, pointer, tuple(names), tuple(shapes), ((),) * batch.num_layers)


def _as_networks(layers: WeightBatch, like: WeightBatch) -> WeightBatch:
    """Return layers as networks of as many layers each as those of `like` have."""
    ends = like.network_ptr_host.tolist()
    names = tuple(
        (like.names[b][0], tuple(name for _, own in layers.names[first:last] for name in own))
        for b, (first, last) in enumerate(pairwise(ends))
    )
    shapes = tuple(tuple(shape for own in layers.shapes[first:last] for shape in own) for first, last in pairwise(ends))
    return _regrouped(layers, like.network_ptr_host, names, shapes, like.skipped)


def _regrouped(batch: WeightBatch, pointer: Tensor, names: tuple, shapes: tuple, skipped: tuple) -> WeightBatch:
    fields = {field: getattr(batch, field) for field in _FIELDS}
    hosts = {**batch.pointers_host, "network_ptr": pointer}
    return WeightBatch.trusted(
        hosts if batch.device.type != "cpu" else None,
        kernels=batch.kernels,
        **fields,
        network_ptr=pointer.to(batch.device),
        names=names,
        shapes=shapes,
        skipped=skipped,
    )


_FIELDS = (
    "values", "chunk_ptr", "tensor_ptr", "layer_ptr", "tensor_type", "layer_level", "tensor_scale", "chunk_size",
    "chunking", "scale", "order", "prepared",
)  # fmt: skip

"""Networks that processes share by layers: each encodes some layers, and all join the encodings of all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..data.batch import WeightBatch
from ..data.layers_apart import layers_apart
from ..nn.encoder import SNE
from ..nn.layer_encodings import LayerEncodings
from ..nn.plain_state import unwrapped
from ..nn.predictor import Predictor
from .distributed import World


def deal_layers(batch: WeightBatch, loads: Sequence[int]) -> list[list[int]]:
    """Deal the layers of networks to processes, the largest first, always to the one that has least to do.

    Args:
        batch: networks of L layers in all.
        loads: weights that each process has to encode already.

    Returns:
        For each process positions of layers, in ascending order.
    """
    held, dealt = list(loads), [[] for _ in loads]  # type: list[int], list[list[int]]
    sizes = layers_apart(batch).network_sizes.tolist()
    for layer in sorted(range(len(sizes)), key=lambda k: (-sizes[k], k)):
        least = min(range(len(held)), key=lambda process: (held[process], process))
        held[least] += sizes[layer]
        dealt[least].append(layer)
    return [sorted(layers) for layers in dealt]


def encode_split(predictor: Predictor, world: World, dealt: Sequence[Sequence[int]], batch: WeightBatch) -> Tensor:
    """Encode networks of which this process encodes some layers, as `predictor.encode` does up to rounding.

    Every process calls this at the same time with the same networks. Gradients reach the layers wherever they were
    encoded: the gradients of all processes are summed, so what they do with the encodings must sum to what one process
    would do.

    Args:
        predictor: the predictor.
        world: the processes.
        dealt: what `deal_layers` returned for these networks.
        batch: B networks.

    Returns:
        `(B, predictor.in_features)`.
    """
    sne = unwrapped(predictor.encoder)
    assert isinstance(sne, SNE)
    batch = predictor.scale_inputs(batch)
    sne.check_batch(batch)
    places = list(dealt[world.rank])
    own = sne.encode_batch_layers(layers_apart(batch)[places])
    rows = own.vectors if own.pooled is None else torch.cat([own.vectors, own.pooled.to(own.vectors)], 1)
    rows = rows.to(sne.sample_parameter.dtype)
    if not rows.requires_grad:  # so that the backward pass of every process waits for that of the others
        rows = rows.detach().requires_grad_()
    everything: Tensor = _AllRows.apply(rows, world, places, batch.num_layers)  # type: ignore[no-untyped-call]
    vectors, pooled = everything.split([sne.hidden_dim, everything.shape[1] - sne.hidden_dim], 1)
    encodings = LayerEncodings(
        vectors, batch.layer_level, batch.layer_ptr.diff(), pooled if own.pooled is not None else None
    )
    return sne.join_layers(encodings, batch.network_ptr, batch.network_ptr_host)


class _AllRows(torch.autograd.Function):
    """Rows `(k, w)` of every process -> all rows `(n, w)` on every process; backward sums the gradients of all."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, world: World, places: list[int], count: int) -> Tensor:
        ctx.world, ctx.places = world, torch.tensor(places, dtype=torch.int64, device=rows.device)
        out = rows.new_zeros(count, rows.shape[1])
        out[ctx.places] = rows
        return world.sum_tensor(out, out.device)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        total = ctx.world.sum_tensor(gradient.clone(memory_format=torch.contiguous_format), gradient.device)
        return total[ctx.places], None, None, None

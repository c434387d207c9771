"""Calibration of trained encoders: views of one network then vary alike in all directions of z."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..data.batch import WeightBatch
from ..data.weight_budgets import batches_by_weights, network_sizes
from ..nn.encoder import SNE
from .networks import READ_WEIGHTS
from .objective import Augment

_RIDGE = 1e-3
"""Added to the variances within networks, relative to their mean: few views tell little of the smallest ones."""
_LARGEST_SCALE = 10.0
"""Of the values that end in a norm, before all of z is scaled: where they are all but constant, more shows rounding."""


@torch.no_grad()
def calibrate(encoder: SNE, batch: WeightBatch, views: Augment, *, count: int = 6, seed: int = 0) -> None:
    """Turn and scale the vectors of an encoder so that views of one network vary alike in all directions.

    A search by distances or cosines then weighs a direction by what it tells of networks, not by how much views of the
    same network differ in it. Parameters change in place, and nothing else: the cost of encoding is the same.

    With u the mean over a network's tensors of the hidden units of the statistics channel (4h), and W and B the
    covariances of u within and between the training networks, `to_pool` becomes the 2h discriminants of Fisher 1936:
    the directions of largest B relative to W, scaled to one variance within networks, or less. The other h values of z,
    which end in a norm, are scaled by one number to at most that variance in any direction. The mean of z over views
    becomes 0, and its standard deviation over networks, in the direction where it is largest, between 1 and 2.

    Args:
        encoder: with statistics and layer norms, trained or not.
        batch: the training networks, packed by `encoder.pack`; at least 2.
        views: changes a batch, see :class:`Views`.
        count: views of each network; the network itself counts besides.
        seed: of the views.

    Raises:
        ValueError: an encoder without statistics or without layer norms, fewer than 2 networks, a count below 1, or
            views that change nothing.

    Example:
        >>> encoder = sne_fast.SNE(hidden_dim=32, statistics="relative", chunks=False)
        >>> batch = encoder.pack([torch.nn.Linear(4, 3) for _ in range(3)]).detach()
        >>> encoder.set_statistics(batch)
        >>> sne_fast.training.calibrate(encoder, batch, sne_fast.training.Views(head=0))
        >>> encoder(batch).shape
        torch.Size([3, 96])
    """
    channel, norm = encoder.tensor_statistics, encoder.network_encoder.pool.mab.ln1
    if channel is None or norm is None:
        raise ValueError("calibrate: encoder must have statistics='relative' or 'tensor', and layer norms")
    if len(batch) < 2 or count < 1:
        raise ValueError(f"calibrate: it takes at least 2 networks and 1 view of each, got {len(batch)} and {count}")
    h = encoder.hidden_dim
    mean, within, between = _moments(encoder, batch, views, count, seed)
    if not float(within.diagonal()[h:].mean()) > 0:
        raise ValueError("calibrate: views must change networks, got the same statistics for all views")
    directions = _discriminants(within[h:, h:], between[h:, h:])[:, : 2 * h]
    largest = float(torch.linalg.eigvalsh(within[:h, :h])[-1])
    scale = max(largest, _LARGEST_SCALE**-2) ** -0.5
    turned = torch.block_diag(scale * torch.eye(h, dtype=directions.dtype), directions)
    spread = float(torch.linalg.eigvalsh(turned.T @ between @ turned)[-1]) ** 0.5
    unit = 2.0 ** -math.floor(math.log2(spread)) if spread > 0 else 1.0  # a power of two loses no bits
    directions, scale = unit * directions, unit * scale
    channel.to_pool.weight.copy_(directions.T)
    channel.to_pool.bias.copy_(-mean[h:] @ directions)
    norm.weight.mul_(scale)
    norm.bias.copy_(scale * (norm.bias - mean[:h].to(norm.bias)))


def _moments(encoder: SNE, batch: WeightBatch, views: Augment, count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the mean, and the covariances within and between networks, of h values of z and 4h units, on the CPU."""
    weight, generator = encoder.sample_parameter, torch.Generator().manual_seed(seed)
    total, within, between = torch.zeros(()), torch.zeros(()), torch.zeros(())
    for rows in batches_by_weights(network_sizes(batch), READ_WEIGHTS):
        part = batch[rows].to(weight.device, weight.dtype)
        shown = [part, *(views(part, rows, generator) for _ in range(count))]
        z = torch.stack([_wide(encoder, view) for view in shown])  # (1 + count, n, 5h)
        centre = z.mean(0)
        apart = (z - centre).flatten(0, 1)
        total, within, between = total + centre.sum(0), within + apart.T @ apart, between + centre.T @ centre
    mean = total / len(batch)
    return mean, within / (len(batch) * count), between / len(batch) - mean[:, None] * mean


def _wide(encoder: SNE, batch: WeightBatch) -> Tensor:
    return torch.cat([encoder(batch)[:, : encoder.hidden_dim], encoder.statistics_units(batch)], 1).cpu().double()


def _discriminants(within: Tensor, between: Tensor) -> Tensor:
    """Return the directions in which networks differ most relative to their views, as columns, the best first."""
    sizes, vectors = torch.linalg.eigh(within)
    white = vectors / (sizes.clamp_min(0) + _RIDGE * sizes.mean()).sqrt()
    found = white @ torch.linalg.eigh(white.T @ between @ white).eigenvectors.flip(1)
    # An eigenvector is known up to its sign.
    largest = found.gather(0, found.abs().argmax(0, keepdim=True))
    return found * largest.sign()

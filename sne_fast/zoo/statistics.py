"""Layer statistics: summary numbers of the weights of each layer, the features of a baseline of SNE."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np

from ..data.batch import WeightBatch
from ..data.tensor_statistics import COLUMNS, NAMES, tensor_statistics
from ..nn.input_scales import FAN_IN_KINDS

Statistics = Literal["plain", "fan_in", "all", "relative"]
"""Choices of :func:`layer_statistics`."""

QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)
PLAIN = 2 + len(QUANTILES)
ROLES = 5
WEIGHT_ROLES = (0, 4)
"""Roles whose tensors are summed up over the whole network: weight and other."""
LARGEST_QUANTILE = 12.0
"""Quantiles that :func:`sne_fast.tensor_statistics` clamps."""
_COLUMN = {name: i for i, name in enumerate(NAMES)}
_QUANTILE_COLUMNS = [_COLUMN[name] for name in ("minimum", "quantile_0.25", "median", "quantile_0.75", "maximum")]


def layer_statistics(batch: WeightBatch, layers: int | None = None, statistics: Statistics = "plain") -> np.ndarray:
    """Return statistics of the tensors of every network in fixed places, for any architecture.

    The features of a network are the S statistics of the tensors of each role (weight, bias, running mean, running
    variance, other) of layers 0, 1, ... from the front, then those of the last two layers, then the mean, least and
    greatest value of every statistic over all tensors of the roles weight and other. Features that a network lacks are
    NaN. Where a layer has several tensors of a role, the last of them counts.

    Args:
        batch: B networks with the shapes of their tensors, as `pack` gives them.
        layers: number of layers from the front; by default that of the deepest network of the batch.
        statistics: which numbers of a tensor.

            - `"plain"`: mean, variance and five quantiles (Unterthiner et al. 2020, arXiv 2002.11448); S = 7.
            - `"fan_in"`: the same of weights times the root of their layer's fan-in, see
              :class:`sne_fast.nn.input_scales.FanInScale`.
            - `"all"`: those of :func:`sne_fast.tensor_statistics`; S = 23.
            - `"relative"`: those of them that do not name a size; S = 19.

    Returns:
        `(B, features)` float64 with `features = 5 S (layers + 2) + 3 S`.

    Raises:
        ValueError: an unknown choice of statistics, or a batch without shapes.

    Example:
        >>> layer_statistics(sne_fast.pack([torch.nn.Linear(4, 3)])).shape
        (1, 126)
    """
    if statistics not in get_args(Statistics):
        choices = ", ".join(repr(choice) for choice in get_args(Statistics))
        raise ValueError(f"layer_statistics: statistics must be one of {choices}, got {statistics!r}")
    numbers = _of_tensors(batch, statistics)
    count, size = numbers.shape[1], len(batch)
    networks = batch.network_ptr_host.numpy()
    depths = np.diff(networks)
    front = int(depths.max(initial=0)) if layers is None else layers
    network, layer, role = _places(batch)
    table = np.full((size, front + 2, ROLES, count), np.nan)
    for place, chosen in (
        (layer, layer < front),
        (front + depths[network] - layer - 1, depths[network] - layer <= 2),
    ):
        # Of several tensors of one place numpy keeps the last.
        table[network[chosen], place[chosen], role[chosen]] = numbers[chosen]
    whole = np.full((size, 3, count), np.nan)
    weights = np.isin(role, WEIGHT_ROLES)
    owners, starts = np.unique(network[weights], return_index=True)
    if len(owners):
        of_weights = numbers[weights]
        counts = np.diff([*starts, len(of_weights)])[:, None]
        whole[owners, 0] = np.add.reduceat(of_weights, starts) / counts
        whole[owners, 1] = np.minimum.reduceat(of_weights, starts)
        whole[owners, 2] = np.maximum.reduceat(of_weights, starts)
    return np.concatenate([table.reshape(size, -1), whole.reshape(size, -1)], 1)


def _places(batch: WeightBatch) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return network, layer from the front and role of every tensor, `(T,)` int64 each."""
    networks, layers = batch.network_ptr_host.numpy(), batch.layer_ptr_host.numpy()
    of_layer = np.repeat(np.arange(len(layers) - 1), np.diff(layers))
    network = np.repeat(np.arange(len(batch)), np.diff(networks))[of_layer]
    role = np.minimum(batch.tensor_type.cpu().numpy() % 8, ROLES - 1)  # those of adapters count as "other"
    return network, of_layer - networks[network], role


def _of_tensors(batch: WeightBatch, statistics: Statistics) -> np.ndarray:
    """Return the statistics of every tensor, `(T, S)` float64."""
    found = tensor_statistics(batch).double().cpu().numpy()
    if statistics in ("all", "relative"):
        return found[:, COLUMNS["tensor" if statistics == "all" else statistics]]
    rms = np.exp(found[:, :1])
    scaled = found[:, [_COLUMN["mean"], *_QUANTILE_COLUMNS]]
    _restore_clamped(batch, rms, scaled[:, 1:])
    if statistics == "fan_in":
        kind = batch.tensor_type.cpu().numpy() // 8
        scales = np.isin(kind, FAN_IN_KINDS)
        rms = rms * np.where(scales, np.exp(found[:, _COLUMN["log_fan_in"]] / 2), 1.0)[:, None]
    scaled *= rms
    variance = (rms * found[:, [_COLUMN["std"]]]) ** 2
    return np.concatenate([scaled[:, :1], variance, scaled[:, 1:]], 1)


def _restore_clamped(batch: WeightBatch, rms: np.ndarray, quantiles: np.ndarray) -> None:
    """Replace the quantiles of tensors of which one was clamped by exact ones."""
    starts = batch.chunk_ptr_host[batch.tensor_ptr_host].tolist()
    for s in np.flatnonzero((np.abs(quantiles) >= LARGEST_QUANTILE).any(1)):
        w = batch.values[starts[s] : starts[s + 1]].detach().double().cpu().numpy()
        w = w * float(batch.tensor_scale[s])
        quantiles[s] = np.quantile(w, QUANTILES) / rms[s]

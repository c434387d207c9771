"""Layer statistics: summary numbers of the weights of each layer, the features of a baseline of SNE."""

from __future__ import annotations

import numpy as np

from ..data.batch import WeightBatch

QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)
STATISTICS = 2 + len(QUANTILES)
ROLES = 5


def layer_statistics(batch: WeightBatch, layers: int | None = None) -> np.ndarray:
    """Return mean, variance and five quantiles of every tensor (Unterthiner et al. 2020), for any architecture.

    The features of a network are the statistics of the tensors of each role (weight, bias, running mean, running
    variance, other) of layers 0, 1, ... from the front, then those of the last two layers, then the mean, least and
    greatest value of every statistic over all tensors of the roles weight and other. Features that a network lacks are
    NaN.

    Args:
        batch: B networks.
        layers: number of layers from the front; by default that of the deepest network of the batch.

    Returns:
        `(B, features)` float64 with `features = 35 (layers + 2) + 21`.
    """
    depth = int(batch.network_ptr_host.diff().max()) if layers is None else layers
    rows = np.full((len(batch), ROLES * STATISTICS * (depth + 2) + 3 * STATISTICS), np.nan)
    values, scale = batch.values.detach().double().cpu().numpy(), batch.tensor_scale.double().cpu().tolist()
    role = (batch.tensor_type % 8).tolist()
    start = batch.chunk_ptr_host[batch.tensor_ptr_host].tolist()
    layer_ptr, network_ptr = batch.layer_ptr_host.tolist(), batch.network_ptr_host.tolist()
    for b in range(len(batch)):
        table = np.full((depth + 2, ROLES, STATISTICS), np.nan)
        weights = []
        first, last = network_ptr[b], network_ptr[b + 1]
        for layer in range(first, last):
            for s in range(layer_ptr[layer], layer_ptr[layer + 1]):
                x = values[start[s] : start[s + 1]] * scale[s]
                numbers = [x.mean(), x.var(), *np.quantile(x, QUANTILES)]
                if role[s] in (0, ROLES - 1):
                    weights.append(numbers)
                if layer - first < depth:
                    table[layer - first, role[s]] = numbers
                if last - layer <= 2:
                    table[depth + last - layer - 1, role[s]] = numbers
        rows[b, : table.size] = table.ravel()
        if weights:
            whole = np.array(weights)
            rows[b, table.size :] = np.concatenate([whole.mean(0), whole.min(0), whole.max(0)])
    return rows

"""DeepSets (Zaheer et al. 2017, arXiv 1703.06114): the weights of a network as one set."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...data.batch import WeightBatch
from ...data.tensor_types import KINDS, ROLES
from ...data.weight_budgets import network_sizes
from ...nn.predictor import PredictorHead
from .neural import Neural, raw_weights, tensor_sizes


class SetOfWeights(nn.Module):
    """DeepSets of all n weights of a network: `rho(mean_i phi(x_i), log n)`, from a `WeightBatch` to `(B, outputs)`.

    The features x_i of a weight are its value, the value relative to its tensor, a signed logarithm, kind and role of
    its tensor (one-hot), and sinusoids of its layer's level. phi has two layers: a third, linear layer would commute
    with the mean and merge with rho.
    """

    rms: Tensor
    log_size: Tensor

    def __init__(self, known: WeightBatch, outputs: int = 1, width: int = 64) -> None:
        super().__init__()
        self.register_buffer("rms", raw_weights(known).square().mean().sqrt().clamp_min(1e-12))
        self.register_buffer("log_size", network_sizes(known).float().log().mean())
        features = 3 + len(KINDS) + len(ROLES) + 8
        self.phi = nn.Sequential(nn.Linear(features, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
        self.rho = PredictorHead(width + 1, outputs, (4 * width, 4 * width))

    def features(self, batch: WeightBatch) -> Tensor:
        """Return the features of all weights, `(V, 24)`."""
        value = raw_weights(batch) / self.rms
        numbers = torch.stack([value, batch.values, (100 * value).asinh() / 5], 1)
        level = batch.layer_level.repeat_interleave(batch.layer_ptr.diff()).float()
        angle = level[:, None] / torch.tensor([1.0, 4.0, 16.0, 64.0], device=batch.device)
        kind, role = F.one_hot(batch.tensor_type // 8, len(KINDS)), F.one_hot(batch.tensor_type % 8, 8)[:, : len(ROLES)]
        place = torch.cat([kind, role, angle.sin(), angle.cos()], 1)
        return torch.cat([numbers, place.repeat_interleave(tensor_sizes(batch).to(batch.device), 0)], 1)

    def forward(self, batch: WeightBatch) -> Tensor:
        """Return the outputs of each network, `(B, outputs)`."""
        # One mean per network, since the result of index_add depends on the order of threads on a GPU.
        sizes = network_sizes(batch)
        pooled = torch.stack([x.mean(0) for x in self.phi(self.features(batch)).split(sizes.tolist())])
        count = sizes.to(pooled).log() - self.log_size
        return self.rho(torch.cat([pooled, count[:, None]], 1))


class DeepSets(Neural):
    """DeepSets on the weights of a network as one set, whatever its architecture."""

    name = "DeepSets"
    module = SetOfWeights

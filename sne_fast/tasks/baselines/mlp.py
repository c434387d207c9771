"""An MLP on the flattened weights of networks of one architecture."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ...data.batch import WeightBatch
from ...nn.predictor import PredictorHead
from .neural import Neural, raw_weights
from .problem import Problem, differing_shapes, problems


class FlatWeights(nn.Module):
    """An MLP on the standardised weights of networks of one shape, from a `WeightBatch` to `(B, outputs)`."""

    mean: Tensor
    std: Tensor

    def __init__(self, known: WeightBatch, outputs: int = 1, widths: Sequence[int] = (512, 512)) -> None:
        super().__init__()
        rows = raw_weights(known).view(len(known), -1)
        std = rows.std(0, correction=0)
        self.register_buffer("mean", rows.mean(0))
        self.register_buffer("std", std.where(std > 0, torch.ones_like(std)))
        self.head = PredictorHead(rows.shape[1], outputs, widths)

    def forward(self, batch: WeightBatch) -> Tensor:
        """Return the outputs of each network, `(B, outputs)`."""
        return self.head((raw_weights(batch).view(len(batch), -1) - self.mean) / self.std)


class MLP(Neural):
    """An MLP on flattened weights; it needs networks of one architecture and knows nothing of their symmetry."""

    name = "MLP on flat weights"
    module = FlatWeights

    def why_not(self, problem: Problem) -> list[str]:
        """Return the reasons against this problem, see :class:`Baseline`."""
        return problems(problem) + differing_shapes(problem.batch)

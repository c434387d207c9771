"""Input scale of a predictor: each tensor divided by the spread that its like had in the training networks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .batch import WeightBatch

TYPES = 64
LEVELS = 64
"""Layers from this depth on share a row."""


class InputNormaliser(nn.Module):
    """Divides every weight by the root mean square of its tensor's type and layer over the training networks.

    Dividing each tensor by its own root mean square, as `pack(scale="tensor")` does, hides small differences of size
    between networks from the chunk encoder: on sines (section 4.1 of the paper) those carry most of the label. One
    constant per tensor of the zoo keeps them.

    The buffer `divisor (64, 64)` holds a number per tensor type and layer level, ones until `fit`.

    Shapes: a `WeightBatch` to one of the same, other `values`. Gradients reach its values.
    """

    divisor: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("divisor", torch.ones(TYPES, LEVELS))

    @torch.no_grad()
    def fit(self, batch: WeightBatch) -> None:
        """Set `divisor` from the training networks, packed with `scale="none"`.

        Types never seen at a level, as deeper networks will have, take the mean over the levels where they were seen,
        types never seen at all the mean over everything (root mean squares, both).
        """
        batch = batch.to("cpu")  # where sums by index have one order
        places, sizes = self._places(batch)
        sums = torch.zeros(TYPES * LEVELS, dtype=torch.float64)
        counts = torch.zeros_like(sums)
        of_value = torch.repeat_interleave(places, sizes, output_size=batch.num_weights)
        sums.index_add_(0, of_value, batch.values.double().square())
        counts.index_add_(0, places, sizes.double())
        sums, counts = sums.view(TYPES, LEVELS), counts.view(TYPES, LEVELS)
        mean = sums.sum() / counts.sum()
        for total, count in ((sums.sum(1, keepdim=True), counts.sum(1, keepdim=True)), (sums, counts)):
            mean = torch.where(count > 0, total / count.clamp_min(1), mean)
        self.divisor.copy_(torch.where(mean > 0, mean, 1.0).sqrt().expand(TYPES, LEVELS))

    def forward(self, batch: WeightBatch) -> WeightBatch:
        """The batch with every value divided by its tensor's divisor."""
        places, sizes = self._places(batch)
        divisors = self.divisor.view(-1).to(batch.values.dtype).index_select(0, places)
        return batch._with(
            values=batch.values / torch.repeat_interleave(divisors, sizes, output_size=batch.num_weights)
        )

    @staticmethod
    def _places(batch: WeightBatch) -> tuple[Tensor, Tensor]:
        """Each tensor's place in `divisor`, `(T,)`, and its number of weights."""
        level = torch.repeat_interleave(
            batch.layer_level.clamp_max(LEVELS - 1), batch.layer_ptr.diff(), output_size=batch.tensor_type.shape[0]
        )
        sizes = batch.chunk_ptr.index_select(0, batch.tensor_ptr).diff()
        return batch.tensor_type * LEVELS + level, sizes

"""The statistics channel of the encoder: numbers of each tensor that its chunks do not carry to z."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.batch import WeightBatch
from ..data.tensor_statistics import COLUMNS, tensor_statistics
from ..ops import functional
from .input_scales import SCALED

LARGEST = 6.0
"""Bound of statistics in standard deviations of those of the training networks."""
LEAST_STD = 1e-3


def _runs(columns: Sequence[int]) -> list[tuple[int, int]]:
    """Return the runs of neighbouring columns, first and end of each."""
    ends = [k + 1 for k, column in enumerate(columns) if columns[k + 1 : k + 2] != (column + 1,)]
    return [(columns[a], columns[b - 1] + 1) for a, b in pairwise([0, *ends])]


class StatisticsChannel(nn.Module):
    """Encode the statistics of tensors, see "The statistics channel" in `docs/method.md`.

    With s the statistics of a tensor, `t = clamp((s - mean) / std, -6, 6)` and
    `a = relu(hidden([t, E[type], P(level)]))`: `to_tensor(a)` joins the vector of the tensor, and the mean of
    `to_pool(a)` over a network's tensors stands beside z.

    Args:
        hidden_dim: h.
        statistics: "tensor" for all 23 statistics, or "relative" for the 19 that do not name a size.

    Parameters are `hidden`, `to_tensor` and `to_pool`; the buffers `mean` and `std` are 0 and 1 until `set_sums`.
    """

    mean: Tensor
    std: Tensor

    __call__: Callable[..., tuple[Tensor, Tensor]]

    def __init__(self, hidden_dim: int, statistics: str) -> None:
        super().__init__()
        self.statistics = statistics
        count = len(COLUMNS[statistics])
        self.hidden = nn.Linear(count + 2 * hidden_dim, 4 * hidden_dim)
        self.to_tensor = nn.Linear(4 * hidden_dim, hidden_dim)
        self.to_pool = nn.Linear(4 * hidden_dim, 2 * hidden_dim)
        self.register_buffer("mean", torch.zeros(count))
        self.register_buffer("std", torch.ones(count))

    def columns_of(self, batch: WeightBatch) -> Tensor:
        """Return the statistics of a batch that the channel takes: `(T, 23)` or `(T, 19)`.

        Raises:
            ValueError: they are to be computed, and the batch has no shapes, or went through an input scale, or
                `torch.export` traces the call.
        """
        if batch.statistics is None and torch.compiler.is_exporting():
            raise ValueError(
                "SNE: batch must have its statistics before torch.export; call sne_fast.tensor_statistics(batch) first"
            )
        if batch.statistics is None and SCALED in batch.prepared:
            raise ValueError(
                "SNE: batch must have its statistics before an input scale changes its values; call "
                "sne_fast.tensor_statistics(batch) first"
            )
        # A compiled graph reads those that the batch has, and breaks where they are to be computed.
        found: Tensor = tensor_statistics(batch) if batch.statistics is None else batch.statistics
        if self.statistics == "tensor":
            return found
        # By slices, since a list as index would be copied to the device and waited for.
        return torch.cat([found[:, first:end] for first, end in _runs(COLUMNS[self.statistics])], 1)

    @torch.no_grad()
    def sums(self, batch: WeightBatch) -> Tensor:
        """Return the number, sums and sums of squares of the statistics of tensors, `(3, columns)` float64 on the CPU.

        Those of several batches add up to those of all their networks.
        """
        found = self.columns_of(batch).double().cpu()
        return torch.stack([torch.full_like(self.mean, len(found), dtype=torch.float64, device="cpu"),
                            found.sum(0), found.square().sum(0)])  # fmt: skip

    @torch.no_grad()
    def set_sums(self, of_networks: Tensor) -> bool:
        """Set `mean` and `std` from what `sums` returned of the training networks.

        Returns:
            Whether they had never been set before.
        """
        first = not bool(self.mean.any()) and bool((self.std == 1).all())
        counts, sums, squares = of_networks.cpu()
        if int(counts[0]):
            mean = sums / counts
            self.mean.copy_(mean)
            self.std.copy_((squares / counts - mean.square()).clamp_min(0).sqrt().clamp_min(LEAST_STD))
        return first

    def units(self, batch: WeightBatch, type_code: Tensor, level_code: Tensor) -> Tensor:
        """Return the hidden units of all tensors, `(T, 4h)`; the arguments are those of `forward`."""
        found = self.columns_of(batch).to(level_code)
        standard = ((found - self.mean) / self.std).clamp(-LARGEST, LARGEST)
        return F.relu(self.hidden(torch.cat([standard, type_code, level_code], 1)))

    def forward(self, batch: WeightBatch, type_code: Tensor, level_code: Tensor) -> tuple[Tensor, Tensor]:
        """Encode the statistics of all tensors.

        Args:
            batch: B networks with T tensors.
            type_code: `E[type]` of each tensor, `(T, h)`.
            level_code: `P(level)` of each tensor, `(T, h)`.

        Returns:
            What joins the vectors of tensors `(T, h)`, and the mean over each layer's tensors `(L, 2h)` of what stands
            beside z.
        """
        a = self.units(batch, type_code, level_code)
        alike = a.new_zeros((a.shape[0], 1))  # logits: a mean
        of_layers = functional.segment_pool(self.to_pool(a), alike, batch.layer_ptr, ptr_host=batch.layer_ptr_host)
        return self.to_tensor(a), of_layers.squeeze(1)

    def join(self, of_layers: Tensor, tensors: Tensor, network_ptr: Tensor, network_ptr_host: Tensor) -> Tensor:
        """Return the mean over the tensors of each network, `(B, 2h)`, from those over the tensors of its layers.

        Args:
            of_layers: `(L, 2h)`.
            tensors: `(L,)`, number of tensors in each layer.
            network_ptr: `(B+1,)`.
            network_ptr_host: the same on the CPU.
        """
        weights = tensors.to(of_layers.dtype).log()[:, None]  # logits: a mean in which every tensor counts alike
        return functional.segment_pool(of_layers, weights, network_ptr, ptr_host=network_ptr_host).squeeze(1)

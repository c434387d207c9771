"""Input scales of a predictor: weights relative to tensors of their kind in the training networks, or to fan-in."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn

from ..data.batch import WeightBatch
from ..data.tensor_types import ATTENTION, CONVOLUTION, KINDS, LINEAR, RECURRENT, TRANSPOSED

TYPES = 64
LEVELS = 64
"""Layers from this depth on share a row."""
SCALED = "an input scale"
"""What `WeightBatch.prepared` says of a batch that went through one; a predictor takes none such, for it scales."""


def _check_unscaled(batch: WeightBatch) -> None:
    if batch.scale != "none" or SCALED in batch.prepared:
        got = "one that was scaled already" if SCALED in batch.prepared else f"scale={batch.scale!r}"
        raise ValueError(f"input scale: the batch must be packed with scale='none', got {got}")


class InputNormaliser(nn.Module):
    """Divides every weight by the root mean square of its tensor's type and layer over the training networks.

    Dividing each tensor by its own root mean square, as `pack(scale="tensor")` does, hides small differences of size
    between networks from the chunk encoder; on sines (section 4.1 of the paper) these carry most of the label. One
    constant per tensor of the zoo keeps them.

    The buffer `divisor (64, 64)` holds a number per tensor type and layer level, ones until `fit`.

    Shapes: a `WeightBatch` to one of the same, other `values`. Gradients reach its values.

    Raises:
        ValueError: a batch that was packed with another scale than "none", or scaled already.
    """

    divisor: Tensor

    __call__: Callable[..., WeightBatch]

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("divisor", torch.ones(TYPES, LEVELS))

    @torch.no_grad()
    def fit(self, batch: WeightBatch) -> None:
        """Set `divisor` from the training networks, packed with `scale="none"`.

        Types never seen at a level, as deeper networks will have, take the mean over the levels where they were seen,
        types never seen at all the mean over everything (root mean squares, both).
        """
        self.set_sums(self.sums(batch))

    @torch.no_grad()
    def sums(self, batch: WeightBatch) -> Tensor:
        """Return sums of squares and numbers of weights by type and level, `(2, 64, 64)` float64 on the CPU.

        Those of several batches add up to those of all their networks.
        """
        _check_unscaled(batch)
        batch = batch.to("cpu")  # where sums by index have one order
        places, sizes = self._places(batch)
        sums = torch.zeros(TYPES * LEVELS, dtype=torch.float64)
        counts = torch.zeros_like(sums)
        of_value = torch.repeat_interleave(places, sizes, output_size=batch.num_weights)
        sums.index_add_(0, of_value, batch.values.double().square())
        counts.index_add_(0, places, sizes.double())
        return torch.stack([sums, counts]).view(2, TYPES, LEVELS)

    @torch.no_grad()
    def set_sums(self, of_networks: Tensor) -> None:
        """Set `divisor` from what `sums` returned of the training networks."""
        sums, counts = of_networks.cpu()
        mean = sums.sum() / counts.sum()
        for total, count in ((sums.sum(1, keepdim=True), counts.sum(1, keepdim=True)), (sums, counts)):
            mean = torch.where(count > 0, total / count.clamp_min(1), mean)
        self.divisor.copy_(torch.where(mean > 0, mean, 1.0).sqrt().expand(TYPES, LEVELS))

    def forward(self, batch: WeightBatch) -> WeightBatch:
        """Divide every value by its tensor's divisor."""
        _check_unscaled(batch)
        places, sizes = self._places(batch)
        divisors = self.divisor.view(-1).to(batch.values.dtype).index_select(0, places)
        return batch.with_fields(
            values=batch.values / torch.repeat_interleave(divisors, sizes, output_size=batch.num_weights),
            prepared=(*batch.prepared, SCALED),
            statistics=batch.statistics,
        )

    @staticmethod
    def _places(batch: WeightBatch) -> tuple[Tensor, Tensor]:
        """Return each tensor's place in `divisor`, `(T,)`, and its number of weights."""
        level = torch.repeat_interleave(
            batch.layer_level.clamp_max(LEVELS - 1), batch.layer_ptr.diff(), output_size=batch.tensor_type.shape[0]
        )
        sizes = batch.chunk_ptr.index_select(0, batch.tensor_ptr).diff()
        return batch.tensor_type * LEVELS + level, sizes


FAN_IN_KINDS = (LINEAR, CONVOLUTION, TRANSPOSED, RECURRENT, ATTENTION)


class FanInScale(nn.Module):
    """Multiplies the weights and biases of a layer by the root of its fan-in, so that all start alike.

    Layers start with a spread of about one over the root of their fan-in, in every usual initialisation. What is left
    of a weight is how far training took it, and means the same in architectures that no training network had, for which
    `InputNormaliser` knows no spread. Tensors of other kinds, such as norms and embeddings, stay as they are.

    The fan-in is the product of all dimensions but the first of the last matrix or kernel of the layer. It has nothing
    to fit.

    Shapes: a `WeightBatch` to one of the same, other `values`. Gradients reach its values.

    Raises:
        ValueError: a batch without the shapes of its tensors, packed with another scale than "none", or scaled already.
    """

    __call__: Callable[..., WeightBatch]

    def sums(self, batch: WeightBatch) -> Tensor:
        """Return nothing to add up: there is nothing to fit; the interface is that of `InputNormaliser`."""
        return torch.zeros(0, dtype=torch.float64)

    def set_sums(self, of_networks: Tensor) -> None:
        """Do nothing."""

    def forward(self, batch: WeightBatch) -> WeightBatch:
        """Multiply every value by the root of its layer's fan-in."""
        _check_unscaled(batch)
        if len(batch) and not batch.shapes:
            raise ValueError("FanInScale: the batch must have the shapes of its tensors, as those that pack makes have")
        layers, tensors = batch.network_ptr_host.tolist(), batch.layer_ptr_host.tolist()
        roots: list[float] = []
        for b, shapes in enumerate(batch.shapes):
            starts = tensors[layers[b] : layers[b + 1] + 1]
            roots += _fan_in_roots(shapes, tuple(after - before for before, after in pairwise(starts)))
        factor = torch.tensor(roots, dtype=batch.values.dtype, device=batch.device)
        # Computed at every use: a buffer that no file holds is garbage after the meta device and `to_empty`.
        kind = batch.tensor_type // len(KINDS)
        scaled = functools.reduce(torch.logical_or, (kind == one for one in FAN_IN_KINDS))
        factor = torch.where(scaled, factor, 1.0)
        sizes = batch.chunk_ptr.index_select(0, batch.tensor_ptr).diff()
        return batch.with_fields(
            values=batch.values * torch.repeat_interleave(factor, sizes, output_size=batch.num_weights),
            prepared=(*batch.prepared, SCALED),
            statistics=batch.statistics,
        )


@functools.lru_cache(maxsize=256)
def _fan_in_roots(shapes: tuple[tuple[int, ...], ...], counts: tuple[int, ...]) -> tuple[float, ...]:
    """Return one number per tensor of a network whose layers have `counts` tensors each."""
    found: list[float] = []
    for count in counts:
        matrices = [shape for shape in shapes[len(found) : len(found) + count] if len(shape) > 1]
        found += [math.sqrt(math.prod(matrices[-1][1:])) if matrices else 1.0] * count
    return tuple(found)


INPUT_SCALES: dict[str, type[InputNormaliser | FanInScale]] = {"zoo": InputNormaliser, "fan_in": FanInScale}
"""Choices of `Predictor(normalise_inputs=...)`."""

"""Views: random changes of networks that leave them recognisable, for training without labels.

Every change is a function of a batch and of a number per network that says how much of it there is, 0 for none.
`Views` draws those numbers. All randomness comes from one generator, so the same state gives the same views.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from ..data.batch import WeightBatch
from ..symmetry.core import Symmetry
from ..symmetry.permuting import draw, permute_by_tables
from .new_heads import with_new_heads

SMALLEST_RMS = 1e-12


@dataclass(frozen=True, eq=False)
class Views:
    """Random views of the networks of a batch: `views(part, rows, generator)`.

    Each change is made to a share of the networks, drawn anew for every network and call, in the order of the
    arguments. A share of 0 switches a change off.

    Args:
        symmetries: of all training networks, None for those without; None permutes nothing.
        permute: share of networks whose hidden units are permuted.
        noise: share of networks that get Gaussian noise in every tensor.
        noise_size: largest standard deviation of the noise, relative to the root mean square of its tensor.
        prune: share of networks of which the smallest weights of every matrix become zero.
        prune_most: largest share of weights that become zero.
        round: share of networks whose matrices are rounded to 8 bits.
        head: share of networks whose last layer is drawn anew.
        resize: share of those whose last layer gets another number of outputs, up to twice as many.

    Raises:
        ValueError: a share outside of [0, 1], or a size that is below 0 or not finite.

    Example:
        >>> views = Views(permute=0, noise=1, prune=0, round=0, head=0)
        >>> changed = views(batch, range(len(batch)), torch.Generator().manual_seed(0))
        >>> changed.shapes == batch.shapes, torch.equal(changed.values, batch.values)
        (True, False)
    """

    symmetries: Sequence[Symmetry | None] | None = None
    permute: float = 0.7
    noise: float = 0.8
    noise_size: float = 0.5
    prune: float = 0.3
    prune_most: float = 0.6
    round: float = 0.2
    head: float = 0.6
    resize: float = 0.5

    def __post_init__(self) -> None:
        for field in fields(self)[1:]:
            value = getattr(self, field.name)
            if field.name == "noise_size":
                if not 0 <= value < float("inf"):
                    raise ValueError(f"Views: noise_size must be finite and at least 0, got {value!r:.80}")
            elif not 0 <= value <= 1:
                raise ValueError(f"Views: {field.name} must be a share in [0, 1], got {value!r:.80}")

    def __call__(self, part: WeightBatch, rows: Sequence[int], generator: torch.Generator) -> WeightBatch:
        """Return a view of each network.

        Args:
            part: networks of the training batch, packed with names and shapes.
            rows: their places among the training networks.
            generator: the source of all randomness, on the CPU.
        """
        count = len(part)

        def chosen(share: float) -> Tensor:
            return torch.rand(count, generator=generator, dtype=torch.float64) < share

        def uniform() -> Tensor:
            return torch.rand(count, generator=generator, dtype=torch.float64)

        which = chosen(self.permute)
        if self.symmetries is not None:
            part = permuted(part, [self.symmetries[row] for row in rows], which, generator)
        part = with_noise(part, self.noise_size * uniform() * chosen(self.noise), generator)
        part = with_pruning(part, self.prune_most * uniform() * chosen(self.prune))
        part = with_rounding(part, chosen(self.round))
        which, resized = chosen(self.head), chosen(self.resize)
        return with_new_heads(part, which, resized, generator)


def permuted(
    batch: WeightBatch, symmetries: Sequence[Symmetry | None], which: Tensor, generator: torch.Generator
) -> WeightBatch:
    """Return the batch with hidden units of some networks permuted at random.

    Args:
        batch: B networks.
        symmetries: one per network; networks without stay as they are.
        which: (B,) bool.
        generator: on the CPU.
    """
    rows = [b for b in which.nonzero()[:, 0].tolist() if symmetries[b] is not None]
    if not rows:
        return batch
    own = [symmetry for symmetry in (symmetries[b] for b in rows) if symmetry is not None]
    found = permute_by_tables(batch[rows], own, draw(own, len(own), generator))
    return replaced(batch, rows, found)


def with_noise(batch: WeightBatch, sizes: Tensor, generator: torch.Generator) -> WeightBatch:
    """Return the batch with Gaussian noise in every tensor.

    Args:
        batch: B networks.
        sizes: (B,), standard deviation of the noise relative to the root mean square of its tensor.
        generator: on the CPU.
    """
    if not bool(sizes.any()):
        return batch
    rms = _per_value(batch, _rms(batch, batch.values))
    own = _own_generator(generator, batch.device)
    noise = torch.randn(batch.values.shape, generator=own, device=batch.device, dtype=batch.dtype)
    return _with_values(batch, batch.values + _of_networks(batch, sizes) * rms * noise)


def with_pruning(batch: WeightBatch, shares: Tensor) -> WeightBatch:
    """Return the batch with the smallest weights of every matrix set to zero.

    Args:
        batch: B networks, with the shapes of their tensors.
        shares: (B,), share of the weights of each matrix.
    """
    if not bool(shares.any()):
        return batch
    sizes = _tensor_sizes(batch)
    by_size = batch.values.detach().abs().argsort(stable=True)
    order = by_size[_per_value(batch, torch.arange(len(sizes), device=batch.device))[by_size].argsort(stable=True)]
    starts = _per_value(batch, sizes.cumsum(0) - sizes)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device)
    cut = (_tensor_amounts(batch, shares) * sizes).floor()
    return _with_values(batch, batch.values.masked_fill(rank - starts < _per_value(batch, cut), 0.0))


def with_rounding(batch: WeightBatch, which: Tensor) -> WeightBatch:
    """Return the batch with every matrix rounded to 255 levels, equally far apart and symmetric about zero.

    Args:
        batch: B networks, with the shapes of their tensors.
        which: (B,) bool.
    """
    if not bool(which.any()):
        return batch
    largest = torch.segment_reduce(batch.values.detach().abs(), "max", lengths=_tensor_sizes(batch))
    step = _per_value(batch, (largest / 127).clamp_min(SMALLEST_RMS).to(batch.dtype))
    chosen = _per_value(batch, _tensor_amounts(batch, which.double()) > 0)
    return _with_values(batch, torch.where(chosen, (batch.values / step).round() * step, batch.values))


def _with_values(batch: WeightBatch, values: Tensor) -> WeightBatch:
    """Return the batch with other values, divided by their root mean squares again where the batch was packed so."""
    if batch.scale == "none":
        return batch.with_fields(values=values)
    rms = _rms(batch, values)
    rms = torch.where(rms > 0, rms, 1.0)
    return batch.with_fields(
        values=values / _per_value(batch, rms), tensor_scale=batch.tensor_scale * rms.to(batch.tensor_scale.dtype)
    )


def replaced(batch: WeightBatch, rows: Sequence[int], found: WeightBatch) -> WeightBatch:
    """Return the batch with the networks `rows` replaced by those of `found`."""
    others = [b for b in range(len(batch)) if b not in set(rows)]
    if not others:
        return found
    kept = batch[others].with_fields(prepared=found.prepared)
    place = {b: k for k, b in enumerate([*rows, *others])}
    return WeightBatch.cat([found, kept])[[place[b] for b in range(len(batch))]]


def _tensor_sizes(batch: WeightBatch) -> Tensor:
    """Return the number of values of every tensor, `(T,)` int64 on the batch's device."""
    return batch.chunk_ptr_host[batch.tensor_ptr_host].diff().to(batch.device)


def _per_value(batch: WeightBatch, of_tensors: Tensor) -> Tensor:
    """Repeat a number of every tensor `(T,)` for each of its values: `(V,)`."""
    sizes = _tensor_sizes(batch)
    return of_tensors.repeat_interleave(sizes, output_size=batch.num_weights)


def _rms(batch: WeightBatch, values: Tensor) -> Tensor:
    """Return the root mean square of every tensor, `(T,)`."""
    sizes = _tensor_sizes(batch)
    return (torch.segment_reduce(values.detach().square(), "sum", lengths=sizes) / sizes).sqrt()


def _of_tensors(batch: WeightBatch, of_networks: Tensor) -> Tensor:
    """Repeat a number of every network `(B,)` for each of its tensors: `(T,)`, on the batch's device."""
    counts = batch.layer_ptr_host[batch.network_ptr_host].diff()
    return of_networks.repeat_interleave(counts).to(batch.device)


def _of_networks(batch: WeightBatch, amounts: Tensor) -> Tensor:
    return _per_value(batch, _of_tensors(batch, amounts).to(batch.dtype))


def _tensor_amounts(batch: WeightBatch, amounts: Tensor) -> Tensor:
    """Return the amounts of networks for their matrices, 0 for their vectors: `(T,)`."""
    matrices = torch.tensor([len(shape) >= 2 for shapes in batch.shapes for shape in shapes])
    return _of_tensors(batch, amounts) * matrices.to(batch.device)


def _own_generator(generator: torch.Generator, device: torch.device) -> torch.Generator:
    """Return a generator on a device, seeded by the one on the CPU."""
    if device.type == "cpu":
        return generator
    seed = int(torch.randint(2**62, (), generator=generator))
    return torch.Generator(device).manual_seed(seed)

"""Predictions of a trained predictor, and its loss on networks that it does not learn from."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..data.batch import WeightBatch
from ..data.weight_budgets import shards_by_weights
from ..nn.predictor import Predictor
from .arguments import check_limit, check_packed, check_settings
from .distributed import World
from .networks import READ_WEIGHTS, PackedNetworks, PreparedNetworks, stream_of
from .objective import autocast, rows_of
from .planning import cut_parts
from .settings import FitSettings
from .streams import NetworkStream


@torch.no_grad()
def predict(
    predictor: Predictor,
    batch: WeightBatch | NetworkStream,
    batch_weights: int = READ_WEIGHTS,
    *,
    settings: FitSettings | None = None,
) -> tuple[Tensor, Tensor]:
    """Predict properties of networks, in batches of bounded size.

    Args:
        batch: the networks, packed by `predictor.pack`, on any device; or a stream or loader of such, as for `fit`,
            of which one batch is in memory at a time.
        batch_weights: largest number of weights in a batch.
        settings: those of the training, to encode under autocast if it did; without them networks are encoded in the
            parameters' own type.

    Returns:
        Predictions `(len(batch), out_features)` in the units of the targets, and encodings `(len(batch), h)`.

    Raises:
        TypeError: no predictor or no networks, or another argument of a wrong type.
        ValueError: `batch_weights` is below 1, or the batch is packed otherwise than the predictor's encoder asks for.

    Example:
        >>> values, z = predict(sne_fast.Predictor(encoder), batch)
        >>> values.shape, z.shape
        (torch.Size([2, 1]), torch.Size([2, 32]))
    """
    if not isinstance(predictor, Predictor):
        raise TypeError(f"predict: predictor must be a sne_fast.Predictor, got {type(predictor).__name__}")
    networks: NetworkStream
    stream = stream_of(batch, "predict: batch")
    if stream is not None:
        networks = PreparedNetworks(stream, stream.targets, predictor)
    else:
        networks = PackedNetworks(check_packed(batch, predictor, "predict: batch"), predictor.target_mean)
    limit = check_limit(batch_weights, "predict: batch_weights")
    settings = check_settings(settings, "predict")
    z = _encodings(predictor, networks, range(len(networks.sizes)), limit, settings)
    return predictor.denormalise(predictor.head(z)), z


@torch.no_grad()
def mean_loss(predictor: Predictor, networks: NetworkStream, settings: FitSettings, world: World) -> float:
    """Return the mean loss of networks, shared out between processes.

    Args:
        predictor: the predictor.
        networks: the networks, with targets in their own units.
        settings: of the training.
        world: the processes.
    """
    rows = shards_by_weights(networks.sizes, range(len(networks.sizes)), world.size)[world.rank]
    total = 0.0
    if rows:
        z = _encodings(predictor, networks, rows, max(settings.batch_weights, READ_WEIGHTS), settings)
        goals = rows_of(predictor.normalise(networks.targets), rows)
        total = predictor.losses(predictor.head(z), goals).double().sum().item()
    (total,) = world.sum(total, device=predictor.target_mean.device)
    return total / len(networks.sizes)


def _encodings(
    predictor: Predictor, networks: NetworkStream, rows: Sequence[int], limit: int, settings: FitSettings
) -> Tensor:
    """Return the encodings of some networks, `(len(rows), h)`, in evaluation mode."""
    was_training = predictor.training
    predictor.eval()
    weight = predictor.target_mean
    parts = []
    for part in networks.parts(cut_parts(networks.sizes, rows, limit)):
        with autocast(settings, weight.device):
            parts.append(predictor.encode(part.to(weight.device, weight.dtype)))
    predictor.train(was_training)
    return torch.cat(parts) if parts else weight.new_zeros(0, predictor.in_features)

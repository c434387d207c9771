"""Predictions of a trained predictor, and its loss on networks that it does not learn from."""

from __future__ import annotations

import torch
from torch import Tensor

from ..data.batch import WeightBatch
from ..data.weight_budgets import batches_by_weights, network_sizes, shards_by_weights
from ..nn.predictor import Predictor
from .arguments import check_limit, check_packed, check_settings
from .distributed import World
from .objective import autocast, rows_of
from .settings import FitSettings

BATCH_WEIGHTS = 100_000
"""Largest number of weights in a batch of networks that are only encoded."""


@torch.no_grad()
def predict(
    predictor: Predictor, batch: WeightBatch, batch_weights: int = BATCH_WEIGHTS, *, settings: FitSettings | None = None
) -> tuple[Tensor, Tensor]:
    """Predict properties of networks, in batches of bounded size.

    Args:
        batch: the networks, packed by `predictor.pack`; on any device.
        batch_weights: largest number of weights in a batch.
        settings: those of the training, to encode under autocast if it did; without them networks are encoded in the
            parameters' own type.

    Returns:
        Predictions `(len(batch), out_features)` in the units of the targets, and encodings `(len(batch), h)`.

    Raises:
        TypeError: no predictor or no batch, or another argument of a wrong type.
        ValueError: `batch_weights` is below 1, or the batch is packed otherwise than the predictor's encoder asks for.

    Example:
        >>> values, z = predict(sne_fast.Predictor(encoder), batch)
        >>> values.shape, z.shape
        (torch.Size([2, 1]), torch.Size([2, 32]))
    """
    if not isinstance(predictor, Predictor):
        raise TypeError(f"predict: predictor must be a sne_fast.Predictor, got {type(predictor).__name__}")
    check_packed(batch, predictor, "predict: batch")
    limit = check_limit(batch_weights, "predict: batch_weights")
    settings = check_settings(settings, "predict")
    was_training = predictor.training
    predictor.eval()
    weight = predictor.target_mean
    parts = []
    for rows in batches_by_weights(network_sizes(batch), limit):
        with autocast(settings, weight.device):
            parts.append(predictor.encode(batch[rows].to(weight.device, weight.dtype)))
    z = torch.cat(parts) if parts else weight.new_zeros(0, predictor.in_features)
    predictor.train(was_training)
    return predictor.denormalise(predictor.head(z)), z


def mean_loss(predictor: Predictor, batch: WeightBatch, targets: Tensor, settings: FitSettings, world: World) -> float:
    """Return the mean loss of networks, shared out between processes.

    Args:
        predictor: the predictor.
        batch: the networks.
        targets: of the networks, in their own units.
        settings: of the training.
        world: the processes.
    """
    rows = shards_by_weights(network_sizes(batch), range(len(batch)), world.size)[world.rank]
    total = 0.0
    if rows:
        _, z = predict(predictor, batch[rows], max(settings.batch_weights, BATCH_WEIGHTS), settings=settings)
        with torch.no_grad():
            goals = rows_of(predictor.normalise(targets), rows)
            total = predictor.losses(predictor.head(z), goals).double().sum().item()
    (total,) = world.sum(total, device=predictor.target_mean.device)
    return total / len(batch)

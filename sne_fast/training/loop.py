"""Training a predictor on packed networks."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .batch import WeightBatch
from .predictor import Predictor


@dataclass(frozen=True)
class FitSettings:
    """How `fit` trains.

    `epochs`: passes over the training networks. `lr`: peak learning rate of AdamW, reached after `warmup` (share of
    all steps) and then lowered to zero along a cosine. `weight_decay`: on matrices only. `batch_weights`: the most
    weights a batch holds, unless one network alone has more. `clip`: gradients' largest norm. `patience`: epochs
    without a better validation loss after which training ends; None trains to the end. `keep_best`: end with the
    parameters of the epoch whose validation loss was lowest, not with the last. `seed`: order of the networks.
    """

    epochs: int = 40
    lr: float = 2e-3
    warmup: float = 0.1
    weight_decay: float = 1e-2
    batch_weights: int = 20_000
    clip: float = 1.0
    patience: int | None = None
    keep_best: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_weights"):
            if getattr(self, name) < 1:
                raise ValueError(f"FitSettings: {name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"FitSettings: warmup must lie in [0, 1), got {self.warmup}")
        if not self.lr > 0 or not self.clip > 0:
            raise ValueError(f"FitSettings: lr and clip must be above 0, got {self.lr} and {self.clip}")


@dataclass
class History:
    """What happened in each epoch; losses are mean squared errors of normalised targets, `kept` the epoch kept."""

    train_loss: list[float] = field(default_factory=list)
    validation_loss: list[float] = field(default_factory=list)
    kept: int = -1
    seconds: float = 0.0
    weights_per_second: float = 0.0


def fit(
    predictor: Predictor,
    batch: WeightBatch,
    targets: Tensor,
    settings: FitSettings | None = None,
    *,
    validation: tuple[WeightBatch, Tensor] | None = None,
    on_epoch: Callable[[int, History], None] | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> History:
    """Train a predictor to give `targets`, by the mean squared error of normalised targets.

    Sets the predictor's target mean and spread from `targets`, trains in place, and ends in evaluation mode, with the
    last epoch's parameters without `validation`, else as `settings.keep_best` says.

    Args:
        batch: the training networks, packed by `predictor.encoder.pack`; on any device.
        targets: `(len(batch), out_features)` in their own units.
        validation: networks and targets to choose the epoch by, or to watch.
        on_epoch: called after each epoch with its number and the history so far.
        on_batch: called after each step with the number of weights done in this epoch.

    Raises:
        ValueError: targets that do not fit the networks, or a loss that is not finite.
    """
    settings = settings or FitSettings()
    for what, networks, values in (
        ("targets", batch, targets),
        *((("validation targets", *validation),) if validation else ()),
    ):
        if len(networks) != len(values) or not len(networks):
            raise ValueError(f"fit: {what} must have one row per network ({len(networks)}), got {len(values)}")
    batch = batch.detach()  # a batch of modules carries their graph, which the first backward would free
    weight = predictor.target_mean
    predictor.set_targets(targets)
    goal = predictor.normalise(targets)
    sizes = network_sizes(batch)
    generator = torch.Generator().manual_seed(settings.seed)
    plan = [list(batches_by_weights(sizes, settings.batch_weights, generator)) for _ in range(settings.epochs)]

    optimiser = torch.optim.AdamW(_decay_groups(predictor, settings.weight_decay), lr=settings.lr, fused=True)
    total = sum(len(epoch) for epoch in plan)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: _warm_cosine(step, total, settings.warmup))
    history = History()
    best: dict[str, Tensor] | None = None
    lowest = 0
    start = time.perf_counter()
    for epoch, batches in enumerate(plan):
        predictor.train()
        losses, done = 0.0, 0
        for rows in batches:
            part = batch[rows].to(weight.device, weight.dtype)
            loss = nn.functional.mse_loss(predictor.head(predictor.encoder(part)), goal[rows])
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(predictor.parameters(), settings.clip)
            optimiser.step()
            schedule.step()
            losses += loss.item() * len(rows)
            done += part.num_weights
            if on_batch is not None:
                on_batch(done)
        if not math.isfinite(losses):
            raise ValueError(f"fit: the loss became {losses} in epoch {epoch}; lower lr ({settings.lr})")
        history.train_loss.append(losses / len(batch))
        if validation is not None:
            history.validation_loss.append(_loss(predictor, *validation, settings.batch_weights))
            if history.validation_loss[-1] <= min(history.validation_loss):
                lowest = epoch
                if settings.keep_best:
                    best = {name: t.detach().clone() for name, t in predictor.state_dict().items()}
        history.kept = epoch if best is None else lowest
        history.seconds = time.perf_counter() - start
        history.weights_per_second = (epoch + 1) * batch.num_weights / history.seconds
        if on_epoch is not None:
            on_epoch(epoch, history)
        if validation is not None and settings.patience is not None and epoch - lowest >= settings.patience:
            break
    if best is not None:
        predictor.load_state_dict(best)
    predictor.eval()
    return history


@torch.no_grad()
def predict(predictor: Predictor, batch: WeightBatch, batch_weights: int = 100_000) -> tuple[Tensor, Tensor]:
    """Predictions `(B, out_features)` in the targets' units and encodings `(B, h)`, in batches of bounded size."""
    was_training = predictor.training
    predictor.eval()
    weight = predictor.target_mean
    parts = []
    for rows in batches_by_weights(network_sizes(batch), batch_weights):
        parts.append(predictor.encoder(batch[rows].to(weight.device, weight.dtype)))
    z = torch.cat(parts) if parts else weight.new_zeros(0, predictor.encoder.config["hidden_dim"])
    predictor.train(was_training)
    return predictor.denormalise(predictor.head(z)), z


def _loss(predictor: Predictor, batch: WeightBatch, targets: Tensor, batch_weights: int) -> float:
    _, z = predict(predictor, batch, batch_weights)
    with torch.no_grad():
        return nn.functional.mse_loss(predictor.head(z), predictor.normalise(targets)).item()


def network_sizes(batch: WeightBatch) -> Tensor:
    """Weights of each network: `(B,)` int64 on the CPU."""
    start = batch.chunk_ptr_host[batch.tensor_ptr_host[batch.layer_ptr_host[batch.network_ptr_host]]]
    return start.diff()


def batches_by_weights(sizes: Tensor, budget: int, generator: torch.Generator | None = None) -> Iterator[list[int]]:
    """Cut networks into batches of at most `budget` weights; a network larger than that is a batch of its own.

    Args:
        sizes: `(B,)` int64, weights of each network.
        budget: weights per batch.
        generator: shuffles the networks; in their order without it.
    """
    order = torch.arange(len(sizes)) if generator is None else torch.randperm(len(sizes), generator=generator)
    rows: list[int] = []
    held = 0
    for row in order.tolist():
        size = int(sizes[row])
        if rows and held + size > budget:
            yield rows
            rows, held = [], 0
        rows.append(row)
        held += size
    if rows:
        yield rows


def stratified_split(groups: Sequence[Hashable], fractions: Sequence[float], seed: int = 0) -> list[list[int]]:
    """Split positions 0..n-1 into parts of the given shares, each group being shared out in those shares too.

    Args:
        groups: the group of each position, such as its architecture.
        fractions: shares of the parts, summing to 1.

    Returns:
        One sorted list of positions per share; every position is in exactly one.

    Raises:
        ValueError: shares that are negative or do not sum to 1.
    """
    if min(fractions) < 0 or abs(sum(fractions) - 1) > 1e-9:
        raise ValueError(f"stratified_split: fractions must be at least 0 and sum to 1, got {list(fractions)}")
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(len(groups), generator=generator).tolist()
    by_group: dict[Hashable, list[int]] = {}
    for i in shuffled:
        by_group.setdefault(groups[i], []).append(i)
    parts: list[list[int]] = [[] for _ in fractions]
    bounds = [sum(fractions[: k + 1]) for k in range(len(fractions))]
    # A position's place inside its shuffled group, as a share of the group, says which part it falls in.
    for offset, group in enumerate(by_group.values()):
        shift = (offset * 0.618034) % 1.0  # so that rounding does not favour the same part in every group
        for place, i in enumerate(group):
            share = (place + shift) / len(group) % 1.0
            parts[next((k for k, bound in enumerate(bounds) if share < bound - 1e-12), len(bounds) - 1)].append(i)
    return [sorted(part) for part in parts]


def _decay_groups(module: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    matrices = [p for p in module.parameters() if p.ndim >= 2]
    vectors = [p for p in module.parameters() if p.ndim < 2]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]


def _warm_cosine(step: int, total: int, warmup: float) -> float:
    rise = max(1, round(warmup * total))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, total - rise)))

"""The training loop: `fit` trains a predictor on packed networks, `predict` applies it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from ..data.batch import WeightBatch
from ..data.weight_budgets import batches_by_weights, network_sizes, shards_by_weights
from ..nn.predictor import Predictor
from .distributed import World, part_of
from .optimiser import adamw, draws_of, set_learning_rate, warm_cosine
from .progress import Log, Progress
from .settings import FitSettings, History


class Augment(Protocol):
    """A change of the networks of a batch that keeps the functions they compute.

    :class:`sne_fast.symmetry.PermutationAugmentation` is one.
    """

    def __call__(self, part: WeightBatch, rows: Sequence[int], generator: torch.Generator, /) -> WeightBatch:
        """Return the changed batch.

        Args:
            part: the networks of a training batch.
            rows: their positions among the training networks.
            generator: the source of all randomness, on the CPU, so that every process of a data parallel training draws
                the same.
        """


def fit(
    predictor: Predictor,
    batch: WeightBatch,
    targets: Tensor,
    settings: FitSettings | None = None,
    *,
    validation: tuple[WeightBatch, Tensor] | None = None,
    augment: Augment | None = None,
    checkpoint: str | PathLike[str] | None = None,
    log: Log | None = None,
    on_epoch: Callable[[int, History], None] | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> History:
    """Train a predictor on targets by its loss.

    Sets the predictor's target mean and spread from `targets` and its input scale from `batch`, and trains it in place.
    It ends in evaluation mode, without `validation` with the parameters of the last epoch, with it as
    `settings.keep_best` says.

    In a process group of `torch.distributed` (see :func:`sne_fast.training.distributed.processes`) every process calls
    this with the same arguments. The processes share the networks of each batch by their numbers of weights, and the
    result is that of a single process.

    Args:
        batch: the training networks, packed by `predictor.pack`; on any device.
        targets: `(len(batch), out_features)` in their own units; `(len(batch),)` integers for "cross_entropy".
        settings: learning rate, epochs and so on; those of `FitSettings()` by default.
        validation: networks and targets whose loss is measured after every epoch.
        augment: changes every training batch before it is encoded; by default as the predictor's preparation says,
            with jitter if it has any.
        checkpoint: a file that is written after every epoch. If it exists, training resumes from it bit for bit.
        log: takes the numbers of every epoch, see :class:`CsvLog` and :class:`TensorBoardLog`.
        on_epoch: called after each epoch with its number and the history so far.
        on_batch: called after each step with the number of weights trained on in this epoch.

    Returns:
        The losses of all epochs.

    Raises:
        ValueError: targets that do not fit the networks, a loss that is not finite, `settings.invariance` without
            `augment`, or a checkpoint of another training.

    Example:
        >>> accuracy = torch.rand(len(batch), 1)
        >>> history = fit(sne_fast.Predictor(encoder), batch, accuracy, FitSettings(epochs=2))
        >>> len(history.train_loss)
        2
    """
    settings = settings or FitSettings()
    for what, networks, values in (
        ("targets", batch, targets),
        *((("validation targets", *validation),) if validation else ()),
    ):
        if len(networks) != len(values) or not len(networks):
            raise ValueError(f"fit: {what} must have one row per network ({len(networks)}), got {len(values)}")
    if augment is None and predictor.preparation.draws:
        augment = predictor.preparation.augment
    if settings.invariance and augment is None:
        raise ValueError("fit: settings.invariance compares a batch with its augmented copy; give augment")
    world = World()
    # Detached: a batch of modules holds their autograd graph, which the first backward would free.
    batch = predictor.prepare(batch.detach())
    if validation is not None:
        validation = predictor.prepare(validation[0].detach()), validation[1]
    predictor.set_inputs(batch)
    predictor.set_targets(targets)
    world.share_parameters(predictor)
    run = _Run(predictor, batch, predictor.normalise(targets), settings, augment, world)
    state = Progress(settings, 0, 0, History(), 0, None)
    path = Path(checkpoint) if checkpoint is not None else None
    if path is not None and path.exists():
        state = Progress.load(path, settings, predictor, run.optimiser, run.scaler)
    if log is not None and world.first:
        log.resume(state.epoch)
    history, start = state.history, time.perf_counter() - state.history.seconds
    while state.epoch < settings.epochs and not _finished(state, settings, validation is not None):
        epoch = state.epoch
        history.train_loss.append(run.epoch(state, on_batch))
        row = {"train_loss": history.train_loss[-1]}
        if validation is not None:
            history.validation_loss.append(_loss(predictor, *validation, settings, world))
            row["validation_loss"] = history.validation_loss[-1]
            if history.validation_loss[-1] <= min(history.validation_loss):
                state.lowest = epoch
                if settings.keep_best:
                    state.best = {name: t.detach().clone() for name, t in predictor.state_dict().items()}
        state.epoch += 1
        history.kept = epoch if state.best is None else state.lowest
        history.seconds = time.perf_counter() - start
        history.weights_per_second = state.epoch * batch.num_weights / history.seconds
        if world.first:
            if log is not None:
                log(epoch, {**row, "lr": run.lr, "seconds": history.seconds})
            if path is not None:
                state.save(path, predictor, run.optimiser, run.scaler)
        if on_epoch is not None:
            on_epoch(epoch, history)
    world.wait()
    if state.best is not None:
        predictor.load_state_dict(state.best)
    predictor.eval()
    return history


def _finished(state: Progress, settings: FitSettings, watched: bool) -> bool:
    patient = settings.patience is None or not watched or not state.epoch
    return not patient and state.epoch - 1 - state.lowest >= (settings.patience or 0)


class _Run:
    """The parts of a training that stay the same: networks, batches of all epochs, optimiser, normalised targets."""

    def __init__(
        self,
        predictor: Predictor,
        batch: WeightBatch,
        goals: Tensor,
        settings: FitSettings,
        augment: Augment | None,
        world: World,
    ) -> None:
        self.predictor, self.batch, self.goals = predictor, batch, goals
        self.settings, self.augment, self.world = settings, augment, world
        self.weight = predictor.target_mean
        self.sizes = network_sizes(batch)
        generator = torch.Generator().manual_seed(settings.seed)
        self.plan = [
            list(batches_by_weights(self.sizes, settings.batch_weights, generator)) for _ in range(settings.epochs)
        ]
        self.steps = sum(len(epoch) for epoch in self.plan)
        self.optimiser = adamw(predictor, settings.lr, settings.weight_decay)
        self.scaler = torch.amp.GradScaler(self.weight.device.type, enabled=settings.amp == "float16")
        self.lr = settings.lr

    def epoch(self, state: Progress, on_batch: Callable[[int], None] | None) -> float:
        """Train one epoch, and return the mean loss of its networks."""
        self.predictor.train()
        total, done = 0.0, 0
        for rows in self.plan[state.epoch]:
            part = self.batch[rows].to(self.weight.device, self.weight.dtype)
            total += self.step(part, rows, state.step)
            state.step += 1
            done += part.num_weights
            if on_batch is not None:
                on_batch(done)
        (total,) = self.world.sum(total, device=self.weight.device)
        if not math.isfinite(total):
            raise ValueError(f"fit: the loss became {total} in epoch {state.epoch}; lower lr ({self.settings.lr})")
        return total / len(self.batch)

    def step(self, part: WeightBatch, rows: Sequence[int], step: int) -> float:
        """Take one step, and return the summed loss of the networks of this process."""
        settings, predictor = self.settings, self.predictor
        self.lr = settings.lr * warm_cosine(step, self.steps, settings.warmup)
        set_learning_rate(self.optimiser, self.lr)
        changed = part
        if self.augment is not None:
            changed = self.augment(part, rows, draws_of(settings.seed, step))
        places = shards_by_weights(self.sizes, rows, self.world.size)[self.world.rank]
        self.optimiser.zero_grad()
        total = 0.0
        if places:
            mine = changed if self.world.size == 1 else changed[places]
            with _autocast(settings, self.weight.device):
                outputs = predictor.head(predictor.encode(mine)).to(self.weight.dtype)
            losses = predictor.losses(outputs, part_of([rows[p] for p in places], self.goals))
            loss = losses.sum()
            total = loss.item()
            if settings.invariance:
                plain = part if self.world.size == 1 else part[places]
                with _autocast(settings, self.weight.device):
                    unchanged = predictor.head(predictor.encode(plain))
                loss = loss + settings.invariance * (outputs - unchanged.to(outputs)).square().sum() / 2
            self.scaler.scale(loss / len(rows)).backward()
        self.world.sum_gradients(predictor.parameters())
        self.scaler.unscale_(self.optimiser)
        nn.utils.clip_grad_norm_(predictor.parameters(), settings.clip)
        self.scaler.step(self.optimiser)
        self.scaler.update()
        return total


def _autocast(settings: FitSettings, device: torch.device) -> torch.autocast:
    dtype = getattr(torch, settings.amp) if settings.amp else None
    return torch.autocast(device.type, dtype=dtype, enabled=settings.amp is not None)


@torch.no_grad()
def predict(
    predictor: Predictor, batch: WeightBatch, batch_weights: int = 100_000, *, settings: FitSettings | None = None
) -> tuple[Tensor, Tensor]:
    """Predict properties of networks, in batches of bounded size.

    Args:
        batch: the networks, packed by `predictor.pack`; on any device.
        batch_weights: largest number of weights in a batch.
        settings: those of the training, to encode under autocast if it did; without them networks are encoded in the
            parameters' own type.

    Returns:
        Predictions `(len(batch), out_features)` in the units of the targets, and encodings `(len(batch), h)`.

    Example:
        >>> values, z = predict(sne_fast.Predictor(encoder), batch)
        >>> values.shape, z.shape
        (torch.Size([2, 1]), torch.Size([2, 32]))
    """
    was_training = predictor.training
    predictor.eval()
    weight = predictor.target_mean
    parts = []
    for rows in batches_by_weights(network_sizes(batch), batch_weights):
        with _autocast(settings or FitSettings(), weight.device):
            parts.append(predictor.encode(batch[rows].to(weight.device, weight.dtype)))
    z = torch.cat(parts) if parts else weight.new_zeros(0, predictor.encoder.config["hidden_dim"])
    predictor.train(was_training)
    return predictor.denormalise(predictor.head(z)), z


def _loss(predictor: Predictor, batch: WeightBatch, targets: Tensor, settings: FitSettings, world: World) -> float:
    rows = shards_by_weights(network_sizes(batch), range(len(batch)), world.size)[world.rank]
    total = 0.0
    if rows:
        _, z = predict(predictor, batch[rows], settings.batch_weights, settings=settings)
        with torch.no_grad():
            goals = part_of(rows, predictor.normalise(targets))
            total = predictor.losses(predictor.head(z), goals).double().sum().item()
    (total,) = world.sum(total, device=predictor.target_mean.device)
    return total / len(batch)

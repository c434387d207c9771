"""The training loop: `fit` trains a predictor on packed networks, `predict` applies it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from os import PathLike
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from ..atomic_files import remove_leftovers
from ..data.batch import WeightBatch
from ..data.weight_budgets import batches_by_weights, network_sizes, shards_by_weights
from ..file_locks import holding
from ..nn.predictor import Predictor
from .arguments import (
    check_batch,
    check_calls,
    check_checkpoint,
    check_limit,
    check_packed,
    check_predictor,
    check_settings,
    check_targets,
    check_validation,
)
from .distributed import World, part_of
from .fingerprint import as_recorded, in_use, of_training
from .optimiser import adamw, draws_of, set_learning_rate, warm_cosine
from .progress import Log, Progress, not_finite, restore
from .settings import FitSettings, History

MOST_SKIPPED = 32
"""Steps in a row that may be skipped under float16: its scale, 65536 at first, is halved by each, down to 2**-16."""
BATCH_WEIGHTS = 100_000
"""Largest number of weights in a batch of networks that are only encoded."""
_SHOWN = 5  # networks named in a message


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
    targets: Tensor | np.ndarray | Sequence[Any],
    settings: FitSettings | None = None,
    *,
    validation: tuple[WeightBatch, Tensor | np.ndarray | Sequence[Any]] | None = None,
    augment: Augment | None = None,
    checkpoint: str | PathLike[str] | None = None,
    made_of: Mapping[str, Any] | None = None,
    log: Log | None = None,
    on_epoch: Callable[[int, History], None] | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> History:
    """Train a predictor on targets by its loss.

    Sets the predictor's target mean and spread from `targets` and its input scale from `batch`, and trains it in place.
    It ends in evaluation mode, without `validation` with the parameters of the last epoch, with it as
    `settings.keep_best` says. A validation loss that is not finite counts as worse than any other.

    A loss or a gradient that is not finite ends the training before the step is taken. Under `amp="float16"` steps
    whose gradients overflow are skipped, as its scale of the loss asks for, but not more than 32 in a row.

    The file `checkpoint` holds a fingerprint of networks, targets, validation, augmentation, predictor and settings; a
    call with others is refused, and told what differs. Only `settings.epochs` may grow: the training then goes on, also
    if it had ended, with the learning rate that the longer training has at that step. It is not the rate that a call
    with as many epochs from the start would have had before, so the result differs from that call's.

    In a process group of `torch.distributed` (see :func:`sne_fast.training.distributed.processes`) every process calls
    this with the same arguments. The processes share the networks of each batch by their numbers of weights, and the
    result is that of a single process.

    Args:
        batch: the training networks, packed by `predictor.pack`; on any device.
        targets: `(len(batch), out_features)` in their own units, as a tensor, an array or a list; `(len(batch),)` is
            enough for a single output. `(len(batch),)` integers for "cross_entropy".
        settings: learning rate, epochs and so on; those of `FitSettings()` by default.
        validation: networks and targets whose loss is measured after every epoch.
        augment: changes every training batch before it is encoded; by default as the predictor's preparation says,
            with jitter if it has any.
        checkpoint: a file that is written after every epoch. If it exists, training resumes from it bit for bit.
        made_of: what else the training is made of, as plain values by name, such as how the first parameters were
            drawn, which are no part of the fingerprint themselves.
        log: takes the numbers of every epoch, see :class:`CsvLog` and :class:`TensorBoardLog`.
        on_epoch: called after each epoch with its number and the history so far.
        on_batch: called after each step with the number of weights trained on in this epoch.

    Returns:
        The losses of all epochs.

    Raises:
        TypeError: an argument of another type; the message names it.
        ValueError: an argument that does not fit the others, a loss or gradient that is not finite, or a checkpoint
            that is damaged or of another training.
        BlockingIOError: another training is writing the checkpoint.
        OSError: the checkpoint cannot be written.
        ConnectionError: another process of the group does not answer.

    Example:
        >>> accuracy = torch.rand(len(batch), 1)
        >>> history = fit(sne_fast.Predictor(encoder), batch, accuracy, FitSettings(epochs=2))
        >>> len(history.train_loss)
        2
    """
    predictor, settings = check_predictor(predictor), check_settings(settings)
    if augment is None and predictor.preparation.draws:
        augment = predictor.preparation.augment
    batch = check_batch(batch, predictor)  # detached: the first backward would free the graph of a batch of modules
    goals = check_targets(targets, predictor, len(batch))
    watched = check_validation(validation, predictor)
    check_calls(settings, augment, log, on_epoch=on_epoch, on_batch=on_batch)
    path = check_checkpoint(checkpoint)
    world = World()
    fingerprint = of_training(predictor, batch, goals, settings, watched, augment, made_of) if path is not None else {}
    with ExitStack() as stack, torch.enable_grad():
        if path is not None:
            world.share_error(_hold(path, stack) if world.first else None)
        state, states = Progress(), None
        if path is not None and path.exists():
            state, states = Progress.load(path, fingerprint, settings.epochs, predictor.target_mean.device)
        predictor.set_inputs(batch)
        predictor.set_targets(goals)
        if predictor.preparation.steps == batch.prepared:
            batch = predictor.prepare(batch)  # whose parts keep what it has computed
        if watched is not None:
            watched = predictor.prepare(watched[0]), watched[1]
        world.share_parameters(predictor)
        run = _Run(predictor, batch, goals, settings, augment, world)
        if path is not None and states is not None:
            restore(path, states, predictor, run.optimiser, run.scaler)
            fingerprint = as_recorded(fingerprint, states["fingerprint"])
        spoilt = not_finite(predictor.state_dict())
        if spoilt is not None:
            raise ValueError(f"fit: predictor must have finite parameters, {spoilt} has others before any step")
        if log is not None and world.first:
            log.resume(state.epoch)
        history, start = state.history, time.perf_counter() - state.history.seconds
        while state.epoch < settings.epochs and not _finished(state, settings, watched is not None):
            epoch = state.epoch
            history.train_loss.append(run.epoch(state, on_batch))
            row = {"train_loss": history.train_loss[-1]}
            if watched is not None:
                history.validation_loss.append(_loss(predictor, *watched, settings, world))
                row["validation_loss"] = history.validation_loss[-1]
                if _is_lowest(history.validation_loss):
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
                    fingerprint = in_use(fingerprint, augment)
                    state.save(path, fingerprint, predictor, run.optimiser, run.scaler)
            if on_epoch is not None:
                on_epoch(epoch, history)
        world.wait()
        if state.best is not None:
            predictor.load_state_dict(state.best)
        predictor.eval()
        return history


def _hold(path: Path, stack: ExitStack) -> Exception | None:
    """Lock a checkpoint until the stack ends, or return why it cannot be written."""
    try:
        lock = path.with_name(f".{path.name}.lock")
        stack.enter_context(holding(lock, f"fit: checkpoint {str(path)!r}", "give another path"))
    except OSError as error:
        return error
    remove_leftovers(path.parent)
    return None


def _is_lowest(losses: Sequence[float]) -> bool:
    """Return True if the last loss is the lowest one, where losses that are not finite are never."""
    return math.isfinite(losses[-1]) and losses[-1] <= min(loss for loss in losses if math.isfinite(loss))


def _finished(state: Progress, settings: FitSettings, watched: bool) -> bool:
    patient = settings.patience is None or not watched or not state.epoch
    return not patient and state.epoch - 1 - state.lowest >= (settings.patience or 0)


class _Run:
    """The parts of a training that stay the same: networks, batches of all epochs, optimiser, normalised targets."""

    def __init__(
        self,
        predictor: Predictor,
        batch: WeightBatch,
        targets: Tensor,
        settings: FitSettings,
        augment: Augment | None,
        world: World,
    ) -> None:
        self.predictor, self.batch, self.goals = predictor, batch, predictor.normalise(targets)
        if not bool(self.goals.isfinite().all()):
            raise ValueError(f"fit: targets must fit {self.goals.dtype}, got up to {targets.abs().max().item():g}")
        self.settings, self.augment, self.world = settings, augment, world
        self.weight = predictor.target_mean
        self.parameters = dict(predictor.named_parameters())
        self.sizes = network_sizes(batch)
        generator = torch.Generator().manual_seed(settings.seed)
        self.plan = [
            list(batches_by_weights(self.sizes, settings.batch_weights, generator)) for _ in range(settings.epochs)
        ]
        self.steps = sum(len(epoch) for epoch in self.plan)
        self.optimiser = adamw(predictor, settings.lr, settings.weight_decay)
        self.scaler = torch.amp.GradScaler(self.weight.device.type, enabled=settings.amp == "float16")
        self.lr = settings.lr
        self.skipped = 0

    def epoch(self, state: Progress, on_batch: Callable[[int], None] | None) -> float:
        """Train one epoch, and return the mean loss of its networks.

        Raises:
            ValueError: a loss, a gradient or a parameter that is not finite.
        """
        self.predictor.train()
        total, done = 0.0, 0
        plan = self.plan[state.epoch]
        for k, rows in enumerate(plan):
            part = self.batch[rows].to(self.weight.device, self.weight.dtype)
            where = f"epoch {state.epoch}; lower lr ({self.settings.lr}), or look at batch {k + 1} of {len(plan)} in it"
            total += self.step(part, rows, state.step, where)
            state.step += 1
            done += part.num_weights
            if on_batch is not None:
                on_batch(done)
        (total,) = self.world.sum(total, device=self.weight.device)
        spoilt = not_finite({"predictor": self.predictor.state_dict(), "optimiser": self.optimiser.state_dict()})
        if spoilt is not None:
            raise ValueError(f"fit: {spoilt} is not finite after epoch {state.epoch}; lower lr ({self.settings.lr})")
        return total / len(self.batch)

    def step(self, part: WeightBatch, rows: Sequence[int], step: int, where: str) -> float:
        """Take one step, and return the summed loss of the networks of this process.

        Args:
            part: the networks of the batch.
            rows: their positions among the training networks.
            step: number of the step.
            where: the middle of the sentence of an error.

        Raises:
            ValueError: a loss or a gradient that is not finite; the step is not taken.
        """
        settings, predictor = self.settings, self.predictor
        self.lr = settings.lr * warm_cosine(step, self.steps, settings.warmup)
        set_learning_rate(self.optimiser, self.lr)
        changed = part
        if self.augment is not None:
            changed = self.augment(part, rows, draws_of(settings.seed, step))
        places = shards_by_weights(self.sizes, rows, self.world.size)[self.world.rank]
        self.optimiser.zero_grad()
        losses = self.weight.new_zeros(0)
        loss = total = losses.sum()
        if places:
            mine = changed if self.world.size == 1 else changed[places]
            with _autocast(settings, self.weight.device):
                outputs = predictor.head(predictor.encode(mine)).to(self.weight.dtype)
            losses = predictor.losses(outputs, part_of([rows[p] for p in places], self.goals))
            loss = total = losses.sum()
            if settings.invariance:
                plain = part if self.world.size == 1 else part[places]
                with _autocast(settings, self.weight.device):
                    unchanged = predictor.head(predictor.encode(plain))
                loss = loss + settings.invariance * (outputs - unchanged.to(outputs)).square().sum() / 2
            self.scaler.scale(loss / len(rows)).backward()
        spoilt = self.world.sum_gradients(self.parameters.values(), loss)
        self.scaler.unscale_(self.optimiser)
        gradients = {name: p.grad for name, p in self.parameters.items() if p.grad is not None}
        norm = nn.utils.get_total_norm(gradients.values())
        # Read together, so that a GPU is waited for once in a step.
        summed, whole, spoilt_, length = torch.stack(
            [total.detach().double(), loss.detach().double(), spoilt.double(), norm.double()]
        ).tolist()
        if math.isnan(spoilt_):
            own = [rows[p] for p, finite in zip(places, losses.isfinite().tolist(), strict=True) if not finite]
            raise ValueError(f"fit: the loss became {whole} in {where}, {self._named(own or rows)}; no step was taken")
        self._check_gradients(length, gradients, f"{where}, {self._named(rows)}")
        nn.utils.clip_grads_with_norm_(self.parameters.values(), settings.clip, norm)
        self.scaler.step(self.optimiser)
        self.scaler.update()
        return summed

    def _check_gradients(self, norm: float, gradients: Mapping[str, Tensor], where: str) -> None:
        self.skipped = 0 if math.isfinite(norm) else self.skipped + 1
        if not self.skipped or (self.scaler.is_enabled() and self.skipped <= MOST_SKIPPED):
            return
        of = [name for name, gradient in gradients.items() if not bool(gradient.isfinite().all())]
        row = f" in {self.skipped} steps in a row, the last" if self.scaler.is_enabled() else ""
        which = f"that of {of[0]}{f' and {len(of) - 1} more' if len(of) > 1 else ''}" if of else "their norm"
        raise ValueError(f"fit: the gradients became not finite ({which}){row} in {where}; no step was taken")

    def _named(self, rows: Sequence[int]) -> str:
        more = f" and {len(rows) - _SHOWN} more" if len(rows) > _SHOWN else ""
        return ", ".join(self.batch.network_name(row) for row in rows[:_SHOWN]) + more


def _autocast(settings: FitSettings, device: torch.device) -> torch.autocast:
    dtype = getattr(torch, settings.amp) if settings.amp else None
    return torch.autocast(device.type, dtype=dtype, enabled=settings.amp is not None)


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
        with _autocast(settings, weight.device):
            parts.append(predictor.encode(batch[rows].to(weight.device, weight.dtype)))
    z = torch.cat(parts) if parts else weight.new_zeros(0, predictor.in_features)
    predictor.train(was_training)
    return predictor.denormalise(predictor.head(z)), z


def _loss(predictor: Predictor, batch: WeightBatch, targets: Tensor, settings: FitSettings, world: World) -> float:
    rows = shards_by_weights(network_sizes(batch), range(len(batch)), world.size)[world.rank]
    total = 0.0
    if rows:
        _, z = predict(predictor, batch[rows], max(settings.batch_weights, BATCH_WEIGHTS), settings=settings)
        with torch.no_grad():
            goals = part_of(rows, predictor.normalise(targets))
            total = predictor.losses(predictor.head(z), goals).double().sum().item()
    (total,) = world.sum(total, device=predictor.target_mean.device)
    return total / len(batch)

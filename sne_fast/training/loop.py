"""The training loop: `fit` trains a predictor on packed networks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from os import PathLike
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.batch import WeightBatch
from ..nn.predictor import Predictor
from .arguments import (
    check_batch,
    check_calls,
    check_checkpoint,
    check_predictor,
    check_seconds,
    check_settings,
    check_targets,
    check_validation,
)
from .capture import Graphs, check_capture
from .checkpoint import Checkpoint
from .distributed import World
from .epochs import run_epochs
from .fingerprint import Fingerprint, of_training
from .networks import PackedNetworks, PreparedNetworks, check_stream, fit_inputs, stream_of
from .objective import Augment, Supervised
from .prediction import mean_loss
from .progress import Log
from .settings import FitSettings, History
from .split_networks import encode_split
from .steps import Trainer
from .streams import NetworkStream


def fit(
    predictor: Predictor,
    batch: WeightBatch | NetworkStream,
    targets: Tensor | np.ndarray | Sequence[Any] | None = None,
    settings: FitSettings | None = None,
    *,
    validation: tuple[WeightBatch, Tensor | np.ndarray | Sequence[Any]] | NetworkStream | None = None,
    augment: Augment | None = None,
    checkpoint: str | PathLike[str] | None = None,
    checkpoint_seconds: float = 600.0,
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
    this with the same arguments. A step then takes `settings.accumulate` parts for each of them, which they share by
    their numbers of weights; each reads and changes only its own. The result is that of a single process with as many
    parts in a step.

    Args:
        batch: the training networks, packed by `predictor.pack`, on any device; or a stream of networks that are read
            when a step needs them, such as a :class:`sne_fast.zoo.ZooDataset`, or a loader that
            :func:`sne_fast.zoo.zoo_loader` made, of which the networks are taken and `settings.batch_weights` instead
            of its budget. A predictor with an input scale or statistics to fit reads all of a stream once before.
        targets: `(len(batch), out_features)` in their own units, as a tensor, an array or a list; `(len(batch),)` is
            enough for a single output. `(len(batch),)` integers for "cross_entropy". None takes those of the stream.
        settings: learning rate, epochs and so on; those of `FitSettings()` by default.
        validation: networks and targets, or a stream or loader, whose loss is measured after every epoch.
        augment: changes every training batch before it is encoded; by default as the predictor's preparation says,
            with jitter if it has any.
        checkpoint: a file that is written after every epoch. If it exists, training resumes from it bit for bit.
        checkpoint_seconds: within an epoch the file is written after a step if that long has passed since it was
            written; infinity writes it after epochs alone.
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
    networks = networks_of(batch, targets, predictor)
    watched = validation_of(validation, predictor)
    check_calls(settings, augment, log, on_epoch=on_epoch, on_batch=on_batch)
    path, seconds = check_checkpoint(checkpoint), check_seconds(checkpoint_seconds)
    world = World()
    graphs = check_capture(predictor, world.size) if settings.capture else None
    made: Fingerprint = {}
    if path is not None and world.first:
        made = of_training(predictor, networks, settings, watched, augment, made_of, processes=world.size)
    file = Checkpoint(path, made, augment, seconds, world)
    with ExitStack() as stack, torch.enable_grad():
        state = file.open(stack, settings.epochs, predictor.target_mean.device)
        if not file.holds_state:
            fit_inputs(predictor, networks, world)
        trainer = trainer_of(predictor, networks, settings, world, graphs, augment)
        if world.first:
            trainer.plan.check_balance()
        validate = None if watched is None else partial(mean_loss, predictor, watched, settings, world)
        return run_epochs(trainer, state, file, validate=validate, log=log, on_epoch=on_epoch, on_batch=on_batch)


def trainer_of(
    predictor: Predictor,
    networks: NetworkStream,
    settings: FitSettings,
    world: World,
    graphs: Graphs | None = None,
    augment: Augment | None = None,
) -> Trainer:
    """Set the targets of a predictor whose inputs are fitted, and return what takes its steps.

    Raises:
        ValueError: a target that is not finite in the dtype of the parameters.
    """
    predictor.set_targets(networks.targets)
    goals = predictor.normalise(networks.targets)
    if not bool(goals.isfinite().all()):
        largest = networks.targets.abs().max().item()
        raise ValueError(f"fit: targets must fit {goals.dtype}, got up to {largest:g}")
    objective = Supervised(predictor, goals, settings, augment)
    split = partial(encode_split, predictor)
    return Trainer(predictor, objective, predictor.encode, split, networks, settings, world, graphs)


def networks_of(batch: Any, targets: Any, predictor: Predictor) -> NetworkStream:
    """Return the training networks as a stream of prepared ones, with targets as `check_targets` returns them.

    Raises:
        TypeError, ValueError: as `fit`.
    """
    stream = check_stream(batch, targets)
    if stream is not None:
        given = stream.targets if targets is None else targets
        return PreparedNetworks(stream, check_targets(given, predictor, len(stream.sizes)), predictor)
    batch = check_batch(batch, predictor)  # detached: the first backward would free the graph of a batch of modules
    return PackedNetworks(batch, check_targets(targets, predictor, len(batch)))


def validation_of(validation: Any, predictor: Predictor) -> NetworkStream | None:
    """Return the validation networks as `networks_of` returns those of the training.

    Raises:
        TypeError, ValueError: as `fit`.
    """
    stream = stream_of(validation, "fit: validation")
    if stream is not None:
        goals = check_targets(stream.targets, predictor, len(stream.sizes), "validation targets")
        return PreparedNetworks(stream, goals, predictor)
    found = check_validation(validation, predictor)
    return None if found is None else PackedNetworks(*found)

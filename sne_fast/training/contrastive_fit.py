"""`fit_contrastive`: the training of an encoder without labels."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from os import PathLike
from typing import Any

import torch
from torch import Tensor

from ..data.batch import WeightBatch
from .arguments import check_checkpoint, check_seconds, check_settings
from .checkpoint import Checkpoint
from .contrastive import Contrastive, ContrastiveModel
from .digests import of_values
from .distributed import World
from .epochs import run_epochs
from .fingerprint import CONTINUED, SETTINGS, Fingerprint, of_batch, of_config, of_object
from .networks import PackedNetworks
from .objective import Encode, Losses, autocast
from .optimiser import draws_of
from .planning import cut_parts
from .progress import Log
from .recipes import CONTRASTIVE
from .settings import FitSettings, History
from .steps import Trainer

RUN = 16
"""Networks of one cluster that stand together in the order of an epoch."""


class ClusteredNetworks(PackedNetworks):
    """Networks of which those of a cluster stand together in every order, so that batches have near negatives.

    Args:
        batch: the networks.
        clusters: of each network, such as its architecture; None for networks without any order.
    """

    def __init__(self, batch: WeightBatch, clusters: Sequence[Hashable] | None = None) -> None:
        super().__init__(batch, torch.zeros(len(batch), 1))
        self.clusters = clusters

    def order(self, generator: torch.Generator) -> list[int]:
        """Return all positions in a random order, runs of up to 16 of a cluster together."""
        order = super().order(generator)
        if self.clusters is None:
            return order
        members: dict[Hashable, list[int]] = {}
        for i in order:
            members.setdefault(self.clusters[i], []).append(i)
        runs = [own[k : k + RUN] for own in members.values() for k in range(0, len(own), RUN)]
        return [i for k in torch.randperm(len(runs), generator=generator).tolist() for i in runs[k]]


def fit_contrastive(
    model: ContrastiveModel,
    batch: WeightBatch,
    objective: Contrastive,
    settings: FitSettings | None = None,
    *,
    clusters: Sequence[Hashable] | None = None,
    validation: tuple[WeightBatch, Contrastive] | None = None,
    checkpoint: str | PathLike[str] | None = None,
    checkpoint_seconds: float = 600.0,
    made_of: Mapping[str, Any] | None = None,
    log: Log | None = None,
    on_epoch: Callable[[int, History], None] | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> History:
    """Train an encoder without labels: to tell the views of each network of a batch from those of all others.

    Sets what the encoder's statistics are standardised by from `batch`, and trains it in place, as
    :func:`sne_fast.training.fit` trains a predictor: steps, learning rate, checkpoint and log are the same.

    In a process group every process takes parts of a step of its own, and the negatives of a network are those of its
    part.

    Args:
        model: the encoder, with its projection and heads.
        batch: the training networks, packed by `model.encoder.pack`.
        objective: of these networks.
        settings: those of the recipe `CONTRASTIVE` by default; `batch_weights` bounds the weights of the networks that
            are compared with each other, which `objective.weights_at_once` lets exceed memory.
        clusters: of each network, such as its architecture; networks of a cluster are put together into batches, which
            makes them harder to tell apart.
        validation: networks that are not trained on, and their objective, of which the loss is measured after every
            epoch on the same views.
        checkpoint: as for `fit`, like all that follow.
        checkpoint_seconds: between two writes within an epoch.
        made_of: what else the training is made of.
        log: takes the numbers of every epoch.
        on_epoch: called after each epoch with its number and the history so far.
        on_batch: called after each step with the number of weights trained on in this epoch.

    Returns:
        The losses of all epochs.

    Raises:
        ValueError: networks that are packed otherwise than the encoder asks for, clusters that are not one per network,
            `settings.invariance`, `settings.ranking` or `settings.buckets`, a network larger than `batch_weights` in a
            process group, a loss or gradient that is not finite, or a checkpoint of another training.
        BlockingIOError: another training is writing the checkpoint.
        OSError: the checkpoint cannot be written.

    Example:
        >>> from sne_fast.training import Contrastive, ContrastiveModel, Views
        >>> model = ContrastiveModel(encoder)
        >>> history = fit_contrastive(model, batch, Contrastive(model, Views()), FitSettings(epochs=2))
        >>> len(history.train_loss)
        2
    """
    settings = CONTRASTIVE.fit_settings() if settings is None else check_settings(settings)
    for name, why in (("invariance", "permuted views teach it"), ("ranking", "there are no targets to rank by")):
        if getattr(settings, name):
            raise ValueError(f"fit_contrastive: {name} must be 0, got {getattr(settings, name):g}; {why}")
    if settings.buckets:
        raise ValueError("fit_contrastive: buckets must be False; views of networks are not padded")
    encoder, world = model.encoder, World()
    batch = batch.detach()
    encoder.check_batch(batch.to(encoder.sample_parameter.device, encoder.sample_parameter.dtype))
    if clusters is not None and len(clusters) != len(batch):
        raise ValueError(f"fit_contrastive: clusters must be one per network ({len(batch)}), got {len(clusters)}")
    if world.size > 1 and int(batch.network_sizes.max()) > settings.batch_weights:
        raise ValueError(
            f"fit_contrastive: processes share no network; batch_weights must be at least that of the largest, "
            f"{int(batch.network_sizes.max())}, got {settings.batch_weights}"
        )
    networks = ClusteredNetworks(batch, clusters)
    path, seconds = check_checkpoint(checkpoint), check_seconds(checkpoint_seconds)
    made: Fingerprint = {}
    if path is not None and world.first:
        made = _fingerprint(model, networks, objective, settings, validation, made_of, world.size)
    file = Checkpoint(path, made, None, seconds, world)
    with ExitStack() as stack, torch.enable_grad():
        state = file.open(stack, settings.epochs, encoder.sample_parameter.device)
        if not file.holds_state:
            encoder.set_statistics(batch.to(encoder.sample_parameter.device, encoder.sample_parameter.dtype))
        mixed = partial(_under_autocast, objective, settings)
        trainer = Trainer(model, mixed, encoder, _not_split, networks, settings, world)
        validate = None
        if validation is not None:
            validate = partial(contrastive_loss, model, *validation, settings=settings, world=world)
        return run_epochs(trainer, state, file, validate=validate, log=log, on_epoch=on_epoch, on_batch=on_batch)


def _under_autocast(
    objective: Contrastive,
    settings: FitSettings,
    part: WeightBatch,
    rows: Sequence[int],
    generator: torch.Generator,
    encode: Encode,
) -> Losses:
    with autocast(settings, part.device):
        return objective(part, rows, generator, encode)


@torch.no_grad()
def contrastive_loss(
    model: ContrastiveModel, batch: WeightBatch, objective: Contrastive, *, settings: FitSettings, world: World
) -> float:
    """Return the mean loss of networks on views that depend on `settings.seed` alone, shared out between processes.

    Args:
        model: encoder and projection, which are in evaluation mode meanwhile.
        batch: the networks, of which those of a batch of `settings.batch_weights` are compared.
        objective: of these networks.
        settings: of the training.
        world: the processes, each of which takes some of the batches; all return the same number.
    """
    was_training, weight = model.training, model.encoder.sample_parameter
    model.eval()
    networks, total = PackedNetworks(batch, torch.zeros(len(batch), 1)), 0.0
    order = torch.randperm(len(batch), generator=draws_of(settings.seed, -1)).tolist()
    parts = cut_parts(networks.sizes, order, settings.batch_weights)
    for k in range(world.rank, len(parts), world.size):
        part = batch[parts[k]].to(weight.device, weight.dtype)
        losses = _under_autocast(objective, settings, part, parts[k], draws_of(settings.seed, -2 - k), model.encoder)
        total += float(losses.shown.double().sum())
    model.train(was_training)
    (total,) = world.sum(total, device=weight.device)
    return total / max(1, len(batch))


def _not_split(world: World, dealt: Sequence[Sequence[int]], batch: WeightBatch) -> Tensor:
    raise AssertionError("fit_contrastive has checked that no network is shared")


def _fingerprint(
    model: ContrastiveModel,
    networks: ClusteredNetworks,
    objective: Contrastive,
    settings: FitSettings,
    validation: tuple[WeightBatch, Contrastive] | None,
    made_of: Mapping[str, Any] | None,
    processes: int,
) -> Fingerprint:
    """Return the fingerprint of a training without labels; see :func:`sne_fast.training.fingerprint.of_training`."""
    clusters = None
    if networks.clusters is not None:
        numbers = {cluster: k for k, cluster in enumerate(dict.fromkeys(networks.clusters))}
        clusters = of_values(torch.tensor([numbers[cluster] for cluster in networks.clusters]))
    shapes = {name: list(p.shape) for name, p in model.state_dict().items()}
    return {
        "networks": of_batch(networks.batch),
        "clusters": clusters,
        "augmentation": None,
        "validation networks": None if validation is None else of_batch(validation[0]),
        "objective": objective.described,
        "validation objective": None if validation is None else validation[1].described,
        "views": of_object(objective.views),
        "validation views": None if validation is None else of_object(validation[1].views),
        SETTINGS: {
            **{k: v for k, v in dataclasses.asdict(settings).items() if k not in CONTINUED},
            "processes times accumulate": processes * settings.accumulate,
        },
        "model": {"encoder": of_config(model.encoder.config), "parameters": shapes},
        **({} if made_of is None else {"made of": dict(made_of)}),
    }

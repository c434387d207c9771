"""The job of `sne-fast train --objective contrastive`: train an encoder on the networks of a zoo, without labels."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..atomic_files import write_json
from ..data.batch import WeightBatch
from ..data.weight_budgets import batches_by_weights
from ..nn.encoder import SNE
from ..reports.terminal import for_progress, progress, say
from ..symmetry import Symmetry, SymmetryError
from ..training.calibration import calibrate
from ..training.contrastive import Contrastive, ContrastiveModel, linear_probe
from ..training.contrastive_fit import fit_contrastive
from ..training.distributed import World
from ..training.networks import READ_WEIGHTS
from ..training.progress import CsvLog, Log, TensorBoardLog
from ..training.settings import FitSettings, History
from ..training.threads import torch_threads
from ..training.views import Views
from ..zoo.splits import split_zoo
from ..zoo.symmetries import symmetries_of
from ..zoo.table import Zoo
from .run_folder import RunFolder
from .settings import TrainSettings

if TYPE_CHECKING:
    from rich.console import Console

PROBED = ("family", "dataset", "trained_steps", "test_accuracy")
"""Columns that linear probes predict if the zoo has them and no others are asked for."""
_PROBE_EVERY = 5


def pretrain(
    settings: TrainSettings,
    fit_settings: FitSettings,
    zoo: Zoo,
    device: torch.device,
    console: Console,
    world: World,
    about: Mapping[str, Any],
) -> dict[str, Any]:
    """Train an encoder without labels, and write `encoder/`, `recipe.json`, `metrics.json` and the log to a folder.

    Of a zoo with the column `root`, as :func:`sne_fast.zoo.make_family_zoo` makes it, networks of one root are no
    negatives of each other, and stay together when networks are held out. With targets, heads on z learn them too;
    without, an encoder with statistics is calibrated in the end, for search. `about` is recorded in
    `metrics.json` besides.

    Returns:
        The content of `metrics.json`: losses, and how well linear maps of z predict columns of held-out networks.

    Raises:
        KeyError: a target that the zoo does not have.
        ValueError: a folder that holds a training of other networks or settings.
    """
    folder, recipe = RunFolder(settings.out), settings.chosen
    log: Log = TensorBoardLog(folder.tensorboard) if settings.log == "tensorboard" else CsvLog(folder.log)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(settings.seed)
        encoder = SNE(**recipe.encoder)
        encoder.fill_code_gains(recipe.code_gain)
        labels = {name: labels_of(zoo, name) for name in settings.targets}
        outputs = {name: 1 if of.dtype.is_floating_point else 1 + max(0, int(of.max())) for name, of in labels.items()}
        model = ContrastiveModel(encoder, labels=outputs).to(device)
    groups, parts = _groups(zoo), _parts(zoo, settings)
    with progress(console, "packing"):
        batch = encoder.pack(zoo, device="cpu").detach()
    with progress(console, "finding symmetries"):
        symmetries, unknown = _symmetries(zoo)
    if unknown and world.first:
        say(for_progress(console), f"Without permuted views, as symmetries are not known: {unknown}")

    def views_of(rows: list[int]) -> Views:
        return Views(None if symmetries is None else [symmetries[i] for i in rows])

    def objective(rows: list[int]) -> Contrastive:
        own = {name: of[rows] for name, of in labels.items()}
        return Contrastive(
            model,
            views_of(rows),
            groups=groups[rows],
            labels=own,
            max_chunks=settings.max_chunks,
            weights_at_once=READ_WEIGHTS,
        )

    probed = {name: labels_of(zoo, name) for name in settings.targets or PROBED if name in zoo.columns}
    fitted = torch.zeros(len(zoo), dtype=torch.bool)
    fitted[parts["train"]] = True

    def probes() -> dict[str, float]:
        z = _encoded(encoder, batch)
        return {name: linear_probe(z, of, fitted) for name, of in probed.items()}

    def on_epoch(epoch: int, history: History) -> None:
        if not world.first:
            return
        line = f"epoch {epoch + 1}/{recipe.epochs}: loss {history.train_loss[-1]:.4g}"
        if history.validation_loss:
            line += f", unseen {history.validation_loss[-1]:.4g}"
        if probed and (epoch + 1) % _PROBE_EVERY == 0:
            line += ", linear probes " + ", ".join(f"{name} {score:.2f}" for name, score in probes().items())
        say(for_progress(console), f"{line}, {history.weights_per_second / 1e3:.0f}k weights/s")

    rows, watched = parts["train"], parts["validation"]
    clusters = zoo.column("architecture").tolist() if "architecture" in zoo.columns else None
    with ExitStack() as stack:
        stack.enter_context(torch_threads(recipe.threads if device.type == "cpu" else None))
        history = fit_contrastive(
            model,
            batch[rows],
            objective(rows),
            fit_settings,
            clusters=None if clusters is None else [clusters[i] for i in rows],
            validation=(batch[watched], objective(watched)) if len(watched) > 1 else None,
            checkpoint=folder.checkpoint(),
            made_of={"code gain": recipe.code_gain},
            log=log,
            on_epoch=on_epoch,
        )
        calibrated = not settings.targets and recipe.statistics != "none"
        if calibrated:
            calibrate(encoder, batch[rows], views_of(rows), seed=settings.seed)
        metrics: dict[str, Any] = {
            **about,
            "recipe": recipe.values,
            "calibrated": calibrated,
            "networks": {name: len(part) for name, part in parts.items()},
            "weights": batch.num_weights,
            "processes": world.size,
            "history": dataclasses.asdict(history),
            "linear_probes": {name: None if score != score else score for name, score in probes().items()},
        }
    if world.first:
        encoder.save_pretrained(folder.path / "encoder")
        recipe.save(folder.recipe)
        write_json(folder.result(), metrics)
    return metrics


def _encoded(encoder: SNE, batch: WeightBatch) -> Tensor:
    weight, was_training = encoder.sample_parameter, encoder.training
    encoder.eval()
    pieces = batches_by_weights(batch.network_sizes, READ_WEIGHTS)
    with torch.no_grad():
        z = torch.cat([encoder(batch[rows].to(weight.device, weight.dtype)).cpu() for rows in pieces])
    encoder.train(was_training)
    return z


def _groups(zoo: Zoo) -> Tensor:
    """Return a number for each network, the same for networks of one root."""
    if "root" not in zoo.columns:
        return torch.arange(len(zoo))
    roots = zoo.column("root").tolist()
    numbers = {root: k for k, root in enumerate(dict.fromkeys(roots))}
    return torch.tensor([numbers[root] for root in roots])


def _families(zoo: Zoo) -> Tensor:
    """Return a number for each network, the same for networks of one root, and for roots of one recipe."""
    if "recipe" not in zoo.columns:
        return _groups(zoo)
    recipes = dict(zip(zoo.column("name"), zoo.column("recipe"), strict=True))
    own = [recipes.get(root, root) for root in zoo.column("root")]
    numbers = {recipe: k for k, recipe in enumerate(dict.fromkeys(own))}
    return torch.tensor([numbers[recipe] for recipe in own])


def _parts(zoo: Zoo, settings: TrainSettings) -> dict[str, list[int]]:
    """Return the networks that are trained on and those that are held out, a tenth, whole families together."""
    if settings.split is not None or "root" not in zoo.columns:
        parts = split_zoo(zoo, settings.split, settings.seed)
        return {"train": parts["train"], "validation": sorted([*parts["validation"], *parts["test"]])}
    groups = _families(zoo)
    count = int(groups.max()) + 1
    order = torch.randperm(count, generator=torch.Generator().manual_seed(settings.seed))
    held = torch.zeros(count, dtype=torch.bool)
    held[order[: max(1, count // 10)]] = count > 1
    found = held[groups]
    return {"train": (~found).nonzero()[:, 0].tolist(), "validation": found.nonzero()[:, 0].tolist()}


def labels_of(zoo: Zoo, name: str) -> Tensor:
    """Return a column as normalised numbers, NaN where one is not known, or as classes, -1 where one is not known."""
    values = zoo.column(name)
    if values.dtype.kind == "f":
        numbers = torch.from_numpy(values).float()
        known = numbers[~numbers.isnan()]
        spread = known.std(unbiased=False).clamp_min(1e-12) if len(known) else torch.ones(())
        return (numbers - known.mean()) / spread
    classes = sorted({str(value) for value in values if value is not None})
    return torch.tensor([-1 if value is None else classes.index(str(value)) for value in values])


def _symmetries(zoo: Zoo) -> tuple[list[Symmetry] | None, str]:
    """Return the symmetry of every network, or None and the reason."""
    try:
        return symmetries_of(zoo), ""
    except SymmetryError as error:
        return None, str(error)

"""The job of `sne-fast train`: train a predictor on columns of a zoo, evaluate it, write everything to one folder."""

from __future__ import annotations

import dataclasses
import os
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..atomic_files import write_json
from ..data.batch import WeightBatch
from ..extras import require
from ..free_memory import parse_bytes
from ..reports.files import distinct_columns, write_csv
from ..reports.terminal import for_progress, progress, say
from ..symmetry import Symmetry, SymmetryError
from ..training.distributed import World, processes
from ..training.loop import fit
from ..training.prediction import predict
from ..training.progress import CsvLog, Log, TensorBoardLog
from ..training.recipe_predictors import augmentation_of, make_predictor, preparation_of
from ..training.settings import FitSettings, History
from ..training.threads import torch_threads
from ..zoo.checkpoint_folder import load_checkpoints
from ..zoo.index import INDEX
from ..zoo.splits import missing_targets, read_targets, split_zoo
from ..zoo.symmetries import symmetries_of
from ..zoo.table import FileSource, Zoo
from .comparisons import STACKED
from .pretrain import pretrain
from .run_folder import RunFolder
from .settings import TrainSettings
from .stacking import FILE as TREES
from .stacking import StackedPredictor
from .stream_baselines import stream_baselines
from .train_networks import TrainNetworks, memory_limit, why_streamed
from .train_report import baselines, evaluate, write_plots

if TYPE_CHECKING:
    from rich.console import Console

TABLE = "index.csv"
"""The table of a folder of checkpoints."""


def train(settings: TrainSettings, console: Console) -> dict[str, Any]:
    """Train, evaluate on the test networks, and write everything to one folder.

    It holds `predictor/`, `recipe.json`, `metrics.json`, `predictions.csv`, the log and, if matplotlib is installed,
    `learning-curve.png` and a plot of predicted against true values.

    A zoo that needs more than `settings.max_memory` is read in every epoch; then boosted trees are fitted to a sample
    of a large one, and `settings.stack` is refused.

    After an interruption the same settings resume from `fit.pt` in `settings.out`. Under `torchrun` the processes
    share each batch. The contrastive objective has a job of its own, see :func:`sne_fast.tasks.pretrain.pretrain`.

    Returns:
        The content of `metrics.json`.

    Raises:
        KeyError: a column that the zoo does not have.
        ModuleNotFoundError: scipy is missing, TensorBoard for its log, or scikit-learn for the stack.
        ValueError: columns that do not fit the loss, a split without networks to train or test, or a folder that holds
            a training of other networks, targets or settings.
        BlockingIOError: another process trains into the folder.
        OSError: the folder cannot be written.
    """
    fit_settings = settings.chosen.fit_settings(
        settings.seed, settings.amp, settings.buckets or settings.capture, settings.capture
    )
    contrastive = settings.objective == "contrastive"
    if settings.loss != "cross_entropy" and not contrastive:
        require("scipy", extra="demo", why="train")
    if settings.stack:
        require("sklearn", extra="demo", why="train --stack")
    if settings.log == "tensorboard":
        require("tensorboard", extra="tensorboard", why="train --log tensorboard")
    with processes() as world, ExitStack() as stack:
        world.share_error(_enter(RunFolder(settings.out), stack) if world.first else None)
        if contrastive:
            zoo, left_out = _open(settings)
            about = {"command": _record(settings), "left_out": left_out}
            return pretrain(settings, fit_settings, zoo, _device(settings.device), console, world, about)
        return _train(settings, fit_settings, console, world)


def _enter(folder: RunFolder, stack: ExitStack) -> Exception | None:
    """Hold the folder until the stack ends, or return why it cannot be written."""
    try:
        stack.enter_context(folder.held("train"))
        folder.check_outputs("train")
    except OSError as error:
        return error
    return None


def _train(settings: TrainSettings, fit_settings: FitSettings, console: Console, world: World) -> dict[str, Any]:
    folder, recipe = RunFolder(settings.out), settings.chosen
    log: Log = TensorBoardLog(folder.tensorboard) if settings.log == "tensorboard" else CsvLog(folder.log)
    zoo, left_out = _open(settings)
    if (unlisted := _unlisted(zoo)) and world.first:
        shown = ", ".join(unlisted[:5]) + (", ..." if len(unlisted) > 5 else "")
        say(for_progress(console), f"Not in {TABLE}, and not used: {len(unlisted)} checkpoints ({shown})")
    parts = _parts(zoo, settings)
    targets, classes = read_targets(zoo, settings.targets, settings.loss)
    names = classes if classes is not None else list(settings.targets)
    limit = None if settings.max_memory is None else parse_bytes(settings.max_memory)
    why = world.of_first(why_streamed(zoo, limit))
    if why is not None:
        if settings.stack:
            remedy = "leave --stack out, or raise --max-memory"
            raise ValueError(f"train: --stack needs all networks in memory. {why}; {remedy}")
        if world.first:
            say(for_progress(console), why)
    symmetries: list[Symmetry] = []
    if recipe.units != "given":
        with progress(console, "finding symmetries"):
            symmetries = _symmetries(zoo, recipe.units)
    with progress(console, "packing"):
        networks = TrainNetworks(
            zoo, targets, recipe, in_memory=why is None, max_memory=memory_limit(limit), workers=settings.workers
        )
        preparation = preparation_of(recipe, *networks.kinds(symmetries))
    predictor = make_predictor(
        recipe,
        names,
        transform=settings.transform,
        loss=settings.loss,
        preparation=preparation,
        seed=settings.seed,
    ).to(_device(settings.device))

    def on_epoch(epoch: int, history: History) -> None:
        if world.first:
            unseen = f", unseen {history.validation_loss[-1]:.4g}" if history.validation_loss else ""
            say(
                for_progress(console),
                f"epoch {epoch + 1}/{recipe.epochs}: loss {history.train_loss[-1]:.4g}{unseen}, "
                f"{history.weights_per_second / 1e3:.0f}k weights/s",
            )

    rows, watched = parts["train"], parts["validation"]
    with torch_threads(recipe.threads if predictor.target_mean.device.type == "cpu" else None):
        history = fit(
            predictor,
            *networks.part(rows, predictor),
            fit_settings,
            validation=_validation(networks.part(watched, predictor)) if watched else None,
            augment=augmentation_of(recipe, [symmetries[i] for i in rows] if symmetries else [], predictor.preparation),
            checkpoint=folder.checkpoint(),
            made_of={"code gain": recipe.code_gain},
            log=log,
            on_epoch=on_epoch,
        )
    test = parts["test"]
    tested = networks.part(test, predictor)[0]
    values = predict(predictor, tested)[0].cpu()
    metrics: dict[str, Any] = {
        "command": _record(settings),
        "recipe": recipe.values,
        "networks": {name: len(part) for name, part in parts.items()},
        "left_out": left_out,
        "weights": networks.weights,
        "read": "in every epoch" if networks.batch is None else "once",
        "processes": world.size,
        "history": dataclasses.asdict(history),
        "test": evaluate(values, targets[test], names, classes is not None),
    }
    if world.first:
        predictor.save_pretrained(folder.predictor())
        recipe.save(folder.recipe)
        for old in folder.predictor().glob(TREES.format("*")):
            old.unlink()  # of an earlier call with the stack
        batch, known = networks.batch, [*rows, *watched]
        if batch is None:
            logit = settings.transform == "logit" or settings.loss == "bce"
            streamed = networks.part(known, predictor)[0], tested
            others = stream_baselines(*streamed, logit=logit, seed=settings.seed, classes=classes)
        else:
            others = {name: of[test] for name, of in baselines(batch, targets, parts, settings, classes).items()}
            if settings.stack:
                stacked = StackedPredictor.fit(predictor, batch, targets, rows=known, seed=settings.seed)
                stacked.save_pretrained(folder.predictor())
                others[STACKED] = stacked(batch[test])
        metrics["baselines"] = {
            name: evaluate(found, targets[test], names, classes is not None) for name, found in others.items()
        }
        write_json(folder.result(), metrics)
        held_out = zoo[test]
        write_csv(
            folder.predictions,
            distinct_columns(["name", *settings.targets, *(f"predicted {name}" for name in names)]),
            [
                (name, *(held_out.rows[i][t] for t in settings.targets), *values[i].tolist())
                for i, name in enumerate(held_out.column("name"))
            ],
        )
        write_plots(folder, history, values, targets[test], names, classes is not None)
    return metrics


def _parts(zoo: Zoo, settings: TrainSettings) -> dict[str, list[int]]:
    """Return the positions of the networks of each part of the split.

    Where nothing is chosen by the validation loss, and no column keeps them apart, validation networks train too.
    """
    parts = split_zoo(zoo, settings.split, settings.seed)
    recipe = settings.chosen
    if settings.split is None and not recipe.keep_best and recipe.patience is None:
        parts = {**parts, "train": sorted([*parts["train"], *parts["validation"]]), "validation": []}
    return parts


def _validation(networks: tuple[Any, Tensor]) -> Any:
    """Return validation networks as `fit` takes them, a stream without its targets."""
    return networks if isinstance(networks[0], WeightBatch) else networks[0]


def _open(settings: TrainSettings) -> tuple[Zoo, list[str]]:
    """Return the zoo, and the names of the networks that were left out because they lack a target.

    Raises:
        FileNotFoundError: neither a zoo nor a folder of checkpoints with a table.
        ValueError: no network has all targets.
    """
    folder = settings.zoo
    if (folder / TABLE).is_file() and not (folder / INDEX).is_file():
        zoo = load_checkpoints(folder, TABLE, targets=settings.targets)
    elif (folder / INDEX).is_file():
        zoo = Zoo.open(folder)
    else:
        raise FileNotFoundError(
            f"train: {str(folder)!r} holds neither a zoo ({INDEX}) nor a table of checkpoints ({TABLE})"
        )
    if not settings.drop_missing:
        return zoo, []
    absent = set(missing_targets(zoo, settings.targets))
    kept = [i for i in range(len(zoo)) if i not in absent]
    if not kept:
        raise ValueError(f"train: no network of {str(folder)!r} has a value of {' and '.join(settings.targets)}")
    return zoo[kept], [str(zoo.rows[i]["name"]) for i in sorted(absent)]


def _unlisted(zoo: Zoo) -> list[str]:
    """Return the checkpoints in the folder of a zoo of files that its table does not name, relative to the folder."""
    if zoo.folder is None or not isinstance(zoo.source, FileSource):
        return []
    listed = {Path(file).resolve() for file in zoo.source.files}
    endings = {file.suffix for file in listed}
    found = (file for file in sorted(zoo.folder.rglob("*")) if file.suffix in endings and file.is_file())
    return [str(file.relative_to(zoo.folder)) for file in found if file.resolve() not in listed]


def _symmetries(zoo: Zoo, units: str) -> list[Symmetry]:
    """Return the symmetry of every network.

    Raises:
        SymmetryError: one that is not known; the message says what to do.
    """
    try:
        return symmetries_of(zoo)
    except SymmetryError as error:
        raise SymmetryError(
            f"train: units {units!r} need the networks' symmetries, and they are not known: {error}; use --units given"
        ) from error


def _record(settings: TrainSettings) -> dict[str, Any]:
    """Return the options as `metrics.json` records them."""
    return {k: str(v) if isinstance(v, Path) else v for k, v in vars(settings).items()}


def _device(name: str) -> torch.device:
    """Return the device of that name; under `torchrun` "cuda" is each process's own GPU."""
    device = torch.device(name)
    if device.type == "cuda" and device.index is None and "LOCAL_RANK" in os.environ:
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    return device

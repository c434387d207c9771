"""The job of `sne-fast train`: train a predictor on columns of a zoo, evaluate it, write everything to one folder."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..atomic_files import write_json
from ..extras import require
from ..nn.encoder import SNE
from ..nn.predictor import Predictor
from ..nn.stages import INITIAL_CODE_GAIN
from ..reports.files import distinct_columns, write_csv
from ..reports.measures import measures, why_undefined
from ..reports.terminal import for_progress, progress, say
from ..symmetry import PermutationAugmentation
from ..training.distributed import World, processes
from ..training.loop import fit, predict
from ..training.progress import CsvLog, Log, TensorBoardLog
from ..training.recipes import scale_of_encoder, scale_of_predictor
from ..training.settings import FitSettings, History
from ..zoo.splits import read_targets, split_zoo
from ..zoo.symmetries import symmetries_of
from ..zoo.table import Zoo
from .run_folder import RunFolder
from .settings import TrainSettings

if TYPE_CHECKING:
    from rich.console import Console


def train(settings: TrainSettings, console: Console) -> dict[str, Any]:
    """Train, evaluate on the test networks, and write `predictor/`, `metrics.json`, `predictions.csv` and the log.

    After an interruption the same settings resume from `fit.pt` in `settings.out`. Under `torchrun` the processes
    share each batch.

    Returns:
        The content of `metrics.json`.

    Raises:
        KeyError: a column that the zoo does not have.
        ModuleNotFoundError: scipy is missing, or TensorBoard for its log.
        ValueError: columns that do not fit the loss, a split without networks to train or test, or a folder that holds
            a training of other networks, targets or settings.
        BlockingIOError: another process trains into the folder.
        OSError: the folder cannot be written.
    """
    fit_settings = FitSettings(**settings.fit)
    if settings.loss != "cross_entropy":
        require("scipy", extra="demo", why="train")
    if settings.log == "tensorboard":
        require("tensorboard", extra="tensorboard", why="train --log tensorboard")
    with processes() as world, ExitStack() as stack:
        world.share_error(_enter(RunFolder(settings.out), stack) if world.first else None)
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
    folder = RunFolder(settings.out)
    log: Log = TensorBoardLog(folder.tensorboard) if settings.log == "tensorboard" else CsvLog(folder.log)
    zoo = Zoo.open(settings.zoo)
    parts = split_zoo(zoo, settings.split, settings.seed)
    targets, classes = read_targets(zoo, settings.targets, settings.loss)
    names = classes if classes is not None else list(settings.targets)
    predictor = _predictor(settings, names)
    code_gain = INITIAL_CODE_GAIN if settings.code_gain is None else settings.code_gain
    with progress(console, "packing"):
        batch = predictor.pack(zoo, device="cpu")
    augment = None
    if settings.permute:
        with progress(console, "finding symmetries"):
            augment = PermutationAugmentation(symmetries_of(zoo[parts["train"]]))

    def on_epoch(epoch: int, history: History) -> None:
        if world.first:
            unseen = f", unseen {history.validation_loss[-1]:.4g}" if history.validation_loss else ""
            say(
                for_progress(console),
                f"epoch {epoch + 1}/{settings.epochs}: loss {history.train_loss[-1]:.4g}{unseen}, "
                f"{history.weights_per_second / 1e3:.0f}k weights/s",
            )

    rows, watched = parts["train"], parts["validation"]
    history = fit(
        predictor, batch[rows], targets[rows], fit_settings,
        validation=(batch[watched], targets[watched]) if watched else None,
        augment=augment, checkpoint=folder.checkpoint(), made_of={"code gain": code_gain}, log=log, on_epoch=on_epoch,
    )  # fmt: skip
    test = parts["test"]
    values = predict(predictor, batch[test])[0].cpu()
    metrics: dict[str, Any] = {
        "command": _record(settings, fit_settings),
        "networks": {name: len(part) for name, part in parts.items()},
        "weights": batch.num_weights,
        "processes": world.size,
        "history": dataclasses.asdict(history),
        "test": evaluate(values, targets[test], names, classes is not None),
    }
    if world.first:
        predictor.save_pretrained(folder.predictor())
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
    return metrics


def _predictor(settings: TrainSettings, names: Sequence[str]) -> Predictor:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        encoder = SNE(**settings.encoder, scale=scale_of_encoder(settings.input_scale))
        if settings.code_gain is not None:
            encoder.fill_code_gains(settings.code_gain)
        return Predictor(
            encoder,
            len(names),
            settings.head,
            names,
            settings.transform,
            settings.loss,
            scale_of_predictor(settings.input_scale),
        ).to(_device(settings.device))


def _record(settings: TrainSettings, fit_settings: FitSettings) -> dict[str, Any]:
    """Return the settings as `metrics.json` records them, those of the encoder and of the loop in groups."""
    groups = {"encoder": settings.encoder, "fit": dataclasses.asdict(fit_settings)}
    grouped = {name for group in groups.values() for name in group}
    own = {name: value for name, value in vars(settings).items() if name not in grouped}
    return {**{k: str(v) if isinstance(v, Path) else v for k, v in own.items()}, **groups}


def evaluate(values: Tensor, targets: Tensor, names: Sequence[str], classes: bool) -> dict[str, Any]:
    """Return the accuracy of class predictions, or by target Kendall's tau, R2, MAE and RMSE.

    Where some of these are None, "undefined" says which and why.
    """
    if classes:
        return {"accuracy": (values.argmax(1) == targets).double().mean().item()}
    found: dict[str, Any] = {}
    for i, name in enumerate(names):
        pair = values[:, i].numpy(), targets[:, i].numpy()
        undefined = why_undefined(*pair)
        found[name] = {**measures(*pair), **({"undefined": undefined} if undefined else {})}
    return found


def _device(name: str) -> torch.device:
    """Return the device of that name; under `torchrun` "cuda" is each process's own GPU."""
    device = torch.device(name)
    if device.type == "cuda" and device.index is None and "LOCAL_RANK" in os.environ:
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    return device

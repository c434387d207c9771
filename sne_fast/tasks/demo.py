"""The main job, end to end: a zoo of digit classifiers, and a predictor of their accuracy from their weights."""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from ..atomic_files import write_json
from ..backends.cpu import library
from ..data.batch import WeightBatch
from ..data.weight_budgets import stratified_split
from ..nn.predictor import Predictor
from ..reports.files import write_csv
from ..reports.machine import machine
from ..reports.measures import COLUMNS, measure_rows, measures
from ..reports.plots import embedding_map, scatter
from ..reports.terminal import progress, say, show_table
from ..similarity.layouts import layout
from ..training.loop import fit
from ..training.prediction import predict
from ..training.recipe_predictors import make_predictor
from ..training.settings import History
from ..training.threads import torch_threads
from ..zoo.digits import ARCHITECTURES, make_digits_zoo
from ..zoo.splits import PARTS
from ..zoo.table import Zoo
from .baselines import Problem, Statistics
from .comparisons import STACKED
from .definitions import reuse
from .requirements import check_extra
from .run_folder import RunFolder
from .settings import Demo
from .stacking import StackedPredictor

TARGET = "test_accuracy"
SHARES = (0.75, 0.05, 0.20)
"""Shares of the networks that train the predictor, that choose its epoch, and that are held out."""
SNE_NAME, STATISTICS_NAME, MEAN_NAME = "SNE", Statistics().name, "mean of the training networks"


def run(out: str | os.PathLike[str], settings: Demo | None = None, console: Console | None = None) -> dict[str, Any]:
    """Make the zoo, train the predictor, report, and write everything into a folder.

    After an interruption a call with the same settings resumes: finished groups of the zoo and epochs of the training
    are not made again.

    Writes `zoo/` (`Zoo.open` reads it), `predictor/` (`Predictor.from_pretrained` reads it),
    `metrics.json`, `predictions.csv` (held-out networks), `scatter.png` and `embedding.png`.

    Args:
        out: a folder that does not exist yet, is empty, or holds an interrupted run of the same settings.

    Returns:
        The content of `metrics.json`.

    Raises:
        BlockingIOError: another process writes into the folder.
        FileExistsError: the folder is not empty.
        ModuleNotFoundError: scikit-learn, scipy, matplotlib or pyarrow is missing.
        ValueError: invalid settings, or an interrupted run of other ones.
    """
    check_extra("the demo")
    settings = settings or Demo()
    console = console or Console()
    folder = RunFolder(out)
    _check(settings)
    # Made before the folder: an encoder that cannot be made leaves none.
    predictor = make_predictor(settings.recipe, ["accuracy"], transform="logit", seed=settings.seed)
    if folder.in_use():
        raise FileExistsError(f"demo: {str(folder)!r} exists and is not an empty folder; choose another or remove it")
    with folder.held("demo"):
        return _run(folder, predictor, settings, console)


def _run(folder: RunFolder, predictor: Predictor, settings: Demo, console: Console) -> dict[str, Any]:
    folder.begin({"settings": settings.values, "torch": torch.__version__}, "demo")
    clock = Clock()

    with clock("zoo"):
        zoo = _make_zoo(folder.zoo, settings, console)
    accuracy = zoo.column(TARGET)
    architectures = [str(name) for name in zoo.column("architecture")]
    parts = dict(zip(PARTS, stratified_split(architectures, SHARES, settings.seed), strict=True))
    with clock("packing"):
        batch = predictor.pack(zoo)
    with clock("training"), torch_threads(settings.recipe.threads):
        history = _train(predictor, batch, accuracy, parts, settings, folder, console)
        predictor.save_pretrained(folder.predictor())
    with clock("report"):
        results = _report(folder, predictor, batch, zoo, parts, settings, console)

    metrics = {
        "settings": settings.values,
        "networks": {"all": len(zoo), **{name: len(rows) for name, rows in parts.items()}},
        "weights": batch.num_weights,
        "held_out": results,
        "train_loss": history.train_loss,
        "validation_loss": history.validation_loss,
        "weights_per_second": history.weights_per_second,
        "seconds": clock.seconds(),
        "machine": machine(),
    }
    write_json(folder.result(), metrics)
    folder.end()
    if library.reasons():
        why = "; ".join(library.reasons())
        say(console, "", f"Without the C++ backend all this took several times longer: {why}")
    say(
        console,
        "",
        f"SNE trained at {history.weights_per_second / 1e3:.0f}k weights/s; {clock.line()}",
        f"Written to {folder}: zoo/, predictor/, metrics.json, predictions.csv, scatter.png, embedding.png",
        f"Try: sne-fast predict --model {shlex.join([str(folder.predictor()), str(zoo[parts['test'][0]])])}",
    )
    return metrics


def _check(settings: Demo) -> None:
    """Check the settings before any work is done.

    Raises:
        ValueError: too few networks.
    """
    least = 4 * len(ARCHITECTURES)
    if settings.networks < least:
        raise ValueError(f"demo: networks must be at least {least}, four per architecture, got {settings.networks}")


class Clock:
    """Wall time of the stages of the demo: `with clock("zoo"): ...`."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._stages: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Measure the time that the `with` block takes as that of a stage."""
        begin = time.perf_counter()
        yield
        self._stages[stage] = time.perf_counter() - begin

    def seconds(self) -> dict[str, float]:
        """Return the seconds of each stage, and as "all" those since the clock was made."""
        return {**self._stages, "all": time.perf_counter() - self._start}

    def line(self) -> str:
        """Return the seconds as a line of text."""
        seconds = self.seconds()
        parts = ", ".join(f"{name} {value:.1f} s" for name, value in seconds.items() if name != "all")
        return f"{seconds['all']:.1f} s in all ({parts})"


def _make_zoo(folder: Path, settings: Demo, console: Console) -> Zoo:
    about = {"networks": settings.networks, "seed": settings.seed, "max_steps": settings.max_steps}
    with progress(console, f"1. Training {settings.networks} digit classifiers", bar=True, stays=True) as update:
        zoo = reuse(folder, about) or make_digits_zoo(
            folder, settings.networks, seed=settings.seed, max_steps=settings.max_steps, on_progress=update
        )
    accuracy = zoo.column(TARGET)
    say(
        console,
        f"   {len(set(zoo.column('architecture')))} architectures; accuracy on held-out digits from "
        f"{accuracy.min():.1%} to {accuracy.max():.1%}, median {sorted(accuracy)[len(zoo) // 2]:.1%}",
    )
    return zoo


def _train(
    predictor: Predictor,
    batch: WeightBatch,
    accuracy: np.ndarray,
    parts: dict[str, list[int]],
    settings: Demo,
    folder: RunFolder,
    console: Console,
) -> History:
    targets = torch.tensor(accuracy, dtype=torch.get_default_dtype())[:, None]
    train, validation = parts["train"], parts["validation"]
    per_epoch = int(batch.network_sizes[train].sum())
    with progress(console, f"2. Training SNE on {len(train)} of them", bar=True, stays=True) as update:
        epochs_done, note = 0, ""

        def on_batch(done: int) -> None:
            update((epochs_done + done / per_epoch) / settings.recipe.epochs, note)

        def on_epoch(epoch: int, history: History) -> None:
            nonlocal epochs_done, note
            epochs_done = epoch + 1
            note = f"loss {history.train_loss[-1]:.2f}, unseen {history.validation_loss[-1]:.2f}"
            update(epochs_done / settings.recipe.epochs, note)

        return fit(
            predictor,
            batch[train],
            targets[train],
            settings.recipe.fit_settings(settings.seed),
            validation=(batch[validation], targets[validation]),
            checkpoint=folder.checkpoint(),
            on_batch=on_batch,
            on_epoch=on_epoch,
        )


def _report(
    folder: RunFolder,
    predictor: Predictor,
    batch: WeightBatch,
    zoo: Zoo,
    parts: dict[str, list[int]],
    settings: Demo,
    console: Console,
) -> dict[str, Any]:
    accuracy, architectures = zoo.column(TARGET), [str(name) for name in zoo.column("architecture")]
    test, known = parts["test"], parts["train"] + parts["validation"]
    with progress(console, "3. Evaluating on held-out networks"):
        values, z = predict(predictor, batch)
        # The baselines may fit the validation networks too, since the predictor used them to choose its epoch.
        everything = {
            SNE_NAME: values[:, 0].double().cpu().numpy(),
            STACKED: StackedPredictor.fit(
                predictor, batch, torch.from_numpy(accuracy)[:, None], rows=known, seed=settings.seed
            )(batch)[:, 0]
            .double()
            .cpu()
            .numpy(),
            STATISTICS_NAME: Statistics().fit_predict(Problem(batch, accuracy, known, [], settings.seed, logit=True)),
            MEAN_NAME: np.full(len(accuracy), accuracy[known].mean()),
        }
        held_out = {name: predicted[test] for name, predicted in everything.items()}
        results: dict[str, Any] = {name: measures(p, accuracy[test]) for name, p in held_out.items()}
        groups = [architectures[i] for i in test]
        shown = {name: held_out[name] for name in (SNE_NAME, STATISTICS_NAME)}
        scatter(folder.plot("scatter"), accuracy[test], shown, groups, results)
        places = layout(z, settings.seed)
        embedding_map(folder.plot("embedding"), places, accuracy, architectures, test)
    say(console, "3. Evaluated on held-out networks", "")
    show_table(console, COLUMNS, measure_rows(results), title=f"Accuracy of {len(test)} held-out networks")
    names = [zoo.rows[i]["name"] for i in test]
    write_csv(
        folder.predictions,
        ["name", "architecture", "accuracy", "predicted", "layer_statistics"],
        list(zip(names, groups, accuracy[test], held_out[SNE_NAME], held_out[STATISTICS_NAME], strict=True)),
    )
    by_architecture = {}
    for name in sorted(set(groups)):
        rows = np.array([group == name for group in groups])
        by_architecture[name] = {
            "networks": int(rows.sum()),
            "mae": float(abs(held_out[SNE_NAME] - accuracy[test])[rows].mean()),
        }
    return {"models": results, "sne_by_architecture": by_architecture}

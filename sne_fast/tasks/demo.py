"""The main job, end to end: a zoo of digit classifiers, and a predictor of their accuracy from their weights."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..extras import require
from ..reports import reporting as report

if TYPE_CHECKING:
    import numpy as np
    import torch
    from rich.console import Console
    from rich.progress import Progress

    from ..data.batch import WeightBatch
    from ..nn.predictor import Predictor
    from ..training import FitSettings, History
    from ..zoo import Zoo

TARGET = "test_accuracy"
SHARES = (0.75, 0.05, 0.20)  # training, watched while training, held out
CODE_GAIN = 1.0
SNE_NAME, STATISTICS_NAME, MEAN_NAME = "SNE", "layer statistics, boosted trees", "mean of the training networks"


@dataclass(frozen=True)
class Demo:
    """Settings of the demo; `max_steps` is the longest training of a network of the zoo."""

    seed: int = 0
    networks: int = 1440
    max_steps: int = 600
    hidden_dim: int = 32
    epochs: int = 20
    lr: float = 1e-3
    batch_weights: int = 12_000

    @classmethod
    def quick(cls, seed: int = 0) -> Demo:
        """A small run that shows the whole path rather than the quality."""
        return cls(seed=seed, networks=180, max_steps=300, epochs=24, batch_weights=6_000)

    def replace(self, **changes: Any) -> Demo:
        """The same settings with some changed."""
        return dataclasses.replace(self, **changes)


def run(out: str | os.PathLike[str], settings: Demo | None = None, console: Console | None = None) -> dict[str, Any]:
    """Make the zoo, train the predictor, report, and write everything into a folder.

    Writes `zoo/` (`Zoo.open` reads it), `predictor/` (`Predictor.from_pretrained` reads it),
    `metrics.json`, `predictions.csv` (held-out networks), `scatter.png` and `embedding.png`.

    Args:
        out: a folder that does not exist yet or is empty.

    Returns:
        What `metrics.json` holds.

    Raises:
        FileExistsError: the folder holds something.
        ModuleNotFoundError: scikit-learn, scipy or matplotlib is missing.
        ValueError: settings that do not work.
    """
    check_extra()
    from rich.console import Console

    from ..backends.cpu import library
    from ..training import stratified_split
    from ..training.threads import torch_threads

    settings = settings or Demo()
    console = console or Console()
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"demo: {str(out)!r} exists and is not an empty folder; choose another or remove it")
    _check(settings)
    predictor = _predictor(settings)
    clock = Clock()

    with clock("zoo"):
        zoo = _make_zoo(out / "zoo", settings, console)
    accuracy = zoo.column(TARGET)
    architectures = [str(name) for name in zoo.column("architecture")]
    parts = dict(
        zip(("train", "validation", "test"), stratified_split(architectures, SHARES, settings.seed), strict=True)
    )
    with clock("packing"):
        batch = predictor.encoder.pack(zoo)
    # Batches are small, and most of a step's thousand operations too small to share: two threads that sleep while they
    # wait (see cli.main) met 330 times a step and trained at 287k weights/s, one at 431k.
    with clock("training"), torch_threads(1):
        history = _train(predictor, batch, accuracy, parts, settings, console)
        predictor.save_pretrained(out / "predictor")
    with clock("report"):
        results = _report(out, predictor, batch, zoo, parts, settings, console)

    metrics = {
        "settings": dataclasses.asdict(settings),
        "networks": {"all": len(zoo), **{name: len(rows) for name, rows in parts.items()}},
        "weights": batch.num_weights,
        "held_out": results,
        "train_loss": history.train_loss,
        "validation_loss": history.validation_loss,
        "weights_per_second": history.weights_per_second,
        "seconds": clock.seconds(),
        "machine": report.machine(),
    }
    report.write_json(out / "metrics.json", metrics)
    if library.reasons():
        console.print(f"\nWithout the C++ backend all this took several times longer: {'; '.join(library.reasons())}")
    console.print(
        f"\nSNE trained at {history.weights_per_second / 1e3:.0f}k weights/s; {clock.line()}\n"
        f"Written to {out}: zoo/, predictor/, metrics.json, predictions.csv, scatter.png, embedding.png\n"
        f"Try: sne-fast predict --model {out / 'predictor'} {zoo[parts['test'][0]]}",
        highlight=False,
        soft_wrap=True,
    )
    return metrics


def check_extra() -> None:
    """Everything the demo imports is there, said before any work is done."""
    require("sklearn", "scipy", "matplotlib", "pyarrow", extra="demo", why="the demo")


def _check(settings: Demo) -> None:
    """Settings are checked before the zoo is trained, not after."""
    from ..zoo.digits import ARCHITECTURES

    least = 4 * len(ARCHITECTURES)
    if settings.networks < least:
        raise ValueError(f"demo: networks must be at least {least}, four per architecture, got {settings.networks}")
    _fit_settings(settings)


def _fit_settings(settings: Demo) -> FitSettings:
    from ..training import FitSettings

    return FitSettings(epochs=settings.epochs, lr=settings.lr, batch_weights=settings.batch_weights, seed=settings.seed)


class Clock:
    """Wall time of the demo's stages: `with clock("zoo"): ...`."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._stages: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self._stages[stage] = time.perf_counter() - begin

    def seconds(self) -> dict[str, float]:
        """Seconds of each stage and of everything so far."""
        return {**self._stages, "all": time.perf_counter() - self._start}

    def line(self) -> str:
        """The same in words."""
        seconds = self.seconds()
        parts = ", ".join(f"{name} {value:.1f} s" for name, value in seconds.items() if name != "all")
        return f"{seconds['all']:.1f} s in all ({parts})"


def _predictor(settings: Demo) -> Predictor:
    import torch

    from ..nn.encoder import SNE
    from ..nn.predictor import Predictor

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        encoder = SNE(hidden_dim=settings.hidden_dim)
        # Accuracy shows in how large the weights of which layer are, which SNE learns from its codes. At the gains it
        # starts with, 0.1, tau was lower by 0.05 on both zoos tried.
        encoder.fill_code_gains(CODE_GAIN)
        return Predictor(encoder, 1, (128, 128), target_names=["accuracy"], target_transform="logit")


def _make_zoo(folder: Path, settings: Demo, console: Console) -> Zoo:
    from ..zoo import make_digits_zoo

    with _bar(console) as bar:
        task = bar.add_task(f"1. Training {settings.networks} digit classifiers", total=1.0, note="")
        zoo = make_digits_zoo(
            folder,
            settings.networks,
            seed=settings.seed,
            max_steps=settings.max_steps,
            on_progress=lambda share: bar.update(task, completed=share),
        )
    accuracy = zoo.column(TARGET)
    console.print(
        f"   {len(set(zoo.column('architecture')))} architectures; accuracy on held-out digits from "
        f"{accuracy.min():.1%} to {accuracy.max():.1%}, median {sorted(accuracy)[len(zoo) // 2]:.1%}",
        highlight=False,
    )
    return zoo


def _train(
    predictor: Predictor,
    batch: WeightBatch,
    accuracy: np.ndarray,
    parts: dict[str, list[int]],
    settings: Demo,
    console: Console,
) -> History:
    from ..training import fit, network_sizes

    targets = _targets(accuracy)
    train, validation = parts["train"], parts["validation"]
    per_epoch = int(network_sizes(batch)[train].sum())
    with _bar(console) as bar:
        task = bar.add_task(f"2. Training SNE on {len(train)} of them", total=settings.epochs * per_epoch, note="")
        epochs_done = 0

        def on_batch(done: int) -> None:
            bar.update(task, completed=epochs_done * per_epoch + done)

        def on_epoch(epoch: int, history: History) -> None:
            nonlocal epochs_done
            epochs_done = epoch + 1
            bar.update(task, note=f"loss {history.train_loss[-1]:.2f}, unseen {history.validation_loss[-1]:.2f}")

        return fit(
            predictor,
            batch[train],
            targets[train],
            _fit_settings(settings),
            validation=(batch[validation], targets[validation]),
            on_batch=on_batch,
            on_epoch=on_epoch,
        )


def _report(
    out: Path,
    predictor: Predictor,
    batch: WeightBatch,
    zoo: Zoo,
    parts: dict[str, list[int]],
    settings: Demo,
    console: Console,
) -> dict[str, Any]:
    import numpy as np

    from ..training import predict

    accuracy, architectures = zoo.column(TARGET), [str(name) for name in zoo.column("architecture")]
    test, known = parts["test"], parts["train"] + parts["validation"]
    with console.status("3. Evaluating on held-out networks"):
        values, z = predict(predictor, batch)
        # The baseline may fit the validation networks too, which the predictor used to choose its epoch.
        everything = {
            SNE_NAME: values[:, 0].double().cpu().numpy(),
            STATISTICS_NAME: report.statistics_regression(batch, accuracy, known, settings.seed),
            MEAN_NAME: np.full(len(accuracy), accuracy[known].mean()),
        }
        held_out = {name: predicted[test] for name, predicted in everything.items()}
        results: dict[str, Any] = {name: report.measures(p, accuracy[test]) for name, p in held_out.items()}
        groups = [architectures[i] for i in test]
        report.scatter(
            out / "scatter.png",
            accuracy[test],
            {name: held_out[name] for name in (SNE_NAME, STATISTICS_NAME)},
            groups,
            results,
        )
        report.embedding_map(
            out / "embedding.png", z.double().cpu().numpy(), accuracy, architectures, test, settings.seed
        )
    console.print("3. Evaluated on held-out networks\n")
    console.print(report.table(results, len(test)))
    names = [zoo.rows[i]["name"] for i in test]
    report.write_csv(
        out / "predictions.csv",
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


def _targets(accuracy: np.ndarray) -> torch.Tensor:
    import torch

    return torch.tensor(accuracy, dtype=torch.get_default_dtype())[:, None]


@contextmanager
def _bar(console: Console) -> Iterator[Progress]:
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console) as progress:
        yield progress

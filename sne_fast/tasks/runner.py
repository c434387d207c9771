"""Running a task: each run of a method, seed and training-set size is made once and kept in files of its own."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..atomic_files import to_json, write_json
from ..reports.machine import commit
from ..reports.measures import why_undefined
from ..reports.paired import ABOVE
from ..reports.terminal import progress, say
from ..training.digests import of_values
from ..training.recipe_predictors import augmentation_of
from ..training.recipes import TrainingRecipe
from ..training.threads import torch_threads
from ..zoo.ceilings import accuracy_ceiling
from .baselines import BASELINES, Problem
from .comparisons import test_measures
from .definitions import TASKS, Task
from .networks import Networks
from .report import show_experiment, write_report
from .requirements import check_extra
from .results import check_runs, collect
from .run_folder import Run, RunFolder
from .settings import SEEDS
from .sne_method import train_sne

LINE = ("tau", "r2", "mse", "accuracy", "cross_entropy")
"""Measures in the line that is printed when a run is done."""

if TYPE_CHECKING:
    from rich.console import Console


def run_task(
    name: str,
    out: Path,
    console: Console,
    *,
    seeds: Sequence[int] = SEEDS,
    methods: Sequence[str] = (),
    networks: int | None = None,
    epochs: int | None = None,
    curves: bool = True,
) -> dict[str, Any]:
    """Make the zoos, train and test every method, and write `results.json`, `results.md` and the plots into `out`.

    Runs that are already there are not repeated, and an interrupted training resumes from its last epoch. Calls with
    different seeds or methods may share a folder, one after the other or at once; each reports all runs that are there.

    Args:
        name: of a task in `TASKS`.
        out: the folder of all files, see :class:`sne_fast.tasks.run_folder.RunFolder`.
        seeds: of the split and of all training; the zoos do not depend on them.
        methods: rows of the table, those of SNE by their names ("SNE", ...), the baselines by their keys in
            `BASELINES`; all rows of the task by default.
        networks: number of networks of all zoos; the task's own by default.
        epochs: of SNE; the task's own by default.
        curves: train on shares of the training networks too, for the learning curves of SNE and the baselines.

    Returns:
        The content of `results.json`.

    Raises:
        ValueError: an unknown task or method, or a folder that holds runs of other settings or other networks.
        BlockingIOError: another process makes the same zoo or trains the same run.
        ModuleNotFoundError: scikit-learn, scipy, matplotlib or pyarrow is missing.
    """
    check_extra("the task")
    if name not in TASKS:
        raise ValueError(f"task: name must be one of {', '.join(TASKS)}, got {name!r}")
    task = TASKS[name]
    sne = {row: s if epochs is None else dataclasses.replace(s, epochs=epochs) for row, s in task.sne.items()}
    rows = [*sne, *task.baselines]
    unknown = [method for method in methods if method not in rows]
    if unknown:
        raise ValueError(f"task: methods must be among {', '.join(rows)}, got {', '.join(unknown)}")
    folder, at = RunFolder(out), commit()  # the commit is read now, since the checkout may change while this runs
    with progress(console, "making the zoos") as update:
        zoos = task.zoos(folder.zoos, networks or task.networks, update)
    job = _Job(task, Networks(zoos, task.target, task.classes), sne, folder, console, at, task.sizes if curves else ())
    job.check(list(methods) or rows)
    for run in job.runs(list(methods) or rows, seeds):
        job.make(run)
    for seed in seeds:
        job.measure_ceilings(seed)
    results = collect(name, task, job.data, list(sne), folder)
    write_json(folder.results, results)
    write_report(folder, task, job.data, results)
    for experiment in results["experiments"].values():
        show_experiment(console, experiment)
    return results


@dataclass(frozen=True)
class _Job:
    """A call of `run_task`: what all of its runs share."""

    task: Task
    data: Networks
    sne: Mapping[str, TrainingRecipe]
    folder: RunFolder
    console: Console
    commit: str | None

    sizes: Sequence[float]

    def runs(self, rows: Sequence[str], seeds: Sequence[int]) -> Iterator[Run]:
        """Yield the runs of whole tables, seed by seed, then those of the learning curves, seed by seed.

        Curves are of the first row of SNE and of the baselines.
        """
        for seed in seeds:
            for experiment in self.task.experiments:
                yield from (Run(experiment, row, seed) for row in rows)
        curves = [row for row in rows if row == next(iter(self.sne)) or row in BASELINES]
        for seed in seeds:
            for share in self.sizes:
                for experiment in self.task.experiments:
                    yield from (Run(experiment, row, seed, share) for row in curves)

    def make(self, run: Run) -> None:
        """Train and test what a run asks for, and write its files, unless they are there already.

        Raises:
            ValueError: the files are of other settings.
        """
        settings = self._settings(run)
        parts = self._parts(run)
        asked = self._made_of(run, settings, parts)
        there = self.folder.read_result(run, asked)
        if there is not None and "test" in there:  # a run without is tried again: the missing package may be there now
            return
        self.folder.begin(asked, "task", run)
        clock = time.perf_counter()
        label = f"{run.experiment.name}, {asked['method']}, seed {run.seed}, {len(parts['train'])} networks"
        threads = 1 if settings is None else settings.threads
        found: np.ndarray | None
        encodings: np.ndarray | None
        with progress(self.console, label) as update, torch_threads(threads):
            if settings is not None:
                found, encodings, about = self._train_sne(run, settings, parts, lambda text: update(note=text))
            else:
                found, encodings, about = self._fit_baseline(run, parts)
        about |= {"seconds": time.perf_counter() - clock, "commit": self.commit}
        predicted = None
        if found is not None:
            predicted, true = found[parts["test"]], self.data.targets[parts["test"]]
            about["test"] = test_measures(self.task, predicted, true)
            undefined = None if self.task.classes else why_undefined(predicted, true)
            if undefined:
                about["undefined"] = undefined
        self.folder.write_result(run, {**asked, **about}, predicted, encodings)
        text = "; ".join(about["why_not"]) if "why_not" in about else _line(about["test"])
        say(self.console, f"{label}: {text} ({about['seconds']:.0f} s)")

    def measure_ceilings(self, seed: int) -> None:
        """Write the tau that a perfect predictor of accuracies would reach, unless it is there already."""
        if not self.task.logit or any(zoo.about.get("source") != "classifiers" for zoo in self.data.zoos):
            return
        starts = np.cumsum([0, *(len(zoo) for zoo in self.data.zoos)])
        for experiment in self.task.experiments:
            path = self.folder.ceiling(experiment, seed)
            if path.exists():
                continue
            test = np.asarray(self.data.split(experiment, seed)["test"])
            parts = [
                zoo[(test[(test >= start) & (test < start + len(zoo))] - start).tolist()]
                for zoo, start in zip(self.data.zoos, starts[:-1].tolist(), strict=True)
            ]
            found = accuracy_ceiling(*(part for part in parts if len(part)), threshold=ABOVE)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, {"seed": seed, "test": found, "made_of": self.data.fingerprint})

    def check(self, rows: Sequence[str]) -> None:
        """Check that what the folder holds of some rows is of this call's settings and networks.

        Raises:
            ValueError: a run of others.
        """
        for experiment in self.task.experiments:
            for row in rows:
                settings = self.sne.get(row)
                runs = self.folder.results_of(experiment, row)
                check_runs(runs, self.data, self.folder, _plain(settings) if settings else None)

    def _settings(self, run: Run) -> TrainingRecipe | None:
        """Return the settings of SNE for a run; None for a baseline."""
        settings = self.sne.get(run.method)
        return settings and settings.replace(epochs=self.task.epochs(settings.epochs, run.share))

    def _made_of(self, run: Run, settings: TrainingRecipe | None, parts: Mapping[str, Sequence[int]]) -> dict[str, Any]:
        """Return the part of a run's result that says what it is made of."""
        form = settings or next(iter(self.sne.values()))  # baselines get networks in the form that SNE gets
        sizes = {name: len(part) for name, part in parts.items()}
        return {
            "method": run.method if settings else BASELINES[run.method].name,
            "seed": run.seed,
            "networks": {"all": len(self.data), **sizes},
            "settings": _plain(settings) if settings else None,
            "made_of": {
                **self.data.fingerprint,
                "packed networks": self.data.fingerprint_of(form, None if settings else "tensor"),
                "split": {"size": f"{sum(sizes.values())} networks", "sha256": of_values(dict(parts))},
                "target": self.task.target,
                "logit": self.task.logit,
                **({"classes": list(self.data.classes)} if self.task.classes else {}),
                "units": form.units,
                "jitter": form.jitter,
            },
        }

    def _parts(self, run: Run) -> dict[str, list[int]]:
        """Return the positions of the networks by part, with the run's share of the training networks."""
        parts = self.data.split(run.experiment, run.seed)
        if run.share < 1:
            train = parts["train"]
            order = torch.randperm(len(train), generator=torch.Generator().manual_seed(run.seed)).tolist()
            parts["train"] = sorted(train[i] for i in order[: max(2, round(run.share * len(train)))])
        return parts

    def _train_sne(
        self, run: Run, settings: TrainingRecipe, parts: Mapping[str, list[int]], show: Callable[[str], None]
    ) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
        data = self.data
        batch = data.packed(settings)
        problem = Problem(
            batch, data.targets, parts["train"], parts["validation"], run.seed, self.task.logit,
            classes=data.classes,
        )  # fmt: skip
        done = train_sne(
            problem, settings, data.preparation(settings), data.symmetries, parts["test"], target=self.task.target,
            checkpoint=self.folder.checkpoint(run),
            on_epoch=lambda epoch, history: show(f"epoch {epoch + 1}, loss {history.train_loss[-1]:.3f}"),
        )  # fmt: skip
        done.predictor.save_pretrained(self.folder.predictor(run))
        return done.predicted, done.encodings.astype(np.float32), done.about

    def _fit_baseline(self, run: Run, parts: Mapping[str, list[int]]) -> tuple[np.ndarray | None, None, dict[str, Any]]:
        """Fit a baseline to networks in the form that SNE gets; those trained by batches get its augmentation too."""
        data, settings = self.data, next(iter(self.sne.values()))
        own = [data.symmetries[i] for i in parts["train"]]
        augment = augmentation_of(settings, own, data.preparation(settings))
        problem = Problem(
            data.packed(settings, "tensor"), data.targets, parts["train"], parts["validation"], run.seed,
            self.task.logit, augment, data.classes, data.runnable,
        )  # fmt: skip
        reasons = BASELINES[run.method].why_not(problem)
        if reasons:
            return None, None, {"why_not": reasons}
        return BASELINES[run.method].fit_predict(problem), None, {}


def _plain(settings: TrainingRecipe) -> dict[str, Any]:
    """Return settings as JSON gives them back."""
    plain: dict[str, Any] = json.loads(to_json(dataclasses.asdict(settings)))
    return plain


def _line(test: Mapping[str, float | None]) -> str:
    return ", ".join(f"{key} {test[key]:.4g}" for key in LINE if test.get(key) is not None)

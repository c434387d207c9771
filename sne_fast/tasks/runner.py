"""Running a task: every prediction of a method, seed and training-set size is made once and kept in a file."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..atomic_files import write_json
from ..data.batch import WeightBatch
from ..reports.machine import commit, machine
from ..reports.measures import measures
from ..symmetry import Symmetry
from ..training import stratified_split
from ..training.threads import torch_threads
from ..zoo.splits import PARTS, SHARES
from ..zoo.symmetries import symmetries_of
from . import report
from .baselines import BASELINES, Problem
from .definitions import TASKS, Experiment, SneSettings, Task
from .requirements import check_extra
from .runs import Run, slug
from .settings import SEEDS
from .sne_method import augmentation, in_form, train_sne

if TYPE_CHECKING:
    from rich.console import Console

    from ..zoo import Zoo

WATCHED = 0.1  # of the networks to learn from, where the test networks are others


class Networks:
    """All networks of a task's zoos in one row: targets, groups, symmetries, and batches as methods want them."""

    def __init__(self, zoos: Sequence[Zoo], target: str) -> None:
        self.zoos = list(zoos)
        self.targets = np.concatenate([zoo.column(target).astype(np.float64) for zoo in zoos])
        self.groups = [str(name) for name in self.column("architecture")]
        self._batches: dict[tuple[object, ...], WeightBatch] = {}

    def __len__(self) -> int:
        return len(self.targets)

    @cached_property
    def symmetries(self) -> list[Symmetry]:
        """Of every network."""
        return [symmetry for zoo in self.zoos for symmetry in symmetries_of(zoo)]

    def column(self, name: str) -> np.ndarray:
        return np.concatenate([zoo.column(name) for zoo in self.zoos])

    def packed(self, settings: SneSettings, scale: str | None = None) -> WeightBatch:
        """All networks, packed and with their units as the settings say, or with another scale; kept."""
        from .. import pack

        scale = scale or settings.scale
        key = scale, settings.chunk_size, settings.chunking, settings.units, settings.odd, settings.relative
        if key not in self._batches:
            size, chunking = settings.chunk_size, settings.chunking
            batch = WeightBatch.cat(
                [pack(list(zoo), scale=scale, chunk_size=size, chunking=chunking).detach() for zoo in self.zoos]
            )
            self._batches[key] = in_form(batch, self.symmetries, settings)
        return self._batches[key]

    def where(self, wanted: Mapping[str, tuple[str, ...]]) -> np.ndarray:
        """Positions of the networks whose columns have one of the values wanted."""
        mask = np.ones(len(self), bool)
        for name, values in wanted.items():
            mask &= np.isin(self.column(name).astype(str), values)
        return np.flatnonzero(mask)

    def split(self, experiment: Experiment, seed: int) -> dict[str, list[int]]:
        """Positions of the training, validation and test networks."""
        pool, test = self.where(experiment.train), self.where(experiment.test)
        groups = [self.groups[i] for i in pool]
        if experiment.train == experiment.test:
            parts = [pool[part].tolist() for part in stratified_split(groups, SHARES, seed)]
        else:
            known = stratified_split(groups, (1 - WATCHED, WATCHED), seed)
            parts = [*(pool[part].tolist() for part in known), test.tolist()]
        return dict(zip(PARTS, parts, strict=True))


def run_task(
    name: str,
    out: Path,
    console: Console,
    *,
    seeds: Sequence[int] = SEEDS,
    methods: Sequence[str] = (),
    networks: int | None = None,
    epochs: int | None = None,
) -> dict[str, Any]:
    """Make the zoos, train and test every method, and write `results.json`, `results.md` and the plots into `out`.

    What an earlier call did there is not done again; a training that was cut off goes on from its last epoch. Calls
    with different seeds or methods may share a folder, one after the other or at once, and each reports all that is
    there.

    Args:
        name: of `TASKS`.
        seeds: of the split and of everything trained; the zoos are the same.
        methods: rows of the table, SNE's by their names ("SNE", ...), the others by their keys in `BASELINES`; all of
            the task by default.
        networks, epochs: other than the task's own; `epochs` of SNE.

    Returns:
        What `results.json` holds.

    Raises:
        ValueError: an unknown task or method, or a folder that holds results of other settings.
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
    count, at = networks or task.networks, commit()  # now: the checkout may change while this runs
    with console.status("zoos") as status:

        def progress(done: float) -> None:
            status.update(f"making the zoos: {done:.0%}")

        zoos = task.zoos(out / "zoos", count, progress)
    data = Networks(zoos, task.target)
    for run in _runs(task, list(methods) or rows, seeds, next(iter(sne)), out):
        _do(run, task, data, sne, out, console, at)
    results = collect(name, task, data, list(sne), out)
    write_json(out / "results.json", results)
    report.write_report(out, task, data, results)
    for experiment in results["experiments"].values():
        console.print(report.table(experiment))
    return results


def _runs(task: Task, rows: Sequence[str], seeds: Sequence[int], first: str, out: Path) -> Iterator[Run]:
    """Whole tables first, one seed after the other; then curves of error against training-set size, of the lowest seed
    that there is of a row, by this call or another."""
    for seed in seeds:
        for experiment in task.experiments:
            yield from (Run(experiment, row, seed, 1.0) for row in rows)
    for share in task.sizes:
        curves = [row for row in rows if row == first or row in BASELINES]
        for experiment in task.experiments:
            for row in curves:
                seed = runs_of(out, experiment, row)[0]["seed"]
                if seed in seeds:
                    yield Run(experiment, row, seed, share)


def runs_of(out: Path, experiment: Experiment, row: str, seed: int | None = None) -> list[dict[str, Any]]:
    """What the files of a row say, by seed: of whole training sets, or of one seed also those of its shares."""
    stem = Run(experiment, row, 0).path(out).name.removesuffix("0")
    pattern = f"{stem}*.json" if seed is None else f"{stem}{seed}-share*.json"
    files = list((out / "runs" / slug(experiment.name)).glob(pattern))
    if seed is None:
        files = [file for file in files if "-share" not in file.stem]
    else:
        files.append(Run(experiment, row, seed).path(out).with_suffix(".json"))
    runs = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    return sorted(runs, key=lambda run: (run["seed"], run["networks"]["train"]))


def _do(
    run: Run, task: Task, data: Networks, sne: Mapping[str, SneSettings], out: Path, console: Console, at: str | None
) -> None:
    path = run.path(out)
    parts = data.split(run.experiment, run.seed)
    train = parts["train"]
    if run.share < 1:
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(run.seed)).tolist()
        train = sorted(train[i] for i in order[: max(2, round(run.share * len(train)))])
    settings = sne.get(run.method)
    asked = {
        "method": run.method if settings else BASELINES[run.method].name,
        "seed": run.seed,
        "networks": {"all": len(data), "train": len(train), **{k: len(parts[k]) for k in ("validation", "test")}},
        "settings": json.loads(json.dumps(dataclasses.asdict(settings))) if settings else None,
    }
    if path.with_suffix(".json").exists():
        found = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        if {key: found[key] for key in asked} != asked:
            raise ValueError(f"task: {path}.json holds a run with other settings; choose another --out or remove it")
        if "test" in found:  # else a reason why not, such as a missing package, which may have passed
            return
    path.parent.mkdir(parents=True, exist_ok=True)
    clock = time.perf_counter()
    arrays: dict[str, np.ndarray] = {}
    about: dict[str, Any] = {}
    label = f"{run.experiment.name}, {asked['method']}, seed {run.seed}, {len(train)} networks"
    # One thread: batches are small, and most of a step's operations too small to share (see demo.py).
    with console.status(label) as status, torch_threads(1):
        if settings is not None:
            batch = data.packed(settings)
            problem = Problem(batch, data.targets, train, parts["validation"], run.seed, task.logit)
            done = train_sne(
                problem, settings, data.symmetries, parts["test"], target=task.target,
                checkpoint=path.with_suffix(".pt"),
                on_epoch=lambda e, h: status.update(f"{label}: epoch {e + 1}, loss {h.train_loss[-1]:.3f}"),
            )  # fmt: skip
            arrays, about = {"predicted": done.predicted, "encodings": done.encodings}, done.about
            done.predictor.save_pretrained(path)
        else:
            # Units as SNE has them, and for all who learn by batches the draws that SNE trains with.
            same = next(iter(sne.values()))
            augment = augmentation([data.symmetries[i] for i in train], same)
            batch = data.packed(same, "tensor")
            problem = Problem(batch, data.targets, train, parts["validation"], run.seed, task.logit, augment)
            reasons = BASELINES[run.method].why_not(problem)
            if reasons:
                about = {"why_not": reasons}
            else:
                arrays = {"predicted": BASELINES[run.method].fit_predict(problem)}
    about |= {"seconds": time.perf_counter() - clock, "commit": at}
    if arrays:
        about["test"] = _test(arrays["predicted"][parts["test"]], data.targets[parts["test"]])
        np.savez(path.with_suffix(".npz"), **arrays)  # type: ignore[arg-type]
    write_json(path.with_suffix(".json"), {**asked, **about})
    path.with_suffix(".pt").unlink(missing_ok=True)
    said = "; ".join(about["why_not"]) if "why_not" in about else _said(about["test"])
    console.print(f"{label}: {said} ({about['seconds']:.0f} s)", highlight=False, soft_wrap=True)


def _test(predicted: np.ndarray, true: np.ndarray) -> dict[str, float | None]:
    found = measures(predicted, true)
    rmse = found["rmse"]
    assert rmse is not None
    return {**found, "mse": rmse**2}


def _said(test: Mapping[str, float | None]) -> str:
    return ", ".join(f"{key} {test[key]:.4g}" for key in ("tau", "r2", "mse") if test[key] is not None)


def collect(name: str, task: Task, data: Networks, sne_rows: Sequence[str], out: Path) -> dict[str, Any]:
    """Everything that the files under `out` say, as `results.json` holds it."""
    experiments: dict[str, Any] = {}
    for experiment in task.experiments:
        methods: dict[str, Any] = {}
        curves: dict[str, list[dict[str, Any]]] = {}
        for row in [*sne_rows, *BASELINES]:
            whole = runs_of(out, experiment, row)
            if not whole:
                continue
            title = whole[0]["method"]
            methods[title] = _summary(whole)
            points = [run for run in runs_of(out, experiment, row, whole[0]["seed"]) if "test" in run]
            if len(points) > 1:
                curves[title] = [{"networks": run["networks"]["train"], **run["test"]} for run in points]
        if methods:
            experiments[experiment.name] = {"name": experiment.name, "methods": methods, "by_training_size": curves}
    return {
        "task": name,
        "title": task.title,
        "target": task.target,
        "networks": len(data),
        "weights": sum(int(zoo.sizes.sum()) for zoo in data.zoos),
        "variance": float(data.targets.var()),
        "experiments": experiments,
        "machine": machine(),
    }


def _summary(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation over seeds, and each of them."""
    summary: dict[str, Any] = {
        "runs": len(runs),
        "seconds": float(np.mean([run["seconds"] for run in runs])),
        "each": [{key: value for key, value in run.items() if not key.endswith("_loss")} for run in runs],
    }
    if "test" not in runs[0]:
        return {**summary, "why_not": runs[0]["why_not"]}
    for key in ("tau", "r2", "mse", "mae"):
        values = [run["test"][key] for run in runs]
        known = all(value is not None for value in values)
        summary[key] = {
            "mean": float(np.mean(values)) if known else None,
            # Around the first: the mean of equal numbers may be rounded, and their spread is 0.
            "std": float(np.std(np.subtract(values, values[0]), ddof=1)) if known and len(values) > 1 else None,
        }
    if "invariance_rms" in runs[0]:
        shares = [run["invariance_rms"] / run["test"]["rmse"] for run in runs]
        summary["invariance_rms_over_rmse"] = float(np.max(shares))
    return summary

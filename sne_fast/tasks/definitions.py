"""The tasks: zoos, experiments, the settings of SNE and its ablations, and the baselines."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from ..training.recipes import RECIPES, TrainingRecipe
from ..zoo.architectures import FAMILIES
from ..zoo.classifiers import Spread, make_classifier_zoo
from ..zoo.images import SMALL_DATASETS
from ..zoo.index import INDEX
from ..zoo.inrs import make_sine_zoo
from ..zoo.mnist_inrs import make_mnist_inr_zoo
from ..zoo.table import Zoo

Progress = Callable[[float], None]
"""Function that is called with the share of the work done, in [0, 1]."""


@dataclass(frozen=True)
class Experiment:
    """One table of a task: which networks of its zoos train and which are tested.

    `train` and `test` give the values that columns of the zoos must have, such as `{"family": ("cnn",)}`. Where both
    are the same, networks are split 80/10/10 within each architecture. Otherwise 90 % of the networks of `train` train,
    10 % choose the epoch, and all networks of `test` are tested.
    """

    name: str
    train: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    test: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    """A section of the paper: zoos, the column to predict, experiments, and the rows of their tables.

    Args:
        title: heading of the report.
        target: the column to predict.
        zoos: makes the zoos in a folder, or opens those that are there; takes the folder, the number of networks of all
            zoos, and a function to call with the share done.
        networks: number of networks by default.
        experiments: one table each.
        sne: rows of the tables that are SNE by name; the first is the method itself, the others are its ablations.
        logit: the target lies in [0, 1] and is modelled as its logit.
        classes: the target is a class.
        sizes: shares of the training networks in the curve of error against training-set size.
        same_steps: SNE takes as many steps on each share as on all training networks, so with more epochs;
            by default it takes as many epochs.
        baselines: rows after those of SNE, keys of `baselines.BASELINES`.
    """

    title: str
    target: str
    zoos: Callable[[Path, int, Progress], list[Zoo]]
    networks: int
    experiments: tuple[Experiment, ...]
    sne: Mapping[str, TrainingRecipe]
    logit: bool = False
    classes: bool = False
    sizes: tuple[float, ...] = (0.125, 0.25, 0.5)
    same_steps: bool = False
    baselines: tuple[str, ...] = ("mean", "statistics", "statistics_rich", "deepsets", "mlp", "nfn", "probes")

    def epochs(self, epochs: int, share: float) -> int:
        """Return the epochs of SNE on a share of the training networks, where it takes `epochs` on all of them."""
        return round(epochs / share) if self.same_steps else epochs


def _sines(folder: Path, networks: int, progress: Progress) -> list[Zoo]:
    # Section 4.1 uses the data of Navon et al. 2023, where the first layer is initialised like the others. With the
    # first layer of Sitzmann et al., neither SNE nor statistics learn anything from 800 networks.
    about = {"networks": networks, "seed": 0, "init": "dwsnets"}
    made = reuse(folder / "sines", about)
    return [made or make_sine_zoo(folder / "sines", networks, seed=0, init="dwsnets", on_progress=progress)]


def _mnist_inrs(folder: Path, networks: int, progress: Progress) -> list[Zoo]:
    made = reuse(folder / "mnist-inrs", {"networks": networks, "seed": 0})
    return [made or make_mnist_inr_zoo(folder / "mnist-inrs", networks, seed=0, on_progress=progress)]


def _classifiers(
    datasets: tuple[str, ...], architectures: tuple[str, ...], spread: Spread = "wide"
) -> Callable[[Path, int, Progress], list[Zoo]]:
    def make(folder: Path, networks: int, progress: Progress) -> list[Zoo]:
        zoos, each = [], networks // len(datasets)
        for k, dataset in enumerate(datasets):
            about = {"networks": each, "seed": 0, "dataset": dataset, "architectures": list(architectures)}
            made = reuse(folder / dataset, {**about, "spread": None if spread == "wide" else spread})
            zoos.append(
                made
                or make_classifier_zoo(
                    folder / dataset, each, dataset=dataset, architectures=architectures, seed=0, spread=spread,
                    on_progress=partial(_part, progress, k, len(datasets)),
                )
            )  # fmt: skip
        return zoos

    return make


def _part(progress: Progress, k: int, parts: int, done: float) -> None:
    progress((k + done) / parts)


def reuse(folder: Path, about: Mapping[str, Any]) -> Zoo | None:
    """Open the finished zoo in a folder; None if there is none.

    Raises:
        ValueError: the zoo was made with other arguments than those in `about`.
    """
    if not (folder / INDEX).is_file():
        return None
    zoo = Zoo.open(folder)
    found = {key: zoo.about.get(key) for key in about}
    if found != about:
        raise ValueError(f"task: {folder} holds another zoo, {found} where {about} is asked for; choose another --out")
    return zoo


_INR, _BEST, _ACROSS, _DATASETS = (RECIPES[name] for name in ("inr", "best", "across", "datasets"))


def _rows(recipe: TrainingRecipe, **with_chunks: Any) -> dict[str, TrainingRecipe]:
    """Return the rows of tasks whose label is an accuracy: the recipe, and what it leaves out or adds."""
    chunks = recipe.replace(chunks=True, **with_chunks)
    return {
        "SNE": recipe,
        **({"SNE, no ranking loss": recipe.replace(ranking=0.0)} if recipe.ranking else {}),
        "SNE, chunks and statistics": chunks,
        "SNE, chunks alone": chunks.replace(statistics="none"),
    }


_ACCURACY = _rows(_BEST, input_scale="zoo")
_ACCURACY_OF_DATASETS = _rows(_DATASETS, input_scale="zoo")
_ACCURACY_ACROSS = _rows(_ACROSS)
_ACROSS_BASELINES = ("mean", "statistics", "statistics_fan_in", "statistics_rich", "statistics_relative", "deepsets")
# Of five times the networks: fewer passes, without the loss of invariance, which doubles what a pass costs.
_MNIST_INR = _INR.replace(epochs=15, invariance=0.0)
_MLPS, _CNNS = tuple(FAMILIES["mlp"]), tuple(FAMILIES["cnn"])
_MLP, _CNN, _VIT = ({"family": (name,)} for name in ("mlp", "cnn", "vit"))

TASKS: dict[str, Task] = {
    "inr": Task(
        "Frequency of a sine from the weights of the SIREN fitted to it (section 4.1)",
        "a",
        _sines,
        1000,
        (Experiment("sines"),),
        {
            "SNE": _INR.replace(statistics="none"),
            "SNE, chunks and statistics": _INR,
            "SNE, statistics alone": _INR.replace(chunks=False),
            "SNE, no logit invariance": _INR.replace(statistics="none", invariance=0.0),
            "SNE, no order codes": _INR.replace(statistics="none", order=False),
            "SNE, units in random order": _INR.replace(statistics="none", units="permuted", odd=False, jitter=0.0),
        },
        sizes=(0.25, 0.5),
        same_steps=True,
    ),
    "accuracy": Task(
        "Accuracy of convolutional networks of one architecture (Unterthiner et al. 2020)",
        "test_accuracy",
        _classifiers(("digits",), ("unterthiner",)),
        800,
        (Experiment("unterthiner, digits"),),
        _ACCURACY,
        logit=True,
    ),
    "mnist-accuracy": Task(
        "Accuracy of trained CNNs of one architecture on MNIST's digits, few of them near chance",
        "test_accuracy",
        _classifiers(("mnist",), ("unterthiner",), "trained"),
        1000,
        (Experiment("unterthiner, mnist"),),
        _ACCURACY,
        logit=True,
    ),
    "mnist-inr": Task(
        "Class of a handwritten digit from the weights of the SIREN fitted to it (Navon et al. 2023)",
        "label",
        _mnist_inrs,
        5000,
        (Experiment("mnist digits"),),
        {
            "SNE": _MNIST_INR,
            "SNE, chunks alone": _MNIST_INR.replace(statistics="none"),
            "SNE, statistics alone": _MNIST_INR.replace(chunks=False),
        },
        classes=True,
    ),
    "cross-dataset": Task(
        "Accuracy on data sets that no training network saw (section 4.3)",
        "test_accuracy",
        _classifiers(SMALL_DATASETS, ("unterthiner",)),
        2000,
        tuple(
            Experiment(f"{d} -> others", {"dataset": (d,)}, {"dataset": tuple(x for x in SMALL_DATASETS if x != d)})
            for d in SMALL_DATASETS
        ),
        _ACCURACY_OF_DATASETS,
        logit=True,
        sizes=(),
        baselines=("mean", "statistics", "statistics_rich", "deepsets", "nfn"),
    ),
    "cross-architecture": Task(
        "Accuracy of families of architectures never seen (section 4.2)",
        "test_accuracy",
        _classifiers(("digits",), _MLPS + _CNNS),
        3900,
        (Experiment("mlp -> cnn", _MLP, _CNN), Experiment("cnn -> mlp", _CNN, _MLP)),
        _ACCURACY_ACROSS,
        logit=True,
        sizes=(),
        baselines=_ACROSS_BASELINES,
    ),
    "transformers": Task(
        "Accuracy of transformers, from CNNs and MLPs",
        "test_accuracy",
        _classifiers(("digits",), (*_MLPS, *_CNNS, "vit")),
        1400,
        (Experiment("mlp and cnn -> vit", {"family": ("mlp", "cnn")}, _VIT),),
        _ACCURACY_ACROSS,
        logit=True,
        sizes=(),
        baselines=_ACROSS_BASELINES,
    ),
}
"""Name -> task, as `sne-fast task` takes them."""

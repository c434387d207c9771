"""The tasks: zoos, experiments, the settings of SNE and its ablations, and the baselines."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from ..data.batch import WeightBatch
from ..data.choices import Chunking, Scale
from ..nn.preparation import Preparation
from ..symmetry import Symmetry
from ..zoo.architectures import FAMILIES
from ..zoo.classifiers import make_classifier_zoo
from ..zoo.images import SMALL_DATASETS
from ..zoo.index import INDEX
from ..zoo.inrs import make_sine_zoo
from ..zoo.table import Zoo
from .settings import InputScale, check_choices, scale_of_encoder

Progress = Callable[[float], None]
"""Function that is called with the share of the work done, in [0, 1]."""
Units = Literal["canonical", "permuted", "given"]


@dataclass(frozen=True)
class SneSettings:
    """Settings of SNE in a task.

    The names that are not listed are those of :class:`sne_fast.SNE`, :class:`sne_fast.training.FitSettings` and
    :class:`sne_fast.tasks.settings.TrainSettings`.

    Args:
        units: order of the hidden units, for all methods of the task. "canonical": that of
            :func:`sne_fast.symmetry.canonicalise`, with `odd` also its signs, and in training with `jitter`;
            "permuted": random, drawn anew for every training batch; "given": that of the zoo.
        invariance: weight of the logit-invariance loss between networks as training draws them and as they are.
        order: give codes to elements and chunks; False is the paper's ablation.
        relative: replace types and levels by :func:`sne_fast.nn.preparation.relative_places`.
        keep_best: keep the epoch with the lowest validation loss, not the last one.

    Raises:
        ValueError: a value that is not among a field's choices.
    """

    epochs: int = 60
    lr: float = 1e-3
    warmup: float = 0.1
    batch_weights: int = 24_000
    hidden_dim: int = 32
    chunk_size: int = 32
    chunking: Chunking = "flat"
    input_scale: InputScale = "zoo"
    code_gain: float = 1.0
    head: tuple[int, ...] = (128, 128)
    units: Units = "permuted"
    odd: bool = False
    jitter: float = 0.1
    invariance: float = 0.0
    order: bool = True
    relative: bool = False
    keep_best: bool = True

    def __post_init__(self) -> None:
        check_choices(self, "SneSettings")

    @property
    def scale(self) -> Scale:
        """The scale of `pack`."""
        return scale_of_encoder(self.input_scale)

    def preparation(self, batch: WeightBatch, symmetries: Sequence[Symmetry]) -> Preparation:
        """Return what the settings ask to be done to networks, given their symmetries.

        Args:
            batch: the networks of the task as they are packed.
            symmetries: the symmetry of each.
        """
        if self.units != "canonical":
            return Preparation(relative=self.relative)
        return Preparation.for_networks(batch, symmetries, odd=self.odd, jitter=self.jitter, relative=self.relative)


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
        baselines: rows after those of SNE, keys of `baselines.BASELINES`.
    """

    title: str
    target: str
    zoos: Callable[[Path, int, Progress], list[Zoo]]
    networks: int
    experiments: tuple[Experiment, ...]
    sne: Mapping[str, SneSettings]
    logit: bool = False
    classes: bool = False
    sizes: tuple[float, ...] = (0.125, 0.25, 0.5)
    baselines: tuple[str, ...] = ("mean", "statistics", "deepsets", "mlp", "nfn")


def _sines(folder: Path, networks: int, progress: Progress) -> list[Zoo]:
    # Section 4.1 uses the data of Navon et al. 2023, where the first layer is initialised like the others. With the
    # first layer of Sitzmann et al., neither SNE nor statistics learn anything from 800 networks.
    about = {"networks": networks, "seed": 0, "init": "dwsnets"}
    made = reuse(folder / "sines", about)
    return [made or make_sine_zoo(folder / "sines", networks, seed=0, init="dwsnets", on_progress=progress)]


def _classifiers(
    datasets: tuple[str, ...], architectures: tuple[str, ...]
) -> Callable[[Path, int, Progress], list[Zoo]]:
    def make(folder: Path, networks: int, progress: Progress) -> list[Zoo]:
        zoos, each = [], networks // len(datasets)
        for k, dataset in enumerate(datasets):
            about = {"networks": each, "seed": 0, "dataset": dataset, "architectures": list(architectures)}
            made = reuse(folder / dataset, about)
            zoos.append(
                made
                or make_classifier_zoo(
                    folder / dataset, each, dataset=dataset, architectures=architectures, seed=0,
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


# `odd` since the sine is an odd function. With this warm-up nothing is learnt at a rate of 2e-3, since sines need a low
# rate at first.
_SINES = SneSettings(epochs=150, units="canonical", odd=True, jitter=0.2)
_ACCURACY = SneSettings(epochs=25, units="given")
# Architectures never seen have no learnt codes, and no RMS in the training networks to divide by.
_ACROSS = SneSettings(epochs=20, units="given", input_scale="fan_in", relative=True, keep_best=False)
_ACROSS_BASELINES = ("mean", "statistics", "statistics_fan_in", "deepsets")
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
            "SNE": replace(_SINES, invariance=0.5),
            "SNE, no logit invariance": _SINES,
            "SNE, no order codes": replace(_SINES, invariance=0.5, order=False),
            "SNE, units in random order": replace(_SINES, invariance=0.5, units="permuted"),
        },
    ),
    "accuracy": Task(
        "Accuracy of convolutional networks of one architecture (Unterthiner et al. 2020)",
        "test_accuracy",
        _classifiers(("digits",), ("unterthiner",)),
        800,
        (Experiment("unterthiner, digits"),),
        {"SNE": _ACCURACY},
        logit=True,
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
        {"SNE": _ACROSS},
        logit=True,
        sizes=(),
        baselines=_ACROSS_BASELINES,
    ),
    "cross-architecture": Task(
        "Accuracy of families of architectures never seen (section 4.2)",
        "test_accuracy",
        _classifiers(("digits",), _MLPS + _CNNS),
        3900,
        (Experiment("mlp -> cnn", _MLP, _CNN), Experiment("cnn -> mlp", _CNN, _MLP)),
        {"SNE": _ACROSS},
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
        {"SNE": _ACROSS},
        logit=True,
        sizes=(),
        baselines=_ACROSS_BASELINES,
    ),
}
"""Name -> task, as `sne-fast task` takes them."""

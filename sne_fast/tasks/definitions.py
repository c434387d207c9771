"""What each task learns from and is tested on, and how SNE is trained for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.choices import Chunking, Scale
from ..zoo.architectures import FAMILIES
from ..zoo.images import DATASETS
from .settings import InputScale, scale_of_encoder

if TYPE_CHECKING:
    from ..zoo import Zoo


Progress = Callable[[float], None]


@dataclass(frozen=True)
class SneSettings:
    """How SNE is trained in a task.

    `units`: how hidden units stand, in all methods of the task. "canonical": in the order, and with `odd` with the
    signs, of `symmetry.canonicalise`, in training with `jitter`; "permuted": at random, fresh for every batch of
    training; "given": as the zoo has them. `invariance`: weight of the logit-invariance loss between what training
    draws and the networks as they are; 0 leaves it out. `order`: codes of elements and chunks; False is the paper's
    ablation. `relative`: see `sne_method.relative_places`. `keep_best`: the epoch that
    validation likes best, else the last one. `input_scale`: "tensor", "zoo", "fan_in" or "none", as in
    `TrainSettings`. The other names are those of `SNE`, `FitSettings` and `TrainSettings`.
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
    units: str = "permuted"
    odd: bool = False
    jitter: float = 0.1
    invariance: float = 0.0
    order: bool = True
    relative: bool = False
    keep_best: bool = True

    @property
    def scale(self) -> Scale:
        """What networks are packed with."""
        return scale_of_encoder(self.input_scale)


@dataclass(frozen=True)
class Experiment:
    """One table of a task: where the networks to learn from and those to be tested come from.

    `train` and `test` give the values that columns of the zoos must have, such as `{"family": ("cnn",)}`. Where both
    are the same, networks are split 80/10/10 within each architecture; else 90 % of the former train, 10 % choose the
    epoch, and all of the latter are tested.
    """

    name: str
    train: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    test: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    """A section of the paper: zoos, the column to predict, experiments, and the rows of their tables.

    `zoos`: makes them in a folder, or opens what is there; takes the folder, how many networks in all, and a function
    that is told the share done. `networks`: how many unless asked otherwise. `sne`: rows of the table that are SNE, the
    first one the method itself, the others its ablations. `logit`: the target lies in [0, 1] and is modelled as its
    logit. `sizes`: shares of the training networks for the curve of error against training-set size. `baselines`: rows
    after them, keys of `baselines.BASELINES`.
    """

    title: str
    target: str
    zoos: Callable[[Path, int, Progress], list[Zoo]]
    networks: int
    experiments: tuple[Experiment, ...]
    sne: Mapping[str, SneSettings]
    logit: bool = False
    sizes: tuple[float, ...] = (0.125, 0.25, 0.5)
    baselines: tuple[str, ...] = ("mean", "statistics", "deepsets", "mlp", "nfn")


def _sines(folder: Path, networks: int, progress: Progress) -> list[Zoo]:
    from ..zoo import make_sine_zoo

    # The data of section 4.1 are those of Navon et al. 2023, whose first layer starts as the others do. With the first
    # layer of Sitzmann et al. neither SNE nor statistics learn anything from 800 networks.
    about = {"networks": networks, "seed": 0, "init": "dwsnets"}
    made = reuse(folder / "sines", about)
    return [made or make_sine_zoo(folder / "sines", networks, seed=0, init="dwsnets", on_progress=progress)]


def _classifiers(
    datasets: tuple[str, ...], architectures: tuple[str, ...]
) -> Callable[[Path, int, Progress], list[Zoo]]:
    def make(folder: Path, networks: int, progress: Progress) -> list[Zoo]:
        from ..zoo import make_classifier_zoo

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
    """The finished zoo in `folder`, None if there is none.

    Raises:
        ValueError: it was made with other arguments than `about` says.
    """
    from ..zoo import Zoo
    from ..zoo.shards import INDEX

    if not (folder / INDEX).is_file():
        return None
    zoo = Zoo.open(folder)
    found = {key: zoo.about.get(key) for key in about}
    if found != about:
        raise ValueError(f"task: {folder} holds another zoo, {found} where {about} is asked for; choose another --out")
    return zoo


# The sine is odd. At a rate of 2e-3 nothing is learnt with this warm-up: sines need the rate to be low at first.
_SINES = SneSettings(epochs=150, units="canonical", odd=True, jitter=0.2)
_ACCURACY = SneSettings(epochs=25, units="given")
# What was never seen has no learnt code, and no spread to divide by.
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
        _classifiers(tuple(DATASETS), ("unterthiner",)),
        2000,
        tuple(
            Experiment(f"{one} -> others", {"dataset": (one,)}, {"dataset": tuple(d for d in DATASETS if d != one)})
            for one in DATASETS
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

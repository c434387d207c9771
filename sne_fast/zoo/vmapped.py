"""Training of many small networks of one architecture in one vectorised call (`torch.func`)."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, stack_module_state, vmap

from ..training.threads import torch_threads

_GLOBAL_GENERATOR = threading.Lock()
"""Held while modules draw their initial weights from torch's generator, since groups may train in threads."""


@contextmanager
def drawing_weights(seed: int) -> Iterator[None]:
    """Draw initial weights of modules from torch's generator, seeded; the generator is left as it was."""
    with _GLOBAL_GENERATOR, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


BETA2 = 0.999
LARGEST_WEIGHT = 1e4
"""Bound of weights, far above any that training reaches; steps of diverging networks end here."""


@dataclass(frozen=True)
class Recipe:
    """Hyperparameters of K networks: every field is of shape `(K,)`, with one entry per network.

    Args:
        steps: int64, number of minibatch steps, from 0.
        lr: learning rate, as in `torch.optim.SGD`.
        momentum: as in `torch.optim.SGD`.
        weight_decay: as in `torch.optim.SGD`.
        init_gain: factor of the initial weights of two and more dimensions.
        train_fraction: share of the training images that the network sees, in (0, 1].
        label_noise: share of their labels that are drawn anew, in [0, 1].

    Raises:
        ValueError: fields of different shapes.
    """

    steps: Tensor
    lr: Tensor
    momentum: Tensor
    weight_decay: Tensor
    init_gain: Tensor
    train_fraction: Tensor
    label_noise: Tensor

    def __post_init__(self) -> None:
        sizes = {f.name: tuple(getattr(self, f.name).shape) for f in fields(self)}
        if len(set(sizes.values())) != 1 or self.steps.ndim != 1 or self.steps.numel() == 0:
            raise ValueError(f"Recipe: every field must have the same shape (K,) with K >= 1, got {sizes}")

    def __len__(self) -> int:
        """Return the number of networks."""
        return self.steps.numel()

    def __getitem__(self, index: Tensor) -> Recipe:
        """Return the hyperparameters of some of the networks."""
        return Recipe(**{f.name: getattr(self, f.name)[index] for f in fields(self)})

    def row(self, i: int) -> dict[str, Any]:
        """Return the hyperparameters of network `i` as plain numbers."""
        return {f.name: getattr(self, f.name)[i].item() for f in fields(self)}


@dataclass(frozen=True)
class Trained:
    """K trained networks: stacked parameters and buffers `(K, ...)` in module order, accuracies and losses `(K,)`."""

    parameters: dict[str, Tensor]
    buffers: dict[str, Tensor]
    order: tuple[str, ...]
    test_accuracy: Tensor
    test_loss: Tensor
    train_accuracy: Tensor
    train_loss: Tensor

    def state_dict(self, i: int) -> dict[str, Tensor]:
        """Return the state_dict of network `i` in module order."""
        both = {**self.parameters, **self.buffers}
        return {name: both[name][i].clone() for name in self.order}


def _per_network(x: Tensor, like: Tensor) -> Tensor:
    return x.view(-1, *[1] * (like.ndim - 1))


def _subsets(recipe: Recipe, labels: Tensor, classes: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Draw the training images of each network: a random order (K, n), how many it sees (K,), noisy labels (K, n)."""
    k, n = len(recipe), labels.numel()
    order = torch.rand(k, n, generator=generator).argsort(dim=1)
    size = (recipe.train_fraction * n).round().clamp(1, n).long()
    noisy = torch.rand(k, n, generator=generator) < recipe.label_noise[:, None]
    drawn = torch.randint(classes, (k, n), generator=generator)
    return order, size, torch.where(noisy, drawn, labels.expand(k, n))


# The ops here are so small that two threads mostly wait for each other: beside another process, a zoo took several
# times longer on two threads than on one.
@torch_threads(1)
def train_together(
    make: Callable[[], nn.Module],
    recipe: Recipe,
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    *,
    seed: int,
    batch_size: int = 32,
    clip: float = 5.0,
    optimiser: str = "sgd",
    images_at_once: int | None = None,
    on_step: Callable[[int], None] | None = None,
) -> Trained:
    """Train `len(recipe)` classifiers of one architecture at once, each with its own hyperparameters.

    The networks are sorted by their number of steps, so that those that still train are the first of the stack, and
    finished ones are left alone. Gradients are clipped per network. A step that would make a weight larger than
    `LARGEST_WEIGHT`, or NaN, is not taken.

    Args:
        make: returns a fresh module; it is called `len(recipe)` times. Normalisation buffers are allowed.
        recipe: hyperparameters of the networks.
        train: training images `(n, ...)` float32 and labels `(n,)` int64.
        test: test images and labels.
        seed: of the initial weights, subsets, noise and order of images; the global generator is left alone.
        batch_size: images per step.
        clip: largest norm of the gradients of a network.
        optimiser: "sgd" as `torch.optim.SGD`, or "adam" as `torch.optim.Adam` with `momentum` as its first beta, 0.999
            as its second, and weight decay added to the gradients.
        images_at_once: as in `evaluate_together`.
        on_step: called with the number of each step.

    Raises:
        ValueError: an unknown optimiser.
    """
    if optimiser not in ("sgd", "adam"):
        raise ValueError(f"train_together: optimiser must be 'sgd' or 'adam', got {optimiser!r}")
    generator = torch.Generator().manual_seed(seed)
    with drawing_weights(seed):
        modules = [make() for _ in range(len(recipe))]
        base = make().to("meta").train()
    names = tuple(modules[0].state_dict())
    stacked, buffers = stack_module_state(modules)
    params = {name: p.detach().clone() for name, p in stacked.items()}
    for p in params.values():
        if p.ndim > 2:  # stacked: a matrix or a kernel of one network
            p *= _per_network(recipe.init_gain, p)

    images, labels = train
    order, size, own_labels = _subsets(recipe, labels, int(labels.max()) + 1, generator)

    longest_first = torch.argsort(recipe.steps, descending=True, stable=True)
    back = torch.argsort(longest_first)
    params = {name: p[longest_first] for name, p in params.items()}
    buffers = {name: b[longest_first] for name, b in buffers.items()}
    order, size, own_labels = order[longest_first], size[longest_first], own_labels[longest_first]
    ordered = recipe[longest_first]
    velocity = {name: torch.zeros_like(p) for name, p in params.items()}
    square = {name: torch.zeros_like(p) for name, p in params.items()} if optimiser == "adam" else {}

    def loss_of(p: dict[str, Tensor], b: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(functional_call(base, (p, b), (x,)), y)

    step_of = vmap(grad_and_value(loss_of))
    for step in range(int(ordered.steps[0])):
        k = int((ordered.steps > step).sum())
        pick = torch.rand(k, batch_size, generator=generator)
        rows = order[:k].gather(1, (pick * size[:k, None]).long())
        live = {name: p[:k] for name, p in params.items()}
        state = {name: b[:k].clone() for name, b in buffers.items()}  # running statistics are updated in place
        grads, _ = step_of(live, state, images[rows], own_labels[:k].gather(1, rows))

        norm = torch.stack([g.flatten(1).square().sum(1) for g in grads.values()]).sum(0).sqrt()
        shrink = clip / norm.clamp_min(clip)
        moved, speed, second = {}, {}, {}
        for name, p in live.items():
            g = grads[name] * _per_network(shrink, p) + _per_network(ordered.weight_decay[:k], p) * p
            beta, lr = _per_network(ordered.momentum[:k], p), _per_network(ordered.lr[:k], p)
            if optimiser == "sgd":
                speed[name] = beta * velocity[name][:k] + g
                moved[name] = p - lr * speed[name]
            else:
                speed[name] = beta * velocity[name][:k] + (1 - beta) * g
                second[name] = BETA2 * square[name][:k] + (1 - BETA2) * g.square()
                root = (second[name] / (1 - BETA2 ** (step + 1))).sqrt()
                moved[name] = p - lr * speed[name] / (1 - beta ** (step + 1)) / (root + 1e-8)
        largest = torch.stack([p.flatten(1).abs().amax(1) for p in moved.values()]).amax(0)
        sane = largest <= LARGEST_WEIGHT  # false for NaN
        for old, new in ((live, moved), (velocity, speed), (square, second), (buffers, state)):
            for name, value in new.items():
                old[name][:k] = value.where(_per_network(sane, value), old[name][:k])
        if on_step is not None:
            on_step(step)

    params = {name: p[back] for name, p in params.items()}
    buffers = {name: b[back] for name, b in buffers.items()}
    order, size, own_labels = order[back], size[back], own_labels[back]
    logits = evaluate_together(base, params, buffers, test[0], images_at_once)
    test_accuracy, test_loss = _score(logits, test[1].expand(len(recipe), -1))
    logits = evaluate_together(base, params, buffers, images, images_at_once)
    seen = torch.zeros(own_labels.shape).scatter_(1, order, (torch.arange(labels.numel()) < size[:, None]).float())
    train_accuracy, train_loss = _score(logits, own_labels, seen)
    return Trained(params, buffers, names, test_accuracy, test_loss, train_accuracy, train_loss)


@torch.no_grad()
def evaluate_together(
    base: nn.Module,
    params: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
    images: Tensor,
    images_at_once: int | None = None,
) -> Tensor:
    """Return the logits `(K, n, classes)` of K stacked networks on the same images, in evaluation mode.

    Args:
        base: a module of their architecture, which may be on the device "meta".
        params: stacked parameters `(K, ...)`.
        buffers: stacked buffers.
        images: `(n, ...)`.
        images_at_once: images that are run together; all of them by default. A few tens of 28 x 28 are four times
            faster than all 4,000, since what they need fits a core's cache.
    """
    base.eval()

    def run(p: Mapping[str, Tensor], b: Mapping[str, Tensor], some: Tensor) -> Tensor:
        return functional_call(base, (dict(p), dict(b)), (some,))

    run_all = vmap(run, in_dims=(0, 0, None), chunk_size=16)
    parts = [images] if images_at_once is None else images.split(images_at_once)
    return torch.cat([run_all(params, buffers, part) for part in parts], 1)


def _score(logits: Tensor, labels: Tensor, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return accuracy and mean cross entropy per network; `weight` (K, n) says which images count."""
    weight = torch.ones(labels.shape) if weight is None else weight
    loss = nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    hit = (logits.argmax(-1) == labels).float()
    total = weight.sum(1)
    return (hit * weight).sum(1) / total, (loss * weight).sum(1) / total

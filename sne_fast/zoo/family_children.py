"""Training of the networks of `make_family_zoo`, and what makes a network of another without training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .family_architectures import build, head_of
from .family_data import Task
from .vmapped import drawing_weights

State = dict[str, Tensor]
"""A state_dict whose tensors no module shares."""
BATCH = 32
CLIP = 1.0
_RETRIES = 3


@dataclass(frozen=True)
class FamilyRecipe:
    """Hyperparameters of a training: steps of 32 examples, Adam or SGD with momentum 0.9, a cosine down to zero."""

    steps: int
    lr: float
    weight_decay: float
    optimiser: str

    @property
    def row(self) -> dict[str, Any]:
        """The hyperparameters as columns of a zoo."""
        return {"steps": self.steps, "lr": self.lr, "weight_decay": self.weight_decay, "optimiser": self.optimiser}


def state_of(module: nn.Module) -> State:
    """Return a copy of a module's parameters and buffers in their order."""
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def loaded(architecture: str, state: Mapping[str, Tensor]) -> nn.Module:
    """Return a module of an architecture with a network's weights."""
    with torch.device("meta"):
        module = build(architecture)
    module.load_state_dict({name: tensor.clone() for name, tensor in state.items()}, assign=True)
    return module


def initial(architecture: str, seed: int) -> State:
    """Return the initial weights of a network."""
    with drawing_weights(seed):
        return state_of(build(architecture))


def train(
    architecture: str,
    start: State,
    task: Task,
    recipe: FamilyRecipe,
    seed: int,
    *,
    rank: int | None = None,
    head_only: bool = False,
    on_step: Callable[[], None] | None = None,
) -> tuple[State, FamilyRecipe]:
    """Train a network from given weights; return its weights and the recipe with the learning rate that was used.

    A training that does not stay finite is repeated with a tenth of its learning rate.

    Args:
        architecture: as `build` takes it.
        start: the weights to start from.
        task: the data.
        recipe: the hyperparameters.
        seed: of the order of the examples and of what a low-rank change starts from.
        rank: train a change of this rank of every matrix alone, and add it to the matrix in the end (LoRA, Hu et al.
            2021); a convolution counts as the matrix `(out, in * k * k)`.
        head_only: train the output layer alone.
        on_step: called after each step.

    Raises:
        FloatingPointError: no learning rate that was tried gives finite weights.
    """
    for attempt in range(_RETRIES):
        tried = replace(recipe, lr=recipe.lr / 10**attempt)
        found = _train(architecture, start, task, tried, seed, rank, head_only, on_step)
        if all(bool(t.isfinite().all()) for t in found.values()):
            return found, tried
    raise FloatingPointError(f"make_family_zoo: training of {architecture} on {task.name} did not stay finite")


def _train(
    architecture: str,
    start: State,
    task: Task,
    recipe: FamilyRecipe,
    seed: int,
    rank: int | None,
    head_only: bool,
    on_step: Callable[[], None] | None,
) -> State:
    g = torch.Generator().manual_seed(seed)
    module = loaded(architecture, start).train()
    parameters = dict(module.named_parameters())
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    trained: list[Tensor]
    if rank is not None:
        for name, p in parameters.items():
            p.requires_grad_(False)
            if p.ndim >= 2:
                out, columns = p.shape[0], p[0].numel()
                down = torch.randn(rank, columns, generator=g) / columns**0.5
                factors[name] = (torch.zeros(out, rank, requires_grad=True), down.requires_grad_())
        trained = [t for pair in factors.values() for t in pair]
    elif head_only:
        trained = list(head_of(module)[1].parameters())
    else:
        trained = list(parameters.values())

    def weights() -> dict[str, Tensor]:
        return {name: parameters[name] + (up @ down).view_as(parameters[name]) for name, (up, down) in factors.items()}

    optimiser: torch.optim.Optimizer
    if recipe.optimiser == "adam":
        optimiser = torch.optim.AdamW(trained, recipe.lr, weight_decay=recipe.weight_decay, fused=True)
    else:
        optimiser = torch.optim.SGD(trained, recipe.lr, 0.9, weight_decay=recipe.weight_decay, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, max(1, recipe.steps))
    inputs, targets = task.train
    for _ in range(recipe.steps):
        rows = torch.randint(len(inputs), (BATCH,), generator=g)
        outputs = functional_call(module, weights(), (inputs[rows],)) if factors else module(inputs[rows])
        grads = torch.autograd.grad(task.loss_of(outputs, targets[rows]), trained)
        for leaf, grad in zip(trained, grads, strict=True):
            leaf.grad = grad.contiguous()
        torch.nn.utils.clip_grad_norm_(trained, CLIP)
        optimiser.step()
        schedule.step()
        if on_step is not None:
            on_step()
    return {**state_of(module), **{name: t.detach() for name, t in weights().items()}}


@torch.no_grad()
def score(architecture: str, state: State, task: Task) -> dict[str, float | None]:
    """Return accuracy and loss on held-out examples, as columns of a zoo; no accuracy for numbers."""
    module = loaded(architecture, state).eval()
    outputs = module(task.test[0])
    loss = task.loss_of(outputs, task.test[1]).item()
    return {"test_accuracy": task.accuracy_of(outputs, task.test[1]), "test_loss": min(loss, 1e6)}


def pruned(state: State, share: float) -> State:
    """Return the weights with the smallest `share` of every matrix set to zero."""

    def cut(t: Tensor) -> Tensor:
        if t.ndim < 2 or not t.is_floating_point():
            return t
        flat = t.abs().flatten()
        smallest = flat.argsort(stable=True)[: int(share * len(flat))]
        return t.flatten().index_fill(0, smallest, 0.0).view_as(t)

    return {name: cut(t) for name, t in state.items()}


def rounded(state: State) -> State:
    """Return the weights with every matrix rounded to 255 levels, equally far apart and symmetric about zero."""

    def cut(t: Tensor) -> Tensor:
        if t.ndim < 2 or not t.is_floating_point():
            return t
        step = t.abs().max().clamp_min(1e-12) / 127
        return (t / step).round() * step

    return {name: cut(t) for name, t in state.items()}


def averaged(one: State, other: State) -> State:
    """Return the mean of the weights of two networks; counters of batches are those of the first."""
    return {name: (t + other[name]) / 2 if t.is_floating_point() else t for name, t in one.items()}


def with_new_head(state: State, architecture: str, seed: int) -> State:
    """Return the weights for an architecture that may differ in its number of outputs, with an output layer anew."""
    fresh = initial(architecture, seed)
    with torch.device("meta"):
        head = head_of(build(architecture))[0]
    return {name: fresh[name] if name.rpartition(".")[0] == head else state[name] for name in fresh}

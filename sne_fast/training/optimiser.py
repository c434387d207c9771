"""Pieces of a training step that `fit` and the neural baselines share: optimiser, learning rate, random draws."""

from __future__ import annotations

import math

import torch
from torch import nn

from ..data.weight_budgets import SEED_STRIDE


def adamw(module: nn.Module, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """Return AdamW with weight decay on matrices and none on vectors."""
    matrices = [p for p in module.parameters() if p.ndim >= 2]
    vectors = [p for p in module.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, fused=True)


def set_learning_rate(optimiser: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of all parameter groups."""
    for group in optimiser.param_groups:
        group["lr"] = lr


def warm_cosine(step: int, total: int, warmup: float) -> float:
    """Return the share of the peak learning rate at a step: a linear rise, then half a cosine down to zero.

    Args:
        step: number of the step, from 0.
        total: number of steps of the training.
        warmup: share of the steps in which the rate rises.

    Example:
        >>> [round(warm_cosine(step, 10, 0.2), 2) for step in range(0, 11, 2)]
        [0.5, 1.0, 0.85, 0.5, 0.15, 0.0]
    """
    rise = max(1, round(warmup * total))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, total - rise)))


def draws_of(seed: int, step: int) -> torch.Generator:
    """Return the random generator of a step, on the CPU.

    Every step has a generator of its own, so that a resumed training draws the same as one that was not interrupted.
    """
    return torch.Generator().manual_seed((seed * SEED_STRIDE + step) % 2**63)

"""Networks whose weights are drawn from random distributions, each tensor's its own, without any training."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .family_children import State

_NUMBERS = 8
"""Numbers that describe the distribution of a tensor."""


def draw_distributions(state: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """Draw what describes the distribution of each tensor of a network: eight standard Gaussian numbers."""
    return {name: torch.randn(_NUMBERS, generator=generator) for name in state}


def near(distributions: Mapping[str, Tensor], distance: float, generator: torch.Generator) -> dict[str, Tensor]:
    """Draw distributions near others: at a distance of 0 the same, at 1 independent of them."""
    kept = (1 - distance**2) ** 0.5
    return {
        name: kept * numbers + distance * torch.randn(numbers.shape, generator=generator)
        for name, numbers in distributions.items()
    }


def draw_weights(state: Mapping[str, Tensor], distributions: Mapping[str, Tensor], seed: int) -> State:
    """Return weights for all floating-point tensors of a network, of the given distributions.

    Matrices are products of heavy- or light-tailed noise with factors of every output and every input, plus a mean, a
    part of rank one and zeros; their size is that of fresh layers times a factor between 1/3 and 3. Vectors are
    Gaussian around 0, or around 1 where the network's own are positive throughout, such as the weights of a norm.

    Args:
        state: the tensors by their names; shapes and signs count.
        distributions: for each tensor as `draw_distributions` gives them.
        seed: of the noise.
    """
    generator = torch.Generator().manual_seed(seed)
    return {
        name: _drawn(t, distributions[name], generator) if t.is_floating_point() else t.clone()
        for name, t in state.items()
    }


def _drawn(like: Tensor, numbers: Tensor, generator: torch.Generator) -> Tensor:
    size, tail, rows, columns, mean, low_rank, zeros, _ = numbers.tolist()
    factor = 3.0 ** max(-1.0, min(1.0, size / 1.5))
    if like.ndim < 2:
        noise: Tensor = torch.randn(like.shape, generator=generator) * _positive(tail)
        if bool((like > 0).all()):
            return (noise / 2).exp() * factor
        return 0.1 * factor * (noise + mean)
    out = like.shape[0]
    shape = (out, like.shape[1], like[0, 0].numel())
    x = torch.randn(shape, generator=generator)
    x = x.sign() * x.abs() ** (0.5 + _positive(tail))
    x = x / x.square().mean().sqrt()
    x = x * (_positive(rows - 0.5) * torch.randn(out, 1, 1, generator=generator)).exp()
    x = x * (_positive(columns - 0.5) * torch.randn(1, shape[1], 1, generator=generator)).exp()
    x = x + 0.1 * mean
    one = torch.randn(out, 1, 1, generator=generator) * torch.randn(1, *shape[1:], generator=generator)
    x = x + _positive(low_rank - 1) * one
    x = x * (torch.rand(shape, generator=generator) >= _positive(zeros - 2))
    fan_in = shape[1] * shape[2]
    return (x * factor / (3 * fan_in) ** 0.5).view(like.shape)


def _positive(number: float) -> float:
    """Return a number between 0 and 1."""
    return 1 / (1 + 2.718281828459045**-number)

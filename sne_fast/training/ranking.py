"""The ranking loss: a predictor learns which of two networks has the larger target."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

STEEPNESS = 4.0
"""Slope of the logistic function of a difference of outputs, which have about the standard deviation 1."""
CLEAR = 0.5
"""Difference of goals from which on a pair counts fully; the order of nearer ones is less and less certain."""


def ranking_losses(outputs: Tensor, goals: Tensor, real: Tensor | None = None) -> Tensor:
    """Return the pairwise logistic loss of RankNet (Burges et al. 2005, equation 3) of each network.

    A pair of networks whose goals differ by d costs `min(1, |d| / 0.5) log(1 + exp(-4 sign(d) e))`, where e is the
    difference of their outputs: little if e has the sign of d and is well above 0.25, much if its sign is wrong. A
    network's loss is the mean over its pairs with all others.

    Args:
        outputs: of the head, `(n, t)`.
        goals: normalised targets, `(n, t)`.
        real: `(n,)` bool, False for networks that are padding and have no pairs; all are real by default.

    Returns:
        `(n,)`, the mean over targets; 0 for one network alone.

    Example:
        >>> ranking_losses(torch.tensor([[0.0], [1.0]]), torch.tensor([[-1.0], [1.0]]))
        tensor([0.0181, 0.0181])
    """
    apart = goals[:, None] - goals  # (n, n, t)
    costs = F.softplus(-STEEPNESS * apart.sign() * (outputs[:, None] - outputs))
    pairs = ((apart.abs() / CLEAR).clamp_max(1) * costs).mean(2)
    if real is None:
        return pairs.sum(1) / max(len(goals) - 1, 1)
    both = real[:, None] & real
    return pairs.masked_fill(~both, 0).sum(1) / (real.sum() - 1).clamp_min(1)

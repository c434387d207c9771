"""The ranking loss: a predictor learns which of two networks has the larger target."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

STEEPNESS = 4.0
"""Slope of the logistic function of a difference of outputs, which have about the standard deviation 1."""
CLEAR = 0.5
"""Difference of goals from which on a pair counts fully; the order of nearer ones is less and less certain."""


def ranking_loss(outputs: Tensor, goals: Tensor) -> Tensor:
    """Return the pairwise logistic loss of RankNet (Burges et al. 2005, equation 3), the mean over all pairs.

    A pair of networks whose goals differ by d costs `min(1, |d| / 0.5) log(1 + exp(-4 sign(d) e))`, where e is the
    difference of their outputs: little if e has the sign of d and is well above 0.25, much if its sign is wrong.

    Args:
        outputs: of the head, `(n, t)`.
        goals: normalised targets, `(n, t)`.

    Returns:
        A scalar; 0 for fewer than two networks.

    Example:
        >>> ranking_loss(torch.tensor([[0.0], [1.0]]), torch.tensor([[-1.0], [1.0]]))
        tensor(0.0181)
    """
    count = len(goals)
    if count < 2:
        return outputs.new_zeros(())
    apart = goals[:, None] - goals  # (n, n, t)
    costs = F.softplus(-STEEPNESS * apart.sign() * (outputs[:, None] - outputs))
    weighted = (apart.abs() / CLEAR).clamp_max(1) * costs
    return weighted.sum() / (count * (count - 1) * goals[0].numel())

"""The logit-invariance loss."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..data.batch import WeightBatch


def logit_invariance(
    predictor: Callable[[WeightBatch], Tensor],
    batch: WeightBatch,
    permuted: WeightBatch,
    *,
    outputs: Tensor | None = None,
) -> Tensor:
    """Return how far a predictor tells networks from their permuted copies: `mean_b ||f(g x_b) - f(x_b)||^2 / 2`.

    The regulariser of Moskalev et al., "On genuine invariance learning without weight-tying" (2023), which SNE adds
    to its loss, times a weight ("Predictor and logit invariance" in `docs/method.md`). Gradients flow through both
    terms.

    Args:
        predictor: an `sne_fast.Predictor`, whose head's outputs are compared (of normalised targets, before any
            sigmoid), or any function of a batch that gives `(B, ...)`.
        batch: the networks x.
        permuted: the networks g x, from `permute`.
        outputs: `f(x)`, if it has been computed already.

    Returns:
        A scalar; 0 for an empty batch.

    Raises:
        ValueError: batches of different length.

    Example:
        >>> import torch
        >>> import sne_fast
        >>> from sne_fast.symmetry import logit_invariance, permute, trace
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
        >>> batch = sne_fast.pack([net, net]).detach()
        >>> permuted = permute(batch, trace(net, torch.zeros(1, 4)))
        >>> predictor = sne_fast.Predictor(sne_fast.SNE(hidden_dim=32))
        >>> bool(logit_invariance(predictor, batch, permuted) > 0)
        True
    """
    if len(batch) != len(permuted):
        raise ValueError(
            f"logit_invariance: permuted must hold the {len(batch)} networks of batch, got {len(permuted)}"
        )
    encode, head = getattr(predictor, "encode", None), getattr(predictor, "head", None)

    def f(networks: WeightBatch) -> Tensor:
        found: Tensor = head(encode(networks)) if encode is not None and head is not None else predictor(networks)
        return found

    difference = f(permuted) - (f(batch) if outputs is None else outputs)
    return difference.square().sum() / (2 * max(1, len(batch)))

"""Errors of results against exact ones."""

from __future__ import annotations

from torch import Tensor


def relative_error(got: Tensor, want: Tensor) -> float:
    """Return ||got - want|| / ||want||, or the largest difference over the largest entry, whichever is worse."""
    if want.numel() == 0:
        assert got.shape == want.shape
        return 0.0
    difference = got.double() - want.double()
    norm = max(float(want.double().norm()), 1e-30)
    return max(float(difference.norm()) / norm, float(difference.abs().max() / max(float(want.abs().max()), 1e-30)))


def largest_error(got: Tensor, want: Tensor) -> float:
    """Return the largest difference over the largest entry."""
    assert got.shape == want.shape
    return float((got.double() - want.double()).detach().abs().max() / want.detach().abs().max())


def loses_at_most_twice(got: Tensor, usual: Tensor, want: Tensor, name: object = "") -> None:
    """Check that ``got`` is at most twice as far from ``want`` as ``usual``, which PyTorch's own ops give."""
    lost, allowed = relative_error(got, want), relative_error(usual, want)
    assert lost < 2 * allowed, (name, lost, allowed)

"""Maker of the zoo of `sne-fast demo`: small classifiers of the handwritten digits of scikit-learn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from os import PathLike

from . import architectures as all_architectures
from .classifiers import make_classifier_zoo
from .table import Zoo

_NAMES = (
    "mlp-10",
    "mlp-10-10",
    "mlp-10-8-8",
    "mlp-10-10-layernorm",
    "cnn3-flatten",
    "cnn3-pool-groupnorm",
    "cnn3-pool-batchnorm",
    "cnn5-flatten",
    "cnn5-pool",
)
ARCHITECTURES = {name: all_architectures.ARCHITECTURES[name] for name in _NAMES}
"""Name -> constructor, of the nine smallest architectures with 600 to 4,000 parameters."""


def make_digits_zoo(
    folder: str | PathLike[str],
    networks: int = 720,
    *,
    seed: int = 0,
    max_steps: int = 600,
    architectures: Sequence[str] | None = None,
    on_progress: Callable[[float], None] | None = None,
) -> Zoo:
    """Train a zoo of classifiers of scikit-learn's digits, of nine small architectures unless others are named.

    The arguments are those of :func:`make_classifier_zoo`.

    Example:
        >>> zoo = make_digits_zoo("digits", 18, max_steps=5)
        >>> verify(zoo, range(10)) < 1e-6
        True
    """
    return make_classifier_zoo(
        folder,
        networks,
        dataset="digits",
        architectures=_NAMES if architectures is None else architectures,
        seed=seed,
        max_steps=max_steps,
        on_progress=on_progress,
    )

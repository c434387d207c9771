"""Positions of many networks in the plane, such that networks of similar encodings are near each other."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..extras import require
from .searching import as_matrix

_COMPONENTS = 50
"""Principal components that t-SNE takes of wider encodings, as van der Maaten and Hinton (2008) do."""

_EXACT = 500
"""Smaller side of a matrix up to which its components are computed exactly."""
_START = 1e-4
"""Standard deviation of the first positions, small for t-SNE as Kobak and Berens (2019) recommend."""


def layout(vectors: Any, seed: int = 0, *, perplexity: float = 30.0) -> np.ndarray:
    """Return positions in the plane by t-SNE (van der Maaten and Hinton 2008, JMLR 9).

    Vectors are standardised number by number, and those of more than 50 numbers are reduced to their first 50 principal
    components. The same vectors and seed give the same positions, for which it runs in one thread. Distances in the
    plane say who is near whom, and little about how far others are.

    Args:
        vectors: `(N, h)`, tensors or arrays.
        seed: of the reduction and of t-SNE.
        perplexity: about the number of neighbours that each network is held near to, at most `(N - 1) / 3`.

    Returns:
        Positions `(N, 2)` float32. Fewer than four networks are placed by their principal components.

    Raises:
        ValueError: no matrix of finite numbers, a perplexity that is not above 0, or a seed outside of [0, 2**32).
        ModuleNotFoundError: scikit-learn is missing.

    Example:
        >>> layout(torch.randn(20, 8)).shape
        (20, 2)
    """
    values = as_matrix(vectors, "layout: vectors")
    if not perplexity > 0:
        raise ValueError(f"layout: perplexity must be above 0, got {perplexity!r}")
    if not 0 <= seed < 2**32:
        raise ValueError(f"layout: seed must lie in [0, 2**32), got {seed!r}")
    if not (values != values[:1]).any():  # none, one, or copies of one
        return np.zeros((len(values), 2), np.float32)
    require("sklearn", extra="sklearn", why="a map of networks")
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    mean, spread = mean_and_spread(values)
    scaled = (values - mean) / spread
    with threadpool_limits(1):  # sums of several threads are added in any order
        components = min(_COMPONENTS, *scaled.shape)
        solver = "full" if min(scaled.shape) <= _EXACT else "randomized"
        scaled = PCA(components, random_state=seed, svd_solver=solver).fit_transform(scaled)
        plane = np.pad(scaled[:, :2], ((0, 0), (0, max(0, 2 - components))))
        width = plane[:, 0].std()
        if len(plane) < 4 or not width > 1e-12:  # t-SNE crashes on positions that are all the same
            return plane.astype(np.float32)
        # The noise parts copies, on which the same forces act otherwise.
        start = _START * (plane / width + 0.01 * np.random.default_rng(seed).normal(size=plane.shape))
        near = min(perplexity, (len(plane) - 1) / 3)
        found = TSNE(perplexity=near, init=start.astype(np.float32), random_state=seed).fit_transform(scaled)
    return np.asarray(found, np.float32)


def mean_and_spread(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and standard deviation of each column, `(h,)` float64; the latter is 1 for a constant column."""
    mean, spread = values.mean(0, dtype=np.float64), values.std(0, dtype=np.float64)
    return mean, np.where(spread > 1e-6 * np.maximum(np.abs(mean), 1e-6), spread, 1.0)

"""Search among encodings: one matrix product for each block of queries, or lists of candidates by `faiss`."""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np

from .inverted_lists import candidates

Metric = Literal["cosine", "euclidean"]
_BLOCK_BYTES = 1 << 28
_ROWS = 1 << 16
_SHRINKAGE = 0.01


def nearest(
    gallery: Any,
    queries: Any = None,
    k: int = 10,
    *,
    metric: Metric = "cosine",
    whiten: bool = True,
    approximate: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the nearest encodings of a gallery, the nearest first, equally near ones in their order.

    Args:
        gallery: `(N, h)`, tensors or arrays.
        queries: `(Q, h)`; None searches for the neighbours of every encoding of the gallery, itself left out.
        k: neighbours of each query; fewer where the gallery has not so many.
        metric: "cosine" is 1 minus the cosine of the angle, "euclidean" the Euclidean distance.
        whiten: subtract the gallery's mean first, and turn and scale encodings so that the gallery varies alike in all
            directions. Without it the few directions in which networks differ most hide all others.
        approximate: compare each query only with the part of the gallery that is likely to be near, by inverted lists
            of `faiss`. It misses a few of the neighbours, and pays where there are millions of encodings and many
            queries; galleries of fewer than 10,000 are searched exactly.

    Returns:
        Distances and places in the gallery, `(Q, k)` float32 and int64.

    Raises:
        ValueError: encodings that are no matrices of the same width, not finite, or an unknown metric, or k below 1.
        ModuleNotFoundError: `approximate` without `faiss`.

    Example:
        >>> distances, places = nearest(torch.eye(3), torch.tensor([[0.0, 0.9, 0.1]]), k=2)
        >>> places.tolist()
        [[1, 2]]
    """
    base = as_matrix(gallery, "nearest: gallery")
    asked = base if queries is None else as_matrix(queries, "nearest: queries")
    if metric not in get_args(Metric):
        raise ValueError(f"nearest: metric must be one of {', '.join(get_args(Metric))}, got {metric!r}")
    if k < 1 or base.shape[1] != asked.shape[1]:
        raise ValueError(
            f"nearest: k must be at least 1 and encodings of one width, got {k}, {base.shape} and {asked.shape}"
        )
    if whiten and len(base):
        mean, matrix = whitening(base)
        base, asked = ((x - mean) @ matrix for x in (base, asked))
    if metric == "cosine":
        base, asked = (x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12) for x in (base, asked))
    alone = queries is not None
    k = min(k, max(0, len(base) - (not alone)))
    listed = np.full((len(asked), k), -1, np.int64)
    if approximate and k:
        listed = candidates(base, asked, k, themselves=alone)
    left = np.flatnonzero((listed < 0).any(1))
    squares = (base.astype(np.float64) ** 2).sum(1)
    block = max(1, _BLOCK_BYTES // (8 * max(1, len(base))))
    lost = np.finfo(np.float32).eps * base.shape[1] * float(squares.max(initial=0.0)) ** 0.5
    for start in range(0, len(left), block):
        rows = left[start : start + block]
        # With |x|^2 the same for a query, the order is that of |y|^2 / 2 - <x, y>.
        score = squares / 2 - asked[rows] @ base.T
        if not alone:
            score[np.arange(len(rows)), rows] = np.inf
        listed[rows] = _listed(base, asked[rows], score, k, lost)
    return _ranked(base, asked, listed, metric)


def _ranked(base: np.ndarray, asked: np.ndarray, listed: np.ndarray, metric: Metric) -> tuple[np.ndarray, np.ndarray]:
    """Return the distances of listed places, `(Q, k)`, without what a product loses, and the places in their order."""
    distances, places = np.zeros(listed.shape, np.float32), np.zeros(listed.shape, np.int64)
    block = max(1, _BLOCK_BYTES // (8 * max(1, listed.shape[1] * base.shape[1])))
    for start in range(0, len(asked), block):
        found = listed[start : start + block]
        near = ((base[found].astype(np.float64) - asked[start : start + block, None]) ** 2).sum(2)
        order = np.lexsort((found, near), axis=1)
        places[start : start + block] = np.take_along_axis(found, order, 1)
        near = np.take_along_axis(near, order, 1)
        distances[start : start + block] = near / 2 if metric == "cosine" else np.sqrt(near)
    return distances, places


def _listed(base: np.ndarray, asked: np.ndarray, score: np.ndarray, k: int, lost: float) -> np.ndarray:
    """Return the places of the k nearest ones of each query, in any order.

    Args:
        base: `(N, h)`.
        asked: `(Q, h)`, queries.
        score: `(Q, N)`, the less the nearer, as a product of float32 has rounded it.
        k: number of places.
        lost: twice what the product may lose for a query of length 1.
    """
    if k >= score.shape[1]:
        return np.broadcast_to(np.arange(score.shape[1]), score.shape)
    most = np.partition(score, k - 1, axis=1)[:, k - 1] + lost * np.linalg.norm(asked, axis=1)
    chosen = score <= most[:, None]
    counts = chosen.sum(1)
    listed = np.empty((len(asked), k), np.int64)
    listed[counts == k] = np.nonzero(chosen[counts == k])[1].reshape(-1, k)
    for row in np.flatnonzero(counts != k):  # more may be among the k nearest, or the product has overflown
        places = np.flatnonzero(chosen[row] if counts[row] > k else score[row] != np.inf)
        near = ((base[places].astype(np.float64) - asked[row]) ** 2).sum(1)
        listed[row] = places[np.argsort(near, kind="stable")[:k]]
    return listed


def whitening(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean of encodings `(h,)`, and the matrix `(h, h)` after which they vary alike in all directions.

    With the eigenvectors V and eigenvalues w of the covariance, it is `V / sqrt(w + 0.01 mean(w))`: directions in which
    encodings hardly vary are not blown up to noise.

    Args:
        values: `(N, h)` float32, N at least 1.

    Returns:
        Both float32; zeros and the identity for encodings that are all the same, such as one alone.
    """
    mean = values.mean(0, dtype=np.float64)
    covariance = np.zeros((values.shape[1],) * 2)
    for start in range(0, len(values), _ROWS):
        part = values[start : start + _ROWS] - mean
        covariance += part.T @ part
    sizes, vectors = np.linalg.eigh(covariance / len(values))
    sizes = np.maximum(sizes, 0.0)
    if not sizes.mean() > 1e-12 * max(float(np.square(mean).mean()), 1e-12):
        return np.zeros(len(mean), np.float32), np.eye(len(mean), dtype=np.float32)
    matrix = vectors / np.sqrt(sizes + _SHRINKAGE * sizes.mean())
    return mean.astype(np.float32), matrix.astype(np.float32)


def as_matrix(values: Any, name: str) -> np.ndarray:
    """Return encodings as a float32 matrix.

    Args:
        values: `(N, h)`, a tensor or an array.
        name: what they are, for the message, such as "nearest: gallery".

    Raises:
        ValueError: they are no matrix of numbers, or not finite.
    """
    found = values.detach().cpu().numpy() if hasattr(values, "detach") else np.asarray(values)
    if found.ndim != 2 or found.dtype.kind not in "fiu":
        raise ValueError(f"{name} must be a matrix of numbers, got {found.dtype} {found.shape}")
    found = found.astype(np.float32)
    if not np.isfinite(found).all():
        rows = np.flatnonzero(~np.isfinite(found).all(1))
        raise ValueError(f"{name} must be finite, row {rows[0]} is not")
    return found

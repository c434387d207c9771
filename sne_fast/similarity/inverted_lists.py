"""Lists of likely neighbours by inverted files of `faiss`: each query looks only into the cells that are near to it."""

from __future__ import annotations

import math

import numpy as np

from ..extras import require

SMALLEST = 10_000
"""Encodings below which the product of all with all is as fast."""
_CELLS = 4  # times the square root of the number of encodings, the least that faiss advises
_PROBED = 24
_SEED = 0


def candidates(base: np.ndarray, asked: np.ndarray, k: int, *, themselves: bool) -> np.ndarray:
    """Return the places of the k likely nearest encodings of each query, in any order.

    Args:
        base: `(N, h)`, compared in float32.
        asked: `(Q, h)`.
        k: number of neighbours, at most N.
        themselves: False where the queries are those of `base`, which are then none of their own neighbours.

    Returns:
        `(Q, k)` int64; a row with -1 in it is not complete, and all are so where N is below 10,000.

    Raises:
        ModuleNotFoundError: `faiss` is missing.
    """
    require("faiss", extra="faiss", why="approximate search", otherwise=", or search exactly")
    if len(base) < SMALLEST:
        return np.full((len(asked), k), -1, np.int64)
    import faiss

    cells = int(_CELLS * math.sqrt(len(base)))
    base, asked = (np.ascontiguousarray(x, np.float32) for x in (base, asked))
    quantiser = faiss.IndexFlatL2(base.shape[1])
    index = faiss.IndexIVFFlat(quantiser, base.shape[1], cells)
    index.cp.seed = _SEED
    index.cp.min_points_per_centroid = 1  # fewer than it advises are no reason to write to stderr
    index.train(base)
    index.add(base)
    index.nprobe = max(_PROBED, cells // 50)
    _, found = index.search(asked, k + (not themselves))
    if themselves:
        return np.asarray(found, np.int64)
    # A query is mostly the first of its own list, but not always: others may be the same.
    own = found == np.arange(len(found))[:, None]
    own[~own.any(1), -1] = True
    return np.asarray(found[~own].reshape(len(found), k), np.int64)

"""Indices of networks in a batch, as users write them."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

NetworkIndex = int | slice | Sequence[int] | Sequence[bool] | Tensor | np.ndarray[Any, Any]
"""An index, a slice, a sequence of indices, or a mask with one boolean per network."""


def chosen_networks(index: NetworkIndex, count: int) -> slice | np.ndarray[Any, np.dtype[np.int64]]:
    """Return the networks that an index selects: a slice of step 1 where they are neighbours, else int64 indices.

    Args:
        index: as a user wrote it.
        count: number of networks in the batch.

    Raises:
        IndexError: an index outside -count..count-1, or a mask of another length.
        TypeError: anything else.
    """
    if isinstance(index, slice):
        start, stop, step = index.indices(count)
        if step == 1:
            return slice(start, max(start, stop))
        return np.arange(start, stop, step, dtype=np.int64)
    if (isinstance(index, (Tensor, np.ndarray)) and index.ndim == 0) or not hasattr(index, "__len__"):
        if isinstance(index, (bool, np.bool_)) or getattr(index, "dtype", None) in (torch.bool, np.bool_):
            raise TypeError("WeightBatch: a single boolean is no index; use a mask of one boolean per network")
        try:
            b = operator.index(index)
        except TypeError:
            raise TypeError(
                f"WeightBatch: index must be an int, a slice, a sequence of ints or a mask, got {type(index).__name__}"
            ) from None
        if not -count <= b < count:
            raise IndexError(f"WeightBatch: index {b} is outside a batch of {count} networks")
        return slice(b % count, b % count + 1)
    indices = index.detach().cpu().numpy() if isinstance(index, Tensor) else np.asarray(index)
    if indices.ndim != 1 or (indices.size and indices.dtype.kind not in "iub"):
        raise TypeError(
            "WeightBatch: index must be ints or booleans in one dimension, "
            f"got {indices.dtype} of shape {indices.shape}"
        )
    if indices.dtype.kind == "b":
        if indices.size != count:
            raise IndexError(f"WeightBatch: mask must have one entry per network, got {indices.size} for {count}")
        return np.flatnonzero(indices)
    indices = indices.astype(np.int64)
    wrong = (indices < -count) | (indices >= count)
    if wrong.any():
        raise IndexError(f"WeightBatch: index {indices[wrong][0]} is outside a batch of {count} networks")
    return np.where(indices < 0, indices + count, indices)

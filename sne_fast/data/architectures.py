"""What packing a network decides by names, shapes and dtypes alone, kept for the next network of the same architecture.

Which tensors count, their order, layers, types and cuts are the same for all networks of an architecture, and take a
hundred times longer to find than to look up. Whatever depends on values, on objects or on files beside (quantised and
tied weights, adapters, buffers known by their values) is no matter of an architecture: `architecture_of` returns None.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch

from ..ops.schema import STORED_DTYPES
from .adapters import Adapters
from .checkpoints import Checkpoint
from .choices import Chunking
from .cutting import cut_of, has_kernel
from .known_names import buffer_by_name, is_flattened
from .layers import collect
from .pointers import chunk_pointers

__all__ = ["Architecture", "Cuts", "Form", "architecture_of", "cuts_of"]

Form = tuple[str, tuple[int, ...], torch.dtype]
"""Name, shape and dtype of a tensor as it is stored."""

MOST_CHUNKS = 1 << 16
"""Chunks of a network from which its pointers are not kept: 128 architectures take 64 MiB at most."""


class Architecture(NamedTuple):
    """The weights of a network in the order in which they are packed.

    Attributes:
        places: (T,) of each weight among the tensors as they were given.
        dtypes: (T,) places in `STORED_DTYPES`.
        sizes: (T,) numbers of elements.
        types: (T,) `8 * kind + role`.
        kernels: (T,) bool, see `WeightBatch`.
        tensors_of: (L,) number of tensors of each layer.
        levels: (L,) 0, 1, ...
        names: of the weights.
        shapes: of the weights.
        skipped: what is left out, with the reasons.
    """

    places: np.ndarray
    dtypes: np.ndarray
    sizes: np.ndarray
    types: np.ndarray
    kernels: np.ndarray
    tensors_of: np.ndarray
    levels: np.ndarray
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    skipped: tuple[tuple[str, str], ...]


class Cuts(NamedTuple):
    """How the weights of an architecture are cut into chunks.

    Attributes:
        matrices: (T, 2) matrices `(R, K)` whose transposes are written.
        chunks_of: (T,) number of chunks of each tensor.
        chunk_ends: (N,) where each chunk ends, from the first weight of the network on.
    """

    matrices: np.ndarray
    chunks_of: np.ndarray
    chunk_ends: np.ndarray


@lru_cache(maxsize=128)
def architecture_of(forms: tuple[Form, ...], order: str) -> Architecture | None:
    """Return what is decided by names, shapes and dtypes; None where that is not all, or the network is refused.

    Args:
        forms: of all tensors of the network, in their order.
        order: of layers, as in :func:`sne_fast.pack`.
    """
    tensors = {name: torch.empty(shape, dtype=dtype, device="meta") for name, shape, dtype in forms}
    if len(tensors) < len(forms) or Adapters(tensors).names:
        return None
    for name, tensor in tensors.items():
        if is_flattened(name) or (tensor.is_floating_point() and buffer_by_name(name, tensor, tensors)):
            return None
    try:
        network = collect(0, Checkpoint(tensors, keeps_order=True), order, values=False)
    except (ValueError, TypeError, RuntimeError):
        return None
    place_of = {id(tensor): place for place, tensor in enumerate(tensors.values())}
    weights = [entry for layer in network.layers for entry in layer.tensors]
    for name, tensor in weights:
        stored_as, sources = network.sources[name]
        if list(sources) != [stored_as] or id(tensor) not in place_of or tensor.dtype not in STORED_DTYPES:
            return None
    types = [tensor_type for layer in network.layers for tensor_type in layer.types()]
    shapes = tuple(tuple(tensor.shape) for _, tensor in weights)
    kernels = [has_kernel(tensor_type, len(shape)) for tensor_type, shape in zip(types, shapes, strict=True)]
    return Architecture(
        places=np.array([place_of[id(tensor)] for _, tensor in weights]),
        dtypes=np.array([STORED_DTYPES.index(tensor.dtype) for _, tensor in weights]),
        sizes=np.array([math.prod(shape) for shape in shapes], np.int64),
        types=np.array(types, np.int64),
        kernels=np.array(kernels, bool),
        tensors_of=np.array([len(layer.tensors) for layer in network.layers], np.int64),
        levels=np.arange(len(network.layers), dtype=np.int64),
        names=tuple(name for name, _ in weights),
        shapes=shapes,
        skipped=tuple(network.skipped),
    )


@lru_cache(maxsize=128)
def cuts_of(forms: tuple[Form, ...], order: str, chunk_size: int, chunking: Chunking) -> Cuts | None:
    """Return how the weights of an architecture that is known are cut; None for too many chunks to keep.

    Args:
        forms: as for `architecture_of`.
        order: as for `architecture_of`.
        chunk_size: as in :func:`sne_fast.pack`.
        chunking: as in :func:`sne_fast.pack`.
    """
    known = architecture_of(forms, order)
    if known is None:
        return None
    cuts = [cut_of(shape, bool(k), chunking) for shape, k in zip(known.shapes, known.kernels, strict=True)]
    lengths = [size // cut.rows for size, cut in zip(known.sizes.tolist(), cuts, strict=True)]
    chunks_of = [cut.rows * -(-length // chunk_size) for length, cut in zip(lengths, cuts, strict=True)]
    if sum(chunks_of) > MOST_CHUNKS:
        return None
    chunk_ends = chunk_pointers([cut.rows for cut in cuts], lengths, chunk_size)[0][1:]
    return Cuts(np.array([cut.matrix for cut in cuts], np.int64), np.array(chunks_of, np.int64), chunk_ends)

"""How tensors are cut into rows: which dimensions are those of kernels, and in which order values are written."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .tensor_types import CONVOLUTION, ROLES, TRANSPOSED

_WEIGHT = ROLES.index("weight")


class Cut(NamedTuple):
    """The matrix `(R, K)` whose transpose is written, and the number of rows that are cut into chunks one by one."""

    matrix: tuple[int, int]
    rows: int


def has_kernel(tensor_type: int, ndim: int) -> bool:
    """Return whether a tensor of this type has kernel dimensions, as only the weights of convolutions have."""
    kind, role = divmod(tensor_type, 8)
    return ndim > 2 and role == _WEIGHT and kind in (CONVOLUTION, TRANSPOSED)


def which_have_kernels(tensor_types: Sequence[int], shapes: Sequence[Sequence[Sequence[int]]]) -> Tensor:
    """Return for every tensor of a batch whether it has kernel dimensions, `(T,)` bool on the CPU.

    Args:
        tensor_types: of the T tensors.
        shapes: per network those of its tensors; if they are not known, no tensor has kernel dimensions.
    """
    ndims = [len(shape) for network in shapes for shape in network] or [0] * len(tensor_types)
    found = [has_kernel(*pair) for pair in zip(tensor_types, ndims, strict=True)]
    return torch.tensor(found, dtype=torch.bool, device="cpu")


def cut_of(shape: Sequence[int], kernel: bool, chunking: str) -> Cut:
    """Return how a tensor is cut.

    Args:
        shape: of the tensor, as it is stored.
        kernel: whether all dimensions behind the second are those of a kernel, see `has_kernel`. A tensor without is
            cut as the matrix of its last dimension by all others.
        chunking: "flat", "neuron" or "kernel".
    """
    size = math.prod(shape)
    if len(shape) < 2:
        return Cut((size, 1), 1)
    if not kernel:
        return Cut((size, 1), 1 if chunking == "flat" else size // shape[-1])
    pairs = shape[0] * shape[1]
    positions = size // pairs
    if chunking == "kernel":
        return Cut((size, 1), pairs)  # kernels stand as they are stored
    return Cut((pairs, positions), positions if chunking == "flat" else positions * shape[0])


def packed_strides(shape: Sequence[int], kernel: bool, chunking: str) -> list[int]:
    """Return the strides of a tensor in the values of a batch; arguments as for `cut_of`, or another chunking for none.

    See "How a tensor is cut" in `docs/method.md`.
    """
    dims = list(range(len(shape)))
    if kernel and chunking in ("flat", "neuron"):
        dims = [*dims[2:], 0, 1]  # kernel positions outermost
    strides = [0] * len(shape)
    stride = 1
    for d in reversed(dims):
        strides[d] = stride
        stride *= shape[d]
    return strides

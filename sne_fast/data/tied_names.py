"""Names of tensors that are tied: one tensor under several names, which counts once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor

T = TypeVar("T")

__all__ = ["has_plain_values", "identity_of", "with_tied_names"]


def has_plain_values(tensor: Tensor) -> bool:
    """Return whether a tensor is an ordinary one with memory, whose values may be looked at."""
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided and not tensor.is_meta
    return plain and not nn.parameter.is_lazy(tensor) and not is_functorch_wrapped_tensor(tensor)


def identity_of(tensor: Tensor) -> object:
    """Return what all names of one tensor share: its memory and the way it is read, else the object itself."""
    if not has_plain_values(tensor) or tensor.numel() == 0:
        return id(tensor)
    storage = tensor.untyped_storage().data_ptr()
    # The stride of a dimension of one says nothing.
    strides = tuple(stride if n > 1 else 0 for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.device, storage, tensor.storage_offset(), tensor.shape, strides, tensor.dtype


def with_tied_names(tensors: Mapping[str, T], metadata: Mapping[str, str]) -> dict[str, T]:
    """Return tensors under their other names too, where the metadata of a safetensors file maps those to them.

    The format holds no tensor twice, so `safetensors.torch.save_model` writes tied tensors under one of their names and
    puts the others into the metadata.
    """
    tied = {other: tensors[name] for other, name in metadata.items() if other not in tensors and name in tensors}
    return {**tensors, **tied}

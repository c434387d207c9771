"""Which names are names of one tensor."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor

__all__ = ["has_plain_values", "identity"]


def has_plain_values(tensor: Tensor) -> bool:
    """Return whether a tensor is an ordinary one with memory, whose values may be looked at."""
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided and not tensor.is_meta
    return plain and not is_functorch_wrapped_tensor(tensor)


def identity(tensor: Tensor) -> object:
    """Return what two names of one tensor share: its memory and the way it is read, else the object."""
    if not has_plain_values(tensor) or tensor.numel() == 0:
        return id(tensor)
    storage = tensor.untyped_storage().data_ptr()
    return tensor.device, storage, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype

"""What the functions of the ops share: autocast, pointers on the CPU, and whether a gradient is wanted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .transforms import torch_func_is_active


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast to the autocast dtype where autocast is on, since autocast does not cast the inputs of opaque ops."""
    if not all(isinstance(t, Tensor) for t in tensors):
        return tensors  # the checks that follow name the argument
    device_type = tensors[0].device.type
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        return tuple(t if t.dtype in (dtype, torch.float64) else t.to(dtype) for t in tensors)
    return tensors


def is_cast(tensor: Tensor) -> bool:
    """Return whether :func:`autocast` casts a tensor."""
    device_type = tensor.device.type
    wanted = torch.is_autocast_enabled(device_type) and tensor.dtype != torch.float64
    return wanted and tensor.dtype != torch.get_autocast_dtype(device_type)


def on_host(ptr: Tensor, host: Tensor | None) -> Tensor:
    """Return the copy of a pointer on the CPU."""
    if host is not None:
        return host
    if not isinstance(ptr, Tensor):
        return ptr  # the checks that follow name the argument
    return ptr if ptr.device.type == "cpu" else ptr.cpu()


def needs_grad(tensors: Sequence[Tensor]) -> bool:
    """Return whether a call on the tensors is recorded for a gradient."""
    # Inside torch.func a tensor may need the gradient of an outer level, which it does not show here.
    return torch_func_is_active() or (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))


def distinct(*args: Any) -> list[Any]:
    """Replace repeated tensors by views while tracing: dynamo refuses one tensor twice in an autograd.Function."""
    if not torch.compiler.is_compiling():
        return list(args)
    all_distinct: list[Any] = []
    for arg in args:
        repeated = isinstance(arg, Tensor) and any(arg is other for other in all_distinct)
        all_distinct.append(arg.view_as(arg) if repeated else arg)
    return all_distinct

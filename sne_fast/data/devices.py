"""Devices by name, and copies to them."""

from __future__ import annotations

import torch
from torch import Tensor


def usable_device(name: str | torch.device) -> torch.device:
    """Return the device of that name.

    Raises:
        ValueError: torch knows no such device, or cannot use it.
    """
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ValueError(f"device {str(name)!r} cannot be used: {str(error).splitlines()[0]}") from error
    return device


def without_waiting(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor of the CPU on a device; a copy to a GPU goes through page-locked memory and is not waited for."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)

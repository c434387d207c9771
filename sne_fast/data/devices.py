"""Devices by name."""

from __future__ import annotations

import torch


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

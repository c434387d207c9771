"""Facts about the GPU of a tensor, each asked of the driver once."""

from __future__ import annotations

import functools

import torch


def index(device: torch.device) -> int:
    """Return the index of a CUDA device; a device without one is the current one."""
    return torch.cuda.current_device() if device.index is None else device.index


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def capability(device: torch.device) -> tuple[int, int]:
    """Return the compute capability of a CUDA device, such as ``(9, 0)``."""
    return _capability(index(device))


@functools.cache
def _multiprocessors(index: int) -> int:
    return int(torch.cuda.get_device_properties(index).multi_processor_count)


def multiprocessors(device: torch.device) -> int:
    """Return the multiprocessor count of a CUDA device."""
    return _multiprocessors(index(device))

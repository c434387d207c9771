"""Copies of small host arrays on a GPU, made without waiting for it and cached by content."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...ops import devices

KEPT_TABLES = 32
SPARES, SPARE_SIZES = 4, 64


@dataclass(frozen=True)
class _Entry:
    tensor: Tensor
    stream: Any
    copied: Any


_tables: OrderedDict[tuple[int, bytes], _Entry] = OrderedDict()
# Pinned memory cannot be allocated while a CUDA graph is captured, so some of each size used before is kept for that.
_spares: OrderedDict[tuple[int, ...], list[Tensor]] = OrderedDict()
_lock = threading.Lock()
# Tensors that a captured CUDA graph reads at every replay: never freed, since nothing tells which replay is the last.
_captured: list[Tensor] = []


def _keep_spares(shape: tuple[int, ...]) -> None:
    spares = _spares.setdefault(shape, [])
    _spares.move_to_end(shape)
    while len(spares) < SPARES:
        spares.append(torch.empty(shape, dtype=torch.int64, device="cpu", pin_memory=True))
    if len(_spares) > SPARE_SIZES:
        _spares.popitem(last=False)


def _copy(array: np.ndarray, device: torch.device, capturing: bool) -> Tensor:
    if not capturing:
        _keep_spares(array.shape)
        return torch.from_numpy(array).pin_memory().to(device, non_blocking=True)
    spares = _spares.get(array.shape)
    pinned = spares.pop() if spares else torch.empty(array.shape, dtype=torch.int64, device="cpu", pin_memory=True)
    pinned.numpy()[:] = array
    tensor = pinned.to(device, non_blocking=True)
    _captured.extend((pinned, tensor))
    return tensor


def on_device_without_waiting(array: np.ndarray, device: torch.device, repeats: bool) -> Tensor:
    """Return a copy of int64 ``array`` on ``device``, ready for work on its current stream.

    With ``repeats``, equal arrays share one copy. While a CUDA graph is captured, a copy made earlier is used if there
    is one, so that after a warm-up the graph holds no transfer; tensors that a graph uses are never freed.
    """
    if device.type != "cuda":
        return torch.from_numpy(array)
    index = devices.index(device)
    capturing = torch.cuda.is_current_stream_capturing()
    with _lock:
        if not repeats:
            return _copy(array, torch.device("cuda", index), capturing)
        key, stream = (index, array.tobytes()), torch.cuda.current_stream(index)
        entry = _tables.get(key)
        if entry is None:
            tensor = _copy(array, torch.device("cuda", index), capturing)
            if not capturing:  # a captured copy happens at replay, and serves nobody else
                copied = torch.cuda.Event()
                copied.record(stream)
                _tables[key] = _Entry(tensor, stream, copied)
                if len(_tables) > KEPT_TABLES:
                    _tables.popitem(last=False)
            return tensor
        _tables.move_to_end(key)
        if capturing:  # an earlier copy is complete: torch.cuda.graph waits for the device before it captures
            _captured.append(entry.tensor)
        elif entry.stream != stream:
            stream.wait_event(entry.copied)
            entry.tensor.record_stream(stream)
        return entry.tensor

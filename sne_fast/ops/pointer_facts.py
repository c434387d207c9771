"""What follows from the pointers of a batch, computed once: owners of rows, launch plans, lengths, checks.

Every op of a pass, its backward and all later passes with the same batch ask for the same. The encoder declares the
tensors of a batch lasting; what is derived from others, say from temporary pointers whose memory a compiled graph uses
again, is computed at every call.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .transforms import torch_func_is_active

_Found = TypeVar("_Found")
_facts: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""Lasting tensor -> its version, and what was derived from it by key; forgotten with the tensor."""


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def declare_lasting(*tensors: Tensor) -> None:
    """Declare that the content of tensors stays as it is, so that what is derived from them may be kept with them."""
    if torch.compiler.is_compiling() or torch_func_is_active():
        return
    for tensor in tensors:
        if tensor not in _facts and type(tensor) is Tensor:
            _facts[tensor] = (_version(tensor), {})


def derived(tensor: Tensor, key: Hashable, make: Callable[[], _Found]) -> _Found:
    """Return what ``make`` makes from the content of a tensor, from a lasting one only once.

    Args:
        tensor: integers. What follows from it on a GPU is kept per stream, and not while a CUDA graph is captured.
        key: name of what is made.
        make: computes it, without gradients.
    """
    if torch.compiler.is_compiling() or torch_func_is_active():
        return make()
    version, found = _facts.get(tensor, (None, {}))
    if version is None or version != _version(tensor):
        return make()
    if tensor.device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            return make()
        key = (key, torch.cuda.current_stream(tensor.device).cuda_stream)
    if key not in found:
        with torch.inference_mode(False), torch.no_grad():
            found[key] = make()
    result: _Found = found[key]
    return result


def owners(ptr: Tensor, rows: int) -> Tensor:
    """Return the set of each of the ``rows`` that ``ptr (S+1,)`` cuts into sets: ``(rows,)`` int64."""

    def make() -> Tensor:
        sets = torch.arange(ptr.shape[0] - 1, device=ptr.device)
        return torch.repeat_interleave(sets, ptr.diff(), output_size=rows)

    return derived(ptr, ("owners", rows), make)


def places(ptr: Tensor, rows: int) -> Tensor:
    """Return the place of each of the ``rows`` in its set, counted from 0: ``(rows,)`` int64."""

    def make() -> Tensor:
        return torch.arange(rows, device=ptr.device) - ptr.index_select(0, owners(ptr, rows))

    return derived(ptr, ("places", rows), make)


def lengths(ptr: Tensor) -> Tensor:
    """Return the number of rows of each set, ``(S,)`` int64."""
    return derived(ptr, "lengths", ptr.diff)


def empty_sets(ptr: Tensor, ptr_host: Tensor | None) -> Tensor | None:
    """Return which sets have no rows, ``(S,)`` bool; None where all have some, as the copy on the CPU tells."""
    if ptr_host is None or torch.compiler.is_compiling():
        return ptr.diff() == 0
    some = derived(ptr_host, "has empty sets", lambda: bool((ptr_host.diff() == 0).any()))
    return ptr.diff() == 0 if some else None

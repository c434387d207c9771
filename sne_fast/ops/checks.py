"""Checks of op inputs; every message says op, argument, contract, what came and the remedy."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def described(value: object) -> str:
    """``float32 (3, 4) on cpu`` for a tensor, the type's name for anything else."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)} on {value.device}"
    return type(value).__name__


def floating(op: str, **tensors: Tensor) -> None:
    """Every tensor is floating, and all share one dtype and one device."""
    first_name, first = next(iter(tensors.items()))
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or tensor.dtype not in FLOATING:
            raise TypeError(
                f"{op}: {name} must be a tensor of float16, bfloat16, float32 or float64, got {described(tensor)}"
            )
        if tensor.dtype != first.dtype or tensor.device != first.device:
            raise TypeError(
                f"{op}: {name} must have the dtype and device of {first_name} ({described(first)}), got "
                f"{described(tensor)}; use .to() on one of them"
            )


def shape(op: str, name: str, tensor: Tensor, contract: str, expected: tuple[int | None, ...]) -> None:
    """``tensor.shape`` equals ``expected``, where None allows any size; ``contract`` spells it for the message."""
    fits = tensor.dim() == len(expected) and all(
        want is None or have == want for have, want in zip(tensor.shape, expected, strict=True)
    )
    if not fits:
        raise ValueError(f"{op}: {name} must have shape {contract}, got {described(tensor)}")


def pointer(op: str, name: str, ptr: Tensor, host: Tensor, device: torch.device, rows: int) -> None:
    """``ptr (S+1,)`` int64 on ``device`` cuts ``rows`` rows, by what its copy ``host`` on the CPU holds."""
    contract = "int64 of shape (S+1,) for S sets"
    if not isinstance(ptr, Tensor) or ptr.dtype != torch.int64 or ptr.dim() != 1:
        raise TypeError(f"{op}: {name} must be {contract}, got {described(ptr)}")
    if ptr.device != device:
        raise ValueError(f"{op}: {name} must be on {device} beside the values, got {described(ptr)}; use .to({device})")
    if host.dtype != torch.int64 or host.shape != ptr.shape or host.device.type != "cpu":
        raise ValueError(f"{op}: {name}_host must be a CPU copy of {name} ({described(ptr)}), got {described(host)}")
    if host.numel() == 0 or int(host[0]) != 0 or int(host[-1]) != rows or bool((host[1:] < host[:-1]).any()):
        raise ValueError(
            f"{op}: {name} must start at 0, never decrease and end at the number of rows, {rows}; got "
            f"{described(ptr)} from {host[:1].tolist()} to {host[-1:].tolist()}"
        )

"""The op ``add_codes`` in plain PyTorch, for :mod:`sne_fast.ops.reference`."""

from __future__ import annotations

import torch
from torch import Tensor

from .pointer_facts import owners, places


def _codes(
    rows: int, ptr: Tensor, level: Tensor, table: Tensor, scale: Tensor, magnitude: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Return the codes of rows before the gain, and logarithms of the scales of their sets ``(rows, 1)``, if any."""
    by_set = ptr.shape[0] > 0
    code = level[owners(ptr, rows)] if by_set else level
    if table.shape[0]:
        code = code + (table[places(ptr, rows)] if by_set else table[:1])
    if not scale.shape[0]:
        return code, None
    of_row = (scale[owners(ptr, rows)] if by_set else scale).log()[:, None]
    return code + of_row * magnitude, of_row


def add_codes(
    x: Tensor, ptr: Tensor, ptr_host: Tensor, level: Tensor, table: Tensor, scale: Tensor, magnitude: Tensor,
    gain: Tensor,
) -> Tensor:  # fmt: skip
    """Add the codes of sets and of places in them to packed rows."""
    code, _ = _codes(x.shape[0], ptr, level, table, scale, magnitude)
    return (x + gain * code).to(x.dtype)


def add_codes_backward(
    grad: Tensor, ptr: Tensor, ptr_host: Tensor, level: Tensor, table: Tensor, scale: Tensor, magnitude: Tensor,
    gain: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the gradients of ``magnitude`` and ``gain``."""
    code, of_row = _codes(grad.shape[0], ptr, level, table, scale, magnitude)
    wide = grad.to(torch.promote_types(grad.dtype, gain.dtype))
    by_magnitude = torch.zeros_like(magnitude) if of_row is None else (wide * of_row).sum(0) * gain
    return by_magnitude.to(magnitude.dtype), (wide * code).sum().to(gain.dtype)

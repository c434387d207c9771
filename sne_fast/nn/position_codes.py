"""Sinusoid codes of positions, computed in float64 and then cast."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def position_code(index: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """Return the code P: ``P(n)[2i] = sin(n / 10000^(2i/h))``, ``P(n)[2i+1] = cos(same)`` (Vaswani et al. 2017).

    Args:
        index: ``(rows,)`` integer positions n >= 0.
        width: h, the number of channels.
        dtype: of the result.

    Returns:
        ``(rows, h)``.
    """
    channel = torch.arange(0, width, 2, dtype=torch.float64, device=index.device)
    angle = index.to(torch.float64)[:, None] * torch.exp(channel * (-math.log(10000.0) / width))
    code = torch.stack([angle.sin().to(dtype), angle.cos().to(dtype)], dim=-1)
    return code.flatten(1)[:, :width]


def reversed_position_code(index: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """Return the code R: ``P`` with its channels reversed, so that sums of the two do not collide."""
    return position_code(index, width, dtype).flip(1)

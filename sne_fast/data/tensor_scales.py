"""Root mean square of every tensor, and the handling of NaN and infinities."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..ops.autograd import apply
from ..ops.transforms import is_transformed, outside_transforms, unwrapped
from .layers import Network

# Elements at once, 128 KiB in float64. It stays in cache, and torch starts no threads below 32768 elements: on a busy
# machine the barriers of thousands of tiles would cost a hundred times what the sums do.
TILE = 1 << 14

_PLAIN = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class _Scale(torch.autograd.Function):
    """Gradient of `s = sqrt(mean x^2)`, `ds/dx = x / (n s)`; s is handed in, so that it has the same bits."""

    @staticmethod
    def forward(ctx: Any, scale: Tensor, divides: Tensor, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(scale, *tensors)
        ctx.divides = divides.tolist()
        return scale.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        scale, *tensors = ctx.saved_tensors
        grads: list[Tensor | None] = []
        for t, tensor in enumerate(tensors):
            if not ctx.needs_input_grad[t + 2]:
                grads.append(None)
            elif not ctx.divides[t]:
                grads.append(torch.zeros_like(tensor))
            else:
                wide = tensor if tensor.dtype == torch.float64 else tensor.to(scale.dtype)
                grads.append((wide * (grad[t] / (tensor.numel() * scale[t]))).to(tensor.dtype))
        return None, None, *grads


def tensor_scales(
    tensors: list[Tensor],
    where: list[tuple[Network, str]],
    scale: str,
    nonfinite: str,
    dtype: torch.dtype,
    scale_dtype: torch.dtype,
) -> tuple[Tensor, list[Tensor]]:
    """Return the divisor of each tensor `(T,)`, and the tensors with NaN and infinities handled as `nonfinite` says."""
    device = tensors[0].device
    if scale == "none" and nonfinite == "keep":
        return torch.ones(len(tensors), dtype=scale_dtype, device=device), tensors
    plain = unwrapped(tensors)
    with outside_transforms():
        rms = root_mean_square(plain)
    odd = np.flatnonzero(~np.isfinite(rms)).tolist()
    if odd and nonfinite == "zero":
        tensors = list(tensors)
        for t in odd:
            tensors[t] = _finite(tensors[t])
        with outside_transforms():
            rms[odd] = root_mean_square([_finite(plain[t]) for t in odd])
    elif nonfinite == "raise":
        for t in odd:
            _refuse(plain[t], *where[t])
        # Halves are divided in float32 before they are cast, wider values after.
        _check_range(plain, where, rms, dtype if scale == "none" else scale_dtype)
    if scale == "tensor" and is_transformed(tensors):
        return torch.stack([_composed(t) for t in tensors]).to(scale_dtype), tensors
    divisors, divides = divisors_of(rms, scale, scale_dtype)
    divisors = divisors.to(device)
    if scale == "tensor" and torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        divisors = apply(_Scale, divisors, divides, *tensors)
    return divisors, tensors


def divisors_of(rms: np.ndarray, scale: str, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return what tensors of these root mean squares are divided by, 1 for none, and which are divided; on the CPU."""
    divisors = torch.from_numpy(rms).to(scale_dtype)
    divides = divisors.isfinite() & (divisors > 0)
    return torch.where(divides, divisors, 1.0) if scale == "tensor" else torch.ones_like(divisors), divides


def _composed(tensor: Tensor) -> Tensor:
    """Return the divisor of a tensor in float64 by plain operations, which torch.func and forward mode can follow."""
    square = tensor.double().square().mean()
    divides = square.isfinite() & (square > 0)
    return torch.where(divides, square, 1.0).sqrt()


def root_mean_square(tensors: list[Tensor]) -> np.ndarray:
    """Return `sqrt(mean x^2)` of each tensor in float64 `(T,)`; NaN or inf only for a tensor that holds one."""
    sizes = np.array([t.numel() for t in tensors], np.float64)
    squares = sums_of_squares(tensors)
    with np.errstate(invalid="ignore"):
        rms = np.sqrt(squares / sizes)
    # Squares of float64 values overflow above 1e154 and vanish below 1e-162; smaller dtypes do not reach that.
    for t in np.flatnonzero(~((squares > 1e-290) & (squares < math.inf))).tolist():
        if tensors[t].dtype == torch.float64:
            largest = float(tensors[t].abs().max())
            if 0 < largest < math.inf:
                scaled = float(sums_of_squares([tensors[t] / largest])[0])
                rms[t] = largest * math.sqrt(scaled / sizes[t])
    return rms


def sums_of_squares(tensors: list[Tensor]) -> np.ndarray:
    """Return the sum of squares of each tensor, computed in float64, `(T,)`."""
    if tensors[0].device.type != "cpu":  # the reduction converts as it reads there, and one wait serves all
        norms = torch.stack([torch.linalg.vector_norm(_plain(t), dtype=torch.float64) for t in tensors])
        return norms.square().cpu().numpy()
    squares = np.empty(len(tensors))
    held: list[int] = []
    size = 0
    for t, tensor in enumerate(tensors):
        if tensor.numel() > TILE:
            squares[t] = sum(part.double().square().sum().item() for part in tensor.reshape(-1).split(TILE))
            continue
        if size + tensor.numel() > TILE:
            squares[held] = _small_sums([tensors[i] for i in held])
            held, size = [], 0
        held.append(t)
        size += tensor.numel()
    if held:
        squares[held] = _small_sums([tensors[i] for i in held])
    return squares


def _small_sums(tensors: list[Tensor]) -> np.ndarray:
    starts = np.cumsum([0] + [t.numel() for t in tensors[:-1]])
    flat = torch.cat([_plain(t).reshape(-1) for t in tensors])
    return np.add.reduceat(flat.double().square_().numpy(), starts)


def _plain(tensor: Tensor) -> Tensor:
    """Convert fp8 tensors, which have no arithmetic, to float32; return others as they are."""
    return tensor if tensor.dtype in _PLAIN else tensor.float()


def _finite(tensor: Tensor) -> Tensor:
    return torch.nan_to_num(_plain(tensor), 0.0, 0.0, 0.0)


def _refuse(tensor: Tensor, network: Network, name: str) -> None:
    wide = _plain(tensor)
    nans, infinities = int(wide.isnan().sum()), int(wide.isinf().sum())
    raise ValueError(
        f"pack: {network.label}, tensor {name!r} has {nans} NaN and {infinities} inf among {tensor.numel()} values; "
        f'use nonfinite="zero" or "keep", or leave the network out'
    )


def _check_range(tensors: list[Tensor], where: list[tuple[Network, str]], rms: np.ndarray, dtype: torch.dtype) -> None:
    """Refuse finite values that would turn infinite in `dtype`: possible only if the norm is above its range."""
    limit = torch.finfo(dtype).max
    for t, tensor in enumerate(tensors):
        if torch.finfo(tensor.dtype).max > limit and rms[t] * math.sqrt(tensor.numel()) > limit:
            largest = float(_plain(tensor).abs().max())
            if largest > limit:
                network, name = where[t]
                raise ValueError(
                    f"pack: {network.label}, tensor {name!r} has values up to {largest:.3g}, beyond {dtype} "
                    f"(at most {limit:.3g}); use a wider dtype="
                )

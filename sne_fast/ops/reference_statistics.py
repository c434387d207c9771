"""Statistics of tensors in plain PyTorch, in float64: the reference of the op `tensor_statistics`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .schema import STATISTICS, accumulate_dtype

QUANTILES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
LEAST_RMS, LEAST_STD, LEAST_MEAN = 1e-12, 1e-6, 1e-9
LARGEST_SKEWNESS, LARGEST_KURTOSIS, LARGEST_QUANTILE = 20.0, 200.0, 12.0
TILE_ELEMENTS = 1 << 19


def tensor_statistics(values: Tensor, start: Tensor, scale: Tensor, dims: Tensor, start_host: Tensor) -> Tensor:
    """Compute the op ``tensor_statistics``, with arguments and results as in :mod:`sne_fast.ops.schema`."""
    out = values.new_empty((dims.shape[0], STATISTICS), dtype=accumulate_dtype(values.dtype))
    if not dims.shape[0]:
        return out
    _, group = torch.unique(dims, dim=0, return_inverse=True)
    order = torch.argsort(group, stable=True)
    for alike in order.split(torch.bincount(group).tolist()):
        out_, inn, kernel = dims[alike[0], :3].tolist()
        size = out_ * max(inn, 1) * kernel
        for ids in alike.split(max(1, TILE_ELEMENTS // size)):
            rows = start_host[ids][:, None] + torch.arange(size)
            w = values.index_select(0, rows.flatten().to(values.device)).double().view(len(ids), size)
            ids = ids.to(out.device)
            w = w * scale.index_select(0, ids).double()[:, None]
            out[ids] = _of_alike(w, *dims[alike[0]].tolist()).to(out.dtype)
    return out


def _of_alike(w: Tensor, out: int, inn: int, kernel: int, fan_in: int, fan_out: int, kernel_first: int) -> Tensor:
    """Return `(t, 23)` of t tensors of one shape, `w (t, n)` in float64 as they are stored in a batch."""
    size = w.shape[1]
    square = w.square().mean(1)  # [t]
    finite = square.isfinite()
    w = torch.where(finite[:, None], w, 0.0)  # no decomposition takes anything else
    rms = torch.where(finite, square, 0.0).sqrt().clamp_min(LEAST_RMS)
    u = w / rms[:, None]
    mean = u.mean(1)
    centred = u - mean[:, None]
    std = centred.square().mean(1).sqrt()
    divisor = std.clamp_min(LEAST_STD)
    skewness = (centred**3).mean(1) / divisor**3
    kurtosis = (centred**4).mean(1) / divisor**4
    ordered = u.sort(1).values
    quantiles = []
    for q in QUANTILES:
        at = q * (size - 1)
        low, high = ordered[:, math.floor(at)], ordered[:, math.ceil(at)]
        quantiles.append(low + (high - low) * (at - math.floor(at)))
    columns = [
        rms.log(),
        (rms * math.sqrt(fan_in)).log(),
        mean,
        std,
        skewness.clamp(-LARGEST_SKEWNESS, LARGEST_SKEWNESS),
        kurtosis.clamp(1.0, LARGEST_KURTOSIS).log(),
        *(quantile.clamp(-LARGEST_QUANTILE, LARGEST_QUANTILE) for quantile in quantiles),
        *(torch.full_like(rms, math.log(count)) for count in (size, fan_in, fan_out)),
    ]
    if inn:  # two dimensions or more
        if kernel_first:
            u = u.view(-1, kernel, out, inn).permute(0, 2, 3, 1)
        columns += _of_units(u.reshape(-1, out, inn, kernel))
    else:
        columns += [torch.zeros_like(rms)] * 7
    return torch.where(finite[:, None], torch.stack(columns, 1), math.nan)


def _of_units(u: Tensor) -> list[Tensor]:
    """Return seven columns `(t,)` of `u (t, out, in, k)`, of which those of zeros only are zero."""

    def rms(*dims: int) -> Tensor:
        return u.square().mean(dims).sqrt()

    def spread(norms: Tensor) -> Tensor:
        return norms.std(1, correction=0) / norms.mean(1).clamp_min(LEAST_MEAN)

    outputs, inputs = rms(2, 3), rms(1, 3)
    matrix = u.flatten(2)  # [t, out, in k]
    if matrix.shape[1] > matrix.shape[2]:
        matrix = matrix.mT
    frobenius = matrix.square().sum((1, 2))
    largest = torch.linalg.eigvalsh(matrix @ matrix.mT)[:, -1]
    share = torch.where(frobenius > 0, largest / frobenius, 1.0 / matrix.shape[1])
    return [
        spread(outputs),
        spread(inputs),
        u.mean((2, 3)).std(1, correction=0),
        u.mean((1, 3)).square().mean(1).sqrt(),
        (share * matrix.shape[1]).log() / 2,
        outputs.amax(1),
        spread(rms(1, 2)),
    ]

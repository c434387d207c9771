"""Values of weights whose groups of neighbours share a scale: float4 of NVFP4 and MXFP4, and integers of MLX and HQQ.

As in `dequantise`, every function returns float32 in the layout of `torch.nn.Linear` and raises `Unfit` where the
tensors do not belong together; nothing here looks at names.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from .dequantise import FP4_VALUES, WORD, Unfit, shape_of, unpack

__all__ = ["float4", "group_scales", "hqq", "mlx"]

_MLX_BITS, _MLX_GROUPS = (8, 6, 5, 4, 3, 2), (128, 64, 32)
_MLX_FLOATS = {4 * 32: (4, 32), 4 * 16: (4, 16), 8 * 32: (8, 32)}  # MXFP4, NVFP4 and MXFP8, by the bits of a group
_HQQ_BITS = (8, 4, 3, 2, 1)
_HQQ_PER_WORD = 10  # of three bits in 32


def float4(packed: Tensor, scale: Tensor, factor: Tensor | None = None, *, divide: bool = False) -> Tensor:
    """Return e2m1 numbers times the scale of their group of 16 or 32 along the last dimension.

    Args:
        packed: uint8 `(..., in / 2)`, two numbers per byte, low bits first.
        scale: `(..., in / group)`: float8 or another float, or uint8 exponents of two plus 127.
        factor: float, a second scale for all groups or for each matrix of a stack of them.
        divide: whether scales are divided by `factor`, as compressed-tensors keeps it, instead of multiplied.
    """
    if packed.ndim < 2 or scale.ndim != packed.ndim or scale.shape[:-1] != packed.shape[:-1]:
        raise Unfit(f"scales {shape_of(scale)} do not fit {shape_of(packed)}")
    if scale.shape[-1] < 1 or 2 * packed.shape[-1] / scale.shape[-1] not in (16, 32):
        raise Unfit(f"scales {shape_of(scale)} do not fit {shape_of(packed)} in groups of 16 or 32")
    scales = group_scales(scale)
    if factor is not None:
        second = factor.float()
        if second.numel() != 1 and second.numel() != math.prod(packed.shape[:-2]):
            raise Unfit(f"the second scales {shape_of(factor)} do not fit {shape_of(packed)}")
        second = second.reshape(() if second.numel() == 1 else (*packed.shape[:-2], 1, 1))
        scales = scales / second if divide else scales * second
    return _grouped(_float4_numbers(packed), scales)


def group_scales(scale: Tensor) -> Tensor:
    """Return scales as float32; those of uint8 are exponents of two plus 127."""
    if scale.dtype == torch.uint8:
        return torch.ldexp(torch.ones_like(scale, dtype=torch.float32), scale.int() - 127)
    return scale.float()


def mlx(packed: Tensor, scales: Tensor, biases: Tensor | None, form: tuple[int, int] | None = None) -> Tensor:
    """Return `q * scale + bias` of MLX, or floats times scales in its formats without biases.

    Where `form` is unknown, several numbers of bits may fit, such as four bits in groups of 64 and eight in groups of
    32. MLX gives an end of each group's range the code 0, so the largest number is taken with which all groups have it.

    Args:
        packed: uint32 `(..., in * bits / 32)`, a stream of bits along the last dimension.
        scales: `(..., in / group)`: floats, or uint8 exponents (MXFP4, MXFP8) or float8 (NVFP4) without biases.
        biases: as `scales`, or None.
        form: bits and group size, None to find them out.
    """
    groups = scales.shape[-1] if scales.ndim else 0
    if scales.ndim != packed.ndim or groups < 1 or scales.shape[:-1] != packed.shape[:-1]:
        raise Unfit(f"scales {shape_of(scales)} do not fit {shape_of(packed)}")
    size, rest = divmod(WORD * packed.shape[-1], groups)
    words = packed.view(torch.int32)
    if biases is None:
        if rest or size not in _MLX_FLOATS or scales.dtype != torch.uint8:
            raise Unfit(f"scales {shape_of(scales)} without biases do not fit {shape_of(packed)}")
        bits, group = _MLX_FLOATS[size]
        octets = packed.contiguous().view(torch.uint8)
        values = _float4_numbers(octets) if bits == 4 else octets.view(torch.float8_e4m3fn).float()
        return _grouped(values, group_scales(scales) if group == 32 else scales.view(torch.float8_e4m3fn).float())
    forms = [(b, g) for b in _MLX_BITS for g in _MLX_GROUPS if b * g == size] if form is None else [form]
    forms = [(b, g) for b, g in forms if b in _MLX_BITS and b * g == size and not rest]
    if not forms or biases.shape != scales.shape:
        raise Unfit(f"scales {shape_of(scales)} and biases {shape_of(biases)} do not fit {shape_of(packed)}")
    codes = torch.empty(0)
    for bits, group in forms:
        codes = unpack(words, bits, group * groups, packed.ndim - 1)
        if bool((codes.unflatten(-1, (groups, group)) == 0).any(-1).all()):
            break
    spread = codes.shape[-1] // groups
    return _grouped(codes.float(), scales.float()) + biases.float().repeat_interleave(spread, -1)


def hqq(packed: Tensor, scale: Tensor, zero: Tensor, said: Mapping[str, Tensor]) -> Tensor:
    """Return `(q - zero) * scale` of HQQ in the shape that it says.

    Args:
        packed: `W_q (rows, columns)`: uint8, parts of a byte from the highest bits on, each for a part of the rows; ten
            numbers of three bits in int32; or the same bits viewed as floats.
        scale: one per group.
        zero: one per group.
        said: numbers `nbits`, `shape`, `axis`, and where they are there `group_size`, `quant_zero` and `quant_scale`.
    """
    try:
        bits, axis = int(said["nbits"]), int(said["axis"])
        out, inputs = (int(n) for n in said["shape"])
        group = int(said["group_size"]) if "group_size" in said else (inputs, out)[1 - axis]
        quantised = any(bool(said[name]) for name in ("quant_zero", "quant_scale") if name in said)
    except (KeyError, ValueError, TypeError, RuntimeError, IndexError) as error:
        raise Unfit("its numbers of bits, shape and axis are not there as HQQ writes them") from error
    if quantised:
        raise Unfit("its scales or zero points are quantised themselves")
    if bits not in _HQQ_BITS or axis not in (0, 1) or min(out, inputs, group) < 1 or out * inputs % group:
        raise Unfit(f"{bits} bits, groups of {group} along axis {axis} and shape {(out, inputs)} do not fit each other")
    words = packed.contiguous().view(torch.int32 if bits == 3 else torch.uint8)
    per_word = _HQQ_PER_WORD if bits == 3 else 8 // bits
    parts = [words >> bits * place & (1 << bits) - 1 for place in reversed(range(per_word))]
    codes = torch.cat(parts) if words.ndim == 2 else words
    rows = group if axis == 0 else out * inputs // group
    columns = out * inputs // rows
    if codes.ndim != 2 or codes.shape[0] < rows or codes.shape[1] != columns or codes.shape[0] - rows >= per_word:
        raise Unfit(f"shape {(out, inputs)} with {bits} bits in groups of {group} does not fit {shape_of(packed)}")
    form = (1, columns) if axis == 0 else (rows, 1)
    if any(t.numel() not in (1, math.prod(form)) for t in (scale, zero)):
        raise Unfit(f"scales {shape_of(scale)} and zero points {shape_of(zero)} do not fit {form} groups")
    scale, zero = (t.float().reshape(form if t.numel() > 1 else ()) for t in (scale, zero))
    values: Tensor = (codes[:rows].float() - zero) * scale
    return values.reshape(out, inputs)


def _float4_numbers(packed: Tensor) -> Tensor:
    """Return two numbers of four bits per byte along the last dimension, low bits first."""
    table = torch.tensor([*FP4_VALUES, *(-value for value in FP4_VALUES)], device=packed.device)
    return torch.stack([table[(packed & 15).long()], table[(packed >> 4).long()]], -1).flatten(-2)


def _grouped(values: Tensor, scales: Tensor) -> Tensor:
    """Return values times the scale of their group of neighbours along the last dimension."""
    scaled: Tensor = values.unflatten(-1, (scales.shape[-1], -1)) * scales.unsqueeze(-1)
    return scaled.flatten(-2)

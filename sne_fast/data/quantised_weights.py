"""Quantised weights among named tensors: which tensors belong together, by the names that their formats give them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from . import dequantise, dequantise_groups
from .known_names import is_quantisation_record
from .readers.quantisation_configs import NOTHING_SAID, Quantisation
from .tied_names import identity_of

__all__ = ["Decoded", "decode"]

_CLASSES = (Tensor, torch.nn.Parameter)
_WIDE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_NARROW = (torch.int8, torch.uint8)
_SCALES = ("_scale_inv", "_scale", "_scales")
_FLOAT8_SCALES = tuple(getattr(torch, name) for name in ("float8_e4m3fn", "float8_e8m0fnu") if hasattr(torch, name))
_HQQ = (
    "nbits", "shape", "axis", "group_size", "packing", "quant_zero", "quant_scale", "view_as_float",
    "unpack_view_dtype", "compute_dtype", "offload_meta", "encoded_state_dict", "stores_quant_config", "channel_wise",
    "optimize", "round_zero",
)  # fmt: skip


Tensors = Mapping[str, Tensor]


@dataclass
class Decoded:
    """Weights that were decoded, by the name of the tensor that held them, and the other tensors that this took."""

    weights: dict[str, tuple[str, Tensor]] = field(default_factory=dict)
    used: dict[str, str] = field(default_factory=dict)
    parts: dict[str, list[str]] = field(default_factory=dict)
    """All tensors that each weight was decoded from, by the name of the first."""
    any_scaled: bool = False
    """Whether float8 weights were multiplied by scales."""


@dataclass
class _Parts:
    """A quantised weight: what it is called when decoded, the tensors it takes besides its own, and how."""

    target: str
    besides: list[str]
    values: Callable[[], Tensor]


def decode(
    tensors: Mapping[str, Tensor], label: str, *, values: bool = True, quantisation: Quantisation = NOTHING_SAID
) -> Decoded:
    """Return the values of all quantised weights whose format is known.

    Known are torch's quantised tensors; int8 and float8 with scales (and zero points) beside them, also per block;
    GPTQ; AWQ; bitsandbytes with eight and four bits; packed integers of compressed-tensors; MXFP4 of experts; NVFP4 and
    MXFP4 of ModelOpt and compressed-tensors; MLX; HQQ.

    Args:
        tensors: all tensors of a network by name.
        label: the network in messages.
        values: whether to decode. Without, tensors may have no values, and each weight is what its first tensor is.
        quantisation: what a configuration says of formats that their tensors do not tell apart.

    Raises:
        ValueError: tensors that their names join and their shapes do not, or a scale of an unknown kind.
    """
    found = Decoded()
    memo: dict[object, Tensor] = {}
    for name, tensor in tensors.items():
        # Most tensors are plain floats. Those of bitsandbytes may be bytes that are called floats.
        plain = tensor.dtype in _WIDE and type(tensor) in _CLASSES
        if name in found.used or (plain and f"{name}.absmax" not in tensors and _siblings(name)[1] != "W_q"):
            continue
        parts = next((p for form in _FORMS if (p := form(name, tensor, tensors, quantisation)) is not None), None)
        if parts is None:
            continue
        where = f"pack: {label}, tensor {name!r}"
        for part in (name, *parts.besides) if values else ():
            if tensors[part].is_meta:
                raise ValueError(
                    f"pack: {label}, tensor {part!r} is on the meta device and has no values; load its weights"
                )
        same = identity_of(tensor)  # tied weights stay tied
        try:
            if same not in memo:
                memo[same] = parts.values() if values else tensor
        except (dequantise.Unfit, RuntimeError, IndexError) as error:
            reason = str(error).partition("\n")[0]
            raise ValueError(f"{where} looks like a quantised weight, but {reason}; dequantise it first") from error
        found.weights[name] = (parts.target, memo[same])
        found.parts[name] = [name, *parts.besides]
        if name != parts.target:
            found.used[name] = f"quantised weight: decoded as {parts.target!r}"
        found.used.update(dict.fromkeys(parts.besides, f"quantisation parameter: of {parts.target!r}"))
        found.any_scaled |= _is_float8(tensor)
    _rest(tensors, found, label)
    return found


def _rest(tensors: Mapping[str, Tensor], found: Decoded, label: str) -> None:
    """Set aside what quantised layers keep about their inputs and outputs, and refuse scales that were not used."""
    layers: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        base, own = _siblings(name)
        layers.setdefault(base, {})[own] = tensor
    for base, held in layers.items():
        scale, zero = held.get("scale"), held.get("zero_point")
        pair = scale is not None and zero is not None and scale.numel() == zero.numel() and not zero.is_floating_point()
        for own in held:
            if (pair and own in ("scale", "zero_point")) or (found.weights and is_quantisation_record(base + own)):
                found.used.setdefault(base + own, "quantisation parameter")
    for base, held in layers.items():
        unused = [own for own, t in held.items() if "scale" in own and base + own not in found.used and _is_scale(t)]
        for own, tensor in held.items() if unused else ():
            taken = base + own in found.weights
            if base + own in found.used or not (_is_float8(tensor) or (taken and tensor.dtype in _NARROW)):
                continue
            odd = next((scale for scale in unused if scale != own and (scale.startswith(own) or not taken)), None)
            if odd is not None:
                raise ValueError(
                    f"pack: {label}, tensor {base + own!r} is {tensor.dtype} and {base + odd!r} beside it is no scale "
                    f"of a known format; dequantise it first, or remove the scale if the values count as they are"
                )


def _is_float8(tensor: Tensor) -> bool:
    return "float8" in str(tensor.dtype)


def _is_scale(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.dtype == torch.uint8


def _siblings(name: str) -> tuple[str, str]:
    layer, _, own = name.rpartition(".")
    return (f"{layer}." if layer else ""), own


def _torch_quantised(name: str, tensor: Tensor, tensors: Tensors, said: Quantisation) -> _Parts | None:
    return _Parts(name, [], tensor.dequantize) if tensor.is_quantized else None


def _subclass(name: str, tensor: Tensor, tensors: Tensors, said: Quantisation) -> _Parts | None:
    """Match tensor classes of other libraries that decode themselves, such as those of torchao and quanto."""
    if type(tensor) in _CLASSES or type(tensor).dequantize is Tensor.dequantize:
        return None
    return _Parts(name, [], tensor.dequantize)


def _integer_words(name: str, tensor: Tensor, tensors: Tensors, said: Quantisation) -> _Parts | None:
    """Match GPTQ and AWQ: `qweight`, `scales`, `qzeros` and `g_idx`."""
    base, own = _siblings(name)
    scales, zeros = tensors.get(base + "scales"), tensors.get(base + "qzeros")
    if own != "qweight" or tensor.dtype != torch.int32 or scales is None:
        return None
    besides = [base + other for other in ("scales", "qzeros", "g_idx") if base + other in tensors]

    def values() -> Tensor:
        if tensor.ndim != 2 or scales.ndim != 2 or (zeros is not None and zeros.ndim != 2):
            raise dequantise.Unfit("its scales or zero points are no matrices")
        if zeros is not None and scales.shape[1] != tensor.shape[1]:
            return dequantise.awq(tensor, scales, zeros)
        return dequantise.gptq(tensor, scales, zeros, tensors.get(base + "g_idx"), second=said.gptq_second)

    return _Parts(base + "weight", besides, values)


def _four_bits(name: str, tensor: Tensor, tensors: Tensors, said: Quantisation) -> _Parts | None:
    """Match bitsandbytes with four bits: `absmax`, `quant_map` and `quant_state.bitsandbytes__*` below the weight."""
    states = [key for kind in ("nf4", "fp4") if (key := f"{name}.quant_state.bitsandbytes__{kind}") in tensors]
    parts = {part: f"{name}.{part}" for part in ("absmax", "quant_map", "nested_absmax", "nested_quant_map")}
    held = {part: tensors[key] for part, key in parts.items() if key in tensors}
    if not states or "absmax" not in held or "quant_map" not in held:
        return None
    nested = (held["nested_absmax"], held["nested_quant_map"]) if len(held) == 4 else None
    besides = [*states, *(parts[part] for part in held)]
    state, absmax, codes = tensors[states[0]], held["absmax"], held["quant_map"]
    return _Parts(name, besides, lambda: dequantise.bitsandbytes_4bit(tensor, state, absmax, codes, nested))


def _eight_bits(name: str, tensor: Tensor, tensors: Tensors, said: Quantisation) -> _Parts | None:
    """Match bitsandbytes with eight bits: `weight` and `SCB`."""
    base, own = _siblings(name)
    maxima = tensors.get(base + "SCB")
    if own != "weight" or tensor.dtype != torch.int8 or maxima is None:
        return None
    stored_as = tensors.get(base + "weight_format")

    def values() -> Tensor:
        if stored_as is not None and stored_as.numel() == 1 and int(stored_as) != 0:
            raise dequantise.Unfit("its weight_format is not rows, and depends on the device that wrote it")
        return dequantise.bitsandbytes_8bit(tensor, maxima)

    return _Parts(name, [base + other for other in ("SCB", "weight_format") if base + other in tensors], values)


def _packed(name: str, tensor: Tensor, tensors: Tensors, said: Quantisation) -> _Parts | None:
    """Match packed integers of compressed-tensors: `weight_packed`, `weight_shape` and `weight_scale`."""
    start = name.removesuffix("_packed")
    besides = [start + other for other in ("_scale", "_shape", "_zero_point", "_g_idx") if start + other in tensors]
    if start == name or tensor.dtype != torch.int32 or not {start + "_scale", start + "_shape"} <= set(besides):
        return None
    scale, shape, zero, groups = (tensors.get(start + end) for end in ("_scale", "_shape", "_zero_point", "_g_idx"))
    assert scale is not None and shape is not None
    return _Parts(start, besides, lambda: dequantise.packed_integers(tensor, shape, scale, zero, _if_used(groups)))


def _experts(name: str, tensor: Tensor, tensors: Tensors, said: Quantisation) -> _Parts | None:
    """Match MXFP4 of experts: `gate_up_proj_blocks` and `gate_up_proj_scales`."""
    start = name.removesuffix("_blocks")
    exponents = tensors.get(start + "_scales")
    if start == name or tensor.dtype != torch.uint8 or exponents is None or exponents.dtype != torch.uint8:
        return None
    return _Parts(start, [start + "_scales"], lambda: dequantise.mxfp4(tensor, exponents))


def _scaled(name: str, tensor: Tensor, tensors: Tensors, said: Quantisation) -> _Parts | None:
    """Match int8, uint8 and float8 beside a scale that bears their name, or in a layer with `scale` or `scales`."""
    wide = _is_float8(tensor)
    if not (wide or tensor.dtype in _NARROW):
        return None
    base, own = _siblings(name)
    stored = own == "_data"  # quanto keeps weight._data and weight._scale
    target = base.removesuffix(".") if stored else name
    names = [base + "_scale"] if stored else [name + end for end in _SCALES] + [f"{base}scale_{own}"]
    zeros = [name + "_zero_point", name + "_zero_points"]
    if own == "weight" and not wide:
        names += [base + "scale", base + "scales"]
        zeros += [base + "zero_point", base + "zero_points", base + "zeros"]
    octets = tensors.get(name + "_scale") if wide else None  # MXFP8, whose scales are exponents
    fits = octets is not None and octets.dtype == torch.uint8 and octets.ndim == tensor.ndim
    exponents = name + "_scale" if fits else None
    scale = exponents or next((key for key in names if key in tensors and tensors[key].is_floating_point()), None)
    if scale is None or (stored and base + "_shift" in tensors):
        return None
    zero = next((key for key in zeros if key in tensors), None)
    if tensor.dtype == torch.uint8 and zero is None:
        return None
    besides = [scale, *([zero] if zero else []), *([name + "_g_idx"] if name + "_g_idx" in tensors else [])]
    scales, zero_point, groups = tensors[scale], tensors[zero] if zero else None, tensors.get(name + "_g_idx")

    def values() -> Tensor:
        spread = dequantise_groups.group_scales(scales) if exponents else scales
        return dequantise.scaled(tensor, spread, zero_point, _if_used(groups))

    return _Parts(target, besides, values)


def _if_used(groups: Tensor | None) -> Tensor | None:
    """Return the groups of columns, or None where they are written as -1 because columns keep their order."""
    return None if groups is None or bool((groups < 0).all()) else groups


def _floats_of_four_bits(name: str, tensor: Tensor, tensors: Tensors, said: Quantisation) -> _Parts | None:
    """Match NVFP4 and MXFP4: `weight` with `weight_scale` and `weight_scale_2`, or `weight_packed` with its scales."""
    start = name.removesuffix("_packed")
    scale = tensors.get(start + "_scale")
    if tensor.dtype != torch.uint8 or scale is None or start + "_zero_point" in tensors:
        return None
    if scale.dtype not in (torch.uint8, *_FLOAT8_SCALES) and (start == name or not scale.is_floating_point()):
        return None
    if _siblings(name)[0] + "comfy_quant" in tensors:  # whose scales stand in another order
        return None
    ends = ("_scale_2",) if start == name else ("_global_scale",)
    factor = next((start + end for end in ends if start + end in tensors), None)
    besides = [start + "_scale", *([factor] if factor else [])]
    second, divide = tensors[factor] if factor else None, start != name
    return _Parts(start, besides, lambda: dequantise_groups.float4(tensor, scale, second, divide=divide))


def _mlx(name: str, tensor: Tensor, tensors: Tensors, said: Quantisation) -> _Parts | None:
    """Match MLX: `weight` of uint32 with `scales` and `biases`."""
    base, own = _siblings(name)
    scales, biases = tensors.get(base + "scales"), tensors.get(base + "biases")
    if own != "weight" or tensor.dtype != torch.uint32 or scales is None:
        return None
    form = said.mlx.get(base.removesuffix("."), said.mlx.get(""))
    besides = [base + other for other in ("scales", "biases") if base + other in tensors]
    return _Parts(name, besides, lambda: dequantise_groups.mlx(tensor, scales, biases, form))


def _hqq(name: str, tensor: Tensor, tensors: Tensors, said: Quantisation) -> _Parts | None:
    """Match HQQ: `W_q` with `scale`, `zero` and what describes them."""
    base, own = _siblings(name)
    scale, zero = tensors.get(base + "scale"), tensors.get(base + "zero")
    described = {other: tensors[base + other] for other in _HQQ if base + other in tensors}
    if own != "W_q" or scale is None or zero is None or "nbits" not in described:
        return None
    besides = [base + other for other in ("scale", "zero", *described)]
    return _Parts(base + "weight", besides, lambda: dequantise_groups.hqq(tensor, scale, zero, described))


_FORMS = (
    _torch_quantised, _subclass, _integer_words, _four_bits, _eight_bits, _packed, _experts, _floats_of_four_bits, _mlx,
    _hqq, _scaled,
)  # fmt: skip

"""Adapters in a form that depends on the update they make, and not on how training happened to factorise it.

The update `B A` of a low-rank adapter is the same for `B M` and `M^-1 A` with any invertible M. Here both factors are
computed from the update: from its singular value decomposition `U S V^T`, as `U sqrt(S)` and `sqrt(S) V^T`, with the
adapter's scale multiplied in. An update with equal singular values leaves a rotation open, and only there two
factorisations of it may differ.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from ..ops.transforms import is_transformed
from .tied_names import identity_of

__all__ = ["Adapters", "Scaling", "canonical_factors", "scalings_of_module"]

_SMALLEST = 1e-5  # of the largest singular value: what is below is the rounding of factors in float32
_NEARLY = 1 - 1e-6  # of the largest magnitude: between entries closer than this, rounding would decide

_NAME = re.compile(
    r"((?P<base>.+)\.)?"
    # PEFT and loralib
    r"((?P<part>lora_(embedding_)?[AB]|lora_E|lora_magnitude_vector|ia3_l)"
    r"(\.(?!(weight|bias)$)(?P<adapter>[^.]+))?(\.(?P<own>weight|bias))?"
    # kohya
    r"|(?P<kohya>lora_(down|up|mid)\.weight|dora_scale))"
    # diffusers
    r"|(?P<module>.+?)[._]lora(_linear_layer)?\.(?P<diffusers>down|up)\.weight"
)
_PARTS = {
    "lora_A": "A", "lora_B": "B", "lora_embedding_A": "A", "lora_embedding_B": "B", "lora_down.weight": "A",
    "lora_up.weight": "B", "down": "A", "up": "B", "lora_magnitude_vector": "magnitude", "dora_scale": "magnitude",
    "ia3_l": "ia3",
}  # fmt: skip
_TARGETS = {"A": "lora_A", "B": "lora_B", "bias": "lora_bias", "magnitude": "lora_magnitude_vector", "ia3": "ia3_l"}
_FACTORS = frozenset({"A", "B"})


class Scaling(NamedTuple):
    """The number that an adapter's update is multiplied by, and the rank that its configuration gives, if any."""

    scale: float
    rank: int | None = None


@dataclass
class _Adapter:
    """An adapter of one module: the full names of its tensors by what they are, and that of its `alpha`."""

    base: str
    adapter: str | None
    parts: dict[str, str] = field(default_factory=dict)
    alpha: str | None = None

    def is_read(self) -> bool:
        """Return whether its form is known: two factors with their bias and magnitudes, or a vector of IA3."""
        return set(self.parts) == {"ia3"} or (_FACTORS <= set(self.parts) <= _TARGETS.keys())


class Adapters:
    """The adapters of a network, found by the names of its tensors.

    Known are the names of PEFT, loralib, kohya and diffusers for LoRA, of PEFT and kohya for DoRA, and of PEFT for IA3.
    Other forms, such as AdaLoRA, count as the tensors that they are.

    Args:
        names: of all tensors of the network.
    """

    def __init__(self, names: Iterable[str]) -> None:
        known = dict.fromkeys(names)
        found: dict[tuple[str, str | None], _Adapter] = {}
        for name in known:
            match = _NAME.fullmatch(name) if "lora" in name or "ia3_l" in name or "dora_scale" in name else None
            if match is None:
                continue
            base = match["base"] or match["module"] or ""
            one = found.setdefault((base, match["adapter"]), _Adapter(base, match["adapter"]))
            part = _PARTS.get(match["part"] or match["kohya"] or match["diffusers"], name)
            part = "bias" if part == "B" and match["own"] == "bias" else part
            one.parts[name if part in one.parts else part] = name  # a second one of a kind has no known form
        self._found = [one for one in found.values() if one.is_read()]
        for one in self._found:
            alpha = _joined(one.base, "alpha")
            one.alpha = alpha if alpha in known and "A" in one.parts else None
        self._several = len({one.adapter for one in self._found if one.adapter}) > 1
        self.scales = {one.alpha for one in self._found if one.alpha}
        """Names of the tensors that scale an adapter, which are no weights."""
        self.names = self.scales.union(*(one.parts.values() for one in self._found))
        """Names of all tensors of adapters."""

    def canonical(
        self,
        floating: dict[str, Tensor],
        tensors: Mapping[str, Tensor],
        scalings: Mapping[str, Scaling],
        label: str,
    ) -> tuple[dict[str, Tensor], list[tuple[str, str]]]:
        """Return a network's weights with its adapters in canonical form, and what to say of the tensors that it took.

        An adapter becomes a layer with the name of its module, or `<module>.lora` where that has tensors itself. The
        layer holds `lora_A (rank, in)` and `lora_B (out, rank)`, matrices also of convolutions and with as many rows as
        the update has rank, `lora_bias`, `lora_magnitude_vector` and `ia3_l`. Where the network has adapters of several
        names, their layers are called `<module>.<adapter>`.

        Args:
            floating: weights by name.
            tensors: all tensors of the network by name.
            scalings: by the name of the adapted module, or by that and the name of the adapter.
            label: the network in messages.

        Raises:
            ValueError: an `alpha` that is no finite number, an adapter inside a transform of `torch.func`.
        """
        owners = {name.rpartition(".")[0] for name in floating if name not in self.names}
        replaced: dict[str, dict[str, Tensor]] = {}
        said: dict[str, str] = {}
        memo: dict[object, dict[str, Tensor]] = {}
        for one in self._found:
            held = {part: floating[name] for part, name in one.parts.items() if name in floating}
            # One is empty, or a flat part of a factor, as partitioned trainings leave them.
            if len(held) < len(one.parts) or any(held[part].ndim < 2 for part in _FACTORS & held.keys()):
                continue
            layer = _joined(one.base, one.adapter) if self._several and one.adapter else one.base
            layer = _joined(layer, "lora") if layer in owners else layer
            scaling = _scaling(one, held, tensors, scalings, label)
            if is_transformed(held.values()):
                raise ValueError(
                    f"pack: {label}, adapter of {layer!r} is inside a transform of torch.func, under which its "
                    f"canonical form cannot be computed; pack it outside"
                )
            # Tied adapters stay tied.
            same = (scaling, *((part, identity_of(tensor)) for part, tensor in held.items()))
            if same not in memo:
                memo[same] = _values(held, scaling or Scaling(1.0))
            targets = {part: _joined(layer, _TARGETS[part]) for part in memo[same]}
            first, *others = (name for name in floating if name in one.parts.values())
            replaced[first] = {targets[part]: tensor for part, tensor in memo[same].items()}
            replaced.update({name: {} for name in others})
            for part, name in one.parts.items():
                if name != targets[part]:
                    said[name] = f"adapter: taken as {targets[part]!r}"
            if one.alpha is not None:
                said[one.alpha] = f"adapter: scale of {layer!r}"
            elif scaling is None and "A" in held:
                said[_joined(layer, "scaling")] = "unknown scale of an adapter: taken as 1"
        weights: dict[str, Tensor] = {}
        for stored, tensor in floating.items():
            for name, value in replaced.get(stored, {stored: tensor}).items():
                if name in weights:
                    raise ValueError(f"pack: {label} has {name!r} beside the adapter that is called so; rename one")
                weights[name] = value
        return weights, list(said.items())


def scalings_of_module(name: str, module: nn.Module) -> dict[str, Scaling]:
    """Return the scales of a module's adapters as PEFT and loralib keep them, by the names that `canonical` takes."""
    scale, rank = (vars(module).get(attribute) for attribute in ("scaling", "r"))
    scales = scale if isinstance(scale, Mapping) else {"": scale} if "lora_A" in module._parameters else {}
    ranks = rank if isinstance(rank, Mapping) else {"": rank}
    return {
        _joined(name, adapter): Scaling(float(value), ranks.get(adapter))
        for adapter, value in scales.items()
        if isinstance(value, (int, float)) and math.isfinite(value)
    }


def canonical_factors(a: Tensor, b: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return the factors of `scale * b @ a` that depend on this product alone.

    With the singular value decomposition `U S V^T` of the product, they are `sqrt(S) V^T` and `U sqrt(S)`. The entry of
    largest magnitude is positive in every column of U; singular values below 1e-5 of the largest count as zero and are
    left out, but for one. All is computed in float64, from thin QR decompositions of both factors.

    Args:
        a: `(r, in)`.
        b: `(out, r)`.
        scale: a number.

    Returns:
        Tensors `(k, in)` and `(out, k)` of at least float32, with `k` at least 1. They require gradients if the factors
        do, but refuse to be differentiated.
    """
    return _CanonicalFactors.apply(a, b, scale)  # type: ignore[no-untyped-call, no-any-return]


class _CanonicalFactors(torch.autograd.Function):
    @staticmethod
    def forward(a: Tensor, b: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        on = torch.device("cpu") if a.device.type == "mps" else a.device  # which has no float64
        q_b, r_b = torch.linalg.qr(b.to(on, torch.float64))
        q_a, r_a = torch.linalg.qr(a.to(on, torch.float64).mT)
        u, s, v = torch.linalg.svd(scale * (r_b @ r_a.mT), full_matrices=False)
        rank = max(1, int((s > _SMALLEST * s[0]).sum()))
        left, right = q_b @ u[:, :rank], v[:rank] @ q_a.mT
        size = left.abs()
        first = (size >= _NEARLY * size.amax(0)).int().argmax(0)  # the first of entries that are as good as equal
        sign = torch.where(left.gather(0, first[None])[0] < 0, -1.0, 1.0)
        root = s[:rank].sqrt() * sign
        dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
        return (root[:, None] * right).to(a.device, dtype), (left * root).to(b.device, dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Keep nothing: there is no backward pass."""

    @staticmethod
    def backward(ctx: Any, *_: Any) -> NoReturn:
        raise RuntimeError(
            "pack: no gradient flows through the canonical form of an adapter; pack the network under torch.no_grad(), "
            "or call .detach() on the batch"
        )


def _values(held: Mapping[str, Tensor], scaling: Scaling) -> dict[str, Tensor]:
    """Return the parts of an adapter, its factors in canonical form if they are the two of one matrix."""
    values = {part: tensor.reshape(-1) for part, tensor in held.items() if part not in _FACTORS}
    if "bias" in values:
        values["bias"] = values["bias"] * scaling.scale
    if "A" not in held:
        return values
    # of convolutions: the kernel positions of A stand beside each other, and B has one
    a, b = (held[part].reshape(held[part].shape[0], -1) for part in "AB")
    # Factors for several experts or groups in one, which are no two of one matrix, stay as they are.
    fits = a.shape[0] == b.shape[1] and scaling.rank in (None, a.shape[0])
    if fits and all(t.is_floating_point() and bool(torch.isfinite(t.float()).all()) for t in (a, b)):
        a, b = canonical_factors(a, b, scaling.scale)
    else:
        b = b * scaling.scale
    return {"A": a, "B": b, **values}


def _scaling(
    one: _Adapter,
    held: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
    scalings: Mapping[str, Scaling],
    label: str,
) -> Scaling | None:
    if "A" not in held:
        return None
    if one.alpha is None:
        return scalings.get(_joined(one.base, one.adapter or "")) or scalings.get(one.base)
    alpha = tensors[one.alpha]
    if alpha.numel() != 1 or alpha.is_meta or not math.isfinite(float(alpha)):
        raise ValueError(f"pack: {label}, tensor {one.alpha!r} scales an adapter and must be one finite number")
    return Scaling(float(alpha) / held["A"].shape[0])


def _joined(name: str, own: str) -> str:
    return f"{name}.{own}" if name and own else name or own

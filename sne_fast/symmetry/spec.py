"""Symmetries of networks of which only a state_dict is there: said by hand, or by the names of a plain chain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..data.checkpoints import find_state_dict
from ..data.layers import strip_wrappers
from .core import Symmetry, SymmetryError
from .structure import assemble
from .terms import Atom, Cat, Term, freeze, fresh, product, resolve, size, split

NOT_NAMED = "in no group"


def _tensors(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    found = {k: t for k, t in find_state_dict(state_dict).items() if isinstance(t, Tensor) and t.is_floating_point()}
    return dict(zip(strip_wrappers(list(found)), found.values(), strict=True))


def from_spec(
    groups: Mapping[str, Sequence[Sequence[Any]]],
    state_dict: Mapping[str, Tensor],
    *,
    units: Mapping[str, int] | None = None,
    name: str = "spec",
) -> Symmetry:
    """A symmetry said by hand: for every group of hidden units, the dimensions of tensors along which they stand.

    An entry is `(tensor, dim)`, `(tensor, dim, block)` or `(tensor, dim, block, (start, stop))`. `block` says how many
    neighbouring positions belong to one unit (1 if left out): the columns that a channel owns in the linear layer
    after a flatten, or the width of a head. With a range only positions start..stop-1 of the dimension are meant,
    such as the queries' rows of a fused projection. Groups may share a dimension if their blocks nest: heads with
    block d, and with block 1 the d units inside each head, which are then permuted alike in every head. Where blocks
    do not fill a range, they repeat over it, each repetition permuted alike.

    Nothing is inferred and nothing is checked but the shapes: use `verify`.

    Args:
        groups: entries by group name.
        state_dict: for names and shapes.
        units: size of groups for which it does not follow: by default a group has as many units as its first entry
            has blocks.
        name: what messages call it.

    Raises:
        SymmetryError: an unknown tensor or dimension, blocks that do not fit, ranges that overlap.

    Example:
        >>> symmetry = sne_fast.symmetry.from_spec(
        ...     {"conv": [("0.weight", 0), ("0.bias", 0), ("3.weight", 1, 36)]}, net.state_dict())
    """
    tensors = _tensors(state_dict)
    atoms: dict[str, Term] = {}
    uses: dict[tuple[str, int], list[tuple[int, int, int, str]]] = {}
    for group, entries in groups.items():
        for entry in entries:
            tensor, dim, *rest = entry
            if tensor not in tensors:
                raise SymmetryError(f"from_spec: group {group!r}: no tensor {tensor!r} in the state_dict")
            shape = tuple(tensors[tensor].shape)
            if not -len(shape) <= dim < len(shape):
                raise SymmetryError(f"from_spec: group {group!r}: {tensor!r} of shape {shape} has no dimension {dim}")
            dim %= len(shape)
            block = rest[0] if rest else 1
            start, stop = rest[1] if len(rest) > 1 else (0, shape[dim])
            if group not in atoms:
                count = (units or {}).get(group, (stop - start) // max(1, block))
                atoms[group] = Atom(max(1, count))
            span = block * size(atoms[group])
            if block < 1 or not 0 <= start < stop <= shape[dim] or (stop - start) % span:
                raise SymmetryError(
                    f"from_spec: group {group!r}: {size(atoms[group])} units of {block} do not fit positions "
                    f"{start}..{stop - 1} of dimension {dim} of {tensor!r}, shape {shape}"
                )
            uses.setdefault((tensor, dim), []).append((start, stop, block, group))
    labels = {
        key: tuple(_term(key, d, n, uses.get((key, d), []), atoms) for d, n in enumerate(tensor.shape))
        for key, tensor in tensors.items()
    }
    return assemble(name, labels, {key: key for key in tensors}, list(labels.values()), independent=True)


def _term(tensor: str, dim: int, n: int, uses: list[tuple[int, int, int, str]], atoms: dict[str, Term]) -> Term:
    parts: list[Term] = []
    place = 0
    for start, stop in sorted({use[:2] for use in uses}):
        if start < place:
            raise SymmetryError(f"from_spec: ranges of dimension {dim} of {tensor!r} overlap at position {start}")
        if start > place:
            parts.append(fresh(start - place, NOT_NAMED))
        nested: list[Term] = []
        inside = 1
        for _, _, block, group in sorted((u for u in uses if u[:2] == (start, stop)), key=lambda u: u[2]):
            if block % inside:
                raise SymmetryError(
                    f"from_spec: group {group!r}: blocks of {block} in dimension {dim} of {tensor!r} must hold whole "
                    f"multiples of the {inside} positions of the group inside them"
                )
            nested += [fresh(block // inside, NOT_NAMED), atoms[group]]
            inside = block * size(atoms[group])
        if (stop - start) % inside:
            raise SymmetryError(
                f"from_spec: groups in dimension {dim} of {tensor!r} do not fit {stop - start} positions"
            )
        parts.append(product([fresh((stop - start) // inside, NOT_NAMED), *reversed(nested)]))
        place = stop
    if place < n:
        parts.append(fresh(n - place, NOT_NAMED))
    return resolve(Cat(parts))


def chain_symmetry(
    state_dict: Mapping[str, Tensor], *, norm_groups: Mapping[str, int] | None = None, name: str = "chain"
) -> Symmetry:
    """The symmetry of a plain chain of linear layers, convolutions and norms, from the names and shapes alone.

    For networks in which every layer feeds the next and nothing else: MLPs and CNNs, with batch or layer normalisation
    between, and with a flatten or pooling before the linear layers. Every hidden layer's units are a group; where a
    linear layer has more inputs than the layer before has channels, each channel owns a block of its columns.
    Shortcuts, attention, transposed convolutions and the like cannot be seen in a state_dict: use `trace` or
    `from_spec` for those, and `verify` where there is a module.

    Args:
        state_dict: in the order of the layers.
        norm_groups: by layer name, the groups of a GroupNorm (1 for any other norm without running statistics),
            which shapes do not tell; needed for such a layer after a convolution.
        name: what messages call it.

    Raises:
        SymmetryError: a layer that does not fit the one before (grouped convolution, branches), or whose kind shapes do
            not tell; the message names it.

    Example:
        >>> symmetry = sne_fast.symmetry.chain_symmetry(torch.load("mlp.pt", weights_only=True))
    """
    tensors = _tensors(state_dict)
    layers: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        layer, _, last = key.rpartition(".")
        layers.setdefault(layer, {})[last] = tensor
    labels: dict[str, tuple[Term, ...]] = {}
    units: Term | None = None
    convolution = False
    for layer, own in layers.items():
        prefix = f"{layer}." if layer else ""
        if not set(own) <= {"weight", "bias", "running_mean", "running_var"} or "weight" not in own and units is None:
            raise SymmetryError(f"chain_symmetry: layer {layer!r} is no linear layer, convolution or norm: {list(own)}")
        weight = own.get("weight")
        if weight is None or weight.ndim == 1:
            units = _norm(layer, own, units, convolution, (norm_groups or {}).get(layer))
            labels.update({prefix + key: (units,) for key in own})
            continue
        out, taken = weight.shape[0], weight.shape[1]
        if units is None:
            incoming = fresh(taken, "input")
        else:
            have = size(units)
            if taken % have or (weight.ndim > 2 and taken != have):
                raise SymmetryError(
                    f"chain_symmetry: layer {layer!r} takes {taken} inputs after {have} units: not a plain chain, or "
                    f"a grouped convolution; use trace or from_spec"
                )
            incoming = product([units, fresh(taken // have, "places in the image")])
        convolution = weight.ndim > 2
        units = fresh(out)
        kernel = [fresh(n, "kernel positions") for n in weight.shape[2:]]
        labels[prefix + "weight"] = (units, incoming, *kernel)
        if "bias" in own:
            labels[prefix + "bias"] = (units,)
    if units is None:
        raise SymmetryError("chain_symmetry: the state_dict holds no layer with a weight")
    freeze(units, "output")
    return assemble(name, labels, {key: key for key in tensors}, list(labels.values()), independent=True)


def _norm(layer: str, own: dict[str, Tensor], units: Term | None, convolution: bool, groups: int | None) -> Term:
    length = next(iter(own.values())).shape[0] if next(iter(own.values())).ndim == 1 else -1
    if units is None or length != size(units):
        have = "the input" if units is None else f"{size(units)} units"
        raise SymmetryError(f"chain_symmetry: norm {layer!r} of {length} units follows {have}; use trace or from_spec")
    if "running_mean" in own:
        return units
    if groups is None and convolution:
        raise SymmetryError(
            f"chain_symmetry: norm {layer!r} after a convolution has no running statistics, and shapes do not tell "
            f"its kind: pass norm_groups={{{layer!r}: groups of the GroupNorm, or 1}}, or use trace"
        )
    if groups is not None and groups > 1:
        if length % groups:
            raise SymmetryError(f"chain_symmetry: norm {layer!r} of {length} units cannot have {groups} groups")
        split(units, groups, length // groups)
    return units

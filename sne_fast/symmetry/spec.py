"""Labels of tensors from groups of units that the user declares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from ..data.checkpoints import find_state_dict
from ..data.layers import strip_wrappers
from .boxes import SymmetryError
from .terms import Axis, Concat, Label, Term, fresh, product, resolve, size

_NOT_NAMED = "in no group"


class _Use(NamedTuple):
    """Units of a group along positions `start..stop-1` of a dimension, `block` neighbouring positions each."""

    start: int
    stop: int
    block: int
    group: str


def floating_tensors(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the floating-point tensors of a state_dict, wrappers such as `module.` taken off their names."""
    found = {k: t for k, t in find_state_dict(state_dict).items() if isinstance(t, Tensor) and t.is_floating_point()}
    return dict(zip(strip_wrappers(list(found)), found.values(), strict=True))


def labels_from_groups(
    groups: Mapping[str, Sequence[Sequence[Any]]], state_dict: Mapping[str, Any], units: Mapping[str, int]
) -> dict[str, Label]:
    """Return the label of every tensor; arguments and errors as for `Symmetry.from_spec`."""
    tensors = floating_tensors(state_dict)
    axes: dict[str, Term] = {}
    uses: dict[tuple[str, int], list[_Use]] = {}
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
            if group not in axes:
                count = units.get(group, (stop - start) // max(1, block))
                axes[group] = Axis(max(1, count))
            span = block * size(axes[group])
            if block < 1 or not 0 <= start < stop <= shape[dim] or (stop - start) % span:
                raise SymmetryError(
                    f"from_spec: group {group!r}: {size(axes[group])} units of {block} do not fit positions "
                    f"{start}..{stop - 1} of dimension {dim} of {tensor!r}, shape {shape}"
                )
            uses.setdefault((tensor, dim), []).append(_Use(start, stop, block, group))
    return {
        key: tuple(_dimension(key, d, n, uses.get((key, d), []), axes) for d, n in enumerate(tensor.shape))
        for key, tensor in tensors.items()
    }


def _dimension(tensor: str, dim: int, length: int, uses: Sequence[_Use], axes: Mapping[str, Term]) -> Term:
    """Return the term of a dimension: its ranges end to end, frozen where no group is named."""
    parts: list[Term] = []
    end = 0
    for start, stop in sorted({(use.start, use.stop) for use in uses}):
        if start < end:
            raise SymmetryError(f"from_spec: ranges of dimension {dim} of {tensor!r} overlap at position {start}")
        if start > end:
            parts.append(fresh(start - end, _NOT_NAMED))
        parts.append(_range(tensor, dim, stop - start, [u for u in uses if (u.start, u.stop) == (start, stop)], axes))
        end = stop
    if end < length:
        parts.append(fresh(length - end, _NOT_NAMED))
    return resolve(Concat(parts))


def _range(tensor: str, dim: int, length: int, uses: Sequence[_Use], axes: Mapping[str, Term]) -> Term:
    """Return the term of a range: its groups nested, the one of the smallest blocks innermost."""
    nested: list[Term] = []  # innermost first
    inside = 1
    for use in sorted(uses, key=lambda use: use.block):
        if use.block % inside:
            raise SymmetryError(
                f"from_spec: group {use.group!r}: blocks of {use.block} in dimension {dim} of {tensor!r} must hold "
                f"whole multiples of the {inside} positions of the group inside them"
            )
        nested += [fresh(use.block // inside, _NOT_NAMED), axes[use.group]]
        inside = use.block * size(axes[use.group])
    if length % inside:
        raise SymmetryError(f"from_spec: groups in dimension {dim} of {tensor!r} do not fit {length} positions")
    return product([fresh(length // inside, _NOT_NAMED), *reversed(nested)])

"""`chain_symmetry`: the symmetry of a plain chain of layers, from the names and shapes of a state_dict alone."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ..data.choices import Order
from ..data.layer_order import order_by_names
from .boxes import SymmetryError
from .core import Symmetry
from .spec import floating_tensors
from .terms import Label, Term, freeze, fresh, product, size, split


def chain_symmetry(
    state_dict: Mapping[str, Tensor],
    *,
    norm_groups: Mapping[str, int] | None = None,
    order: Order | None = None,
    name: str = "chain",
) -> Symmetry:
    """Return the symmetry of a plain chain of linear layers, convolutions and norms, from names and shapes alone.

    For networks in which every layer feeds the next and nothing else: MLPs and CNNs, with batch or layer normalisation
    between, and with a flatten or pooling before the linear layers. Every hidden layer's units are a group; where a
    linear layer has more inputs than the layer before has channels, each channel owns neighbouring columns of it.
    Shortcuts, attention, transposed convolutions and the like cannot be seen in a state_dict: use `trace` or
    `from_spec` for those, and `verify` where there is a module.

    Args:
        state_dict: names and tensors of the network.
        norm_groups: by layer name, the groups of a GroupNorm (1 for any other norm without running statistics),
            which shapes do not tell; needed for such a layer after a convolution.
        order: in which the layers follow each other: "definition", that of the entries, or "names", that in which
            `sne_fast.pack` takes layers. Needed only where the two differ, since a file may have lost the first.
        name: the network's name in messages.

    Raises:
        SymmetryError: two orders that differ, and none chosen; a layer that does not fit the one before (grouped
            convolution, branches), or whose kind shapes do not tell; the message names it.

    Example:
        >>> import torch
        >>> from sne_fast.symmetry import chain_symmetry
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
        >>> chain_symmetry(net.state_dict())
        Symmetry('chain', 1 groups, 10^4.6 permutations)
    """
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"chain_symmetry: state_dict must map names to tensors, got {type(state_dict).__name__}")
    layers = _in_order(floating_tensors(state_dict), order)
    labels: dict[str, Label] = {}
    units: Term | None = None
    convolution = False
    for layer, own in layers.items():
        prefix = f"{layer}." if layer else ""
        if not set(own) <= {"weight", "bias", "running_mean", "running_var"} or ("weight" not in own and units is None):
            raise SymmetryError(f"chain_symmetry: layer {layer!r} is no linear layer, convolution or norm: {list(own)}")
        weight = own.get("weight")
        if weight is not None and weight.ndim == 0:
            raise SymmetryError(f"chain_symmetry: layer {layer!r} is no linear layer, convolution or norm: one number")
        if weight is None or weight.ndim == 1:
            units = _norm(layer, own, units, convolution, (norm_groups or {}).get(layer))
            labels.update({prefix + key: (units,) for key in own})
            continue
        incoming = _incoming(layer, weight, units)
        convolution = weight.ndim > 2
        units = fresh(weight.shape[0])
        kernel = [fresh(n, "kernel positions") for n in weight.shape[2:]]
        labels[prefix + "weight"] = (units, incoming, *kernel)
        if "bias" in own:
            labels[prefix + "bias"] = (units,)
    if units is None:
        raise SymmetryError("chain_symmetry: the state_dict holds no layer with a weight")
    freeze(units, "output")
    return Symmetry.from_labels(name, labels)


def _in_order(tensors: Mapping[str, Tensor], order: Order | None) -> dict[str, dict[str, Tensor]]:
    """Return the tensors of each layer by their own names, layers as they follow each other."""
    layers: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        layer, _, last = key.rpartition(".")
        layers.setdefault(layer, {})[last] = tensor
    if order == "definition":
        return layers
    if order not in (None, "names"):
        raise SymmetryError(f"chain_symmetry: order must be 'definition', 'names' or None, got {order!r}")
    keys = list(tensors)
    by_names = list(dict.fromkeys(keys[i].rpartition(".")[0] for i in order_by_names(keys)))
    if order is None and by_names != list(layers):
        raise SymmetryError(
            f"chain_symmetry: the layers stand in the order {', '.join(map(repr, layers))}, by their names in the "
            f"order {', '.join(map(repr, by_names))}; say which is the network's: order='definition' or order='names'"
        )
    return {layer: layers[layer] for layer in by_names}


def _incoming(layer: str, weight: Tensor, units: Term | None) -> Term:
    """Return the term of a layer's inputs, behind the units of the layer before."""
    taken = weight.shape[1]
    if units is None:
        return fresh(taken, "input")
    have = size(units)
    if taken % have or (weight.ndim > 2 and taken != have):
        raise SymmetryError(
            f"chain_symmetry: layer {layer!r} takes {taken} inputs after {have} units: not a plain chain, or "
            f"a grouped convolution; use trace or from_spec"
        )
    return product([units, fresh(taken // have, "places in the image")])


def _norm(layer: str, own: dict[str, Tensor], units: Term | None, convolution: bool, groups: int | None) -> Term:
    """Return the units behind a norm; a GroupNorm splits them into groups."""
    first = next(iter(own.values()))
    length = first.shape[0] if first.ndim == 1 else -1
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

"""Rules for the operations that read and write at positions that other tensors hold.

The dimension that is read or written by position stays in place, and with it the positions; all other dimensions of the
tensors meet element by element. Each rule returns the labels of the results, see `tracer.Rule`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .terms import Label, Term, freeze, fresh, size, unify
from .tracer import Call, Rule, Tracer

WHY = "picked by index"
CLASH = "meets an axis that is cut otherwise"
ANY_ORDER = ("sum", "prod", "mean", "amin", "amax")
"""Reductions whose result does not depend on the order in which elements arrive."""


class _Picked(NamedTuple):
    """Dimensions that tensors index, as in `x[:, i, j]`: the terms of the others, and where the new ones stand."""

    others: list[Term]
    place: int
    new: int


def _picked(tracer: Tracer, call: Call) -> _Picked | None:
    """Freeze the dimensions that tensors index, and these tensors; None for masks beside other indices."""
    label = list(tracer.label(call["self"]))
    chosen = [(d, i) for d, i in enumerate(call["indices"]) if i is not None]
    if not chosen:
        return None
    masks = any(i.dtype in (torch.bool, torch.uint8) for _, i in chosen)
    if masks and len(chosen) > 1:
        return None
    if masks:  # a mask stands for as many dimensions as it has, and gives one
        first, mask = chosen[0]
        taken, count = list(range(first, first + mask.ndim)), 1
    else:
        taken = [d for d, _ in chosen]
        count = len(torch.broadcast_shapes(*(i.shape for _, i in chosen)))
    why = tracer.because(WHY)
    for term in [*(label[d] for d in taken), *(term for _, i in chosen for term in tracer.label(i))]:
        freeze(term, why)
    together = taken == list(range(taken[0], taken[0] + len(taken)))
    return _Picked([t for d, t in enumerate(label) if d not in taken], taken[0] if together else 0, count)


def index(tracer: Tracer, call: Call) -> list[Label] | None:
    """Freeze the dimensions that tensors index, as in `x[:, i, j]`, and these tensors."""
    picked = _picked(tracer, call)
    if picked is None:
        return None
    others, place, new_dims = picked
    why = tracer.because(WHY)
    new = [fresh(n, why) for n in call.out[0].shape[place : place + new_dims]]
    return [(*others[:place], *new, *others[place:])]


def index_select(tracer: Tracer, call: Call) -> list[Label] | None:
    """Freeze the indexed dimension and the index."""
    label = list(tracer.label(call["self"]))
    why = tracer.because("picked by index")
    for term in (label[call["dim"]], *tracer.label(call["index"])):
        freeze(term, why)
    label[call["dim"]] = fresh(call.out[0].shape[call["dim"]], why)
    return [tuple(label)]


def index_put(tracer: Tracer, call: Call) -> list[Label] | None:
    """Freeze the dimensions written by index, as in `x[:, i, j] = values`; the others meet those of the values."""
    label, picked = tracer.label(call["self"]), _picked(tracer, call)
    if picked is None:
        return None
    others, place, new_dims = picked
    why = tracer.because(WHY)
    target: list[Term | None] = [*others[:place], *[None] * new_dims, *others[place:]]
    given = tracer.label(call["values"])
    for k in range(1, len(given) + 1):
        meets = target[-k]
        if meets is None:
            freeze(given[-k], why)
        elif size(given[-k]) > 1:
            unify(given[-k], meets, tracer.because(CLASH))
    return [label]


def gather(tracer: Tracer, call: Call) -> list[Label] | None:
    """Freeze the dimension that is read, `out[i, j] = x[index[i, j], j]`; the others meet those of the index."""
    x, indices = call["self"], call["index"]
    d = call["dim"] % max(1, x.ndim)
    label, places = list(tracer.label(x)), list(tracer.label(indices))
    if not _meet(tracer, d, label, places):
        return None
    why = tracer.because(WHY)
    freeze(label[d], why)
    freeze(places[d], why)
    label[d] = fresh(size(places[d]), why)
    return [tuple(label)]


def scatter(tracer: Tracer, call: Call) -> list[Label] | None:
    """Freeze the dimension that is written, `out[index[i, j], j] += x[i, j]`; the others meet those of the index.

    Elements that are added up may arrive in any order; where they replace each other, their order stays.
    """
    out, indices, source = call["self"], call["index"], call.get("src")
    d = call["dim"] % max(1, out.ndim)
    label, places = list(tracer.label(out)), list(tracer.label(indices))
    given = list(tracer.label(source)) if isinstance(source, Tensor) else None
    if not _meet(tracer, d, label, places) or (given is not None and not _meet(tracer, d, given, places)):
        return None
    why = tracer.because(WHY)
    freeze(label[d], why)
    adds = call.name.startswith("scatter_add") or call.get("reduce") in ANY_ORDER
    for term in [places[d]] if given is None else [places[d], given[d]]:
        if not adds:
            freeze(term, why)
    if given is not None:
        if size(given[d]) != size(places[d]):
            return None
        unify(given[d], places[d], tracer.because(CLASH))
    return [tuple(label)]


def index_write(tracer: Tracer, call: Call) -> list[Label] | None:
    """Freeze the dimension that is written by a vector of positions; the others meet those of the source.

    Elements that are added up may arrive in any order; where they replace each other, their order stays.
    """
    x, positions, source = call["self"], call["index"], call.get("source")
    d = call["dim"] % max(1, x.ndim)
    label, (places,) = list(tracer.label(x)), tracer.label(positions) or (fresh(1),)
    why = tracer.because(WHY)
    freeze(label[d], why)
    adds = call.name.startswith("index_add") or call.get("reduce") in ANY_ORDER
    if not adds:
        freeze(places, why)
    if isinstance(source, Tensor) and source.ndim == x.ndim:
        given = tracer.label(source)
        if any(size(a) != size(b) for i, (a, b) in enumerate(zip(given, label, strict=True)) if i != d):
            return None
        for i, (mine, theirs) in enumerate(zip(given, label, strict=True)):
            unify(mine, places if i == d else theirs, tracer.because(CLASH))
    elif isinstance(source, Tensor) and source.ndim:
        return None
    return [tuple(label)]


def _meet(tracer: Tracer, d: int, label: list[Term], places: list[Term]) -> bool:
    """Unify all dimensions but d with those of the positions; False where they are not of the same size."""
    if len(label) != len(places):
        return False
    pairs = [pair for i, pair in enumerate(zip(label, places, strict=True)) if i != d]
    if any(size(mine) != size(theirs) for mine, theirs in pairs):
        return False
    for mine, theirs in pairs:
        unify(mine, theirs, tracer.because(CLASH))
    return True


INDEX_RULES: dict[Rule, str] = {
    index: "index _unsafe_index",
    index_select: "index_select",
    index_put: "index_put index_put_ _index_put_impl_ _unsafe_index_put",
    gather: "gather",
    scatter: "scatter scatter_ scatter_add scatter_add_ scatter_reduce scatter_reduce_",
    index_write: "index_add index_add_ index_copy index_copy_ index_fill index_fill_ index_reduce index_reduce_",
}
"""Names of ATen operations by rule."""

"""Axes of units and how they make up the dimensions of tensors: the algebra behind `trace`.

An `Axis` is a set of n units that one unknown permutation acts on. A dimension of a tensor is described by a term: an
axis, a `Product` of terms (outermost first: heads times units of a head), or a `Concat` of terms laid end to end. Where
two dimensions must be permuted alike, their terms are unified, as types are unified in a compiler; an axis turns out to
be a product or a concatenation when a reshape or a slice cuts it. Whatever cannot be expressed is frozen: its only
permutation is the identity. That loses symmetries, and never makes a wrong one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TypeAlias


class Axis:
    """An axis of units.

    Attributes:
        size: number of units.
        frozen: the reason why they may not be permuted, or None.
        bound: the term that the axis turned out to be, or None.
        family: `(selector, children)` once positions of another axis, the selector, were picked by index: the
            permutation of this axis may then differ from position to position, and `children[t]` is the axis at
            position t.
        selector: positions of this axis are picked by index.
    """

    __slots__ = ("bound", "family", "frozen", "selector", "size")

    def __init__(self, size: int, frozen: str | None = None) -> None:
        self.size = size
        self.frozen = frozen
        self.bound: Term | None = None
        self.family: tuple[Axis, tuple[Term, ...]] | None = None
        self.selector = False


class Product:
    """Terms multiplied, outermost first; the product of none is `ONE`, a dimension of size 1."""

    __slots__ = ("factors",)

    def __init__(self, factors: Sequence[Term]) -> None:
        self.factors = tuple(factors)


class Concat:
    """Terms laid end to end."""

    __slots__ = ("parts",)

    def __init__(self, parts: Sequence[Term]) -> None:
        self.parts = tuple(parts)


Term: TypeAlias = Axis | Product | Concat
"""A dimension of a tensor."""
Label: TypeAlias = tuple[Term, ...]
"""A tensor: one term per dimension."""
ONE = Product(())
"""A dimension of size 1."""


def size(term: Term) -> int:
    """Return the number of positions along a dimension described by `term`."""
    if isinstance(term, Axis):
        return term.size
    if isinstance(term, Product):
        return math.prod(size(f) for f in term.factors)
    return sum(size(p) for p in term.parts)


def fresh(n: int, frozen: str | None = None) -> Term:
    """Return a new axis of n units, or `ONE` if n is 1."""
    return ONE if n == 1 else Axis(n, frozen)


def resolve(term: Term) -> Term:
    """Replace bound axes by what they are bound to, and flatten products in products and concatenations in those."""
    if isinstance(term, Axis):
        if term.bound is None:
            return term
        known = resolve(term.bound)
        if isinstance(known, Axis):
            term.bound = known
        return known
    if isinstance(term, Product):
        factors: list[Term] = []
        for factor in map(resolve, term.factors):
            factors.extend(factor.factors if isinstance(factor, Product) else (factor,))
        return factors[0] if len(factors) == 1 else Product(factors) if factors else ONE
    parts: list[Term] = []
    for part in map(resolve, term.parts):
        parts.extend(part.parts if isinstance(part, Concat) else (part,))
    return parts[0] if len(parts) == 1 else Concat(parts)


def product(terms: Sequence[Term]) -> Term:
    """Return terms multiplied, outermost first."""
    return resolve(Product(terms))


def leaves(term: Term) -> Iterator[Axis]:
    """Yield the unbound axes of a term."""
    term = resolve(term)
    if isinstance(term, Axis):
        yield term
    else:
        for inner in term.factors if isinstance(term, Product) else term.parts:
            yield from leaves(inner)


def freeze(term: Term, why: str) -> None:
    """Forbid every permutation of the axes in `term`; the first reason given is the one kept."""
    for axis in leaves(term):
        if axis.frozen is None:
            axis.frozen = why
        if axis.family is not None:
            children, axis.family = axis.family[1], None
            for child in children:
                freeze(child, why)


def collapse(axis: Axis) -> None:
    """Dissolve a family: the axis has one permutation at every position of the selector again."""
    if axis.family is not None:
        children, axis.family = axis.family[1], None
        for child in children:
            unify(child, axis, "used without the axis it was picked from")


def at(term: Term, selector: Axis, position: int) -> Term:
    """Return `term` at one position of `selector`, where every axis that is not frozen is an axis of its own."""
    term = resolve(term)
    if isinstance(term, Product):
        return Product([at(f, selector, position) for f in term.factors])
    if isinstance(term, Concat):
        return Concat([at(p, selector, position) for p in term.parts])
    if term.frozen is not None:
        return term
    if term.family is not None and resolve(term.family[0]) is not selector:
        collapse(term)
        return at(term, selector, position)
    if term.family is None:
        term.family = (selector, tuple(fresh(term.size) for _ in range(selector.size)))
    return term.family[1][position]


def _give_up(why: str, *terms: Term) -> None:
    for term in terms:
        freeze(term, why)


def split(term: Term, outer: int, inner: int) -> tuple[Term, Term]:
    """Return `term` as a product of an outer and an inner term of these sizes."""
    term = resolve(term)
    if outer == 1:
        return ONE, term
    if inner == 1:
        return term, ONE
    if isinstance(term, Axis):
        if term.family is not None:
            collapse(term)
            return split(term, outer, inner)
        one, other = fresh(outer, term.frozen), fresh(inner, term.frozen)
        term.bound = Product((one, other))
        return one, other
    if isinstance(term, Product):
        taken: list[Term] = []
        have = 1
        for i, factor in enumerate(term.factors):
            n, need = size(factor), outer // have
            if need % n == 0:
                taken.append(factor)
                have *= n
                if have == outer:
                    return product(taken), product(term.factors[i + 1 :])
            elif n % need == 0:
                one, other = split(factor, need, n // need)
                return product([*taken, one]), product([other, *term.factors[i + 1 :]])
            else:
                break
    elif all(size(part) == inner for part in term.parts):
        # Queries, keys and values laid end to end, then viewed as 3 times something: each keeps its own permutation.
        selector, whole = Axis(outer, "its parts are picked by position"), Axis(inner)
        selector.selector = True
        whole.family = (selector, term.parts)
        return selector, whole
    elif all(size(part) % inner == 0 for part in term.parts):
        pieces = [split(part, size(part) // inner, inner) for part in term.parts]
        for _, other in pieces[1:]:
            unify(pieces[0][1], other, "")
        return resolve(Concat([one for one, _ in pieces])), resolve(pieces[0][1])
    why = f"a reshape cuts it into {outer} x {inner}"
    _give_up(why, term)
    return fresh(outer, why), fresh(inner, why)


def cut(term: Term, position: int) -> tuple[Term, Term]:
    """Return `term` as two terms end to end, the first of them `position` long; both are at least 1 long."""
    term = resolve(term)
    n = size(term)
    if isinstance(term, Axis):
        if term.frozen is not None:  # binding it to its parts would tell nothing more
            return fresh(position, term.frozen), fresh(n - position, term.frozen)
        if term.family is not None:
            collapse(term)
            return cut(term, position)
        left, right = fresh(position), fresh(n - position)
        term.bound = Concat((left, right))
        return left, right
    if isinstance(term, Concat):
        before: list[Term] = []
        for i, part in enumerate(term.parts):
            length = size(part)
            if position == length:
                return resolve(Concat([*before, part])), resolve(Concat(term.parts[i + 1 :]))
            if position < length:
                left, right = cut(part, position)
                return resolve(Concat([*before, left])), resolve(Concat([right, *term.parts[i + 1 :]]))
            before.append(part)
            position -= length
    elif term.factors:
        inner = n // size(term.factors[0])
        if position % inner == 0:
            left, right = cut(term.factors[0], position // inner)
            return product([left, *term.factors[1:]]), product([right, *term.factors[1:]])
    why = f"cut at position {position} of {n}"
    _give_up(why, term)
    return fresh(position, why), fresh(n - position, why)


def unify(a: Term, b: Term, why: str) -> None:
    """Make both terms stand for the same permutation; freeze both, for the reason `why`, where their cuts clash."""
    a, b = resolve(a), resolve(b)
    if a is b:
        return
    if size(a) != size(b):
        raise AssertionError(f"symmetry: axes of {size(a)} and {size(b)} units cannot be one")
    if size(a) == 1:
        return
    for one, other in ((a, b), (b, a)):
        if isinstance(one, Axis) and one.frozen is not None:
            # They stay two axes: the frozen one may be the other rolled or picked apart, and a permutation that depends
            # on a position in one must not depend on the same position in the other.
            freeze(other, one.frozen)
            return
    if isinstance(a, Axis) and isinstance(b, Axis):
        _unify_axes(a, b)
    elif isinstance(a, Axis):
        _bind(a, b, why)
    elif isinstance(b, Axis):
        _bind(b, a, why)
    elif isinstance(a, Product) and isinstance(b, Product):
        one, other = a.factors[0], b.factors[0]
        m, n = size(one), size(other)
        if m > n:
            a, b, one, other, m, n = b, a, other, one, n, m
        rest: Term = product(a.factors[1:])
        if m == n:
            unify(one, other, why)
            unify(rest, product(b.factors[1:]), why)
        elif n % m == 0:
            outer, inner = split(other, m, n // m)
            unify(one, outer, why)
            unify(rest, product([inner, *b.factors[1:]]), why)
        else:
            _give_up(why, a, b)
    else:
        first = min(size(t.parts[0]) for t in (a, b) if isinstance(t, Concat))
        (left, rest), (other_left, other_rest) = cut(a, first), cut(b, first)
        unify(left, other_left, why)
        unify(rest, other_rest, why)


def _unify_axes(a: Axis, b: Axis) -> None:
    mine, theirs = a.family, b.family
    if mine is not None and theirs is not None:
        if resolve(mine[0]) is not resolve(theirs[0]):
            collapse(a)
            collapse(b)
            unify(a, b, "")
            return
        a.bound = b
        for one, other in zip(mine[1], theirs[1], strict=True):
            unify(one, other, "its positions are permuted differently")
        return
    b.family = mine or theirs
    a.family = None
    a.bound = b


def _bind(axis: Axis, term: Term, why: str) -> None:
    if axis.family is not None:
        collapse(axis)
        unify(axis, term, why)
    elif any(leaf is axis for leaf in leaves(term)):
        _give_up(why, term)
    else:
        axis.bound = term

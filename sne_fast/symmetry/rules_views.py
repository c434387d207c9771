"""Rules for the operations that move, cut and join tensors.

Each rule unifies or freezes axes of the arguments and returns the labels of the results, see `tracer.Rule`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from .terms import (
    ONE,
    Axis,
    Concat,
    Label,
    Product,
    Term,
    at,
    cut,
    freeze,
    fresh,
    leaves,
    product,
    resolve,
    size,
    split,
    unify,
)
from .tracer import Call, Rule, Tracer


def reshaped(label: Label, shape: Sequence[int]) -> Label | None:
    """Return the label of the same elements under another shape, or None where a dimension cannot be expressed."""
    stack = [resolve(term) for term in reversed(label)]
    out: list[Term] = []
    for n in shape:
        taken: list[Term] = []
        have = 1
        while have < n:
            term = resolve(stack.pop())
            length, need = size(term), n // have
            if need % length == 0:
                taken.append(term)
                have *= length
            elif length % need == 0:
                outer, inner = split(term, need, length // need)
                taken.append(outer)
                stack.append(inner)
                have = n
            elif isinstance(term, Product):
                stack.extend(reversed(term.factors))
            else:
                stack.append(term)
                break
        if have != n or n == 0:
            return None
        out.append(product(taken))
    return tuple(out)


def view(tracer: Tracer, call: Call) -> list[Label] | None:
    """Label another shape of the same elements; freeze all axes where the shape cuts across one."""
    label, shape = tracer.label(call["self"]), call.out[0].shape
    found = reshaped(label, shape)
    if found is None:
        why = tracer.because("a reshape cuts across it")
        for term in label:
            freeze(term, why)
        found = tuple(fresh(n, why) for n in shape)
    return [found]


def same(tracer: Tracer, call: Call) -> list[Label] | None:
    """Label results that have the shape of the first argument."""
    return [tracer.label(call.first)] * len(call.out)


def permute(tracer: Tracer, call: Call) -> list[Label] | None:
    """Label dimensions in another order."""
    label = tracer.label(call["self"])
    return [tuple(label[d] for d in call["dims"])]


def transpose(tracer: Tracer, call: Call) -> list[Label] | None:
    """Label two dimensions exchanged."""
    label = list(tracer.label(call["self"]))
    if call.name in ("t", "t_"):
        label = label[:-2] + label[-2:][::-1]
    elif label:
        i, j = call["dim0"], call["dim1"]
        label[i], label[j] = label[j], label[i]
    return [tuple(label)]


def unsqueeze(tracer: Tracer, call: Call) -> list[Label] | None:
    """Label a new dimension of size 1."""
    label = list(tracer.label(call["self"]))
    label.insert(call["dim"] % (len(label) + 1), ONE)
    return [tuple(label)]


def squeeze(tracer: Tracer, call: Call) -> list[Label] | None:
    """Drop dimensions of size 1."""
    label = tracer.label(call["self"])  # in place of its shape, which squeeze_ has changed by now
    dims = call.get("dim")
    if isinstance(dims, int):
        dims = [dims]
    chosen = range(len(label)) if dims is None else [d % max(1, len(label)) for d in dims]
    return [tuple(term for d, term in enumerate(label) if not (d in chosen and size(term) == 1))]


def expand(tracer: Tracer, call: Call) -> list[Label] | None:
    """Label a tensor repeated along new axes: any permutation of these leaves it as it is."""
    label = tracer.label(call["self"])
    shape = call.out[0].shape
    before = len(shape) - len(label)
    out: list[Term] = []
    for d, n in enumerate(shape):
        term = label[d - before] if d >= before else ONE
        out.append(fresh(n) if size(term) == 1 else term)
    return [tuple(out)]


def repeat(tracer: Tracer, call: Call) -> list[Label] | None:
    """Label dimensions repeated as wholes, by a new outer axis each."""
    label = tracer.label(call["self"])
    times = call["repeats"]
    padded = (ONE,) * (len(times) - len(label)) + tuple(label)
    return [tuple(product([fresh(n), term]) for n, term in zip(times, padded, strict=True))]


def select(tracer: Tracer, call: Call) -> list[Label] | None:
    """Label a tensor at one position along a dimension."""
    return [_select(tracer, tracer.label(call["self"]), call["dim"], call["index"])]


def unbind(tracer: Tracer, call: Call) -> list[Label] | None:
    """Label a tensor at every position along a dimension."""
    label = tracer.label(call["self"])
    return [_select(tracer, label, call.get("dim") or 0, i) for i in range(len(call.out))]


def _select(tracer: Tracer, label: Label, dim: int, index: int) -> Label:
    term = resolve(label[dim])
    rest = [t for d, t in enumerate(label) if d != dim % len(label)]
    if size(term) == 1:
        return tuple(rest)
    if isinstance(term, Axis) and (term.frozen is None or term.selector):
        term.selector = True
        freeze(term, tracer.because("its positions are picked by index"))
        return tuple(at(t, term, index % term.size) for t in rest)
    freeze(term, tracer.because("its positions are picked by index"))
    return tuple(rest)


def _window(tracer: Tracer, term: Term, start: int, stop: int) -> Term:
    n = size(term)
    if stop - start == n:
        return term
    if start > 0:
        _, term = cut(term, start)
    if stop - start < size(term):
        term, _ = cut(term, stop - start)
    return term


def slice_(tracer: Tracer, call: Call) -> list[Label] | None:
    """Cut a window out of a dimension; freeze the dimension where the slice has a step."""
    x, d = call["self"], call["dim"]
    label = list(tracer.label(x))
    n, taken = x.shape[d], call.out[0].shape[d]
    start = 0 if call.get("start") is None else call["start"]
    start = max(0, min(n, start + n if start < 0 else start))
    if (call.get("step", 1) != 1 and taken > 1) or taken == 0:
        why = tracer.because("sliced with a step")
        freeze(label[d], why)
        label[d] = fresh(taken, why)
    else:
        label[d] = _window(tracer, label[d], start, start + taken)
    return [tuple(label)]


def narrow_all(tracer: Tracer, call: Call) -> list[Label] | None:
    """Cut a dimension into neighbouring windows, for `split`, `chunk` and the like."""
    d = call.get("dim") or 0
    out, start = [], 0
    for part in call.out:
        label = list(tracer.label(call["self"]))
        if part.shape[d] == 0:
            return None
        label[d] = _window(tracer, label[d], start, start + part.shape[d])
        start += part.shape[d]
        out.append(tuple(label))
    return out


def cat(tracer: Tracer, call: Call) -> list[Label] | None:
    """Lay a dimension of several tensors end to end; their other dimensions are permuted alike."""
    tensors = [t for t in call["tensors"] if not (t.ndim == 1 and t.shape[0] == 0)]  # torch ignores these
    d = call.get("dim") or 0
    labels = [list(tracer.label(t)) for t in tensors]
    d %= len(labels[0])
    for other in labels[1:]:
        for i, term in enumerate(other):
            if i != d:
                unify(labels[0][i], term, tracer.because("joined with tensors cut otherwise"))
    out = list(labels[0])
    out[d] = resolve(Concat([label[d] for label, t in zip(labels, tensors, strict=True) if t.shape[d]]))
    return [tuple(out)]


def stack(tracer: Tracer, call: Call) -> list[Label] | None:
    """Label a new axis, along which the others keep their own permutations."""
    labels = [tracer.label(t) for t in call["tensors"]]
    why = tracer.because("a stack of tensors")
    selector = fresh(len(labels), why)
    out: list[Term] = []
    for terms in zip(*labels, strict=True):
        free = all(leaf.frozen is None for term in terms for leaf in leaves(term))
        if free and isinstance(selector, Axis) and any(resolve(t) is not resolve(terms[0]) for t in terms):
            selector.selector = True
            whole = Axis(size(terms[0]))
            whole.family = (selector, tuple(terms))
            out.append(whole)
        else:
            for term in terms[1:]:
                unify(terms[0], term, tracer.because("stacked with tensors cut otherwise"))
            out.append(terms[0])
    out.insert((call.get("dim") or 0) % (len(out) + 1), selector)
    return [tuple(out)]


def pad(tracer: Tracer, call: Call) -> list[Label] | None:
    """Label the constants put beside an axis: they are equal, and may be permuted among themselves."""
    label = list(tracer.label(call["self"]))
    amounts = call["pad"]
    for k in range(len(amounts) // 2):
        d = len(label) - 1 - k
        left, right = amounts[2 * k : 2 * k + 2]
        if min(left, right) < 0:
            freeze(label[d], tracer.because("cropped"))
            label[d] = fresh(call.out[0].shape[d], "cropped")
        elif left or right:
            ends = [fresh(n) if n else None for n in (left, right)]
            label[d] = resolve(Concat([t for t in (ends[0], label[d], ends[1]) if t is not None]))
    return [tuple(label)]


def pixel_shuffle(tracer: Tracer, call: Call) -> list[Label] | None:
    """Label `(*, C r r, H, W)` as `(*, C, H r, W r)`; positions in the image are frozen."""
    label = tracer.label(call["self"])
    *rest, channels, height, width = label
    r = call["upscale_factor"]
    outer, inner = split(channels, size(channels) // (r * r), r * r)
    why = tracer.because("its positions become places in the image")
    for term in (inner, height, width):
        freeze(term, why)
    n, m = call.out[0].shape[-2:]
    return [(*rest, outer, fresh(n, why), fresh(m, why))]


def pixel_unshuffle(tracer: Tracer, call: Call) -> list[Label] | None:
    """Label `(*, C, H r, W r)` as `(*, C r r, H, W)`; positions in the image are frozen."""
    *rest, channels, height, width = tracer.label(call["self"])
    why = tracer.because("places in the image")
    for term in (height, width):
        freeze(term, why)
    n, m = call.out[0].shape[-2:]
    inner = fresh(call["downscale_factor"] ** 2, why)
    return [(*rest, product([channels, inner]), fresh(n, why), fresh(m, why))]


def channel_shuffle(tracer: Tracer, call: Call) -> list[Label] | None:
    """Label channels `g x n` as `n x g`."""
    label = list(tracer.label(call["self"]))
    groups = call["groups"]
    group, member = split(label[1], groups, size(label[1]) // groups)
    label[1] = product([member, group])
    return [tuple(label)]


def image_to_columns(tracer: Tracer, call: Call) -> list[Label] | None:
    """Label `(*, C, H, W)` as `(*, C k k, places)`; positions in the image and in the kernel are frozen."""
    *rest, channels, height, width = tracer.label(call["self"])
    why = tracer.because("places in the image")
    for term in (height, width):
        freeze(term, why)
    rows, places = call.out[0].shape[-2:]
    inner = fresh(rows // size(channels), why)
    return [(*rest, product([channels, inner]), fresh(places, why))]


def columns_to_image(tracer: Tracer, call: Call) -> list[Label] | None:
    """Label `(*, C k k, places)` as `(*, C, H, W)`, the inverse of `image_to_columns`."""
    *rest, rows, places = tracer.label(call["self"])
    why = tracer.because("places in the image")
    count, n, m = call.out[0].shape[-3:]
    channels, inner = split(rows, count, size(rows) // count)
    for term in (inner, places):
        freeze(term, why)
    return [(*rest, channels, fresh(n, why), fresh(m, why))]


def windows(tracer: Tracer, call: Call) -> list[Label] | None:
    """Freeze the dimension from which overlapping windows are taken, and label them as a last dimension."""
    label = list(tracer.label(call["self"]))
    d = call["dimension"] % max(1, len(label))
    why = tracer.because("windows slide along it")
    freeze(label[d], why)
    label[d] = fresh(call.out[0].shape[d], why)
    return [(*label, fresh(call["size"], why))]


def as_complex(tracer: Tracer, call: Call) -> list[Label] | None:
    """Drop the last dimension, the real and imaginary parts."""
    *rest, parts = tracer.label(call["self"])
    freeze(parts, tracer.because("real and imaginary parts"))
    return [tuple(rest)]


def as_real(tracer: Tracer, call: Call) -> list[Label] | None:
    """Add a last dimension, the real and imaginary parts."""
    return [(*tracer.label(call["self"]), fresh(2, tracer.because("real and imaginary parts")))]


def factory(tracer: Tracer, call: Call) -> list[Label] | None:
    """Label tensors of equal elements: any permutation leaves them as they are."""
    return [tuple(fresh(n) for n in t.shape) for t in call.out]


def positions(tracer: Tracer, call: Call) -> list[Label] | None:
    """Freeze the dimensions along which the order matters, and pass the others."""
    x: Tensor = call.first
    label = list(tracer.label(x))
    dims = call.get("dim", call.get("dims"))
    if dims is None:
        dims = -1 if call.name in ("sort", "argsort", "topk", "kthvalue") else list(range(x.ndim))
    why = tracer.because("the order along it matters")
    for d in [dims] if isinstance(dims, int) else dims:
        freeze(label[d], why)
        label[d] = fresh(call.out[0].shape[d], why) if call.out[0].ndim == x.ndim else label[d]
    if any(math.prod(map(size, label)) != t.numel() for t in call.out):
        return None
    return [tuple(label)] * len(call.out)


def triangle(tracer: Tracer, call: Call) -> list[Label] | None:
    """Freeze rows and columns, and pass the dimensions before them."""
    label = tracer.label(call["self"])
    for term in label[-2:]:
        freeze(term, tracer.because("the order along it matters"))
    return [label]


VIEW_RULES: dict[Rule, str] = {
    view: "view _unsafe_view reshape _reshape_alias",
    same: "alias detach detach_ clone contiguous _to_copy lift_fresh",
    permute: "permute",
    transpose: "t t_ transpose transpose_",
    unsqueeze: "unsqueeze unsqueeze_",
    squeeze: "squeeze squeeze_",
    expand: "expand",
    repeat: "repeat",
    select: "select",
    unbind: "unbind",
    slice_: "slice",
    narrow_all: "split split_with_sizes unsafe_split unsafe_split_with_sizes chunk unsafe_chunk tensor_split",
    cat: "cat",
    stack: "stack",
    pad: "constant_pad_nd",
    pixel_shuffle: "pixel_shuffle",
    pixel_unshuffle: "pixel_unshuffle",
    channel_shuffle: "channel_shuffle native_channel_shuffle",
    image_to_columns: "im2col",
    columns_to_image: "col2im",
    windows: "unfold",
    as_complex: "view_as_complex",
    as_real: "view_as_real",
    factory: "zeros ones full new_zeros new_ones new_full zeros_like ones_like full_like scalar_tensor "
    "empty empty_like new_empty",
    positions: "cumsum cumprod logcumsumexp cummax cummin flip roll sort topk argsort _fft_r2c _fft_c2r _fft_c2c",
    triangle: "tril triu",
}
"""Names of ATen operations by rule."""

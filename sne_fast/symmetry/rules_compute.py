"""Rules for the operations that compute.

Each rule unifies the axes of the arguments that must be permuted alike, and returns the labels of the results, see
`tracer.Rule`. Where axes are summed over, `Tracer.record` says which must still stand together for the permutation of
one to depend on another: heads, and the units inside a head, may be permuted head by head only where both always stand
together.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .terms import ONE, Label, Term, cut, freeze, fresh, product, size, split, unify
from .tracer import Call, Rule, Tracer

CLASH = "meets an axis that is cut otherwise"


def broadcast(tracer: Tracer, tensors: list[Tensor], shape: Any) -> Label:
    """Unify the axes that meet under broadcasting, and return the label of the result."""
    out: list[Term] = [ONE] * len(shape)
    for x in tensors:
        label = tracer.label(x)
        for k in range(1, len(label) + 1):
            if size(label[-k]) == 1:
                continue
            if size(out[-k]) == 1:
                out[-k] = label[-k]
            else:
                unify(out[-k], label[-k], tracer.because(CLASH))
    return tuple(out)


def pointwise(tracer: Tracer, call: Call) -> list[Label] | None:
    """Label an element-wise operation with broadcasting."""
    shape = max((t.shape for t in call.out), key=len)
    return [broadcast(tracer, call.tensors, shape)] * len(call.out)


def matmul(tracer: Tracer, call: Call) -> list[Label] | None:
    """Label `(*b, m, k) (*b, k, n) -> (*b, m, n)`, also of vectors, and with a tensor added."""
    if call.name in ("mm", "bmm", "mv", "dot", "vdot"):
        a, b = call.tensors[:2]
        added = []
    else:
        added, (a, b) = [call.tensors[0]], call.tensors[1:3]
    left, right = list(tracer.label(a)), list(tracer.label(b))
    k, other = left.pop(), right.pop(0 if b.ndim == 1 else -2)
    unify(k, other, tracer.because(CLASH))
    batch = left[: a.ndim - 2] if b.ndim == 3 else []
    for mine, theirs in zip(batch, right, strict=False):
        unify(mine, theirs, tracer.because(CLASH))
    rows, columns = left[len(batch) :], right[len(batch) :]
    for part in ([k], rows, columns):
        tracer.record(*batch, *part)
    label = (*batch, *rows, *columns)
    if added:
        for mine, theirs in zip(reversed(tracer.label(added[0])), reversed(label), strict=False):
            if size(mine) > 1:
                unify(mine, theirs, tracer.because(CLASH))
    return [label]


def grouped_matmul(tracer: Tracer, call: Call) -> list[Label] | None:
    """Label `(rows, k) (groups, k, n) -> (rows, n)`: every run of rows times the matrix of its group, as of experts.

    Groups have their units permuted alike, so that what is found does not depend on the groups that the example uses.
    """
    a, b = call.tensors[:2]
    if a.ndim != 2 or b.ndim != 3 or call.out[0].ndim != 2:
        return None
    rows, k = tracer.label(a)
    group, other, columns = tracer.label(b)
    for term in (rows, group):
        freeze(term, tracer.because("its positions belong to groups"))
    unify(k, other, tracer.because(CLASH))
    return [(rows, columns)]


def distances(tracer: Tracer, call: Call) -> list[Label] | None:
    """Unify the coordinates of two sets of points, for the distances `(*b, m, k) (*b, n, k) -> (*b, m, n)`."""
    (*batch, m, k), (*others, n, other) = (tracer.label(call[name]) for name in ("x1", "x2"))
    unify(k, other, tracer.because(CLASH))
    if len(batch) != len(others):
        return None
    for mine, theirs in zip(batch, others, strict=True):
        if size(mine) != size(theirs):
            return None
        unify(mine, theirs, tracer.because(CLASH))
    for part in ([k], [m], [n]):
        tracer.record(*batch, *part)
    return [(*batch, m, n)]


def log_sigmoid(tracer: Tracer, call: Call) -> list[Label] | None:
    """Label the result, and the buffer for the backward pass, which is empty on some devices."""
    x: Tensor = call.first
    label = tracer.label(x)
    return [label if t.shape == x.shape else tuple(fresh(n, "a buffer") for n in t.shape) for t in call.out]


def convolution(tracer: Tracer, call: Call) -> list[Label] | None:
    """Unify channels with those of the weight, group by group; freeze positions in image and kernel."""
    x, weight, bias = call["input"], call["weight"], call["bias"]
    groups = call["groups"]
    batch, channels, *space = tracer.label(x)
    first, second, *kernel = tracer.label(weight)
    why = tracer.because("a convolution slides along it")
    for term in space:
        freeze(term, why)
    for term in kernel:
        freeze(term, tracer.because("kernel positions"))
    group: Term = ONE
    if call["transposed"]:
        incoming, outgoing = first, second
        if groups > 1:
            group, incoming = split(first, groups, size(first) // groups)
    else:
        incoming, outgoing = second, first
        if groups > 1:
            group, outgoing = split(first, groups, size(first) // groups)
    unify(channels, product([group, incoming]), tracer.because("channels and groups of the convolution clash"))
    out = product([group, outgoing])
    if bias is not None:
        unify(out, tracer.label(bias)[0], tracer.because(CLASH))
    tracer.record(group, incoming)
    tracer.record(batch, group)
    tracer.record(group, outgoing)
    return [(batch, out, *(fresh(n, why) for n in call.out[0].shape[2:]))]


def channel_norm(tracer: Tracer, call: Call) -> list[Label] | None:
    """Unify channels with weight, bias and running statistics, for batch normalisation."""
    x = call["input"]
    label = tracer.label(x)
    for name in ("weight", "bias", "running_mean", "running_var"):
        if call.get(name) is not None:
            unify(label[1], tracer.label(call[name])[0], tracer.because(CLASH))
    tracer.record(label[1])
    statistics = [(label[1],) if t.numel() else (fresh(0, "empty"),) for t in call.out[1:]]
    return [label, *statistics]


def layer_norm(tracer: Tracer, call: Call) -> list[Label] | None:
    """Unify the normalised dimensions with weight and bias."""
    x = call["input"]
    label = tracer.label(x)
    normalised = len(call["normalized_shape"])
    for name in ("weight", "bias"):
        if call.get(name) is not None:
            for mine, theirs in zip(label[-normalised:], tracer.label(call[name]), strict=True):
                unify(mine, theirs, tracer.because(CLASH))
    statistics = (*label[: x.ndim - normalised], *[ONE] * normalised)
    return [label, *[statistics] * (len(call.out) - 1)]


def group_norm(tracer: Tracer, call: Call) -> list[Label] | None:
    """Split channels into groups, and unify them with weight and bias."""
    x, groups = call["input"], call["group"]
    label = list(tracer.label(x))
    group, member = split(label[1], groups, size(label[1]) // groups)
    label[1] = product([group, member])
    for name in ("weight", "bias"):
        if call.get(name) is not None:
            unify(label[1], tracer.label(call[name])[0], tracer.because(CLASH))
    return [tuple(label), *[(label[0], group)] * (len(call.out) - 1)]


def weight_norm(tracer: Tracer, call: Call) -> list[Label] | None:
    """Unify the dimension that has a gain with the gain."""
    label, gain = tracer.label(call["v"]), tracer.label(call["g"])
    d = call["dim"]
    unify(label[d], gain[d], tracer.because(CLASH))
    return [label, gain]


def reduction(tracer: Tracer, call: Call) -> list[Label] | None:
    """Drop the dimensions of a sum, mean or extreme; freeze them where the result is a position."""
    x: Tensor = call.first
    if len(call.tensors) != 1:
        return None
    dims = call.get("dim")
    chosen = set(range(x.ndim)) if dims is None or dims == [] else None
    if chosen is None:
        chosen = {d % max(1, x.ndim) for d in ([dims] if isinstance(dims, int) else dims)}
    label = tracer.label(x)
    if any(not t.is_floating_point() for t in call.out) and x.is_floating_point():
        for d in chosen:
            freeze(label[d], tracer.because("a position along it is reported"))
    kept = tuple(ONE if d in chosen else t for d, t in enumerate(label))
    dropped = tuple(t for d, t in enumerate(label) if d not in chosen)
    return [kept if t.ndim == x.ndim else dropped for t in call.out]


def softmax(tracer: Tracer, call: Call) -> list[Label] | None:
    """Label a softmax, whose denominators stand without the dimension."""
    label = tracer.label(call["self"])
    d = call["dim"] % max(1, len(label))
    tracer.record(*label[:d], *label[d + 1 :])
    return [label]


def embedding(tracer: Tracer, call: Call) -> list[Label] | None:
    """Freeze the rows of the weight and the indices, and pass the columns."""
    rows, columns = tracer.label(call["weight"])
    freeze(rows, tracer.because("rows are looked up by index"))
    indices = tracer.label(call["indices"])
    for term in indices:
        freeze(term, tracer.because("holds indices"))
    return [(*indices, columns)]


def spatial(tracer: Tracer, call: Call) -> list[Label] | None:
    """Freeze positions in the image and pass channels, for pooling, resizing and padding."""
    x: Tensor = call.first
    label = list(tracer.label(x))
    count = next((int(c) for c, d in zip(call.name, call.name[1:], strict=False) if c in "123" and d == "d"), 0)
    if count == 0:
        return None
    why = tracer.because("places in the image")
    for term in label[-count:]:
        freeze(term, why)
    lead = label[: len(label) - count]
    return [(*lead, *(fresh(n, why) for n in t.shape[len(lead) :])) for t in call.out]


def glu(tracer: Tracer, call: Call) -> list[Label] | None:
    """Unify the two halves of a gated linear unit."""
    x, d = call["self"], call["dim"]
    label = list(tracer.label(x))
    one, other = cut(label[d], x.shape[d] // 2)
    unify(one, other, tracer.because(CLASH))
    label[d] = one
    return [tuple(label)]


_IMAGES = " ".join(
    [f"{kind}{n}d" for n in "123" for kind in (
        "max_pool", "avg_pool", "adaptive_avg_pool", "_adaptive_avg_pool", "adaptive_max_pool", "reflection_pad",
        "replication_pad", "upsample_linear", "upsample_nearest", "_upsample_nearest_exact", "upsample_bilinear",
        "upsample_bicubic", "upsample_trilinear", "_upsample_bilinear", "_upsample_bicubic",
    )]
    + ["max_pool2d_with_indices", "max_pool3d_with_indices", "max_pool1d_with_indices", "mkldnn_max_pool2d"]
    + ["_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa"]
)  # fmt: skip

COMPUTE_RULES: dict[Rule, str] = {
    matmul: "mm bmm mv dot vdot addmm baddbmm addmv",
    grouped_matmul: "_grouped_mm transformers::grouped_mm_fallback",
    distances: "_cdist_forward",
    log_sigmoid: "log_sigmoid_forward",
    convolution: "convolution _convolution convolution_overrideable",
    channel_norm: "native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training cudnn_batch_norm "
    "miopen_batch_norm _batch_norm_no_update _batch_norm_with_update",
    layer_norm: "native_layer_norm _fused_rms_norm",
    group_norm: "native_group_norm",
    weight_norm: "_weight_norm_interface",
    reduction: "sum mean amax amin var std prod logsumexp any all linalg_vector_norm norm max min argmax argmin "
    "var_mean std_mean nansum aminmax count_nonzero median nanmedian mode kthvalue",
    softmax: "_softmax _log_softmax _safe_softmax",
    embedding: "embedding",
    glu: "glu",
    spatial: _IMAGES,
    pointwise: "masked_fill masked_fill_ _prelu_kernel where copy_ copy fill_ fill zero_ hardswish hardswish_ "
    "rrelu_with_noise rrelu_with_noise_ complex polar",
}
"""Names of ATen operations by rule."""

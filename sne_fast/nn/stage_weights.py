"""Parameters of whole stages as the ops take them: folded, stacked and cast together, by few operations.

On a GPU every small operation costs a launch. So the parameters of all stages are joined in one flat tensor, which is
cast once under autocast, and what the ops take are views of it; the gradients come back as views of one flat tensor.
The algebra of the folding is in docs/method.md, "Algebra of the fast code".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops import functional
from ..ops.calls import autocast, is_cast, needs_grad

# Those of sne_fast.nn.blocks, which imports this module.
MAB = Any
PMA = Any


class FeedForwardWeights(NamedTuple):
    """Parameters of the feed-forward half of a block: ``(h, h)``, ``(h,)``, and norms ``(4, h)`` or ``(0, h)``."""

    w_o: Tensor
    b_o: Tensor
    norm: Tensor


class BlockWeights(NamedTuple):
    """Parameters of an attention block on rows of its own width h.

    Attributes:
        w_qkv: fc_q, fc_k and fc_v, ``(3, h, h)``; three ``(h, h)`` where ``set_block`` takes them.
        b_qkv: ``(3, h)``, or three ``(h,)``.
        feed_forward: its other half.
    """

    w_qkv: Tensor | tuple[Tensor, ...]
    b_qkv: Tensor | tuple[Tensor, ...]
    feed_forward: FeedForwardWeights


class PoolWeights(NamedTuple):
    """Parameters of a pooling block with k seeds and H heads.

    Attributes:
        logits: ``(fc_k^T q)_a / sqrt(h)`` per seed and head, ``(k H, h)``.
        query: ``fc_q(S)``, ``(1, k, h)``. It is not cast where modules are called, which sum it with the attention in
            its own dtype.
        w_v: fc_v, ``(H, d, h)``.
        b_v: its bias, ``(h,)``, which is not cast where modules are called.
        feed_forward: its other half; None where its modules are called.
    """

    logits: Tensor
    query: Tensor
    w_v: Tensor
    b_v: Tensor
    feed_forward: FeedForwardWeights | None


class StageWeights(NamedTuple):
    """Parameters of a stage.

    Attributes:
        pool: of any stage.
        blocks: of stages 2 to 4, their blocks; empty where these are called without.
        chunk_encode: of stage 1, arguments of :func:`sne_fast.functional.chunk_encode` by name; else empty.
        unused: parameters without effect, here only for the gradient of 0 that DDP wants for every parameter.
    """

    pool: PoolWeights
    blocks: tuple[BlockWeights, ...]
    chunk_encode: dict[str, Tensor]
    unused: Tensor | None


class _Group(NamedTuple):
    """Tensors that are joined, one after another, to one of a shape."""

    shape: tuple[int, ...]
    tensors: tuple[Tensor, ...]


def _group(shape: tuple[int, ...], *tensors: Tensor) -> Any:
    return _Group(shape, tensors)


def fold_stages(stages: Sequence[tuple[Sequence[MAB], PMA]], with_chunks: bool = False) -> list[StageWeights]:
    """Return the parameters of stages, of each of which the blocks and the pool are given.

    Args:
        stages: plain blocks, all of the width of the pool, and the pool, whose attention is plain.
        with_chunks: whether the first one is stage 1: four blocks, of which the first one is of scalars.
    """
    with torch.autocast(stages[0][1].S.device.type, enabled=False):
        scalars = stages[0][0][0] if with_chunks else None
        queries, slopes = _queries([pool for _, pool in stages], scalars)
        wanted = []
        for place, ((mabs, pool), query) in enumerate(zip(stages, queries, strict=True)):
            if with_chunks and not place:
                unused = _group((2, pool.mab.dim_v), mabs[0].fc_k.bias, pool.mab.fc_k.bias)
                own = _pool(pool, *query)._replace(logits=query[0])  # which only the other use casts
                wanted.append(StageWeights(own, (), _chunk_encode(mabs, query[0], slopes), unused))
            else:
                wanted.append(StageWeights(_pool(pool, *query), _blocks(mabs), {}, None))
    found: list[StageWeights] = _joined(wanted, cast=True)
    return found


def _queries(
    pools: Sequence[PMA], scalars: MAB | None
) -> tuple[list[tuple[Tensor, Tensor]], tuple[Tensor, Tensor] | None]:
    """Return `logits` and `query` of each pool as in `PoolWeights`, those of equal sizes computed together.

    And of a block of scalars weight and bias of fc_q ``(2, h)``, and the weight of fc_k ``(h,)``.
    """
    alike: dict[tuple[Any, ...], list[int]] = {}
    for place, pool in enumerate(pools):
        mab = pool.mab
        learnt = needs_grad((pool.S, mab.fc_q.weight, mab.fc_q.bias, mab.fc_k.weight))
        alike.setdefault((learnt, pool.S.shape, mab.num_heads, pool.S.device), []).append(place)
    found: dict[int, tuple[Tensor, Tensor]] = {}
    slopes: Any = ()
    if scalars is not None:
        width = scalars.dim_v
        slopes = (_group((2, width), scalars.fc_q.weight, scalars.fc_q.bias), _group((width,), scalars.fc_k.weight))
    for (_, (_, seeds, h), heads, _), places in alike.items():
        count, chosen = len(places), [pools[place] for place in places]
        mabs = [pool.mab for pool in chosen]
        # The bias of fc_k is constant in the softmax, and here for the gradient of 0 that DDP wants. One alone would be
        # joined with nothing, so it goes with that of fc_q, which costs another copy.
        of_queries, of_keys = ([fc.bias for fc in fcs] for fcs in zip(*((m.fc_q, m.fc_k) for m in mabs), strict=True))
        biases: Any = (_group((count, 1, h), *of_queries), _group((count, 1, h), *of_keys))
        if count == 1:
            biases = _group((2, 1, 1, h), *of_queries, *of_keys)
        s, w_q, w_k, (b_q, _), slopes = _joined((
            _group((count, seeds, h), *(pool.S for pool in chosen)),
            _group((count, h, h), *(mab.fc_q.weight for mab in mabs)),
            _group((count * heads, h // heads, h), *(mab.fc_k.weight for mab in mabs)),
            biases,
            slopes,
        ))  # fmt: skip
        query = torch.baddbmm(b_q, s, w_q.mT)  # [P, k, h]
        of_heads = query.unflatten(2, (heads, -1)).transpose(1, 2).flatten(0, 1)  # [P H, k, d]
        logits = _scaled(of_heads, w_k, h).unflatten(0, (-1, heads)).transpose(1, 2).flatten(1, 2)  # [P, k H, h]
        folded = zip(logits.unbind(), query.unbind(), strict=True)
        found.update(zip(places, folded, strict=True))
    return [found[place] for place in range(len(pools))], slopes or None


def _scaled(a: Tensor, b: Tensor, h: int) -> Tensor:
    """Return `a b / sqrt(h)` of batches of matrices, by one operation."""
    return torch.baddbmm(a.new_empty(()), a, b, beta=0, alpha=1 / math.sqrt(h))


def _pool(pool: PMA, logits: Tensor, query: Tensor) -> PoolWeights:
    mab, b_v = pool.mab, pool.mab.fc_v.bias
    h, heads = mab.dim_v, mab.num_heads
    fused = mab.has_plain_feed_forward() and functional.fuses_feed_forward(mab.fc_o.weight)
    return PoolWeights(
        _group(tuple(logits.shape), logits), _group((1, *query.shape), query) if fused else query[None],
        _group((heads, h // heads, h), mab.fc_v.weight), _group((h,), b_v) if fused else b_v,
        _feed_forward(mab) if fused else None,
    )  # fmt: skip


def _feed_forward(mab: MAB) -> FeedForwardWeights:
    h, norms = mab.dim_v, mab.norms()
    return FeedForwardWeights(
        _group((h, h), mab.fc_o.weight), _group((h,), mab.fc_o.bias),
        _group((len(norms), h), *(norms or [mab.fc_o.bias[:0]])),
    )  # fmt: skip


def _blocks(mabs: Sequence[MAB]) -> tuple[BlockWeights, ...]:
    found = []
    for mab in mabs:
        h, linears = mab.dim_v, (mab.fc_q, mab.fc_k, mab.fc_v)
        w_qkv: Any
        b_qkv: Any
        if functional.fuses_set_block(mab.fc_q.weight, mab.fc_k.weight, h, mab.num_heads):
            w_qkv = tuple(_group((h, h), fc.weight) for fc in linears)
            b_qkv = tuple(_group((h,), fc.bias) for fc in linears)
        elif functional.fuses_feed_forward(mab.fc_o.weight):
            w_qkv = _group((3, h, h), *(fc.weight for fc in linears))
            b_qkv = _group((3, h), *(fc.bias for fc in linears))
        else:
            return ()
        found.append(BlockWeights(w_qkv, b_qkv, _feed_forward(mab)))
    return tuple(found)


def _chunk_encode(mabs: Sequence[MAB], pool_query: Tensor, slopes: Any) -> dict[str, Any]:
    first, *rest = mabs
    h, heads = first.dim_v, first.num_heads
    w_q, w_v = first.fc_q.weight, first.fc_v.weight
    by_head, w_k = slopes[0].view(2, heads, -1).transpose(0, 1), slopes[1].view(heads, -1, 1)
    logit = _scaled(by_head, w_k, h).squeeze(2).t()  # [2, H]
    projections = [fc for mab in rest for fc in (mab.fc_q, mab.fc_k, mab.fc_v)]
    norms = [norm for mab in mabs for norm in mab.norms()]
    return {
        "logit": _group((2, heads), logit),
        "basis": _group((3, h), w_q, w_v, first.fc_q.bias + first.fc_v.bias),
        "w_qkv": _group((3, 3 * h, h), *(fc.weight for fc in projections)),
        "b_qkv": _group((3, 3 * h), *(fc.bias for fc in projections)),
        "w_o": _group((4, h, h), *(mab.fc_o.weight for mab in mabs)),
        "b_o": _group((4, h), *(mab.fc_o.bias for mab in mabs)),
        "norm": _group((len(norms) // 4, 4, h), *(norms or [first.fc_o.bias[:0]])),
        "pool_query": _group((heads, h), pool_query),
    }


def _joined(wanted: Any, cast: bool = False) -> Any:
    """Replace all groups in nested tuples, lists and dicts by tensors: by one concatenation and at most one cast.

    A single tensor that is not cast is not copied.

    Args:
        wanted: what holds groups.
        cast: whether to cast as autocast casts.
    """
    groups: list[_Group] = []
    _collect(wanted, groups)
    found: dict[int, Tensor] = {}
    # Frozen parameters apart: else they would get gradients, for which an op goes back through all of its rows.
    together: dict[bool, list[int]] = {}
    for place, (shape, tensors) in enumerate(groups):
        if len(tensors) == 1 and not (cast and is_cast(tensors[0])):
            found[place] = tensors[0].reshape(shape)
        else:
            together.setdefault(needs_grad(tensors), []).append(place)
    for places in together.values():
        places.sort(key=lambda place: -math.prod(groups[place].shape))  # aligned: the small ones end it
        flat = torch.cat([t.flatten() for place in places for t in groups[place].tensors])
        if cast:
            (flat,) = autocast(flat)
        parts = flat.split([math.prod(groups[place].shape) for place in places])
        found.update({place: part.view(groups[place].shape) for place, part in zip(places, parts, strict=True)})
    return _replaced(wanted, [found[place] for place in range(len(groups))][::-1])


def _collect(part: Any, groups: list[_Group]) -> None:
    if isinstance(part, _Group):
        groups.append(part)
    elif isinstance(part, (tuple, list, dict)):
        for inner in part.values() if isinstance(part, dict) else part:
            _collect(inner, groups)


def _replaced(part: Any, left: list[Tensor]) -> Any:
    if isinstance(part, _Group):
        return left.pop()
    if isinstance(part, dict):
        return {name: _replaced(inner, left) for name, inner in part.items()}
    if isinstance(part, (tuple, list)):
        inner = [_replaced(one, left) for one in part]
        return type(part)(*inner) if hasattr(part, "_fields") else type(part)(inner)
    return part

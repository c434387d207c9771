"""Blocks of the Set Transformer on packed sets: MAB, SAB, ISAB, PMA."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import functional
from ..ops.calls import autocast
from ..ops.pointer_facts import empty_sets
from .bounded_memory import joined, row_runs
from .plain_modules import are_linear, is_norm, is_plain
from .stage_weights import BlockWeights, FeedForwardWeights, PoolWeights, fold_stages


class MAB(nn.Module):
    """Multihead attention block of the Set Transformer (Lee et al. 2019) on packed sets.

    ``o_a = q_a + softmax(q_a k_a^T / sqrt(h)) v_a`` per head a, ``o = ln0(concat_a o_a)``,
    ``out = ln1(o + relu(fc_o(o)))``, with ``q = fc_q(q_in)``, ``k = fc_k(k_in)``, ``v = fc_v(k_in)`` and the norms only
    if ``layer_norm``. Parameters are named as in the authors' code, whose ``state_dict`` loads unchanged.

    Args:
        dim_q: width of the queries' rows.
        dim_k: width of the keys' rows.
        dim_v: width h of the block.
        num_heads: H, a divisor of h.
        layer_norm: whether ``ln0`` and ``ln1`` are there.

    Raises:
        ValueError: if ``num_heads`` does not divide ``dim_v``.

    Example::

        >>> ptr = torch.tensor([0, 3, 4])
        >>> MAB(8, 8, 16, num_heads=4)(torch.randn(4, 8), torch.randn(4, 8), ptr, ptr).shape
        torch.Size([4, 16])
    """

    __call__: Callable[..., Tensor]

    def __init__(self, dim_q: int, dim_k: int, dim_v: int, num_heads: int, layer_norm: bool = False) -> None:
        super().__init__()
        if num_heads < 1 or dim_v % num_heads:
            raise ValueError(f"MAB: num_heads must divide the width {dim_v}, got {num_heads}")
        self.dim_v, self.num_heads = dim_v, num_heads
        self.fc_q = nn.Linear(dim_q, dim_v)
        self.fc_k = nn.Linear(dim_k, dim_v)
        self.fc_v = nn.Linear(dim_k, dim_v)
        self.ln0 = nn.LayerNorm(dim_v) if layer_norm else None
        self.ln1 = nn.LayerNorm(dim_v) if layer_norm else None
        self.fc_o = nn.Linear(dim_v, dim_v)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        q_ptr: Tensor,
        k_ptr: Tensor,
        q_ptr_host: Tensor | None = None,
        k_ptr_host: Tensor | None = None,
        weights: BlockWeights | None = None,
    ) -> Tensor:
        """Attend from rows ``q (rows_q, dim_q)`` to ``k (rows_k, dim_k)`` inside each set: ``(rows_q, dim_v)``.

        ``weights`` are the parameters where the caller has joined those of many blocks, all plain.
        """
        runs = list(row_runs(q.shape[0], q.device))
        if len(runs) == 1 and functional.fuses_set_block(q, k, self.dim_v, self.num_heads):
            if weights is None and self.is_plain():
                linears = (self.fc_q, self.fc_k, self.fc_v)
                w_qkv, b_qkv = tuple(fc.weight for fc in linears), tuple(fc.bias for fc in linears)
                weights = BlockWeights(w_qkv, b_qkv, self._feed_forward_weights())
            if weights is not None:
                (w_q, w_k, w_v), (b_q, b_k, b_v), (w_o, b_o, norm) = weights
                return functional.set_block(
                    q, k, q_ptr, k_ptr, w_q, b_q, w_k, b_k, w_v, b_v, w_o, b_o, norm, self.num_heads,
                    q_ptr_host=q_ptr_host, k_ptr_host=k_ptr_host,
                )  # fmt: skip
        if len(runs) == 1 and weights is not None and isinstance(weights.w_qkv, Tensor):
            query, key, value = _projected(q, k, weights)
            attended = functional.set_attention(
                query, key, value, q_ptr, k_ptr, self.num_heads, q_ptr_host=q_ptr_host, k_ptr_host=k_ptr_host
            )
            return self.residual(query, attended, weights.feed_forward)
        key, value = self.fc_k(k), self.fc_v(k)

        def attend(q: Tensor, ptr: Tensor, host: Tensor | None) -> Tensor:
            query = self.fc_q(q)
            attended = functional.set_attention(
                query, key, value, ptr, k_ptr, self.num_heads, q_ptr_host=host, k_ptr_host=k_ptr_host
            )
            return self.residual(query, attended)

        if len(runs) == 1:
            return attend(q, q_ptr, q_ptr_host)

        def attend_run(run: slice) -> Tensor:  # sets outside a run have no queries in it
            host = None if q_ptr_host is None else q_ptr_host.clamp(run.start, run.stop) - run.start
            return attend(q[run], q_ptr.clamp(run.start, run.stop) - run.start, host)

        return joined(attend_run, runs)

    def residual(self, q: Tensor, attended: Tensor, weights: FeedForwardWeights | None = None) -> Tensor:
        """Return the block's output ``(..., h)`` from queries and attention outputs, fused where a backend can.

        ``q`` may also be ``(1, ..., h)``, the same for all sets. Fused and under autocast the output has the autocast
        dtype, as that of all ops, where ordinary layer norm on a GPU would give float32. ``weights`` are the parameters
        where the caller has joined those of many blocks for the fused op.
        """
        if weights is None:
            if not functional.fuses_feed_forward(attended) or not self.has_plain_feed_forward():
                return self.feed_forward(q + attended)
            weights = self._feed_forward_weights()
        queries, rows = (t.reshape(-1, self.dim_v) for t in (q.expand_as(attended), attended))
        return functional.feed_forward(queries, rows, *weights).view_as(attended)

    def feed_forward(self, o: Tensor) -> Tensor:
        """Apply norms and feed-forward to a residual sum, ``ln1(o' + relu(fc_o(o')))`` with ``o' = ln0(o)``."""
        if self.ln0 is not None:
            o = self.ln0(o)
        o = o + F.relu(self.fc_o(o))
        return o if self.ln1 is None else self.ln1(o)

    def has_plain_feed_forward(self) -> bool:
        """Return whether fused code may read the parameters of fc_o and of both norms instead of calling them."""
        normed = is_norm(self.ln0, self.dim_v) and is_norm(self.ln1, self.dim_v)
        return are_linear(self.fc_o) and (normed or (self.ln0 is None and self.ln1 is None))

    def is_plain(self) -> bool:
        """Return whether fused code may read all parameters, and no method is another class's."""
        return type(self) is MAB and are_linear(self.fc_q, self.fc_k, self.fc_v) and self.has_plain_feed_forward()

    def _feed_forward_weights(self) -> FeedForwardWeights:
        norm = self.norm_parameters()
        norm = self.fc_o.weight.new_empty((0, self.dim_v)) if norm is None else norm
        return FeedForwardWeights(self.fc_o.weight, self.fc_o.bias, norm)

    def norms(self) -> list[Tensor]:
        """Return ln0.weight, ln0.bias, ln1.weight, ln1.bias; nothing without layer norm."""
        if self.ln0 is None or self.ln1 is None:
            return []
        return [self.ln0.weight, self.ln0.bias, self.ln1.weight, self.ln1.bias]

    def norm_parameters(self) -> Tensor | None:
        """Return ln0.weight, ln0.bias, ln1.weight, ln1.bias as ``(4, h)``; None without layer norm."""
        norms = self.norms()
        return torch.stack(norms) if norms else None


def _projected(q: Tensor, k: Tensor, weights: BlockWeights) -> tuple[Tensor, ...]:
    """Return queries, keys and values by one batched product, of two where queries are of other rows than keys."""
    w, b = weights.w_qkv, weights.b_qkv
    assert isinstance(w, Tensor) and isinstance(b, Tensor)
    if q is k:
        return torch.baddbmm(b[:, None], q.expand(3, -1, -1), w.mT).unbind()
    return (F.linear(q, w[0], b[0]), *torch.baddbmm(b[1:, None], k.expand(2, -1, -1), w[1:].mT).unbind())


def has_plain_attention(mab: nn.Module) -> bool:
    """Return whether fused code may read a MAB's parameters of fc_q, fc_k and fc_v instead of calling it."""
    return isinstance(mab, MAB) and is_plain(mab, MAB) and are_linear(mab.fc_q, mab.fc_k, mab.fc_v)


class SAB(nn.Module):
    """Set attention block, ``MAB(X, X)`` (Lee et al. 2019, eq. 8).

    Args:
        dim_in: width of the rows.
        dim_out: width of the block.
        num_heads: a divisor of ``dim_out``.
        layer_norm: as in :class:`MAB`.

    Example::

        >>> SAB(8, 16, num_heads=4)(torch.randn(4, 8), torch.tensor([0, 3, 4])).shape
        torch.Size([4, 16])
    """

    __call__: Callable[..., Tensor]

    def __init__(self, dim_in: int, dim_out: int, num_heads: int, layer_norm: bool = False) -> None:
        super().__init__()
        self.mab = MAB(dim_in, dim_in, dim_out, num_heads, layer_norm)

    def forward(
        self, x: Tensor, ptr: Tensor, ptr_host: Tensor | None = None, weights: BlockWeights | None = None
    ) -> Tensor:
        """Encode rows ``x (rows, dim_in)`` in sets ``ptr (S+1,)`` int64; returns ``(rows, dim_out)``.

        ``weights`` as in :class:`MAB`.
        """
        return self.mab(x, x, ptr, ptr, ptr_host, ptr_host, weights)


def _for_every_set(points: Tensor, ptr: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Repeat ``points (1, m, h)`` for each of the S sets: ``(S m, h)``, with their pointer and its copy on the CPU."""
    sets, count = ptr.shape[0] - 1, points.shape[1]
    own_ptr = torch.arange(sets + 1, device=ptr.device) * count
    host = own_ptr if ptr.device.type == "cpu" else torch.arange(sets + 1, device="cpu") * count
    return points.expand(sets, -1, -1).flatten(0, 1), own_ptr, host


class ISAB(nn.Module):
    """Induced set attention block, ``MAB(X, MAB(I, X))`` with m learned points I (Lee et al. 2019, eq. 9-10).

    Linear in the size of a set where :class:`SAB` is quadratic.

    Args:
        dim_in: width of the rows.
        dim_out: width of the block.
        num_heads: a divisor of ``dim_out``.
        num_inducing: m.
        layer_norm: as in :class:`MAB`.

    Example::

        >>> ISAB(8, 16, num_heads=4, num_inducing=2)(torch.randn(4, 8), torch.tensor([0, 3, 4])).shape
        torch.Size([4, 16])
    """

    __call__: Callable[..., Tensor]

    def __init__(self, dim_in: int, dim_out: int, num_heads: int, num_inducing: int, layer_norm: bool = False) -> None:
        super().__init__()
        if num_inducing < 1:
            raise ValueError(f"ISAB: num_inducing must be at least 1, got {num_inducing}")
        self.I = nn.Parameter(torch.empty(1, num_inducing, dim_out))
        nn.init.xavier_uniform_(self.I)
        self.mab0 = MAB(dim_out, dim_in, dim_out, num_heads, layer_norm)
        self.mab1 = MAB(dim_in, dim_out, dim_out, num_heads, layer_norm)

    def forward(
        self,
        x: Tensor,
        ptr: Tensor,
        ptr_host: Tensor | None = None,
        weights: tuple[BlockWeights, BlockWeights] | None = None,
    ) -> Tensor:
        """Encode rows ``x (rows, dim_in)`` in sets ``ptr (S+1,)`` int64; returns ``(rows, dim_out)``.

        ``weights`` as in :class:`MAB`, of both blocks.
        """
        first, second = (None, None) if weights is None else weights
        query, induced_ptr, induced_host = _for_every_set(self.I, ptr)
        induced = self.mab0(query, x, induced_ptr, ptr, induced_host, ptr_host, first)
        return self.mab1(x, induced, ptr, induced_ptr, ptr_host, induced_host, second)

    def has_tiles(self) -> bool:
        """Return whether :meth:`apply_in_place` computes what the blocks would compute if they were called."""
        return has_plain_attention(self.mab0) and is_plain(self.mab1, MAB)

    def apply_in_place(self, x: Tensor) -> None:
        """Encode the rows ``x (rows, h)`` of one large set in place, by tiles of rows; without gradients."""
        induced = self._induced(x)
        ptr = torch.tensor([0, induced.shape[0]], device=x.device)
        ptr_host = ptr.cpu()
        for run in row_runs(x.shape[0], x.device):
            host = torch.tensor([0, run.stop - run.start], device="cpu")
            x[run] = self.mab1(x[run], induced, host.to(x.device), ptr, host, ptr_host)

    def _induced(self, x: Tensor) -> Tensor:
        """Return ``MAB(I, X)`` of one set, ``(m, h)``, with a softmax that is summed up tile by tile."""
        mab = self.mab0
        query = mab.fc_q(self.I[0])  # [m, h]
        dtype = torch.promote_types(query.dtype, torch.float32)
        q = query.unflatten(1, (mab.num_heads, -1)).transpose(0, 1).to(dtype) / math.sqrt(mab.dim_v)  # [H, m, d]
        largest = q.new_full((*q.shape[:2], 1), -math.inf)
        total, summed = torch.zeros_like(largest), torch.zeros_like(q)
        for run in row_runs(x.shape[0], x.device):
            k, v = (fc(x[run]).unflatten(1, (mab.num_heads, -1)).to(q.dtype) for fc in (mab.fc_k, mab.fc_v))
            logits = q @ k.permute(1, 2, 0)  # [H, m, rows]
            higher = torch.maximum(largest, logits.amax(-1, keepdim=True))
            weights, shrunk = (logits - higher).exp(), (largest - higher).exp()
            total = total * shrunk + weights.sum(-1, keepdim=True)
            summed = summed * shrunk + weights @ v.transpose(0, 1)
            largest = higher
        attended = (summed / total).transpose(0, 1).flatten(1).to(query.dtype)
        return mab.residual(query, attended)


class PMA(nn.Module):
    """Pooling by multihead attention, ``MAB(S, X)`` with k learned seeds S (Lee et al. 2019, eq. 11).

    Rows are pooled before they are projected (docs/method.md, "Algebra of the fast code"): the logits are
    ``X (fc_k^T q)``, one vector per seed and head, and ``fc_v`` acts on the pooled rows only. Where ``mab`` or one of
    its linear layers has hooks or has been replaced, it is called instead.

    Args:
        dim: width of rows and block.
        num_heads: a divisor of ``dim``.
        num_seeds: k.
        layer_norm: as in :class:`MAB`.

    Example::

        >>> PMA(16, num_heads=4, num_seeds=1)(torch.randn(4, 16), torch.tensor([0, 3, 4])).shape
        torch.Size([2, 1, 16])
    """

    __call__: Callable[..., Tensor]

    def __init__(self, dim: int, num_heads: int, num_seeds: int, layer_norm: bool = False) -> None:
        super().__init__()
        if num_seeds < 1:
            raise ValueError(f"PMA: num_seeds must be at least 1, got {num_seeds}")
        self.S = nn.Parameter(torch.empty(1, num_seeds, dim))
        nn.init.xavier_uniform_(self.S)
        self.mab = MAB(dim, dim, dim, num_heads, layer_norm)

    def forward(
        self, x: Tensor, ptr: Tensor, ptr_host: Tensor | None = None, weights: PoolWeights | None = None
    ) -> Tensor:
        """Pool rows ``x (rows, dim)`` in sets ``ptr (S+1,)`` int64; returns ``(S, num_seeds, dim)``.

        ``weights`` are the parameters where the caller has joined those of many blocks, all plain.
        """
        if weights is None:
            if not has_plain_attention(self.mab):
                query, seed_ptr, seed_host = _for_every_set(self.S, ptr)
                return self.mab(query, x, seed_ptr, ptr, seed_host, ptr_host).reshape(-1, *self.S.shape[1:])
            (folded,) = fold_stages([((), self)])
            weights = folded.pool
        (x,) = autocast(x)  # once for all uses
        if self._fuses(x, weights):
            return self._pool_block(x, ptr, ptr_host, weights)
        pooled = functional.segment_pool(x, F.linear(x, weights.logits), ptr, ptr_host=ptr_host)
        return self.project(pooled, weights, empty_sets(ptr, ptr_host))

    def _fuses(self, x: Tensor, weights: PoolWeights) -> bool:
        """Return whether a fused op computes the whole block, of rows or of rows that are pooled already."""
        one_seed = weights.feed_forward is not None and self.S.shape[1] == 1
        return one_seed and functional.fuses_pool_block(x, self.mab.num_heads)

    def _pool_block(self, x: Tensor, ptr: Tensor, ptr_host: Tensor | None, weights: PoolWeights) -> Tensor:
        assert weights.feed_forward is not None
        logits = weights.logits if x.dim() == 2 else x.new_empty(x.shape[1:])  # of which nothing depends
        parameters = (weights.query.flatten(), weights.w_v, weights.b_v, *weights.feed_forward)
        return functional.pool_block(x, ptr, logits, *parameters, ptr_host=ptr_host)[:, None]

    def project(self, pooled: Tensor, weights: PoolWeights, empty: Tensor | None = None) -> Tensor:
        """Project rows pooled per seed and head, ``(S, k H, h)``, to the block's output ``(S, k, h)``.

        ``empty (S,)`` tells which sets have no rows and attend to nothing; None means that there are none.
        """
        if empty is None and self._fuses(pooled, weights):
            none, none_host = (torch.empty(0, dtype=torch.int64, device=where) for where in (pooled.device, "cpu"))
            return self._pool_block(pooled, none, none_host, weights)
        rows = pooled.unflatten(1, (-1, self.mab.num_heads))  # [S, k, H, h]
        attended = torch.einsum("skah,adh->skad", rows, weights.w_v).flatten(2)
        query = weights.query + weights.b_v
        if empty is not None:
            attended = attended - (weights.b_v * empty[:, None, None]).to(attended.dtype)
        return self.mab.residual(query, attended, weights.feed_forward)

"""The op ``pool_block`` as a function, for :mod:`sne_fast.ops.functional`."""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks, compositions, dispatch
from .autograd import OPS, PoolBlock, apply
from .calls import autocast, distinct, needs_grad, on_host
from .supported_widths import width_reasons
from .transforms import needs_composition


def pool_block(
    x: Tensor,
    ptr: Tensor,
    logits: Tensor,
    query: Tensor,
    w_v: Tensor,
    b_v: Tensor,
    w_o: Tensor,
    b_o: Tensor,
    norm: Tensor,
    *,
    ptr_host: Tensor | None = None,
) -> Tensor:
    """Pool each set by a whole block of the Set Transformer with one seed, fused: eq. 11 of Lee et al. 2019.

    ``ln1(o + relu(fc_o(o)))`` with ``o = ln0(query + attended)`` and ``attended_a = w_v_a sum_i p_ia x_i + b_v_a``, the
    weights ``p`` a softmax of ``<logits_a, x_i>`` over a set; see docs/method.md, One seed pools before it projects.

    Args:
        x: ``(rows, h)`` float16, bfloat16, float32 or float64; all floating arguments share its dtype and device.
            Or ``(S, H, h)``, the sums ``sum_i p_ia x_i`` of rows that are pooled already.
        ptr: ``(S+1,)`` int64, the rows of set s are ``ptr[s]:ptr[s+1]``; ``(0,)`` where x is pooled already.
        logits: ``(H, h)``, ``(fc_k^T q)_a / sqrt(h)`` of the seed's query q and each head.
        query: ``(h,)``, q.
        w_v, b_v: ``(H, h/H, h)``, ``(h,)``, fc_v; an empty set attends to nothing, not even to ``b_v``.
        w_o, b_o: ``(h, h)``, ``(h,)``, fc_o.
        norm: ``(4, h)``, rows ln0.weight, ln0.bias, ln1.weight, ln1.bias; ``(0, h)`` for no layer norm.
        ptr_host: CPU copy of ``ptr``.

    Returns:
        ``(S, h)`` in the dtype of x (of autocast, where it is on).

    Raises:
        TypeError: for inputs of the wrong type or dtype.
        ValueError: for inputs of the wrong shape, device or content.

    Example::

        >>> mab, ptr = sne_fast.MAB(32, 32, 32, num_heads=4, layer_norm=True), torch.tensor([0, 2, 5])
        >>> w_v, norm = mab.fc_v.weight.unflatten(0, (4, 8)), mab.norm_parameters()
        >>> parameters = (torch.zeros(4, 32), torch.zeros(32), w_v, mab.fc_v.bias, mab.fc_o.weight, mab.fc_o.bias, norm)
        >>> sne_fast.functional.pool_block(torch.randn(5, 32), ptr, *parameters).shape
        torch.Size([2, 32])
    """
    x, *parameters = autocast(x, logits, query, w_v, b_v, w_o, b_o, norm)
    ptr_host = on_host(ptr, ptr_host)
    if not torch.compiler.is_compiling():
        checks.pool_block("pool_block", x, ptr, ptr_host, *parameters)
        if x.dim() == 2:
            checks.pointer_content("pool_block", "ptr", ptr, ptr_host, x.shape[0])
    args = (x, ptr, ptr_host, *parameters)
    out: Tensor
    if needs_composition("pool_block", (x, *parameters)):
        return compositions.pool_block(*args)
    out = apply(PoolBlock, *distinct(*args)) if needs_grad((x, *parameters)) else OPS.pool_block(*args)
    return out


def fuses_pool_block(x: Tensor, num_heads: int) -> bool:
    """Return whether a pooling block of one seed on rows like ``x (..., h)`` should go through :func:`pool_block`.

    As for :func:`sne_fast.ops.functional.fuses_set_block`.
    """
    if not dispatch.fuses("pool_block", x.device) or needs_composition("pool_block", (x,)):
        return False
    return not width_reasons(x.shape[-1], num_heads)

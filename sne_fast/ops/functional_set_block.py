"""The op ``set_block`` as a function, for :mod:`sne_fast.ops.functional`."""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks, compositions, dispatch
from .autograd import OPS, SetBlock, apply
from .calls import autocast, distinct, needs_grad, on_host
from .schema import BLOCK_PARAMETERS
from .supported_widths import block_width_reasons
from .transforms import needs_composition


def set_block(
    q: Tensor,
    k: Tensor,
    q_ptr: Tensor,
    k_ptr: Tensor,
    w_q: Tensor,
    b_q: Tensor,
    w_k: Tensor,
    b_k: Tensor,
    w_v: Tensor,
    b_v: Tensor,
    w_o: Tensor,
    b_o: Tensor,
    norm: Tensor,
    num_heads: int,
    *,
    q_ptr_host: Tensor | None = None,
    k_ptr_host: Tensor | None = None,
) -> Tensor:
    """Compute a whole attention block of the Set Transformer on packed sets, fused: eq. 6 of Lee et al. 2019.

    ``ln1(o + relu(fc_o(o)))`` with ``o = ln0(q' + attention(q', k', v'))``, where ``q' = fc_q(q)``, ``k' = fc_k(k)``,
    ``v' = fc_v(k)`` and attention is :func:`set_attention`; see docs/method.md, Set blocks.

    Args:
        q: ``(rows_q, dim_q)`` float16, bfloat16, float32 or float64; all floating arguments share its dtype and device.
        k: ``(rows_k, dim_k)``.
        q_ptr, k_ptr: ``(S+1,)`` int64; queries ``q_ptr[s]:q_ptr[s+1]`` attend to keys ``k_ptr[s]:k_ptr[s+1]``.
        w_q, b_q: ``(h, dim_q)``, ``(h,)``, fc_q.
        w_k, b_k, w_v, b_v: ``(h, dim_k)``, ``(h,)``, fc_k and fc_v.
        w_o, b_o: ``(h, h)``, ``(h,)``, fc_o.
        norm: ``(4, h)``, rows ln0.weight, ln0.bias, ln1.weight, ln1.bias; ``(0, h)`` for no layer norm.
        num_heads: H, a divisor of h.
        q_ptr_host, k_ptr_host: CPU copies of the pointers.

    Returns:
        ``(rows_q, h)`` in the dtype of q (of autocast, where it is on).

    Raises:
        TypeError: for inputs of the wrong type or dtype.
        ValueError: for inputs of the wrong shape, device or content.

    Example::

        >>> ptr, x = torch.tensor([0, 2, 5]), torch.randn(5, 32)
        >>> mab = sne_fast.MAB(32, 32, 64, num_heads=4, layer_norm=True)
        >>> linears = (mab.fc_q, mab.fc_k, mab.fc_v, mab.fc_o)
        >>> parameters = [p for fc in linears for p in (fc.weight, fc.bias)]
        >>> sne_fast.functional.set_block(x, x, ptr, ptr, *parameters, mab.norm_parameters(), num_heads=4).shape
        torch.Size([5, 64])
    """
    same = k is q
    q, *parameters = autocast(q, w_q, b_q, w_k, b_k, w_v, b_v, w_o, b_o, norm)
    k = q if same else autocast(k)[0]
    same_sets = k_ptr is q_ptr and k_ptr_host is q_ptr_host
    q_ptr_host = on_host(q_ptr, q_ptr_host)
    k_ptr_host = q_ptr_host if same_sets else on_host(k_ptr, k_ptr_host)
    pointers = (q_ptr, k_ptr, q_ptr_host, k_ptr_host)
    if not torch.compiler.is_compiling():
        op = "set_block"
        named = dict(zip(BLOCK_PARAMETERS, parameters, strict=True))
        checks.set_block(op, q, k, *pointers, num_heads=num_heads, **named)
        checks.pointer_content(op, "q_ptr", q_ptr, q_ptr_host, q.shape[0])
        if k_ptr is not q_ptr or k_ptr_host is not q_ptr_host or k.shape[0] != q.shape[0]:
            checks.pointer_content(op, "k_ptr", k_ptr, k_ptr_host, k.shape[0])
    out: Tensor
    if needs_composition("set_block", (q, k, *parameters)):
        return compositions.set_block(q, k, *pointers, *parameters, num_heads)
    args = (q, None if same and same_sets else k, *pointers, *parameters, num_heads)
    out = apply(SetBlock, *distinct(*args)) if needs_grad((q, k, *parameters)) else OPS.set_block(*args)
    return out


def fuses_set_block(q: Tensor, k: Tensor, width: int, num_heads: int) -> bool:
    """Return whether a block of ``width`` with rows like ``q`` and ``k`` should go through :func:`set_block`.

    Its parts are better under a backend that has no kernel for the whole, and for widths that such a kernel does not
    take; and for derivatives that need compositions, as the parts compute them too.
    """
    if not dispatch.fuses("set_block", q.device) or needs_composition("set_block", (q, k)):
        return False
    return not block_width_reasons(q.shape[1], k.shape[1], width, num_heads)

"""The op ``add_codes`` as a function, for :mod:`sne_fast.ops.functional`."""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks, dispatch
from .autograd import OPS, AddCodes, apply
from .calls import distinct, needs_grad
from .supported_widths import WIDTHS
from .transforms import is_transformed


def add_codes(
    x: Tensor,
    ptr: Tensor,
    ptr_host: Tensor,
    level: Tensor,
    table: Tensor,
    scale: Tensor,
    magnitude: Tensor,
    gain: Tensor,
) -> Tensor:
    """Add to each row of packed sets the codes of its set and its place: ``x + gain (level + table + log(scale) u)``.

    See docs/method.md, Codes are never stored per weight. Only ``x``, ``magnitude`` and ``gain`` have gradients.

    Args:
        x: ``(rows, h)`` float16, bfloat16, float32 or float64.
        ptr: ``(S+1,)`` int64, the rows of set s are ``ptr[s]:ptr[s+1]``; of shape ``(0,)`` where every row is a set.
        ptr_host: CPU copy of ``ptr``.
        level: ``(S, h)``, a code for each set; this and what follows share a dtype, which may be another than that of
            x, and a device.
        table: ``(P, h)``, a code for each place in a set, P at least the longest set; ``(0, h)`` for none.
        scale: ``(S,)``, by whose logarithm ``magnitude`` is multiplied for each set; ``(0,)`` for nothing.
        magnitude: ``(h,)``, u.
        gain: ``()``.

    Returns:
        ``(rows, h)`` in the dtype of x.

    Raises:
        TypeError: for inputs of the wrong type or dtype.
        ValueError: for inputs of the wrong shape, device or content.

    Example::

        >>> ptr, ones = torch.tensor([0, 2, 5]), torch.ones(2)
        >>> codes = (torch.randn(2, 32), torch.randn(3, 32), ones, torch.randn(32), torch.tensor(0.1))
        >>> sne_fast.ops.functional.add_codes(torch.randn(5, 32), ptr, ptr, *codes).shape
        torch.Size([5, 32])
    """
    args = (x, ptr, ptr_host, level, table, scale, magnitude, gain)
    if not torch.compiler.is_compiling():
        checks.add_codes("add_codes", *args)
        checks.code_rows("add_codes", ptr, ptr_host, x.shape[0], table)
    out: Tensor = apply(AddCodes, *distinct(*args)) if needs_grad((x, magnitude, gain)) else OPS.add_codes(*args)
    return out


def fuses_add_codes(x: Tensor, *constants: Tensor) -> bool:
    """Return whether rows like ``x (rows, h)`` should go through :func:`add_codes`, with codes that have no gradient.

    Ordinary torch operations are better under a backend that has no kernel for it, and follow every transform.
    """
    if is_transformed((x, *constants)) or any(t.requires_grad for t in constants):
        return False
    return dispatch.fuses("add_codes", x.device) and x.shape[1] in WIDTHS

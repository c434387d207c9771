"""Which calls of ``set_block`` the kernels of whole blocks take."""

from __future__ import annotations

from torch import Tensor

from .lengths import Lengths

WIDTHS = (32, 64)
LONGEST = 512
"""Rows of the longest set that whole blocks take: every tile computes the keys and values of its sets again."""


def takes_whole(q: Tensor, k: Tensor | None, q_ptr_host: Tensor, w_o: Tensor) -> bool:
    """Return whether the kernels of whole blocks take a call: rows of the block's width that attend to each other."""
    h = w_o.shape[0]
    fits = k is None and h in WIDTHS and q.shape[1] == h
    return fits and Lengths.of(q_ptr_host).longest <= LONGEST

"""float32 matmul precision, as set in torch."""

from __future__ import annotations

import torch


def product_precision(dtype: torch.dtype) -> str:
    """Return ``"tf32"`` for float32 where torch's setting allows it on a GPU, else ``"ieee"``."""
    if dtype != torch.float32:
        return "ieee"
    try:
        return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    except RuntimeError:  # set through torch.backends.cuda.matmul.fp32_precision, which the old getter refuses to read
        return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"

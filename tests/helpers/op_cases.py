"""Inputs of the ops, ragged and random, for the tests of every backend."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from sne_fast.ops.schema import CHUNK_PARAMETERS


@contextmanager
def products(precision: str) -> Iterator[None]:
    """Set torch's precision of float32 products for a while: "highest", or "high" for tf32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def pointer(lengths: Sequence[int]) -> Tensor:
    """Return where segments of the given lengths start, and where the last one ends."""
    return torch.tensor([0, *lengths]).cumsum(0)


@dataclass
class ChunkCase:
    """Arguments of ``functional.chunk_encode`` in order, for the given chunk lengths of each tensor."""

    args: tuple[Tensor, ...]

    @classmethod
    def make(
        cls,
        tensors: list[list[int]],
        width: int = 32,
        heads: int = 4,
        chunk_size: int = 32,
        layer_norm: bool = True,
        dtype: torch.dtype = torch.float64,
        seed: int = 0,
    ) -> ChunkCase:
        g = torch.Generator().manual_seed(seed)

        def normal(*shape: int, spread: float = 1.0) -> Tensor:
            return (spread * torch.randn(*shape, generator=g, dtype=torch.float64)).to(dtype)

        lengths = [n for tensor in tensors for n in tensor]
        norm = normal(4 if layer_norm else 0, 4, width, spread=0.2)
        norm[:, ::2] += 1  # weights of ln0 and ln1 around one
        return cls(
            (
                normal(sum(lengths)),
                pointer(lengths),
                pointer([len(tensor) for tensor in tensors]),
                normal(len(tensors), width, spread=0.3),
                normal(chunk_size, width, spread=0.3),
                normal(2, heads),
                normal(3, width),
                normal(3, 3 * width, width, spread=width**-0.5),
                normal(3, 3 * width, spread=0.1),
                normal(4, width, width, spread=width**-0.5),
                normal(4, width, spread=0.1),
                norm,
                normal(heads, width, spread=width**-0.5),
            )
        )


GRADED = (0, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12)
"""Places of the arguments of ``chunk_encode`` that are floating and have gradients."""
GRADED_NAMES = ("values", *CHUNK_PARAMETERS)
"""Their names."""


def attention_case(
    q_lengths: list[int], k_lengths: list[int], width: int, dtype: torch.dtype = torch.float64, seed: int = 0
) -> tuple[Tensor, ...]:
    """Return q, k, v, q_ptr, k_ptr."""
    g = torch.Generator().manual_seed(seed)
    rows = (sum(q_lengths), sum(k_lengths), sum(k_lengths))
    q, k, v = (torch.randn(n, width, generator=g, dtype=torch.float64).to(dtype) for n in rows)
    return q, k, v, pointer(q_lengths), pointer(k_lengths)


def pool_case(
    lengths: list[int], width: int, queries: int, dtype: torch.dtype = torch.float64, seed: int = 0
) -> tuple[Tensor, ...]:
    """Return x, logits, ptr."""
    g = torch.Generator().manual_seed(seed)
    x, logits = (torch.randn(sum(lengths), n, generator=g, dtype=torch.float64).to(dtype) for n in (width, queries))
    return x, logits, pointer(lengths)


def feed_forward_case(
    rows: int,
    width: int,
    layer_norm: bool = True,
    dtype: torch.dtype = torch.float64,
    one_query: bool = False,
    seed: int = 0,
) -> tuple[Tensor, ...]:
    """Return q, attended, w_o, b_o, norm; q is one row expanded to all with ``one_query``."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int, spread: float = 1.0) -> Tensor:
        return (spread * torch.randn(*shape, generator=g, dtype=torch.float64)).to(dtype)

    q = normal(1, width).expand(rows, width) if one_query else normal(rows, width)
    norm = normal(4 if layer_norm else 0, width, spread=0.2)
    norm[::2] += 1  # weights of ln0 and ln1 around one
    return q, normal(rows, width), normal(width, width, spread=width**-0.5), normal(width, spread=0.1), norm


def pool_block_case(
    lengths: Sequence[int], width: int, heads: int, layer_norm: bool = True, dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Return x, ptr and the seven parameters of a pooling block of one seed."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int, spread: float = 1.0) -> Tensor:
        return (spread * torch.randn(*shape, generator=g, dtype=torch.float64)).to(dtype)

    norm = normal(4 if layer_norm else 0, width, spread=0.2)
    norm[::2] += 1  # weights of ln0 and ln1 around one
    w_v = normal(heads, width // heads, width, spread=width**-0.5)
    parameters = (
        normal(heads, width, spread=width**-0.5), normal(width), w_v, normal(width),
        normal(width, width, spread=width**-0.5), normal(width, spread=0.1), norm,
    )  # fmt: skip
    return normal(sum(lengths), width), pointer(lengths), *parameters


def block_case(
    q_lengths: list[int],
    k_lengths: list[int],
    dims: tuple[int, int, int] = (8, 6, 8),
    layer_norm: bool = True,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> tuple[Tensor, ...]:
    """Return q, k, q_ptr, k_ptr and the nine parameters of a block; ``dims`` are those of q, of k, and the width."""
    g = torch.Generator().manual_seed(seed)
    dim_q, dim_k, width = dims

    def normal(*shape: int, spread: float = 1.0) -> Tensor:
        return (spread * torch.randn(*shape, generator=g, dtype=torch.float64)).to(dtype)

    rows = normal(sum(q_lengths), dim_q), normal(sum(k_lengths), dim_k)
    linear = [part for dim in (dim_q, dim_k, dim_k, width)
              for part in (normal(width, dim, spread=dim**-0.5), normal(width, spread=0.1))]  # fmt: skip
    norm = normal(4 if layer_norm else 0, width, spread=0.2)
    norm[::2] += 1  # weights of ln0 and ln1 around one
    return *rows, pointer(q_lengths), pointer(k_lengths), *linear, norm

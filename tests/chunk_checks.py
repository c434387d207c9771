"""Arguments of ``chunk_encode``, its exact results, and PyTorch's in half precision: for tests of both GPU engines."""

from __future__ import annotations

import torch
from op_cases import ChunkCase
from torch import Tensor

from sne_fast import reference

NAMES = ("values", "row_code", "element_code", "logit", "basis", "w_qkv", "b_qkv", "w_o", "b_o", "norm", "pool_query")
MIXED = [[32, 32, 1], [31, 17], [2], [16, 16, 5, 1, 1]]


def arguments(case: ChunkCase) -> tuple[Tensor, ...]:
    values, chunk_ptr, tensor_ptr, *parameters = case.args
    return values, chunk_ptr, tensor_ptr, chunk_ptr, tensor_ptr, *parameters


def gentle(args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Without layer norm activations grow until softmax saturates and rounding counts thousandfold: smaller inputs."""
    values, pool_query, *rest = args[0], args[-1], *args[1:-1]
    rest[8] = rest[8] / 2  # w_qkv
    return values / 2, *rest, pool_query / 2


def in_float64(args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(a.double() if a.is_floating_point() else a for a in args)


def upstream(args: tuple[Tensor, ...]) -> Tensor:
    shape = (args[1].shape[0] - 1, *args[-1].shape)
    return torch.randn(shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(args[0].dtype)


def error(got: Tensor, want: Tensor) -> float:
    assert got.shape == want.shape
    return float((got.double() - want).norm() / want.norm()) if want.numel() else 0.0


def half_by_torch(grad: Tensor, args: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """What PyTorch's own half-precision ops make of it, chunk by chunk."""
    values, chunk_ptr, tensor_ptr, _, _, *rest = (
        a.clone().requires_grad_() if a.is_floating_point() else a for a in args
    )
    owner = torch.repeat_interleave(tensor_ptr.diff())
    ends = chunk_ptr.tolist()
    pooled = [
        reference.chunk_tile(values[None, a:b], rest[0][owner[t], None], rest[1][: b - a], *rest[2:])
        for t, (a, b) in enumerate(zip(ends[:-1], ends[1:], strict=True))
    ]
    out = torch.cat(pooled)
    return out.detach(), torch.autograd.grad(out, [values, *rest], grad, allow_unused=True)

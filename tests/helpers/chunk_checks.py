"""Arguments of ``chunk_encode`` and what holds of its results: for tests of both GPU backends, each given as a module.

Exact results are the reference's in float64; PyTorch's own in half precision are what half types are measured by.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from helpers.op_cases import GRADED_NAMES, ChunkCase
from sne_fast.ops import reference

MIXED = [[32, 32, 1], [31, 17], [2], [16, 16, 5, 1, 1]]


def arguments(case: ChunkCase) -> tuple[Tensor, ...]:
    values, chunk_ptr, tensor_ptr, *parameters = case.args
    return values, chunk_ptr, tensor_ptr, chunk_ptr, tensor_ptr, *parameters


def gentle(args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Shrink the inputs: without layer norm, large ones saturate softmax, and rounding counts thousandfold."""
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
    """Compute the same with PyTorch's own half-precision ops, chunk by chunk."""
    values, chunk_ptr, tensor_ptr, _, _, *rest = (
        a.clone().requires_grad_() if a.is_floating_point() else a for a in args
    )
    owner = torch.repeat_interleave(tensor_ptr.diff())
    ends = chunk_ptr.tolist()
    pooled = [
        reference.chunk_tile(values[None, a:b], rest[0][owner[t], None], rest[1][: b - a], *rest[2:])
        for t, (a, b) in enumerate(itertools.pairwise(ends))
    ]
    out = torch.cat(pooled)
    return out.detach(), torch.autograd.grad(out, [values, *rest], grad, allow_unused=True)


def check(backend: ModuleType, args: tuple[Tensor, ...], forward: float, backward: float) -> None:
    grad, exact = upstream(args), in_float64(args)
    out = backend.chunk_encode(*args)
    assert out.dtype == args[0].dtype
    assert error(out, reference.chunk_encode(*exact)) <= forward
    got = backend.chunk_encode_backward(grad, *args)
    want = reference.chunk_encode_backward(grad.double(), *exact)
    for name, ours, theirs, argument in zip(GRADED_NAMES, got, want, (args[0], *args[5:]), strict=True):
        assert ours.dtype == argument.dtype, name
        assert error(ours, theirs) <= backward, name


def loses_at_most_twice_what_torch_loses(backend: ModuleType, args: tuple[Tensor, ...]) -> list[float]:
    """Check this of the result; return how many times as much every gradient loses."""
    grad, exact = upstream(args), in_float64(args)
    out, grads = half_by_torch(grad, args)
    want = reference.chunk_encode(*exact)
    assert error(backend.chunk_encode(*args), want) <= 2 * error(out, want)
    wanted = reference.chunk_encode_backward(grad.double(), *exact)
    got = backend.chunk_encode_backward(grad, *args)
    return [
        error(ours, true) / error(theirs, true) if true.numel() else error(ours, true)
        for ours, theirs, true in zip(got, grads, wanted, strict=True)
    ]


def not_finite_stays_in_its_chunk(backend: ModuleType, width: int, heads: int, where: str, bad: float) -> None:
    lengths = [[5, 5, 5, 18], [19, 19], [1, 1, 1]]
    args = arguments(ChunkCase.make(lengths, width, heads, dtype=torch.float32))
    grad = upstream(args)
    clean, clean_grads = backend.chunk_encode(*args), backend.chunk_encode_backward(grad, *args)
    chunks = [1, 4, 7]  # one among short chunks of its block, a full one, one of one element
    values = args[0].clone()
    for chunk in chunks:
        if where == "values":
            values[args[1][chunk]] = bad
        else:
            grad[chunk, 1, 3] = bad
    out = backend.chunk_encode(values, *args[1:])
    values_grad, row_grad, *_ = backend.chunk_encode_backward(grad, values, *args[1:])
    others = [chunk for chunk in range(9) if chunk not in chunks]
    assert torch.equal(out[others], clean[others])
    if where == "values":
        assert not out[chunks].isfinite().all(2).all(1).any()
    untouched = torch.cat([torch.arange(int(args[1][chunk]), int(args[1][chunk + 1])) for chunk in others])
    assert torch.equal(values_grad[untouched], clean_grads[0][untouched])
    for chunk in chunks:
        assert not values_grad[args[1][chunk] : args[1][chunk + 1]].isfinite().any()
    assert not row_grad.isfinite().any()  # each tensor has one of them


def nothing_to_encode(backend: ModuleType, width: int) -> None:
    for tensors in ([], [[], []]):
        args = arguments(ChunkCase.make(tensors, width, 4, dtype=torch.float32))
        assert backend.chunk_encode(*args).shape == (0, 4, width)
        grads = backend.chunk_encode_backward(upstream(args), *args)
        assert [g.shape for g in grads] == [a.shape for a in (args[0], *args[5:])]
        assert all(not g.any() for g in grads)


def slabs(backend: ModuleType, args: tuple[Tensor, ...], shrink: Callable[[], None], tolerance: float) -> None:
    """Compare two runs to the bit, and within ``tolerance`` a third that ``shrink`` cuts into slabs."""
    grad = upstream(args)
    whole, again = (backend.chunk_encode_backward(grad, *args) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))
    shrink()
    for name, a, b in zip(GRADED_NAMES, whole, backend.chunk_encode_backward(grad, *args), strict=True):
        assert error(b, a.double()) <= tolerance, name


REFUSED = [(48, 4, 32, "width must be one of"), (32, 8, 32, "num_heads must be"), (64, 64, 32, "num_heads must be")]
"""Widths, heads and chunk sizes that no backend takes, and what it says."""


def why_not(backend: ModuleType, width: int, heads: int, chunk_size: int, dtype: torch.dtype, says: str) -> None:
    args = arguments(ChunkCase.make([[3]], width, heads, chunk_size, dtype=dtype))
    assert any(says in reason for reason in backend.why_not("chunk_encode", args))
    assert backend.why_not("chunk_encode", args) == backend.why_not("chunk_encode_backward", (upstream(args), *args))

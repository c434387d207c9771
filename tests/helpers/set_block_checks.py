"""Cases of ``set_block`` and what holds of its results: for tests of both GPU backends, each given as a module."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from helpers.errors import loses_at_most_twice, relative_error
from helpers.op_cases import block_case
from sne_fast import reference
from sne_fast.ops.schema import BLOCK_PARAMETERS

SINGLE, DOUBLE, HALF, BRAIN = torch.float32, torch.float64, torch.float16, torch.bfloat16
RAGGED = [3, 0, 40, 1, 1, 7, 0, 22]
FEW_ROWS = [[], [0, 0], [1], [0, 5, 0], [70]]
NAMES = ("out", "q", "k", *BLOCK_PARAMETERS)
TOLERANCE = {SINGLE: (2e-6, 1e-5), DOUBLE: (1e-13, 1e-12), HALF: (1e-3, 2e-3), BRAIN: (8e-3, 1.6e-2)}
"""Tolerances of results and of gradients."""


def itself(
    lengths: list[int], h: int, heads: int, dtype: torch.dtype, layer_norm: bool = True, seed: int = 0
) -> tuple[Any, ...]:
    """Return arguments of the op for rows that attend to each other.

    In half types no argument of the ReLU is near 0, where rounding would decide.
    """
    x, _, ptr, _, *parameters = block_case(lengths, lengths, (h, h, h), layer_norm, dtype, seed)
    *projections, w_o, b_o, norm = parameters
    if dtype in (HALF, BRAIN):
        w_o, b_o = 0.3 * w_o, 3 * b_o.sign()
    return x, None, ptr, ptr, ptr, ptr, *projections, w_o, b_o, norm, heads


def across(dims: tuple[int, int, int], heads: int, dtype: torch.dtype) -> tuple[Any, ...]:
    """Return arguments of the op for queries of other rows than keys."""
    q, k, q_ptr, k_ptr, *parameters = block_case([3, 0, 2, 17], [2, 3, 0, 19], dims, True, dtype)
    return q, k, q_ptr, k_ptr, q_ptr, k_ptr, *parameters, heads


def upstream(args: tuple[Any, ...]) -> Tensor:
    """Return a gradient of the result."""
    shape = args[0].shape[0], args[-4].shape[0]
    return torch.randn(shape, generator=torch.Generator().manual_seed(5), dtype=DOUBLE).to(args[0].dtype)


def run(backend: ModuleType, args: tuple[Any, ...], grad: Tensor | None = None) -> list[Tensor]:
    """Return the result and all gradients, without that of k where rows attend to each other."""
    grad = upstream(args) if grad is None else grad.to(args[0].dtype)
    out, (by_q, by_k, *others) = backend.set_block(*args), backend.set_block_backward(grad, *args)
    if args[1] is None:
        assert by_k.shape == (0,)
    return [out, by_q, *others] if args[1] is None else [out, by_q, by_k, *others]


def names(args: tuple[Any, ...]) -> list[str]:
    """Return the names of the results of :func:`run`."""
    return [name for name in NAMES if args[1] is not None or name != "k"]


def exact(args: tuple[Any, ...]) -> list[Tensor]:
    """Return the results of the reference in float64."""
    wide = tuple(t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for t in args)
    return run(reference, wide, upstream(args))


def compare(backend: ModuleType, args: tuple[Any, ...], forward: float, backward: float) -> list[Tensor]:
    """Check all results against the reference; return them."""
    got = run(backend, args)
    for name, a, b in zip(names(args), got, exact(args), strict=True):
        assert a.shape == b.shape and a.dtype == args[0].dtype and a.is_contiguous()
        if float(b.norm()) < 1e-3 * b.numel() ** 0.5:  # terms that cancel, as all do in the gradient of b_k
            assert a.numel() == 0 or float(a.abs().max()) < 2 * backward, name
        else:
            error = relative_error(a, b)
            assert error < (backward if name != "out" else forward), (name, error)
    return got


def check(backend: ModuleType, args: tuple[Any, ...]) -> list[Tensor]:
    """Check all results within the tolerance of their type; return them."""
    return compare(backend, args, *TOLERANCE[args[0].dtype])


def eager(leaves: list[Tensor], ptr: Tensor, heads: int) -> Tensor:
    """Compute the block from rows and parameters, set by set, as a user would write it."""
    x, w_q, b_q, w_k, b_k, w_v, b_v, w_o, b_o, norm = leaves
    h = x.shape[1]
    q, k, v = (torch.nn.functional.linear(x, w, b) for w, b in ((w_q, b_q), (w_k, b_k), (w_v, b_v)))
    parts = []
    for begin, end in zip(ptr.tolist(), ptr[1:].tolist(), strict=False):
        a, b, c = (t[begin:end].unflatten(1, (heads, -1)).transpose(0, 1) for t in (q, k, v))
        parts.append((torch.softmax(a @ b.mT / math.sqrt(h), -1) @ c).transpose(0, 1).flatten(1))
    o = torch.nn.functional.layer_norm(q + torch.cat(parts), (h,), norm[0], norm[1])
    o = o + torch.relu(torch.nn.functional.linear(o, w_o, b_o))
    return torch.nn.functional.layer_norm(o, (h,), norm[2], norm[3])


def loses_at_most_twice_what_torch_loses(backend: ModuleType, args: tuple[Any, ...]) -> None:
    leaves = [t.clone().requires_grad_() for t in (args[0], *args[6:-1])]
    out = eager(leaves, args[2], args[-1])
    out.backward(upstream(args))
    usual = [out.detach(), *(t.grad for t in leaves)]
    for name, a, b, c in zip(names(args), run(backend, args), usual, exact(args), strict=True):
        if name != "b_k":
            loses_at_most_twice(a, b, c, name)


def what_is_not_finite_stays_in_its_set(
    backend: ModuleType, where: str, value: float, lengths: tuple[int, int, int], heads: int, dtype: torch.dtype
) -> None:
    """Check a bad number in the rows or in the gradient of the middle one of three sets."""
    before, middle, _ = lengths
    args = itself(list(lengths), 32, heads, dtype)
    grad = upstream(args)
    want = run(backend, args, grad)
    x, broken = args[0].clone(), grad.clone()
    (x if where == "x" else broken)[before + 1, 3] = value
    got = run(backend, (x, *args[1:]), broken)
    others = torch.ones(sum(lengths), dtype=torch.bool)
    others[before : before + middle] = False
    assert torch.equal(got[0][others], want[0][others]) and torch.equal(got[1][others], want[1][others])
    assert not got[1][before + 1].isfinite().all() and (where == "grad" or not got[0][~others].isfinite().any())

"""set_block on the CPU backend against the float64 reference, with every instruction set this machine runs."""

from __future__ import annotations

import math
import re

import pytest
import torch
from torch import Tensor

from helpers.cpu_cases import ISAS, NEEDS_BACKEND
from helpers.errors import loses_at_most_twice, relative_error
from helpers.op_cases import block_case
from sne_fast import reference
from sne_fast.backends.cpu import backend as cpu
from sne_fast.backends.cpu import library
from sne_fast.ops.schema import BLOCK_PARAMETERS

pytestmark = pytest.mark.skipif(bool(library.reasons()), reason=NEEDS_BACKEND)

NAMES = ("out", "q", "k", *BLOCK_PARAMETERS)
RAGGED = ([1, 3, 17, 0, 100, 5, 2], [2, 3, 0, 4, 130, 65, 1])


@pytest.fixture(params=ISAS)
def isa(request):
    with library.use_isa(request.param):
        yield request.param


def arguments(case: tuple[Tensor, ...], heads: int, dtype: torch.dtype = torch.float64) -> tuple:
    """Return the arguments of the op, in ``dtype``."""
    q, k, q_ptr, k_ptr, *parameters = (t.to(dtype) if t.is_floating_point() else t for t in case)
    return q, k, q_ptr, k_ptr, q_ptr, k_ptr, *parameters, heads


def results(backend, args: tuple, grad: Tensor) -> tuple[Tensor, ...]:
    return backend.set_block(*args), *backend.set_block_backward(grad.to(args[0].dtype), *args)


def gradient(rows: int, width: int) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def compare(case: tuple[Tensor, ...], heads: int) -> None:
    exact = arguments(case, heads)
    grad = gradient(len(exact[0]), exact[-4].shape[0])
    want = results(reference, exact, grad)
    for dtype, forward, backward in ((torch.float32, 2e-5, 2e-4), (torch.float64, 1e-11, 1e-11)):
        got = results(cpu, arguments(case, heads, dtype), grad)
        for name, a, b in zip(NAMES, got, want, strict=True):
            assert a.shape == b.shape and a.dtype == dtype
            if name == "b_k":  # zero but for rounding: judged by the gradient of fc_k's weight
                assert float(a.abs().max()) <= backward * (1 + float(want[5].abs().max()))
            else:
                assert relative_error(a, b) < (forward if name == "out" else backward), (name, dtype)


@pytest.mark.parametrize("layer_norm", [True, False])
@pytest.mark.parametrize(("dims", "heads"), [((32, 32, 32), 4), ((16, 48, 64), 4), ((128, 64, 256), 32)], ids=str)
def test_widths_and_heads(isa, dims: tuple[int, int, int], heads: int, layer_norm: bool) -> None:
    compare(block_case(*RAGGED, dims, layer_norm), heads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_rows_that_attend_to_each_other(dtype: torch.dtype) -> None:
    q, _, ptr, *_ = args = arguments(block_case([3, 0, 9], [3, 0, 9], (32, 32, 32)), 4, dtype)
    pointers_and_parameters = (*[ptr] * 4, *args[6:])
    grad = gradient(12, 32)
    for backend in (cpu, reference):
        out, grad_q, grad_k, *grads = results(backend, (q, None, *pointers_and_parameters), grad)
        want, by_q, by_k, *others = results(backend, (q, q, *pointers_and_parameters), grad)
        assert torch.equal(out, want) and grad_k.shape == (0,)
        tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(grad_q, by_q + by_k, rtol=tolerance, atol=tolerance)
        assert all(torch.equal(a, b) for a, b in zip(grads, others, strict=True))


@pytest.mark.parametrize(
    "lengths", [([], []), ([0, 0], [0, 3]), ([1], [1]), ([2100, 3], [40, 0]), ([4, 1], [2100, 9])], ids=str
)
def test_numbers_of_rows(isa, lengths: tuple[list[int], list[int]]) -> None:
    """Many rows have packed matrices and several slices; few have neither."""
    compare(block_case(*lengths, (32, 32, 32)), 4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_types_by_float_products_lose_at_most_twice_what_pytorch_does(isa, dtype: torch.dtype) -> None:
    case = tuple(t.to(dtype) if t.is_floating_point() else t for t in block_case(*RAGGED, (32, 32, 32)))
    args, grad = arguments(case, 4, dtype), gradient(128, 32).to(dtype)
    want = results(reference, arguments(case, 4), grad.double())
    usual = results(reference, args, grad)
    for name, a, b, c in zip(NAMES, results(cpu, args, grad), usual, want, strict=True):
        assert a.dtype == dtype
        if name != "b_k":
            loses_at_most_twice(a, b, c, name)


def test_what_is_not_finite_stays_in_its_set(isa) -> None:
    case = block_case([4, 20, 3], [5, 70, 3], (32, 32, 32), dtype=torch.float32)
    args, grad = arguments(case, 4, torch.float32), gradient(27, 32)
    want = results(cpu, args, grad)
    for place, row in ((0, 6), (1, 30)):
        for value in (math.nan, math.inf):
            bad = [t.clone() if isinstance(t, Tensor) else t for t in args]
            bad[place][row, 3] = value
            got = results(cpu, tuple(bad), grad)
            for which, ptr in ((0, args[2]), (1, args[2]), (2, args[3])):
                outside = torch.ones(len(got[which]), dtype=torch.bool)
                outside[int(ptr[1]) : int(ptr[2])] = False
                assert torch.equal(got[which][outside], want[which][outside])
            assert got[0][4:24].isnan().any()


def test_strides_and_shared_rows() -> None:
    case = block_case([5, 9], [5, 9], (32, 32, 32), dtype=torch.float32)
    args, grad = arguments((case[0], case[0], *case[2:]), 4, torch.float32), gradient(14, 32)
    strided = tuple(
        torch.stack([t, t], -1)[..., 0] if isinstance(t, Tensor) and t.is_floating_point() else t for t in args
    )
    for a, b in zip(results(cpu, strided, grad.t().contiguous().t()), results(cpu, args, grad), strict=True):
        assert torch.equal(a, b)


def test_what_it_refuses() -> None:
    args = arguments(block_case([5, 9], [5, 9], (32, 32, 32), dtype=torch.float32), 4, torch.float32)
    for place, name in enumerate(NAMES[1:]):
        at = place if place < 2 else place + 4
        wrong = args[at][..., :-1]
        with pytest.raises(ValueError, match=f"set_block: {('w_q', 'w_k')[place] if place < 2 else name} must have"):
            cpu.set_block(*args[:at], wrong, *args[at + 1 :])
    with pytest.raises(ValueError, match=re.escape("grad must have shape (14, 32), got float32 (13, 32) on cpu")):
        cpu.set_block_backward(torch.zeros(13, 32), *args)
    with pytest.raises(
        ValueError, match="q_ptr_host must start at 0, never decrease and end at the number of rows, 14"
    ):
        cpu.set_block(*args[:2], args[2] + 1, args[3], args[4] + 1, *args[5:])
    assert cpu.why_not("set_block", args) == []
    assert cpu.why_not("set_block_backward", (args[0], *args)) == []
    for dims, what in (((32, 32, 48), "width must be one of"), ((8, 32, 32), "q must have rows of a multiple of 16")):
        narrow = arguments(block_case([5], [5], dims, dtype=torch.float32), 4, torch.float32)
        assert what in cpu.why_not("set_block", narrow)[0]
    assert "k must have rows of a multiple of 16 up to 1024, got 1040" in cpu.why_not(
        "set_block", arguments(block_case([5], [5], (16, 1040, 32)), 4)
    )

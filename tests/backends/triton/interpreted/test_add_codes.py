"""add_codes in the interpreter: forward and gradients against the float64 reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from helpers.errors import relative_error
from helpers.op_cases import pointer
from sne_fast import BackendError, use_backend
from sne_fast.backends.triton import add_codes as module
from sne_fast.ops import functional, reference

pytestmark = pytest.mark.build

SINGLE, DOUBLE, HALF = torch.float32, torch.float64, torch.float16
LENGTHS = [3, 0, 70, 1]


def case(kind: str, h: int = 32, dtype: torch.dtype = SINGLE) -> tuple[Tensor, ...]:
    """Return arguments of the op: codes of sets and places, of sets alone, or of rows."""
    g = torch.Generator().manual_seed(0)
    rows, places = (sum(LENGTHS), 70) if kind != "rows" else (4, 0)
    ptr = pointer(LENGTHS) if kind != "rows" else torch.zeros(0, dtype=torch.int64)
    shapes = [(rows, h), (4, h), (places if kind == "places" else 0, h), (4 if kind == "places" else 0,), (h,), ()]
    x, *codes = (torch.randn(shape, generator=g, dtype=DOUBLE).to(dtype) for shape in shapes)
    codes[2] = codes[2].exp()  # scales
    return x, ptr, ptr, *codes


def run(backend, args: tuple[Tensor, ...], grad: Tensor) -> tuple[Tensor, ...]:
    return backend.add_codes(*args), *backend.add_codes_backward(grad, *args[1:])


@pytest.mark.parametrize("dtype", [SINGLE, DOUBLE], ids=str)
@pytest.mark.parametrize(("kind", "h"), [("places", 32), ("places", 64), ("sets", 32), ("rows", 64)])
def test_codes(kind: str, h: int, dtype: torch.dtype) -> None:
    args = case(kind, h, dtype)
    grad = torch.randn(args[0].shape, generator=torch.Generator().manual_seed(1), dtype=DOUBLE).to(dtype)
    exact = tuple(t.double() if t.is_floating_point() else t for t in args)
    got, want = run(module, args, grad), run(reference, exact, grad.double())
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape and a.dtype == dtype
        assert relative_error(a, b) < (1e-5 if dtype == SINGLE else 1e-13) or not b.any()
    assert all(torch.equal(a, b) for a, b in zip(got, run(module, args, grad), strict=True))


def test_rows_of_another_dtype_than_the_codes() -> None:
    args = case("places")
    half = (args[0].half(), *args[1:])
    got = run(module, half, half[0])
    assert got[0].dtype == HALF and got[1].dtype == got[2].dtype == SINGLE
    want = run(reference, (half[0].double(), *args[1:3], *(t.double() for t in args[3:])), half[0].double())
    assert relative_error(got[0], want[0]) < 1e-3 and relative_error(got[1], want[1]) < 1e-5


def test_no_rows() -> None:
    args = case("places")
    empty = (args[0][:0], torch.zeros(5, dtype=torch.int64), torch.zeros(5, dtype=torch.int64), *args[3:])
    out, magnitude, gain = run(module, empty, args[0][:0])
    assert out.shape == (0, 32) and not magnitude.any() and not gain.any()


def test_the_function_and_its_gradients() -> None:
    x, ptr, host, *codes = case("places")
    results = []
    for name in ("triton", "reference"):
        leaves = [t.clone().requires_grad_() for t in (x, *codes[3:])]
        with use_backend(name):
            out = functional.add_codes(leaves[0], ptr, host, *codes[:3], *leaves[1:])
            results.append([out.detach(), *torch.autograd.grad(out.square().sum(), leaves)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


def test_widths_that_no_kernel_takes() -> None:
    with use_backend("triton"), pytest.raises(BackendError, match="width must be one of 32, 64, 128, 256, got 48"):
        functional.add_codes(*case("places", 48))

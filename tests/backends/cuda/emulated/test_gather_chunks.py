"""gather_chunks of the CUDA backend in the emulator, against the reference: bit for bit, but for the sums of scale."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import sne_fast
from helpers import gather_checks as checks
from helpers.errors import relative_error
from helpers.gather_checks import SHAPES, backward, case
from sne_fast import functional, reference
from sne_fast.backends.cuda import gather_chunks as kernels
from sne_fast.backends.cuda.library import library

pytestmark = pytest.mark.build

# Shapes for every way to lay tiles: whole rows, whole columns, neither; edges of 1 and of nearly a tile.
MORE_SHAPES = [(460, 9), (64, 100), (66, 130), (70, 65), (65, 64), (2, 2), (513, 8), (17, 512), (8200, 2), (1000, 49)]
TYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float32]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def gather(tensors: list[Tensor], scale: Tensor, plan: Tensor, dtype: torch.dtype) -> Tensor:
    with sne_fast.use_backend("cuda"):
        return functional.gather_chunks(tensors, scale, plan, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.float64], ids=str)
def test_values_are_the_references_to_the_bit(dtype: torch.dtype, scale_dtype: torch.dtype) -> None:
    checks.values_are_the_references_to_the_bit(gather, dtype, *case(TYPES, SHAPES + MORE_SHAPES, scale_dtype))


def test_quotients_are_rounded_exactly() -> None:
    """Values and divisors of many sizes: with a mantissa of all ones, subnormal, zero and infinite ones among them."""
    g = torch.Generator().manual_seed(3)
    values = torch.randn(8, 6000, generator=g) * torch.randint(-30, 31, (8, 6000), generator=g).float().exp2()
    values[1] = torch.nextafter(torch.randint(0, 9, (6000,), generator=g).float().exp2(), torch.zeros(()))
    values[2] *= torch.randint(-90, 91, (6000,), generator=g).float().exp2()
    values[3, ::7], values[3, 5::40], values[4, ::3] = -0.0, float("inf"), 0.0
    largest_mantissa = float(torch.nextafter(torch.tensor(2.0), torch.zeros(())))
    scale = torch.tensor([0.7, 1.0, 3.1e-3, largest_mantissa, 1.0000001, 9e30, 1e-30, 2.5e-39])
    tensors, plan = list(values), torch.tensor([[6000, 1]] * 8)
    got, want = (
        gather(tensors, scale, plan, torch.float32),
        reference.gather_chunks(tensors, scale, plan, torch.float32),
    )
    assert torch.equal(got.view(torch.int32), want.view(torch.int32))  # signs of zeros too


@pytest.mark.parametrize("source", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tensors_that_begin_anywhere(source: torch.dtype, dtype: torch.dtype) -> None:
    shapes = [(7, 9), (4200, 1), (37, 9), (70, 90), (3, 500), (1, 33)]
    tensors, scale, plan = case([source], shapes)
    for offset in (1, 2, 3, 5):  # views of one flat array, as sharded and fused optimisers hold parameters
        flat = torch.full((sum(t.numel() for t in tensors) + offset,), float("nan"), dtype=source)
        at, views = offset, []
        for t in tensors:
            views.append(flat[at : at + t.numel()].view(t.shape).copy_(t))
            at += t.numel()
        assert torch.equal(gather(views, scale, plan, dtype), reference.gather_chunks(tensors, scale, plan, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.float64], ids=str)
def test_gradients(dtype: torch.dtype, scale_dtype: torch.dtype) -> None:
    checks.gradients(kernels, dtype, *case(TYPES, SHAPES + MORE_SHAPES, scale_dtype))


def test_every_schedule_gives_the_same_bits() -> None:
    inputs = case(TYPES, SHAPES + MORE_SHAPES[:6])
    want = gather(*inputs, torch.bfloat16), *backward(kernels, torch.float32, *inputs)
    for seed in (1, 2, 3):
        library().sne_fast_cuda_emulated_schedule(seed)
        values, (grads, grad_scale) = gather(*inputs, torch.bfloat16), backward(kernels, torch.float32, *inputs)
        assert torch.equal(values, want[0]) and torch.equal(grad_scale, want[2])
        assert all(torch.equal(a, b) for a, b in zip(grads, want[1], strict=True))


def test_gradients_of_misaligned_results() -> None:
    tensors, scale, plan = case([torch.float32], [(7, 9), (300, 9)])
    values = reference.gather_chunks(tensors, scale, plan, torch.float16)
    grad = torch.randn(2 * len(values))[1::2].to(torch.float16)
    shifted = torch.cat([values[:1], values])[1:]
    got = kernels.gather_chunks_backward(grad, shifted, tensors, scale, plan)
    want = reference.gather_chunks_backward(grad, values, tensors, scale, plan)
    assert all(torch.equal(a, b) for a, b in zip(got[0], want[0], strict=True))
    assert relative_error(got[1], want[1]) < 1e-5


@pytest.mark.parametrize("shape", [(40, 9), (500, 1), (66, 130)], ids=str)
def test_nan_stays_in_its_tensor(shape: tuple[int, int]) -> None:
    tensors, scale, plan = case([torch.float32], [(5, 9), shape, (30, 3)])
    want, want_grads = gather(tensors, scale, plan, torch.float32), backward(kernels, torch.float32, *case(
        [torch.float32], [(5, 9), shape, (30, 3)]))  # fmt: skip
    tensors[1][3] = float("nan")
    got, got_grads = gather(tensors, scale, plan, torch.float32), backward(kernels, torch.float32, tensors, scale, plan)
    inside = torch.zeros(len(got), dtype=torch.bool)
    inside[45 : 45 + tensors[1].numel()] = True
    assert torch.equal(got[~inside], want[~inside]) and int(got.isnan().sum()) == shape[1]
    assert torch.equal(got_grads[1].isnan(), torch.tensor([False, True, False]))
    assert torch.equal(got_grads[1][::2], want_grads[1][::2])


def test_autograd() -> None:
    tensors, scale, plan = case([torch.float64], scale_dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (scale, *tensors)]

    def run(backend: str) -> tuple[Tensor, ...]:
        with sne_fast.use_backend(backend):
            values = functional.gather_chunks(tensors, scale, plan, torch.float64)
            return torch.autograd.grad((values**3).sum(), leaves)

    for a, b in zip(run("cuda"), run("reference"), strict=True):
        assert relative_error(a, b) < 1e-12


def test_other_types_strides_and_no_tensors() -> None:
    checks.other_types_strides_and_no_tensors(kernels, gather)


def test_wrong_sizes_are_refused() -> None:
    checks.wrong_sizes_are_refused(kernels)


def test_many_tensors() -> None:
    """The search over more tensors than a warp looks at in two steps."""
    shapes = [(1 + t % 5, 1 + t % 3) for t in range(1100)]
    tensors, scale, plan = case([torch.float32, torch.bfloat16], shapes)
    want = reference.gather_chunks(tensors, scale, plan, torch.float32)
    assert torch.equal(gather(tensors, scale, plan, torch.float32), want)

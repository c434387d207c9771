"""gather_chunks in the interpreter, against the reference: bit for bit forward, gradients of tensors and of scale."""

from __future__ import annotations

import pytest
import torch

from helpers import gather_checks as checks
from helpers.gather_checks import backward, case
from sne_fast.backends.triton import gather_chunks as kernels

pytestmark = pytest.mark.build

TYPES = [torch.float64, torch.float32, torch.float16, torch.float32]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.float64], ids=str)
def test_values_are_the_references_to_the_bit(dtype: torch.dtype, scale_dtype: torch.dtype) -> None:
    inputs = case(TYPES, scale_dtype=scale_dtype)
    checks.values_are_the_references_to_the_bit(kernels.gather_chunks, dtype, *inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.float64], ids=str)
def test_gradients(dtype: torch.dtype, scale_dtype: torch.dtype) -> None:
    inputs = case(TYPES, scale_dtype=scale_dtype)
    _, grad_scale = checks.gradients(kernels, dtype, *inputs)
    assert torch.equal(grad_scale, backward(kernels, dtype, *inputs)[1]), "the same bits twice"


def test_gradcheck() -> None:
    tensors, scale, plan = case([torch.float64], scale_dtype=torch.float64)
    kept = [0, 2, 5, 9, 10]
    tensors, scale, plan = [tensors[t].clone().requires_grad_() for t in kept], scale[kept].clone(), plan[kept]

    class Op(torch.autograd.Function):
        @staticmethod
        def forward(ctx, scale, *tensors):
            values = kernels.gather_chunks(tensors, scale, plan, torch.float64)
            ctx.save_for_backward(values, scale, *tensors)
            return values

        @staticmethod
        def backward(ctx, grad):
            values, scale, *tensors = ctx.saved_tensors
            grads, grad_scale = kernels.gather_chunks_backward(grad, values, tensors, scale, plan)
            return (grad_scale, *grads)

    assert torch.autograd.gradcheck(Op.apply, (scale.requires_grad_(), *tensors), fast_mode=True)


def test_other_types_strides_and_no_tensors() -> None:
    checks.other_types_strides_and_no_tensors(kernels, kernels.gather_chunks)


def test_wrong_sizes_are_refused() -> None:
    checks.wrong_sizes_are_refused(kernels)

"""gather_chunks in the interpreter, against the reference: bit for bit forward, gradients of tensors and of scale."""

from __future__ import annotations

import pytest
import torch
from cpu_cases import relative_error
from torch import Tensor

from sne_fast import reference
from sne_fast.kernels import gather_chunks as kernels

SHAPES = [(7, 9), (130, 33), (5, 1), (0, 4), (40, 40), (2300, 1), (1, 70), (300, 9), (3, 3000), (6, 0), (1, 1)]
TYPES = [torch.float64, torch.float32, torch.float16, torch.float32]


def case(types: list[torch.dtype], seed: int = 9, scale_dtype: torch.dtype = torch.float32):
    g = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(s, generator=g).to(types[t % len(types)]) for t, s in enumerate(SHAPES)]
    scale = (torch.rand(len(SHAPES), generator=g) + 0.5).to(scale_dtype)
    return tensors, scale, torch.tensor(SHAPES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.float64], ids=str)
def test_values_are_the_references_to_the_bit(dtype: torch.dtype, scale_dtype: torch.dtype) -> None:
    tensors, scale, plan = case(TYPES, scale_dtype=scale_dtype)
    tensors[2][0], tensors[2][1], tensors[2][2] = 3e-7, float("inf"), -0.0  # a subnormal half among them
    values = kernels.gather_chunks(tensors, scale, plan, dtype)
    assert values.dtype == dtype and torch.equal(values, reference.gather_chunks(tensors, scale, plan, dtype))


def backward(engine, dtype: torch.dtype, tensors: list[Tensor], scale: Tensor, plan: Tensor):
    values = reference.gather_chunks(tensors, scale, plan, dtype)
    grad = torch.randn(values.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    return engine.gather_chunks_backward(grad, values, tensors, scale, plan)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.float64], ids=str)
def test_gradients(dtype: torch.dtype, scale_dtype: torch.dtype) -> None:
    inputs = case(TYPES, scale_dtype=scale_dtype)
    grads, grad_scale = backward(kernels, dtype, *inputs)
    want, want_scale = backward(reference, dtype, *inputs)
    for a, b, tensor in zip(grads, want, inputs[0], strict=True):
        assert a.shape == tensor.shape and a.dtype == tensor.dtype and torch.equal(a, b)
    assert grad_scale.dtype == scale_dtype
    assert relative_error(grad_scale, want_scale) < (1e-12 if scale_dtype == torch.float64 else 1e-5)
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
    tensors, scale, plan = case([torch.float32])
    tensors[0] = tensors[0].to(torch.float8_e4m3fn)
    tensors[1] = tensors[1].T.contiguous().T
    values = kernels.gather_chunks(tensors, scale, plan, torch.float32)
    assert torch.equal(values, reference.gather_chunks(tensors, scale, plan, torch.float32))
    grads, _ = kernels.gather_chunks_backward(values, values, tensors, scale, plan)
    assert grads[0].dtype == torch.float8_e4m3fn and all(g.is_contiguous() for g in grads)
    nothing = kernels.gather_chunks([], scale[:0], plan[:0], torch.float32)
    assert nothing.shape == (0,)
    assert kernels.gather_chunks_backward(nothing, nothing, [], scale[:0], plan[:0])[0] == []


def test_wrong_sizes_are_refused() -> None:
    tensors, scale, plan = case([torch.float32])
    with pytest.raises(ValueError, match="tensors.0. must have shape .7, 9. by plan.0."):
        kernels.gather_chunks([tensors[1], *tensors[1:]], scale, plan, torch.float32)
    with pytest.raises(ValueError, match="scale and plan must have shapes"):
        kernels.gather_chunks(tensors, scale[1:], plan, torch.float32)
    with pytest.raises(ValueError, match="grad and values must have the shape"):
        kernels.gather_chunks_backward(scale, scale, tensors, scale, plan)
    assert kernels.why_not("gather_chunks", (tensors, scale, plan, torch.float8_e5m2))
    assert kernels.why_not("gather_chunks_backward", (scale, scale, tensors, scale, plan)) == []

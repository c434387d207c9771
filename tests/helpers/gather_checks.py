"""Cases of ``gather_chunks`` and what holds of its results: for tests of both GPU backends, each given as a module."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor

from helpers.errors import relative_error
from sne_fast import reference

SHAPES = [(7, 9), (130, 33), (5, 1), (0, 4), (40, 40), (4099, 1), (1, 70), (300, 9), (3, 3000), (6, 0), (1, 1)]
"""R x K."""


def case(
    types: list[torch.dtype], shapes: list[tuple[int, int]] = SHAPES, scale_dtype: torch.dtype = torch.float32
) -> tuple[list[Tensor], Tensor, Tensor]:
    g = torch.Generator().manual_seed(9)
    tensors = [torch.randn(s, generator=g).to(types[t % len(types)]) for t, s in enumerate(shapes)]
    scale = (torch.rand(len(shapes), generator=g) + 0.5).to(scale_dtype)
    return tensors, scale, torch.tensor(shapes)


def backward(
    backend: ModuleType, dtype: torch.dtype, tensors: list[Tensor], scale: Tensor, plan: Tensor
) -> tuple[list[Tensor], Tensor]:
    values = reference.gather_chunks(tensors, scale, plan, dtype)
    grad = torch.randn(values.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    return backend.gather_chunks_backward(grad, values, tensors, scale, plan)


def values_are_the_references_to_the_bit(
    gather: Callable[..., Tensor], dtype: torch.dtype, tensors: list[Tensor], scale: Tensor, plan: Tensor
) -> None:
    """Check values to the bit; ``gather`` is the backend's ``gather_chunks`` or what leads to it."""
    tensors[2][0], tensors[2][1], tensors[2][2] = 3e-7, float("inf"), -0.0  # a subnormal half among them
    values = gather(tensors, scale, plan, dtype)
    assert values.dtype == dtype and torch.equal(values, reference.gather_chunks(tensors, scale, plan, dtype))


def gradients(
    backend: ModuleType, dtype: torch.dtype, tensors: list[Tensor], scale: Tensor, plan: Tensor
) -> tuple[list[Tensor], Tensor]:
    """Check gradients: of tensors to the bit; that of scale is a sum in another order."""
    grads, grad_scale = backward(backend, dtype, tensors, scale, plan)
    want, want_scale = backward(reference, dtype, tensors, scale, plan)
    for a, b, tensor in zip(grads, want, tensors, strict=True):
        assert a.shape == tensor.shape and a.dtype == tensor.dtype and torch.equal(a, b)
    assert grad_scale.dtype == scale.dtype
    assert relative_error(grad_scale, want_scale) < (1e-12 if scale.dtype == torch.float64 else 1e-5)
    return grads, grad_scale


def other_types_strides_and_no_tensors(backend: ModuleType, gather: Callable[..., Tensor]) -> None:
    tensors, scale, plan = case([torch.float32])
    tensors[0] = tensors[0].to(torch.float8_e4m3fn)
    tensors[1] = tensors[1].T.contiguous().T
    values = gather(tensors, scale, plan, torch.float32)
    assert torch.equal(values, reference.gather_chunks(tensors, scale, plan, torch.float32))
    grads, _ = backend.gather_chunks_backward(values, values, tensors, scale, plan)
    assert grads[0].dtype == torch.float8_e4m3fn and all(g.is_contiguous() for g in grads)
    nothing = backend.gather_chunks([], scale[:0], plan[:0], torch.float32)
    assert nothing.shape == (0,)
    assert backend.gather_chunks_backward(nothing, nothing, [], scale[:0], plan[:0])[0] == []


def wrong_sizes_are_refused(backend: ModuleType) -> None:
    tensors, scale, plan = case([torch.float32])
    with pytest.raises(ValueError, match=r"tensors.0. must be floating with plan.0. = 7 x 9 elements, got "):
        backend.gather_chunks([tensors[1], *tensors[1:]], scale, plan, torch.float32)
    with pytest.raises(TypeError, match=r"scale must be float32 or float64 of shape .T,. = .[0-9]+,., got "):
        backend.gather_chunks(tensors, scale[1:], plan, torch.float32)
    with pytest.raises(ValueError, match=r"gather_chunks_backward: grad must have shape .[0-9]+,., got "):
        backend.gather_chunks_backward(scale, scale, tensors, scale, plan)
    assert backend.why_not("gather_chunks", (tensors, scale, plan, torch.float8_e5m2))
    assert backend.why_not("gather_chunks_backward", (scale, scale, tensors, scale, plan)) == []

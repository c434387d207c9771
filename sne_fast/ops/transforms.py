"""Transforms of PyTorch that a call runs under: `torch.func` and forward-mode differentiation.

The kernels give values and first derivatives in reverse mode. A call that asks for more (`jvp`, `vmap`, nested
transforms, dual tensors) is computed by :mod:`sne_fast.ops.compositions` instead, which PyTorch can transform freely.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.autograd import forward_ad

_FUNC = torch._C._functorch


def torch_func_is_active() -> bool:
    """Return whether the call runs inside a transform of `torch.func`."""
    return torch._C._are_functorch_transforms_active()


def carries_tangent(tensors: Iterable[object]) -> bool:
    """Return whether forward-mode differentiation is on and one of the tensors is, or may be, dual."""
    if forward_ad._current_level < 0:
        return False
    try:
        return any(isinstance(t, Tensor) and forward_ad.unpack_dual(t).tangent is not None for t in tensors)
    except RuntimeError:  # inside a graph of AOTAutograd, which runs below autograd, tangents cannot be read
        return True


def is_transformed(tensors: Iterable[object]) -> bool:
    """Return whether a transform follows what a call does with `tensors`, which must not leave PyTorch then."""
    return torch_func_is_active() or carries_tangent(tensors)


def needs_composition(op: str, tensors: Iterable[Tensor]) -> bool:
    """Return whether a call on `tensors` needs more than values and first derivatives in reverse mode.

    One level of `torch.func.grad`, `vjp` or `grad_and_value` does not.

    Raises:
        RuntimeError: inside `torch.func` while `torch.compile` traces, where the loops of a composition cannot be. (A
            graph with breaks runs the call eagerly instead.)
    """
    if not torch_func_is_active():
        return not torch.compiler.is_compiling() and carries_tangent(tensors)
    if torch.compiler.is_compiling():
        raise RuntimeError(
            f"{op}: torch.func inside torch.compile is not supported; apply torch.func to a function that is not "
            f"compiled"
        )
    levels = _FUNC.get_interpreter_stack()
    return [level.key() for level in levels] != [_FUNC.TransformType.Grad]


def follows_nothing() -> bool:
    """Return whether nothing but autograd watches what a call does: no transform, dispatch mode, dual level, compiler.

    Memory may be read directly then.
    """
    modes = torch._C._len_torch_dispatch_stack() > 0
    return not (torch_func_is_active() or modes or forward_ad._current_level >= 0 or torch.compiler.is_compiling())


@contextmanager
def outside_transforms() -> Iterator[None]:
    """Compute with plain tensors inside the block, whose results no transform of `torch.func` wraps."""
    if not torch_func_is_active():
        yield
        return
    with temporarily_clear_interpreter_stack():
        yield


def unwrapped(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return the plain tensors inside the wrappers of transforms, detached; a batch under `vmap` comes whole."""
    plain = []
    for tensor in tensors:
        while _FUNC.is_functorch_wrapped_tensor(tensor):
            tensor = _FUNC.get_unwrapped(tensor)
        plain.append(tensor)
    with outside_transforms():
        return [forward_ad.unpack_dual(tensor).primal.detach() for tensor in plain]

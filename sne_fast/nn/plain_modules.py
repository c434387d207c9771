"""Modules whose parameters a fused path may read instead of calling them.

A fused path computes what a module of `torch.nn` computes by itself. Where a module has been replaced, subclassed,
parametrised, given hooks or another `forward`, the modules are called one by one instead.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from ..ops.reference import LAYER_NORM_EPS


def is_plain(module: nn.Module | None, kind: type[nn.Module]) -> bool:
    """Return whether a call of `module` would do just what the class `kind` does."""
    return (
        type(module) is kind
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and not module._backward_hooks
        and not module._backward_pre_hooks
        and "forward" not in module.__dict__
    )


def are_linear(*modules: nn.Module) -> bool:
    """Return whether all modules are plain linear layers with a bias, and no hook is set for modules of all kinds."""
    for module in modules:
        if not is_plain(module, nn.Linear) or module.bias is None:
            return False
    return torch.compiler.is_compiling() or not _has_any_global_hook()


def is_norm(module: nn.Module | None, width: int) -> bool:
    """Return whether `module` is a plain layer norm of rows of `width` as the kernels compute it."""
    return (
        isinstance(module, nn.LayerNorm)
        and is_plain(module, nn.LayerNorm)
        and module.eps == LAYER_NORM_EPS
        and module.normalized_shape == (width,)
        and module.weight is not None
        and module.bias is not None
    )

"""Running a module on example inputs: its inputs and outputs as tensors, and the mode it runs in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

_DEPTH = 8  # outputs that refer to themselves end somewhere


def uncompiled(net: nn.Module) -> nn.Module:
    """Return the module that `torch.compile` was given, or the module itself."""
    inner = getattr(net, "_orig_mod", net)
    return inner if isinstance(inner, nn.Module) else net


def split_inputs(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return positional and keyword arguments from what `trace` and `verify` accept."""
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    return (tuple(example_inputs) if isinstance(example_inputs, (tuple, list)) else (example_inputs,)), {}


def tensors_in(out: Any, depth: int = 0) -> Iterator[Tensor]:
    """Yield the tensors in whatever a module returns: in containers, mappings and the dataclasses of libraries."""
    for leaf in tree_flatten(out)[0]:
        if isinstance(leaf, Tensor):
            yield leaf
        elif isinstance(leaf, Mapping):
            yield from tensors_in(list(leaf.values()), depth + 1)
        elif depth < _DEPTH and hasattr(leaf, "__dict__"):
            yield from tensors_in(list(vars(leaf).values()), depth + 1)


@contextmanager
def evaluation(net: nn.Module) -> Iterator[None]:
    """Put a module in evaluation mode without gradients; afterwards every submodule is in its former mode."""
    modes = [(module, module.training) for module in net.modules()]
    net.eval()
    try:
        with torch.inference_mode(False), torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training

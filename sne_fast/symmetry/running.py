"""Running a module on example inputs: its inputs and outputs as tensors, and the mode it runs in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from .boxes import SymmetryError

CACHES = frozenset(
    ("past_key_values", "past_key_value", "cache_params", "mems", "past_buckets_states", "present", "presents")
)
"""Names under which modules return what they keep for their next step."""
_DEPTH = 8  # outputs that refer to themselves end somewhere


def uncompiled(net: nn.Module) -> nn.Module:
    """Return the module that `torch.compile` was given, or the module itself.

    Raises:
        SymmetryError: a TorchScript program, whose weights cannot be replaced for a run.
    """
    inner = getattr(net, "_orig_mod", net)
    found = inner if isinstance(inner, nn.Module) else net
    if isinstance(found, torch.jit.ScriptModule):
        raise SymmetryError(
            "symmetry: a TorchScript program cannot be traced as it is; trace the module that it was made from, or "
            "torch.nn.Sequential(net), whose names begin with '0.'"
        )
    return found


def split_inputs(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return positional and keyword arguments from what `trace` and `verify` accept."""
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    return (tuple(example_inputs) if isinstance(example_inputs, (tuple, list)) else (example_inputs,)), {}


def tensors_in(out: Any, depth: int = 0) -> Iterator[Tensor]:
    """Yield the tensors in whatever a module returns: in containers, mappings and the dataclasses of libraries.

    What a module keeps for its next step, such as the keys and values of earlier tokens, is its inner state and not its
    output: entries named in `CACHES` and objects of classes named so are left out.
    """
    if isinstance(out, Tensor):
        yield out
    elif depth < _DEPTH and not type(out).__name__.endswith("Cache"):
        if isinstance(out, Mapping):
            inner = [value for key, value in out.items() if key not in CACHES]
        elif isinstance(out, (list, tuple)):
            inner = list(out)
        else:
            inner = tree_flatten(out)[0]
            if len(inner) == 1 and inner[0] is out:
                inner = [value for key, value in getattr(out, "__dict__", {}).items() if key not in CACHES]
        for value in inner:
            yield from tensors_in(value, depth + 1)


@contextmanager
def evaluation(net: nn.Module) -> Iterator[None]:
    """Put a module in evaluation mode without gradients; afterwards every submodule is in its former mode.

    Raises:
        SymmetryError: a module that has no evaluation mode.
    """
    modes = [(module, module.training) for module in net.modules()]
    try:
        net.eval()
    except NotImplementedError as error:  # programs of torch.export
        raise SymmetryError(
            f"symmetry: {type(net).__name__} cannot be put into evaluation mode ({error}); give the module that it was "
            f"made from"
        ) from error
    try:
        with torch.inference_mode(False), torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training

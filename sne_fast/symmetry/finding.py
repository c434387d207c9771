"""`find_symmetry`: run a module once under a `Tracer` and read the symmetry off the labels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_flatten

from ..data.layers import strip_wrappers
from .boxes import SymmetryError
from .core import Symmetry
from .rules import find_rule
from .running import evaluation, split_inputs, tensors_in, uncompiled
from .terms import Label, freeze, fresh, leaves, unify
from .tracer import Tracer, storage_address

_STATISTICS = ("running_mean", "running_var")


def find_symmetry(net: nn.Module, example_inputs: Any, *, strict: bool = False, name: str | None = None) -> Symmetry:
    """Return the symmetry that one run of `net` shows, unverified; arguments and errors as for `trace`."""
    net = uncompiled(net)
    args, kwargs = split_inputs(example_inputs)
    weights, alias = _weights_of(net)
    constants = {id(t): "input" for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)}
    taken = {id(t) for t in weights.values()}
    for key, tensor in (*net.named_parameters(), *net.named_buffers()):
        if id(tensor) not in taken:
            constants[id(tensor)] = f"meets the constant {key!r}"
    tracer = Tracer(find_rule, constants)
    for tensor in weights.values():
        tracer.set_label(tensor, tuple(fresh(n) for n in tensor.shape))
    labels = {key: tracer.label(tensor) for key, tensor in weights.items()}
    _tie_shared(weights, labels)

    with evaluation(net), _module_names(net, tracer), _decomposed_kernels(), tracer:
        out = net(*args, **kwargs)
    results = list(tensors_in(out))
    if not results:
        raise SymmetryError(f"trace: the output of {type(net).__name__} must hold a tensor, got {type(out).__name__}")
    for tensor in results:
        for term in tracer.label(tensor):
            freeze(term, "output")
    _freeze_unused(labels, tracer)
    if strict and tracer.unsupported:
        raise SymmetryError(
            "trace: some operations have no rule, so what they touch would be frozen: "
            + "; ".join(tracer.unsupported)
            + "; use strict=False to leave it in place"
        )
    return Symmetry.from_labels(name or type(net).__name__, labels, alias, tracer.records, tuple(tracer.unsupported))


def _weights_of(net: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors that `pack` takes from a module, by their first name, and every name's first name."""
    names: list[str] = []
    tensors: list[Tensor] = []
    for name, p in net.named_parameters(remove_duplicate=False):
        names.append(name)
        tensors.append(p)
    for name, b in net.named_buffers(remove_duplicate=False):
        if name.rpartition(".")[2] in _STATISTICS:
            names.append(name)
            tensors.append(b)
    names = strip_wrappers(names)
    first: dict[int, str] = {}
    found: dict[str, Tensor] = {}
    alias: dict[str, str] = {}
    for name, tensor in zip(names, tensors, strict=True):
        if nn.parameter.is_lazy(tensor):
            raise SymmetryError(
                f"trace: {name!r} is not initialised yet (lazy module); run the network once on an example"
            )
        if not tensor.is_floating_point():
            continue
        alias[name] = first.setdefault(id(tensor), name)
        found.setdefault(alias[name], tensor)
    return found, alias


def _tie_shared(weights: dict[str, Tensor], labels: dict[str, Label]) -> None:
    """Permute parameters alike that are different objects on the same memory."""
    first: dict[tuple[Any, ...], str] = {}
    for key, tensor in weights.items():
        if storage_address(tensor):
            other = first.setdefault((tensor.data_ptr(), tensor.shape, tensor.stride()), key)
            for mine, theirs in zip(labels[other], labels[key], strict=True):
                unify(mine, theirs, "shares memory")


def _freeze_unused(labels: dict[str, Label], tracer: Tracer) -> None:
    """Freeze weights that no operation touched; the first records are the labels of the weights themselves."""
    touched = {id(leaf) for label in tracer.records[len(labels) :] for term in label for leaf in leaves(term)}
    for label in labels.values():
        for term in label:
            for leaf in leaves(term):
                if id(leaf) not in touched:
                    freeze(leaf, "not used by the example")


@contextmanager
def _module_names(net: nn.Module, tracer: Tracer) -> Iterator[None]:
    """Tell the tracer which modules are running."""
    with ExitStack() as stack:
        for name, module in net.named_modules():
            if isinstance(module, torch.jit.ScriptModule):
                continue

            def enter(*_: Any, name: str = name) -> None:
                tracer.modules.append(name)

            def leave(*_: Any) -> None:
                tracer.modules.pop()

            stack.callback(module.register_forward_pre_hook(enter, prepend=True).remove)
            stack.callback(module.register_forward_hook(leave).remove)
        yield


@contextmanager
def _decomposed_kernels() -> Iterator[None]:
    """Run attention and recurrent layers as the small operations that have rules."""
    fast = torch.backends.mha.get_fastpath_enabled()
    onednn = torch._C._get_mkldnn_enabled()  # torch.backends.mkldnn.flags warns about Intel GPUs
    torch.backends.mha.set_fastpath_enabled(False)
    torch._C._set_mkldnn_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH), torch.backends.cudnn.flags(enabled=False):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        torch._C._set_mkldnn_enabled(onednn)

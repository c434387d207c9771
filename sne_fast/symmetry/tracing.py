"""`trace`: find the permutations of hidden units that leave a module's function as it is.

The module runs once on an example under a dispatch mode that sees every ATen operation, after Python, control flow and
composite operations are gone. Every tensor gets a label (`terms`), a rule per operation (`rules_views`,
`rules_compute`) says which axes must be permuted alike, and an operation without a rule freezes all axes of its
arguments. Inputs, outputs and constants are frozen from the start.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from ..data.layers import _strip
from .core import Symmetry, SymmetryError
from .rules_compute import RULES, pointwise
from .structure import assemble
from .terms import Label, Term, freeze, fresh, leaves, size, unify

_STATISTICS = ("running_mean", "running_var")


class Call:
    """One call of an operation: arguments by their names in its schema, tensors in and out."""

    def __init__(self, func: Any, args: tuple, kwargs: dict, out: Any) -> None:
        self.name = func._schema.name.split("::")[1]
        self.arguments: dict[str, Any] = {}
        for i, argument in enumerate(func._schema.arguments):
            if i < len(args):
                self.arguments[argument.name] = args[i]
            elif argument.name in kwargs:
                self.arguments[argument.name] = kwargs[argument.name]
            elif argument.has_default_value():
                self.arguments[argument.name] = argument.default_value
        self.tensors = [t for t in tree_flatten(list(self.arguments.values()))[0] if isinstance(t, Tensor)]
        self.out = [t for t in tree_flatten(out)[0] if isinstance(t, Tensor)]

    @property
    def first(self) -> Tensor:
        return self.tensors[0]

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    def get(self, name: str, default: Any = None) -> Any:
        return self.arguments.get(name, default)


class Tracer(TorchDispatchMode):
    """Labels every tensor that it sees."""

    def __init__(self, constants: dict[int, str]) -> None:
        super().__init__()
        self.records: list[Label] = []
        self.unknown: dict[str, None] = {}
        self.modules: list[str] = []
        self._constants = constants
        self._labels: dict[int, Label] = {}
        self._storages: dict[int, list[Label]] = {}
        self._alive: list[Tensor] = []  # so that no id and no address is used twice

    # What rules use

    def label(self, tensor: Tensor) -> Label:
        """The label of a tensor; one never seen before is a constant, and frozen."""
        found = self._labels.get(id(tensor))
        if found is not None:
            return found
        why = self._constants.get(id(tensor)) or self.because("a constant")
        for label in self._storages.get(_address(tensor), ()):  # as by numpy: no operation told where it is from
            for term in label:
                freeze(term, self.because("its memory is reached past torch"))
        return self.set_label(tensor, tuple(fresh(n, why) for n in tensor.shape))

    def set_label(self, tensor: Tensor, label: Label) -> Label:
        self._labels[id(tensor)] = label
        self._alive.append(tensor)
        address = _address(tensor)
        if address:
            self._storages.setdefault(address, []).append(label)
        self.records.append(label)
        return label

    def record(self, *terms: Term) -> None:
        """These axes are at hand together and no others: what depends on an axis that is not must not (`assemble`)."""
        self.records.append(terms)

    def because(self, why: str) -> str:
        """A reason, with the module in which it came up."""
        where = self.modules[-1] if self.modules else ""
        return f"{why} (in {where!r})" if where else why

    # Seeing operations

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        rule = self._rule(func)
        if rule is None and func.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd):
            with self:
                return func.decompose(*args, **kwargs)
        out = func(*args, **kwargs)
        call = Call(func, args, kwargs, out)
        labels = None
        if rule is not None and all(t.numel() for t in call.tensors):
            labels = rule(self, call)
            if labels is not None and not _fits(labels, call.out):
                labels = None
        if labels is None:
            self._give_up(func, call)
        else:
            for tensor, label in zip(call.out, labels, strict=True):
                self.set_label(tensor, label)
        return out

    @staticmethod
    def _rule(func: Any) -> Any:
        namespace, name = func._schema.name.split("::")
        if namespace != "aten" or any(a.is_out for a in func._schema.arguments):
            return None
        if name in RULES:
            return RULES[name]
        if torch.Tag.pointwise in func.tags:
            return pointwise
        if name.endswith("_") and not name.startswith("_"):
            base = getattr(torch.ops.aten, name[:-1], None)
            if base is not None and any(torch.Tag.pointwise in getattr(base, o).tags for o in base.overloads()):
                return pointwise
        return None

    def _give_up(self, func: Any, call: Call) -> None:
        terms = [term for t in call.tensors for term in self.label(t)]
        if any(leaf.frozen is None for term in terms for leaf in leaves(term)):
            why = self.because(f"no rule for {func}")
            self.unknown.setdefault(why)
            for term in terms:
                freeze(term, why)
        why = next((leaf.frozen for term in terms for leaf in leaves(term)), None) or self.because("a constant")
        for tensor in call.out:
            self.set_label(tensor, tuple(fresh(n, why) for n in tensor.shape))


def _address(tensor: Tensor) -> int:
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # sparse, functional and other tensors without memory of their own
        return 0


def _fits(labels: list[Label], out: list[Tensor]) -> bool:
    return len(labels) == len(out) and all(
        len(label) == t.ndim and all(size(term) == n for term, n in zip(label, t.shape, strict=True))
        for label, t in zip(labels, out, strict=True)
    )


def weights_of(net: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors that `pack` takes from a module, by their first name, and every name's first name."""
    names: list[str] = []
    tensors: list[Tensor] = []
    for name, p in net.named_parameters(remove_duplicate=False):
        names.append(name)
        tensors.append(p)
    for name, b in net.named_buffers(remove_duplicate=False):
        if name.rpartition(".")[2] in _STATISTICS:
            names.append(name)
            tensors.append(b)
    names = _strip(names)
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


def trace(
    net: nn.Module, example_inputs: Any, *, strict: bool = False, check: bool = True, name: str | None = None
) -> Symmetry:
    """The permutations of hidden units that leave `net`'s function as it is, found by running it once on an example.

    Found are: hidden units of linear layers and channels of convolutions (grouped and depthwise too), through
    normalisation with its running statistics, pointwise activations, pooling, flattening, reshapes, residual sums,
    concatenation and slices; attention heads as blocks, inside each head the units of queries and keys together and
    those of values and outputs together, with fused or separate projections; the residual stream, where embeddings and
    norms allow it. Tied tensors are permuted once. In evaluation mode, without gradients, on the network's device.

    Frozen, that is left in place: dimensions that meet inputs, outputs, constants and buffers other than running
    statistics; what an operation without a rule touches; parameters that the example does not use. Nothing that is
    frozen makes the rest wrong. `Symmetry.explain` says why each is. Control flow that depends on the input is
    followed as this example takes it.

    Args:
        net: a module; it is not changed.
        example_inputs: a tensor, a tuple of positional arguments or a dict of keyword arguments for `net`.
        strict: raise where an operation without a rule froze something, instead of leaving it in place.
        check: run `verify` on the result, which takes four more runs of the network.
        name: what messages call the network; its class by default.

    Raises:
        SymmetryError: `strict` and an operation is not supported (names module and operation); a lazy parameter; the
            output holds no tensor; or the check failed, also because random weights give no finite output or one that
            is not deterministic (then `check=False`, and `verify` with `randomise=False`).

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        >>> [group.name for group in sne_fast.symmetry.trace(net, torch.zeros(1, 4)).groups]
        ['0.weight[0]']
    """
    net = plain(net)
    args, kwargs = split_inputs(example_inputs)
    weights, alias = weights_of(net)
    constants = {id(t): "input" for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)}
    taken = {id(t) for t in weights.values()}
    for key, tensor in (*net.named_parameters(), *net.named_buffers()):
        if id(tensor) not in taken:
            constants[id(tensor)] = f"meets the constant {key!r}"
    tracer = Tracer(constants)
    for tensor in weights.values():
        tracer.set_label(tensor, tuple(fresh(n) for n in tensor.shape))
    labels = {key: tracer.label(tensor) for key, tensor in weights.items()}
    _tie_shared(weights, labels)

    with evaluation(net), _module_names(net, tracer), _plain_kernels(), tracer:
        out = net(*args, **kwargs)
    results = list(_tensors(out))
    if not results:
        raise SymmetryError(f"trace: the output of {type(net).__name__} must hold a tensor, got {type(out).__name__}")
    for tensor in results:
        for term in tracer.label(tensor):
            freeze(term, "output")
    touched = {id(leaf) for label in tracer.records[len(labels) :] for term in label for leaf in leaves(term)}
    for label in labels.values():
        for term in label:
            for leaf in leaves(term):
                if id(leaf) not in touched:
                    freeze(leaf, "not used by the example")
    if strict and tracer.unknown:
        raise SymmetryError(
            "trace: some operations have no rule, so what they touch would be frozen: "
            + "; ".join(tracer.unknown)
            + "; use strict=False to leave it in place"
        )
    symmetry = assemble(name or type(net).__name__, labels, alias, tracer.records, tuple(tracer.unknown))
    if check:
        from .checking import verify

        verify(net, example_inputs, symmetry, trials=2)
    return symmetry


def _tie_shared(weights: dict[str, Tensor], labels: dict[str, Label]) -> None:
    """Parameters that are different objects and the same memory are permuted alike."""
    first: dict[tuple, str] = {}
    for key, tensor in weights.items():
        if _address(tensor):
            other = first.setdefault((tensor.data_ptr(), tensor.shape, tensor.stride()), key)
            for mine, theirs in zip(labels[other], labels[key], strict=True):
                unify(mine, theirs, "shares memory")


def plain(net: nn.Module) -> nn.Module:
    """The module that `torch.compile` was given."""
    return getattr(net, "_orig_mod", net)


def split_inputs(example_inputs: Any) -> tuple[tuple, dict]:
    """Positional and keyword arguments from what `trace` and `verify` accept."""
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    return (tuple(example_inputs) if isinstance(example_inputs, (tuple, list)) else (example_inputs,)), {}


def _tensors(out: Any, depth: int = 0) -> Iterator[Tensor]:
    """Tensors in whatever a module returns; pytree knows the usual containers, outputs of libraries are dataclasses."""
    for leaf in tree_flatten(out)[0]:
        if isinstance(leaf, Tensor):
            yield leaf
        elif isinstance(leaf, Mapping):
            yield from _tensors(list(leaf.values()), depth + 1)
        elif depth < 8 and hasattr(leaf, "__dict__"):
            yield from _tensors(list(vars(leaf).values()), depth + 1)


@contextmanager
def evaluation(net: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards every module is in the mode it was in."""
    modes = [(module, module.training) for module in net.modules()]
    net.eval()
    try:
        with torch.inference_mode(False), torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _module_names(net: nn.Module, tracer: Tracer) -> Iterator[None]:
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
def _plain_kernels() -> Iterator[None]:
    """Attention and recurrent layers as the small operations that there are rules for."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

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

"""`Tracer`: a dispatch mode that labels every tensor of a running module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from .terms import Label, Term, freeze, fresh, leaves, size


class Call:
    """One call of an operation: its arguments by their names in the schema, its tensors in and out."""

    def __init__(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        self.name: str = func._schema.name.split("::")[1]
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
        """The first tensor among the arguments."""
        return self.tensors[0]

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    def get(self, name: str, default: Any = None) -> Any:
        """Return an argument that not every overload has."""
        return self.arguments.get(name, default)


class Tracer(TorchDispatchMode):
    """Labels the results of every operation by a rule; an operation without a rule freezes its arguments.

    Args:
        find_rule: the rule for an ATen operator, or None.
        constants: by `id`, the reason to freeze tensors that are not weights.

    Attributes:
        records: the labels of all tensors seen, and what rules recorded.
        unsupported: the operations without a rule that froze something, in order, as keys.
        modules: names of the modules that are running, outermost first.
    """

    def __init__(self, find_rule: Callable[[Any], Rule | None], constants: dict[int, str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.records: list[Label] = []
        self.unsupported: dict[str, None] = {}
        self.modules: list[str] = []
        self._find_rule = find_rule
        self._constants = constants
        self._labels: dict[int, Label] = {}
        self._storages: dict[int, list[Label]] = {}
        self._alive: list[Tensor] = []  # keeps every tensor, so that no id and no address is used twice

    # For rules

    def label(self, tensor: Tensor) -> Label:
        """Return the label of a tensor; a tensor never seen before is a constant, and frozen."""
        found = self._labels.get(id(tensor))
        if found is not None:
            return found
        why = self._constants.get(id(tensor)) or self.because("a constant")
        for label in self._storages.get(storage_address(tensor), ()):  # numpy shares memory and no operation tells
            for term in label:
                freeze(term, self.because("its memory is reached past torch"))
        return self.set_label(tensor, tuple(fresh(n, why) for n in tensor.shape))

    def set_label(self, tensor: Tensor, label: Label) -> Label:
        """Give a tensor its label, and return the label."""
        self._labels[id(tensor)] = label
        self._alive.append(tensor)
        address = storage_address(tensor)
        if address:
            self._storages.setdefault(address, []).append(label)
        self.records.append(label)
        return label

    def record(self, *terms: Term) -> None:
        """Record that these axes stand together without any others.

        The permutation of an axis may then not depend on a position in an axis that is missing here.
        """
        self.records.append(terms)

    def because(self, why: str) -> str:
        """Return the reason with the module in which it came up."""
        where = self.modules[-1] if self.modules else ""
        return f"{why} (in {where!r})" if where else why

    # For torch

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation and label its results."""
        kwargs = kwargs or {}
        rule = self._find_rule(func)
        if rule is None and func.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd):
            with self:
                return func.decompose(*args, **kwargs)
        out = func(*args, **kwargs)
        call = Call(func, args, kwargs, out)
        labels = None
        if rule is not None:
            labels = rule(self, call)
            if labels is not None and not _fits(labels, call.out):
                labels = None
        if labels is None:
            self._give_up(func, call)
        else:
            for tensor, label in zip(call.out, labels, strict=True):
                self.set_label(tensor, label)
        return out

    def _give_up(self, func: Any, call: Call) -> None:
        terms = [term for t in call.tensors for term in self.label(t)]
        if any(leaf.frozen is None for term in terms for leaf in leaves(term)):
            why = self.because(f"no rule for {func}")
            self.unsupported.setdefault(why)
            for term in terms:
                freeze(term, why)
        why = next((leaf.frozen for term in terms for leaf in leaves(term)), None) or self.because("a constant")
        for tensor in call.out:
            self.set_label(tensor, tuple(fresh(n, why) for n in tensor.shape))


Rule: TypeAlias = Callable[[Tracer, Call], list[Label] | None]
"""Labels of an operation's results, in order; None where the operation is used in a way that the rule does not know."""


def storage_address(tensor: Tensor) -> int:
    """Return the address of a tensor's memory, or 0 where it has none of its own."""
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # sparse and functional tensors, for example
        return 0


def _fits(labels: list[Label], out: list[Tensor]) -> bool:
    return len(labels) == len(out) and all(
        len(label) == t.ndim and all(size(term) == n for term, n in zip(label, t.shape, strict=True))
        for label, t in zip(labels, out, strict=True)
    )

"""`trace`: find the permutations of hidden units that leave a module's function as it is.

The module runs once on an example under a dispatch mode (`tracer`) that sees every ATen operation, after Python,
control flow and composite operations are gone. Every tensor has a label (`terms`); a rule per operation (`rules`) says
which axes must be permuted alike, and an operation without a rule freezes all axes of its arguments. Inputs, outputs
and constants are frozen from the start.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from .checking import verify
from .core import Symmetry
from .finding import find_symmetry


def trace(
    net: nn.Module, example_inputs: Any, *, strict: bool = False, check: bool = True, name: str | None = None
) -> Symmetry:
    """Return the permutations of hidden units that leave `net`'s function as it is, found by one run on an example.

    Found are: hidden units of linear layers and channels of convolutions (grouped and depthwise too), through
    normalisation with its running statistics, pointwise activations, pooling, flattening, reshapes, residual sums,
    concatenation and slices; attention heads as wholes, inside each head the units of queries and keys together and
    those of values and outputs together, with fused or separate projections; the residual stream, where embeddings and
    norms allow it. Tied tensors are permuted once. The network runs in evaluation mode, without gradients, on its own
    device.

    Frozen, that is left in place, are: dimensions that meet inputs, outputs, constants and buffers other than running
    statistics; what an operation without a rule touches; parameters that the example does not use. What a module
    returns for its next step, such as `past_key_values`, is no output. Freezing loses symmetries and never makes the
    rest wrong. `Symmetry.explain` gives the reason for each. Control flow that depends on the input is followed as this
    example takes it.

    Args:
        net: a module; it is not changed.
        example_inputs: a tensor, a tuple of positional arguments or a dict of keyword arguments for `net`.
        strict: raise where an operation without a rule froze something, instead of leaving it in place.
        check: run `verify` on the result, which takes four more runs of the network.
        name: the network's name in messages; its class by default.

    Raises:
        SymmetryError: `strict` and an operation is not supported (names module and operation); a lazy parameter; the
            output holds no tensor; a TorchScript or exported program; or the check failed, also because random weights
            give no finite output or one that is not deterministic (then use `check=False`, and `verify` with
            `randomise=False`).

    Example:
        >>> import torch
        >>> from sne_fast.symmetry import trace
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        >>> [group.name for group in trace(net, torch.zeros(1, 4)).groups]
        ['0.weight[0]']
    """
    symmetry = find_symmetry(net, example_inputs, strict=strict, name=name)
    if check:
        verify(net, example_inputs, symmetry, trials=2)
    return symmetry

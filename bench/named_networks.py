"""Networks with the names of torchvision 0.29 and timm 1.0: their module trees, written down, with random weights.

`named_networks.txt` has a line for each module that owns tensors: its name, its class in torch.nn (`Module` for one of
the library's own) and its tensors. A shape alone is the weight's, `+` a bias as long as the weight's first dimension,
`*` running mean and variance, `name:shape` another parameter, `!` in front of one that is not trained, `~` and `#` in
front of buffers of floats and integers. Dimensions of 16 and more are divided by 16.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

TREES = Path(__file__).with_suffix(".txt")


@cache
def trees() -> dict[str, list[list[str]]]:
    """Return the lines of each network, split, by `library/name`."""
    found: dict[str, list[list[str]]] = {}
    for line in TREES.read_text().splitlines():
        first, *rest = line.split()
        if first == "=":
            found["/".join(rest)] = lines = []
        else:
            lines.append([first, *rest])
    return found


NAMES = tuple(trees())


def build(library: str, name: str) -> nn.Module:
    """Return a module of the names, classes and scaled shapes of a network."""
    root = nn.Module()
    for path, class_name, *tensors in trees()[f"{library}/{name}"]:
        module = root if path == "." else _place(root, path, class_name)
        for tensor in tensors:
            _add(module, tensor)
    return root


def _place(root: nn.Module, path: str, class_name: str) -> nn.Module:
    outer = root
    *parts, last = path.split(".")
    for part in parts:
        if part not in outer._modules:
            outer.add_module(part, nn.Module())
        outer = outer.get_submodule(part)
    cls = getattr(nn, class_name)
    module = cls.__new__(cls)  # its tensors are those of the line, so its constructor is not needed
    nn.Module.__init__(module)
    if last in outer._modules:  # a module inside it came first
        module._modules.update(outer._modules[last]._modules)
    outer.add_module(last, module)
    return module


def _add(module: nn.Module, tensor: str) -> None:
    name, _, text = tensor.rpartition(":")
    if tensor == "+":
        weight: Tensor = module.weight
        module.register_parameter("bias", nn.Parameter(torch.randn(weight.shape[0])))
    elif tensor == "*":
        size = module.weight.shape
        module.register_buffer("running_mean", torch.randn(size))
        module.register_buffer("running_var", torch.rand(size) + 0.5)
        module.register_buffer("num_batches_tracked", torch.tensor(7))
    else:
        shape = [int(size) for size in text.split(",") if size]
        own = name.lstrip("!~#") or "weight"
        if name.startswith("#"):
            module.register_buffer(own, torch.arange(max(1, torch.Size(shape).numel())).reshape(shape))
        elif name.startswith("~"):
            module.register_buffer(own, torch.randn(shape))
        else:
            module.register_parameter(own, nn.Parameter(torch.randn(shape), requires_grad=not name.startswith("!")))

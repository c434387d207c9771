"""Names of networks and tensors as messages give them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

Names = tuple[tuple[str, tuple[str, ...]], ...]
"""Per network its name and the names of its tensors; empty if unknown."""

Skipped = tuple[tuple[tuple[str, str], ...], ...]
"""Per network the entries that were left out of it, each with the reason; empty if unknown."""


def network_name(names: Names, b: int) -> str:
    """Name network b of a batch, e.g. `network 3 ('resnet18')`; `names` as in `WeightBatch`."""
    return f"network {b} ({names[b][0]!r})" if names else f"network {b}"


def tensor_name(names: Names, hosts: Mapping[str, Tensor], s: int) -> str:
    """Name tensor s, counted over the batch, e.g. `network 3 ('resnet18'), tensor 'fc.weight'`.

    Args:
        names: as in `WeightBatch`.
        hosts: the batch's pointers on the CPU; `layer_ptr` and `network_ptr` are read.
        s: 0..T-1.
    """
    layer = int(torch.searchsorted(hosts["layer_ptr"], s, right=True)) - 1
    b = int(torch.searchsorted(hosts["network_ptr"], layer, right=True)) - 1
    first = int(hosts["layer_ptr"][hosts["network_ptr"][b]])
    tensor = repr(names[b][1][s - first]) if names else str(s - first)
    return f"{network_name(names, b)}, tensor {tensor}"

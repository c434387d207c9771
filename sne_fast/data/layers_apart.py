"""A batch whose networks are the single layers of another."""

from __future__ import annotations

from itertools import pairwise

import torch

from .batch import WeightBatch

__all__ = ["layer_names", "layers_apart"]


def layers_apart(batch: WeightBatch) -> WeightBatch:
    """Return the same weights with every layer as a network of its own, which keeps its level.

    Args:
        batch: B networks of L layers in all.

    Returns:
        A batch of L networks that shares the memory of `batch`; networks keep their names, and what was skipped is not
        known of a layer.
    """
    host = torch.arange(batch.num_layers + 1, device="cpu")
    fields = batch.fields()
    fields["network_ptr"] = host if batch.device.type == "cpu" else host.to(batch.device)
    names, shapes = [], []
    for b, (first, last) in enumerate(pairwise(batch.network_ptr_host.tolist())):
        bounds = batch.layer_ptr_host[first : last + 1] - batch.layer_ptr_host[first]
        for start, stop in pairwise(bounds.tolist()):
            if batch.names:
                names.append((batch.names[b][0], batch.names[b][1][start:stop]))
            if batch.shapes:
                shapes.append(batch.shapes[b][start:stop])
    fields.update(names=tuple(names), shapes=tuple(shapes), skipped=())
    hosts = {**batch.pointers_host, "network_ptr": host}
    return WeightBatch.trusted(hosts, kernels=batch.kernels, statistics=batch.statistics, **fields)


def layer_names(batch: WeightBatch) -> tuple[str, ...]:
    """Return the name of each layer, that of its first tensor without the last part; () for a batch without names."""
    found = []
    starts = batch.layer_ptr_host[batch.network_ptr_host].tolist()
    for (_, tensors), first, (a, b) in zip(
        batch.names, starts, pairwise(batch.network_ptr_host.tolist()), strict=False
    ):
        places = batch.layer_ptr_host[a:b].tolist()
        found += [tensors[place - first].rpartition(".")[0] for place in places]
    return tuple(found)

"""Gradients that repeat to the bit on a GPU: no op in a step of training whose backward adds in any order there."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import sne_fast
from sne_fast import SNE, Predictor

ANY_ORDER = {"IndexSelectBackward", "GatherBackward", "IndexAddBackward", "ScatterAddBackward", "IndexCopyBackward",
             "EmbeddingBagBackward", "CumsumBackward", "RepeatInterleaveBackward", "TakeBackward"}  # fmt: skip
"""Nodes of autograd whose kernels for CUDA add floats atomically. IndexBackward and EmbeddingBackward sort instead."""


def nodes(loss: torch.Tensor) -> set[str]:
    """Return the names of all nodes of a graph, without the numbers of their overloads."""
    found: set[str] = set()
    seen, left = set(), [loss.grad_fn]
    while left:
        node = left.pop()
        if node is not None and node not in seen:
            seen.add(node)
            found.add(node.name().rstrip("0123456789"))
            left.extend(parent for parent, _ in node.next_functions)
    return found


@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("order", [False, True])
def test_a_step_of_training_has_no_op_that_adds_in_any_order(order: bool, hooked: bool) -> None:
    torch.manual_seed(0)
    model = Predictor(SNE(32, 2, num_inducing=4, element_order=order, chunk_order=order), 3)
    if hooked:  # the modules are called one by one
        for module in model.modules():
            module.register_forward_hook(lambda *_: None)
    networks = [nn.Sequential(nn.Linear(9, 8), nn.Linear(8, 2)) for _ in range(3)]
    loss = nn.functional.cross_entropy(model(sne_fast.pack(networks)), torch.tensor([0, 1, 2]))
    found = nodes(loss)
    assert "EmbeddingBackward" in found and found & {"SetBlockBackward", "SetAttentionBackward"}
    assert hooked or "ChunkEncodeBackward" in found
    assert not found & ANY_ORDER

"""Parameters of stages, folded, stacked and cast together."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import sne_fast
from sne_fast.nn.stage_weights import fold_stages

NETWORKS = [nn.Linear(9, 4), nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))]


def encoder_of(**options: Any) -> sne_fast.SNE:
    torch.manual_seed(0)
    encoder = sne_fast.SNE(**{"hidden_dim": 32, "num_heads": 2, **options}).double()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.copy_(torch.randn_like(parameter) / math.sqrt(parameter.shape[-1] if parameter.dim() else 1))
    return encoder


@contextmanager
def operations() -> Iterator[list[str]]:
    names: list[str] = []

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            names.append(func.__name__.partition(".")[0])
            return func(*args, **(kwargs or {}))

    with Seen():
        yield names


@pytest.mark.parametrize("layer_norm", [True, False])
def test_folded_parameters_are_what_the_method_says(layer_norm: bool) -> None:
    encoder = encoder_of(layer_norm=layer_norm)
    weights = encoder.folded_weights()
    assert set(weights) == {"chunk_encoder", "tensor_encoder", "layer_encoder", "network_encoder"}
    for name, stage in weights.items():
        pool = encoder.get_submodule(name).pool
        query = pool.mab.fc_q(pool.S)
        torch.testing.assert_close(stage.pool.query, query)
        keys = pool.mab.fc_k.weight.unflatten(0, (2, -1))
        logits = torch.stack([query[0, 0, :16] @ keys[0], query[0, 0, 16:] @ keys[1]]) / math.sqrt(32)
        torch.testing.assert_close(stage.pool.logits, logits)
    given = weights["chunk_encoder"].chunk_encode
    first = encoder.chunk_encoder.blocks[0].mab
    w_q, w_k, w_v = (fc.weight[:, 0] for fc in (first.fc_q, first.fc_k, first.fc_v))
    slopes = [(a * w_k).unflatten(0, (2, -1)).sum(-1) / math.sqrt(32) for a in (w_q, first.fc_q.bias)]
    torch.testing.assert_close(given["logit"], torch.stack(slopes))
    torch.testing.assert_close(given["basis"], torch.stack([w_q, w_v, first.fc_q.bias + first.fc_v.bias]))
    third = encoder.chunk_encoder.blocks[2].mab
    assert torch.equal(given["w_qkv"][1], torch.cat([third.fc_q.weight, third.fc_k.weight, third.fc_v.weight]))
    assert torch.equal(given["b_qkv"][1], torch.cat([third.fc_q.bias, third.fc_k.bias, third.fc_v.bias]))
    assert torch.equal(given["w_o"][2], third.fc_o.weight) and torch.equal(given["b_o"][2], third.fc_o.bias)
    assert given["norm"].shape == (4 * layer_norm, 4, 32)
    if layer_norm:
        assert torch.equal(given["norm"][2], third.norm_parameters())


def test_several_seeds_fold_too() -> None:
    pools = [sne_fast.PMA(32, 4, seeds).double() for seeds in (3, 1, 3)]
    for pool, stage in zip(pools, fold_stages([((), pool) for pool in pools]), strict=True):
        query = pool.mab.fc_q(pool.S[0]).unflatten(1, (4, -1))
        keys = pool.mab.fc_k.weight.unflatten(0, (4, -1))
        logits = torch.einsum("kad,adh->kah", query, keys).flatten(0, 1) / math.sqrt(32)
        torch.testing.assert_close(stage.pool.logits, logits)
        assert stage.pool.query.shape == (1, pool.S.shape[1], 32)


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("layer_norm", [True, False])
def test_every_parameter_gets_a_gradient(backend: str, layer_norm: bool) -> None:
    encoder = encoder_of(layer_norm=layer_norm)
    with sne_fast.use_backend(backend):
        encoder(encoder.pack(NETWORKS)).sum().backward()
    assert not [name for name, parameter in encoder.named_parameters() if parameter.grad is None]


def test_frozen_stages_have_no_gradient_to_compute() -> None:
    encoder = encoder_of()
    encoder.chunk_encoder.requires_grad_(False)
    encoder.type_embedding.requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16):
        weights = encoder.float().folded_weights()
    frozen = weights["chunk_encoder"]
    tensors: list[Tensor] = [*frozen.chunk_encode.values(), frozen.pool.logits, frozen.pool.query, frozen.pool.w_v]
    assert not any(t.requires_grad for t in tensors)
    assert weights["tensor_encoder"].pool.logits.requires_grad


def test_autocast_casts_all_parameters_at_once() -> None:
    encoder = encoder_of().float()
    with torch.autocast("cpu", torch.bfloat16), operations() as names:
        weights = encoder.folded_weights()
    assert weights["chunk_encoder"].chunk_encode["w_qkv"].dtype == torch.bfloat16
    assert names.count("_to_copy") == 1 and names.count("cat") == 2
    with torch.no_grad(), operations() as names:
        encoder.folded_weights()
    assert names.count("_to_copy") == 0 and names.count("cat") == 2


def test_stages_alone_fold_their_own() -> None:
    encoder = encoder_of()
    batch = encoder.pack(NETWORKS)
    whole = encoder(batch)
    apart = encoder.join_layers(encoder.encode_batch_layers(batch), batch.network_ptr, batch.network_ptr_host)
    torch.testing.assert_close(apart, whole)

"""Symmetries of modules as libraries write them: caches in outputs, custom containers, programs that are no modules."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.symmetry_networks import Fused
from sne_fast import symmetry as sym
from sne_fast.symmetry.running import tensors_in


class DynamicCache:
    """A cache as transformers has it: an object that holds keys and values."""

    def __init__(self) -> None:
        self.keys: list[Tensor] = []


class Caching(Fused):
    """Attention that returns its keys and values, in several ways."""

    def __init__(self, how: str) -> None:
        super().__init__(8, 2)
        self.how = how

    def forward(self, tokens: Tensor) -> Any:
        x = self.embedding(tokens)
        b, n, e = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        k, v = (torch.cat([torch.tensor([]), kept], -2) for kept in (k, v))  # what was kept so far, and the new
        attended = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, e)
        logits = self.out(x + self.proj(attended))
        if self.how == "mapping":
            return OrderedDict(logits=logits, past_key_values=((k, v),))
        cache = DynamicCache()
        cache.keys += [k, v]
        return logits, cache


@pytest.mark.parametrize("how", ["mapping", "object"])
def test_a_returned_cache_freezes_no_heads(how: str) -> None:
    tokens = torch.randint(0, 7, (2, 5))
    found, plain = sym.trace(Caching(how), tokens), sym.trace(Fused(8, 2), tokens)
    assert sorted((g.units, g.tables) for g in found.groups) == sorted((g.units, g.tables) for g in plain.groups)
    assert not found.unsupported


def test_all_other_outputs_count() -> None:
    one, two = torch.zeros(1), torch.ones(2)
    out = {"logits": [one, (two, None)], "past_key_values": one, "hidden": OrderedDict(a=two)}
    assert [t.shape[0] for t in tensors_in(out)] == [1, 2, 2]


@pytest.mark.parametrize("program", [torch.jit.script, lambda net: torch.jit.trace(net, torch.zeros(1, 4))])
def test_torchscript_programs_are_refused_in_one_sentence(program: Any) -> None:
    net = program(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)))
    for call in (sym.trace, sym.verify):
        with pytest.raises(sym.SymmetryError, match="a TorchScript program cannot be traced as it is"):
            call(net, torch.randn(2, 4))
    inside = sym.trace(nn.Sequential(net), torch.randn(2, 4))
    assert inside.groups[0].name == "0.0.weight[0]"


def test_exported_programs_are_refused_in_one_sentence() -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    program = torch.export.export(net, (torch.zeros(1, 4),)).module()
    with pytest.raises(sym.SymmetryError, match="cannot be put into evaluation mode"):
        sym.trace(program, torch.randn(2, 4))


class Cancelling(nn.Module):
    """Differences of large numbers, which float32 rounds in another order by more than is allowed."""

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 64), nn.Linear(64, 64), nn.Linear(64, 1)
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        h = self.b(1e4 * self.a(x))
        if self.dtype is not None:
            h = h.to(self.dtype)
        total = (h + 1e5).sum(-1, keepdim=True) - 64 * 1e5 - h.sum(-1, keepdim=True)
        return self.c(self.a(x).sin()) + total.to(x.dtype)


def test_a_change_that_float32_makes_is_looked_at_in_float64() -> None:
    torch.manual_seed(0)
    net, x = Cancelling(), torch.randn(2, 4)
    assert sym.verify(net, x) < 1e-5
    assert torch.get_default_dtype() == torch.float32
    with pytest.raises(sym.SymmetryError, match="changes its output"):
        sym.verify(Cancelling(torch.float32), x)


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "GPT2LMHeadModel", "MixtralForCausalLM"])
def test_causal_models_of_transformers_have_their_heads_permuted(name: str) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    sizes = {
        "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
        "max_position_embeddings": 32, "bos_token_id": None, "eos_token_id": None,
    }  # fmt: skip
    more = {"Mixtral": {"num_local_experts": 4, "num_key_value_heads": 2}, "GPT2": {"n_inner": 48}}
    kind = name.partition("For")[0].partition("LM")[0]
    torch.manual_seed(0)
    net = getattr(transformers, name)(getattr(transformers, f"{kind}Config")(**sizes, **more.get(kind, {})))
    symmetry = sym.trace(net, {"input_ids": torch.randint(0, 50, (2, 7))})
    assert not symmetry.unsupported
    assert any(group.tables > 1 for group in symmetry.groups), symmetry.explain()  # units inside heads
    state = net.state_dict()
    permuted = symmetry.permute_state_dict(state, torch.Generator().manual_seed(0))
    moved = sum(t.numel() for key, t in state.items() if not torch.equal(t, permuted[key]))
    assert moved > 0.9 * sum(t.numel() for t in state.values())

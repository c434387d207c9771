"""The canonical form keeps the function and is the same for all permutations and signs; its jitter."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

import sne_fast
from helpers.symmetry_networks import CHUNKINGS, CONVOLUTIONS, OTHERS, TRANSFORMERS, assert_same, generator, weights
from sne_fast import symmetry as sym
from sne_fast.symmetry import CanonicalAugmentation, SymmetryError, canonicalise, permute
from sne_fast.zoo.sirens import Siren

FAMILIES = {**CONVOLUTIONS, **OTHERS, **TRANSFORMERS}


def unpack(batch, b=0):
    """Return the tensors of network `b` of a batch with chunking "kernel", which keeps values as they are stored."""
    part = batch[b]
    sizes = [torch.Size(shape).numel() for shape in part.shapes[0]]
    values = part.values * part.tensor_scale.repeat_interleave(torch.tensor(sizes))
    parts = zip(part.names[0][1], part.shapes[0], values.split(sizes), strict=True)
    return {name: x.view(shape) for name, shape, x in parts}


def turned(net, seed):
    """Return the weights of a chain of linear layers with the signs of random units turned."""
    state, g = {k: v.clone() for k, v in net.state_dict().items()}, generator(seed)
    layers = [name.removesuffix(".weight") for name in state if name.endswith(".weight")]
    for one, after in itertools.pairwise(layers):
        sign = torch.randint(2, (len(state[f"{one}.bias"]),), generator=g) * 2.0 - 1
        state[f"{one}.weight"] *= sign[:, None]
        state[f"{one}.bias"] *= sign
        state[f"{after}.weight"] *= sign
    return state


def chain(widths=(1, 12, 9, 1), seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(*(m for a, b in itertools.pairwise(widths) for m in (nn.Linear(a, b), nn.Tanh())))[:-1]


@pytest.mark.parametrize("chunking", CHUNKINGS)
@pytest.mark.parametrize("name", FAMILIES)
def test_the_form_is_a_permutation_and_its_own_form(name, chunking):
    """The form is a permutation of the network, and the form of the form is itself."""
    make_net, inputs, _ = FAMILIES[name]
    torch.manual_seed(0)
    net, inputs = make_net(), inputs()
    symmetry = sym.trace(net, inputs, check=False)
    batch = sne_fast.pack([weights(net, seed) for seed in range(2)], chunk_size=5, chunking=chunking)
    formed = canonicalise(batch, symmetry)
    assert torch.equal(formed.values.sort().values, batch.values.sort().values)
    assert_same(canonicalise(formed, symmetry), formed)
    for seed in range(3):
        assert_same(canonicalise(permute(batch, symmetry, generator(seed)), symmetry), formed)


@pytest.mark.parametrize("name", ["vit", "fused qkv", "grouped queries", "grouped", "lstm"])
def test_fresh_networks_with_biases_of_zero_have_one_form(name):
    """Units whose biases are equal are sorted by their weights."""
    make_net, inputs, _ = FAMILIES[name]
    torch.manual_seed(0)
    net = make_net()
    for key, parameter in net.named_parameters():
        if "bias" in key:
            nn.init.zeros_(parameter)
    symmetry = sym.trace(net, inputs(), check=False)
    batch = sne_fast.pack([net]).detach()
    formed = canonicalise(batch, symmetry)
    for seed in range(3):
        assert_same(canonicalise(permute(batch, symmetry, generator(seed)), symmetry), formed)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_function_stays(name):
    make_net, inputs, _ = FAMILIES[name]
    torch.manual_seed(0)
    net, inputs = make_net().eval(), inputs()
    inputs = inputs if isinstance(inputs, tuple) else (inputs,)
    net.load_state_dict(weights(net, 0))
    batch = sne_fast.pack([net], chunking="kernel", scale="none").detach()
    symmetry = sym.trace(net, inputs, check=False)
    with torch.no_grad():
        before = net(*inputs)
        net.load_state_dict(unpack(canonicalise(batch, symmetry)), strict=False)
        after = net(*inputs)
    assert (after - before).norm() <= 1e-5 * before.norm()


def test_odd_units_are_turned_and_the_function_stays():
    siren = Siren((2, 16, 8, 3))
    for p in siren.parameters():
        nn.init.normal_(p, std=0.1, generator=generator(int(p.numel())))
    symmetry, x = sym.chain_symmetry(siren.state_dict()), torch.randn(5, 2)
    batch = sne_fast.pack([siren], chunking="kernel").detach()
    for jitter in (0.0, 0.5):
        formed = unpack(canonicalise(batch, symmetry, generator(), odd=True, jitter=jitter))
        other = Siren((2, 16, 8, 3))
        other.load_state_dict(formed)
        torch.testing.assert_close(other(x), siren(x), rtol=1e-4, atol=1e-6)
        assert not torch.equal(formed["0.weight"], siren.state_dict()["0.weight"])


@pytest.mark.parametrize("scale", ["tensor", "none"])
def test_signs_and_permutations_give_one_form(scale):
    nets = [chain(seed=seed) for seed in range(3)]
    symmetry = sym.chain_symmetry(nets[0].state_dict())
    plain = sne_fast.pack(nets, scale=scale).detach()
    others = permute(sne_fast.pack([turned(net, 5) for net in nets], scale=scale), symmetry, generator(2))
    formed = canonicalise(plain, symmetry, odd=True)
    torch.testing.assert_close(canonicalise(others, symmetry, odd=True).values, formed.values, rtol=0, atol=0)
    assert_same(canonicalise(formed, symmetry, odd=True), formed)
    for b in range(3):
        state = unpack(formed, b)
        first, last = state["0.weight"][:, 0], state["4.weight"][0]
        assert torch.equal(first, first.sort().values) and first[0] >= 0
        assert torch.equal(last, last.sort().values) and last[0] >= 0
        assert not torch.equal(permute(formed, symmetry, generator()).values, formed.values)


def test_jitter_exchanges_near_units_only():
    net = chain((1, 64, 1))
    with torch.no_grad():
        net[0].weight.copy_(torch.arange(64.0)[:, None])
    symmetry, batch = sym.chain_symmetry(net.state_dict()), sne_fast.pack([net], scale="none").detach()
    one, same, other = (canonicalise(batch, symmetry, generator(s), jitter=0.05).values[:64] for s in (0, 0, 1))
    assert torch.equal(one, same) and not torch.equal(one, other) and not torch.equal(one, batch.values[:64])
    assert (one - torch.arange(64.0)).abs().max() < 15  # noise of about 1.8
    assert torch.equal(canonicalise(batch, symmetry, generator(0)).values, batch.values)


def test_layers_without_ends_sort_by_bias_else_by_everything():
    deep = chain((2, 6, 7, 5, 2))
    symmetry = sym.chain_symmetry(deep.state_dict())
    formed = unpack(canonicalise(sne_fast.pack([deep]).detach(), symmetry))
    assert torch.equal(formed["2.bias"], formed["2.bias"].sort().values)
    bare = nn.Sequential(*(m for m in (nn.Linear(2, 6, False), nn.Linear(6, 7, False), nn.Linear(7, 3, False))))
    symmetry = sym.chain_symmetry(bare.state_dict())
    batch = sne_fast.pack([bare], scale="none").detach()
    formed = canonicalise(batch, symmetry)
    assert_same(canonicalise(permute(batch, symmetry, generator()), symmetry), formed)


def test_mixed_architectures_and_rows():
    nets = [chain((1, 4, 1), 0), chain((1, 6, 5, 1), 1), chain((1, 4, 1), 2)]
    symmetries = [sym.chain_symmetry(net.state_dict()) for net in nets]
    batch = sne_fast.pack(nets).detach()
    alone = [canonicalise(batch[b], symmetries[b], odd=True).values for b in range(3)]
    assert torch.equal(canonicalise(batch, symmetries, odd=True).values, torch.cat(alone))
    augment = CanonicalAugmentation(symmetries, odd=True, jitter=0.3)
    once = augment(batch[[2, 1]], [2, 1], generator(3))
    assert_same(once, canonicalise(batch[[2, 1]], [symmetries[2], symmetries[1]], generator(3), odd=True, jitter=0.3))
    assert len(canonicalise(batch[0:0], symmetries[0])) == 0


def test_gradients_reach_the_values():
    net = chain()
    symmetry = sym.chain_symmetry(net.state_dict())
    formed = canonicalise(sne_fast.pack([net], scale="none"), symmetry, odd=True)
    formed.values.square().sum().backward()
    torch.testing.assert_close(net[0].weight.grad, 2 * net[0].weight)


def test_unsupported_networks_are_refused():
    net = chain()
    symmetry, batch = sym.chain_symmetry(net.state_dict()), sne_fast.pack([net]).detach()
    with pytest.raises(SymmetryError, match="one per network"):
        canonicalise(batch, [symmetry, symmetry])
    with pytest.raises(SymmetryError, match=r"canonicalise: .*must have shape"):
        canonicalise(sne_fast.pack([chain((1, 5, 9, 1))]).detach(), symmetry)
    normed = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 1))
    found = sym.trace(normed, torch.randn(2, 3))
    with pytest.raises(SymmetryError, match=r"'1.weight' is neither"):
        canonicalise(sne_fast.pack([normed]).detach(), found, odd=True)

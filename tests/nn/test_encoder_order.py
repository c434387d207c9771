"""Sets are sets and lists are lists: what the encoder does for any order of elements, chunks, tensors and layers."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import sne_fast
from helpers.brute_force import Cut, Network, arrays, oracle_for
from helpers.encoders import encoder_for
from helpers.errors import largest_error
from helpers.networks import make

F64 = torch.float64


@pytest.fixture(autouse=True, scope="module")
def reference():
    with sne_fast.use_backend("reference"):
        yield


CONFIG = {"hidden_dim": 32, "num_heads": 2, "chunk_size": 4, "num_inducing": 3}


def batch_of(networks: list[Network], levels: list[list[int]] | None = None) -> sne_fast.WeightBatch:
    return sne_fast.WeightBatch(
        **arrays(networks, levels), chunk_size=CONFIG["chunk_size"], chunking="flat", order="definition"
    )


@st.composite
def random_network(draw: st.DrawFn) -> Network:
    """Draw 1-3 layers of 1-3 tensors of 1-4 chunks of 1-4 numbers, any types; numbers all different."""
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    layers = []
    for _ in range(draw(st.integers(1, 3))):
        layer = []
        for _ in range(draw(st.integers(1, 3))):
            lengths = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
            chunks = [torch.randn(n, dtype=F64, generator=g) for n in lengths]
            scale = 0.2 + torch.rand((), dtype=F64, generator=g)
            layer.append(Cut(draw(st.integers(0, 63)), scale, chunks))
        layers.append(layer)
    return layers


def deep(network: Network) -> Network:
    return [[dataclasses.replace(t, chunks=list(t.chunks)) for t in layer] for layer in network]


ATTENTIONS = ["sab", "isab"]
few = settings(max_examples=15, deadline=None, derandomize=True)


@pytest.fixture(scope="module")
def encoders() -> dict[tuple, nn.Module]:
    return {
        (e, c, a): encoder_for({**CONFIG, "element_order": e, "chunk_order": c, "set_attention": a})
        for e, c, a in itertools.product((True, False), (True, False), ATTENTIONS)
    }


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_any_batch_by_hand_equals_brute_force(encoders, attention: str) -> None:
    @few
    @given(st.lists(random_network(), min_size=1, max_size=3))
    def check(networks: list[Network]) -> None:
        encoder = encoders[True, True, attention]
        oracle = oracle_for(encoder, **CONFIG, set_attention=attention)
        assert largest_error(encoder(batch_of(networks)), oracle(networks)) <= 1e-12

    check()


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("on", [False, True])
def test_order_of_elements(encoders, attention: str, on: bool) -> None:
    """element_order off: elements of a chunk may be permuted; on: z changes."""

    @few
    @given(random_network(), st.randoms(use_true_random=False))
    def check(network: Network, random) -> None:
        other, moved = deep(network), False
        for tensor in itertools.chain(*other):
            for n, chunk in enumerate(tensor.chunks):
                order = list(range(len(chunk)))
                random.shuffle(order)
                moved |= order != sorted(order)
                tensor.chunks[n] = chunk[order]
        z = encoders[on, True, attention](batch_of([network, other]))
        error = largest_error(z[1], z[0])
        assert error > 1e-9 if on and moved else error <= 1e-12

    check()


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("on", [False, True])
def test_order_of_chunks(encoders, attention: str, on: bool) -> None:
    """chunk_order off: whole chunks of a tensor (of any lengths) may be permuted; on: z changes."""

    @few
    @given(random_network(), st.randoms(use_true_random=False))
    def check(network: Network, random) -> None:
        other, moved = deep(network), False
        for tensor in itertools.chain(*other):
            order = list(range(len(tensor.chunks)))
            random.shuffle(order)
            moved |= order != sorted(order)
            tensor.chunks = [tensor.chunks[n] for n in order]
        z = encoders[True, on, attention](batch_of([network, other]))
        error = largest_error(z[1], z[0])
        assert error > 1e-9 if on and moved else error <= 1e-12

    check()


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_order_of_tensors_and_of_layers_with_their_levels(encoders, attention: str) -> None:
    """Tensors of a layer are a set; so are layers, once each carries its level."""

    @few
    @given(random_network(), st.randoms(use_true_random=False))
    def check(network: Network, random) -> None:
        other = deep(network)
        for layer in other:
            random.shuffle(layer)
        levels = list(range(len(network)))
        shuffled = list(levels)
        random.shuffle(shuffled)
        other = [other[n] for n in shuffled]
        z = encoders[True, True, attention](batch_of([network, other], [levels, shuffled]))
        assert largest_error(z[1], z[0]) <= 1e-12
        if shuffled != levels:  # the same layers at other levels
            z = encoders[True, True, attention](batch_of([network, other]))
            assert largest_error(z[1], z[0]) > 1e-9

    check()


@pytest.mark.slow
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_what_belongs_to_which_set_matters(encoders, attention: str) -> None:
    """The same numbers in the same order, cut at another place on any of the four levels, are another network."""

    @few
    @given(random_network())
    def check(network: Network) -> None:
        encoder = encoders[False, False, attention]

        def differs(other: Network, levels: list[int] | None = None) -> None:
            own = list(range(len(network)))
            z = encoder(batch_of([network, other], [own, own if levels is None else levels]))
            assert largest_error(z[1], z[0]) > 1e-9

        for k, layer in enumerate(network):
            for t, tensor in enumerate(layer):
                for n, chunk in enumerate(tensor.chunks):
                    if len(chunk) > 1:  # one chunk as two
                        other = deep(network)
                        other[k][t].chunks[n : n + 1] = [chunk[:1], chunk[1:]]
                        differs(other)
                        break
                if len(tensor.chunks) > 1:  # one tensor as two
                    other = deep(network)
                    halves = (tensor.chunks[:1], tensor.chunks[1:])
                    other[k][t : t + 1] = [dataclasses.replace(tensor, chunks=half) for half in halves]
                    differs(other)
            if len(layer) > 1:  # one layer as two at the same level
                other = deep(network)
                other[k : k + 1] = [layer[:1], layer[1:]]
                levels = [n for n in range(len(network)) for _ in range(1 + (n == k))]
                differs(other, levels)
            other = deep(network)  # another type, another scale
            other[k][0].type = (other[k][0].type + 1) % 64
            differs(other)
            other = deep(network)
            other[k][0].scale = other[k][0].scale * 1.5
            differs(other)

    check()


def test_hidden_neurons_in_another_order_are_another_input() -> None:
    """A permutation that keeps the function does change z: that is what the paper's logit invariance trains away."""
    network, other = make("mlp", 1, F64), make("mlp", 1, F64)
    order = torch.tensor([3, 0, 2, 1, 6, 5, 4])
    with torch.no_grad():
        other[0].weight.copy_(network[0].weight[order])
        other[0].bias.copy_(network[0].bias[order])
        other[2].weight.copy_(network[2].weight[:, order])
    x = torch.randn(4, 5, dtype=F64)
    torch.testing.assert_close(network(x), other(x))
    z = encoder_for({"hidden_dim": 32, "num_heads": 2})([network, other])
    assert largest_error(z[1], z[0]) > 1e-4

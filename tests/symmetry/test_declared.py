"""Symmetries declared explicitly or read off the names of a chain; `verify` catches wrong ones."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from helpers.networks import make
from helpers.symmetry_networks import Fused
from sne_fast import symmetry as sym
from sne_fast.zoo.architectures import FAMILIES as ZOO


def conv_net(norm=None):
    layers = [nn.Conv2d(1, 4, 3), *([norm] if norm is not None else []), nn.ReLU(), nn.Flatten(), nn.Linear(36, 2)]
    return nn.Sequential(*layers)


def uses(symmetry):
    return sorted(sorted(use for use in group.uses) for group in symmetry.groups)


IMAGES = torch.randn(2, 1, 5, 5, generator=torch.Generator().manual_seed(0))


# ---------------------------------------------------------------------------------------------------------------------
# Declared explicitly


def test_there_is_one_from_spec():
    assert sym.from_spec == sym.Symmetry.from_spec


def test_the_spec_of_a_flattened_convolution_is_what_trace_finds():
    net = conv_net(nn.BatchNorm2d(4))
    entries = [
        ("0.weight", 0),
        ("0.bias", 0),
        *((f"1.{k}", 0) for k in ("weight", "bias", "running_mean", "running_var")),
    ]
    symmetry = sym.Symmetry.from_spec({"conv": [*entries, ("4.weight", 1, 9)]}, net.state_dict())
    assert uses(symmetry) == uses(sym.trace(net, IMAGES))
    assert sym.verify(net, IMAGES, symmetry) < 1e-5


def test_the_spec_of_fused_attention_with_nested_groups():
    net, tokens = Fused(8, 2), torch.randint(0, 7, (2, 5), generator=torch.Generator().manual_seed(0))
    spec = {
        "heads": [("qkv.weight", 0, 4, (0, 8)), ("qkv.weight", 0, 4, (8, 16)), ("qkv.weight", 0, 4, (16, 24)),
                  ("proj.weight", 1, 4)],
        "queries and keys": [("qkv.weight", 0, 1, (0, 8)), ("qkv.weight", 0, 1, (8, 16))],
        "values": [("qkv.weight", 0, 1, (16, 24)), ("proj.weight", 1)],
        "stream": [("embedding.weight", 1), ("out.weight", 1), ("norm.weight", 0), ("norm.bias", 0),
                   ("qkv.weight", 1), ("proj.weight", 0), ("proj.bias", 0)],
    }  # fmt: skip
    symmetry = sym.from_spec(spec, net.state_dict(), units={"queries and keys": 4, "values": 4})
    assert sorted(g.units for g in symmetry.groups) == [2, 4, 4, 8]
    assert sym.verify(net, tokens, symmetry) < 1e-5
    whole = {"heads": [("qkv.weight", 0, 4), ("proj.weight", 1, 4)]}  # the blocks repeat: queries, keys and values
    symmetry = sym.from_spec(whole, net.state_dict(), units={"heads": 2})
    assert sym.verify(net, tokens, symmetry) < 1e-5


WRONG = {
    "flatten forgotten": {"conv": [("0.weight", 0), ("0.bias", 0), ("1.weight", 0), ("1.bias", 0),
                                   ("1.running_mean", 0), ("1.running_var", 0)]},
    "flatten the other way": {"conv": [("0.weight", 0), ("0.bias", 0), ("1.weight", 0), ("1.bias", 0),
                                       ("1.running_mean", 0), ("1.running_var", 0), ("4.weight", 1)]},
    "running mean forgotten": {"conv": [("0.weight", 0), ("0.bias", 0), ("1.weight", 0), ("1.bias", 0),
                                        ("1.running_var", 0), ("4.weight", 1, 9)]},
    "running variance forgotten": {"conv": [("0.weight", 0), ("0.bias", 0), ("1.weight", 0), ("1.bias", 0),
                                            ("1.running_mean", 0), ("4.weight", 1, 9)]},
    "bias forgotten": {"conv": [("0.weight", 0), ("1.weight", 0), ("1.bias", 0), ("1.running_mean", 0),
                                ("1.running_var", 0), ("4.weight", 1, 9)]},
    "kernel positions": {"kernel": [("0.weight", 2)]},
    "outputs": {"out": [("4.weight", 0), ("4.bias", 0)]},
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_verify_catches_wrong_specs(wrong):
    net = conv_net(nn.BatchNorm2d(4))
    spec = dict(WRONG[wrong])
    units = {"conv": 4} if wrong != "flatten the other way" else None
    symmetry = sym.from_spec(spec, net.state_dict(), units=units)
    with pytest.raises(sym.SymmetryError, match="verify: a permutation of 'spec' changes its output by"):
        sym.verify(net, IMAGES, symmetry)


def test_verify_replaces_fresh_statistics():
    """A fresh BatchNorm treats all channels alike, so a wrong spec passes with the given weights."""
    net = conv_net(nn.BatchNorm2d(4))
    symmetry = sym.from_spec({"conv": [("0.weight", 0), ("0.bias", 0), ("4.weight", 1, 9)]}, net.state_dict())
    assert sym.verify(net, IMAGES, symmetry, randomise=False) < 1e-5
    with pytest.raises(sym.SymmetryError, match="changes its output"):
        sym.verify(net, IMAGES, symmetry)


def test_verify_draws_again_where_nothing_shows():
    """In eleven narrow layers all ReLUs are often off, and then any permutation passes."""
    net, x = make("mlp_deep"), torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    wrong = sym.from_spec({"first": [("0.weight", 0), ("0.bias", 0)]}, net.state_dict())
    for seed in range(20):
        with pytest.raises(sym.SymmetryError, match="changes its output"):
            sym.verify(net, x, wrong, generator=torch.Generator().manual_seed(seed))


def test_verify_refuses_outputs_that_are_not_finite():
    net = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    symmetry = sym.trace(net, torch.randn(2, 2))
    with pytest.raises(sym.SymmetryError, match="by inf of its size"):
        sym.verify(net, torch.full((1, 2), float("nan")), symmetry)


@pytest.mark.parametrize(
    "groups, message",
    [
        ({"a": [("9.weight", 0)]}, "group 'a': no tensor '9.weight' in the state_dict"),
        ({"a": [("0.weight", 4)]}, r"'0.weight' of shape \(4, 1, 3, 3\) has no dimension 4"),
        ({"a": [("0.weight", 0), ("3.weight", 1, 7)]}, "group 'a': 4 units of 7 do not fit positions 0..35"),
        ({"a": [("3.weight", 1, 1, (0, 20))], "b": [("3.weight", 1, 1, (10, 36))]}, "overlap at position 10"),
        ({"a": [("0.weight", 0)], "b": [("0.bias", 0), ("0.weight", 0)]}, "must hold whole multiples of the 4"),
        ({"a": [("3.weight", 1, 9, (20, 40))]}, "do not fit positions 20..39"),
    ],
)
def test_specs_that_do_not_fit(groups, message):
    with pytest.raises(sym.SymmetryError, match=message):
        sym.from_spec(groups, conv_net().state_dict())


# ---------------------------------------------------------------------------------------------------------------------
# Plain chains


CHAINS = {
    "mlp": (lambda: make("mlp_deep"), lambda: torch.randn(2, 3), None),
    "cnn": (lambda: make("cnn"), lambda: torch.randn(2, 1, 4, 6), None),
    "lenet": (lambda: make("lenet"), lambda: torch.randn(2, 1, 28, 28), None),
    "group norm": (lambda: conv_net(nn.GroupNorm(2, 4)), lambda: IMAGES, {"1": 2}),
    "norm of one group": (lambda: conv_net(nn.GroupNorm(1, 4)), lambda: IMAGES, {"1": 1}),
    "no affine": (lambda: conv_net(nn.BatchNorm2d(4, affine=False)), lambda: IMAGES, None),
    **{a: (f, lambda: torch.randn(2, 1, 8, 8), {"1": 2, "4": 2} if "groupnorm" in a else None)
       for family in ("mlp", "cnn") for a, f in ZOO[family].items()},
}  # fmt: skip


@pytest.mark.parametrize("name", CHAINS)
def test_chains_are_what_trace_finds(name):
    make_net, inputs, norm_groups = CHAINS[name]
    torch.manual_seed(0)
    net, inputs = make_net(), inputs()
    symmetry = sym.chain_symmetry(net.state_dict(), norm_groups=norm_groups)
    assert uses(symmetry) == uses(sym.trace(net, inputs))
    assert sym.verify(net, inputs, symmetry) < 1e-5


def test_networks_that_are_not_chains_are_refused_by_name():
    with pytest.raises(
        sym.SymmetryError, match=r"norm '1' after a convolution has no running statistics.*norm_groups="
    ):
        sym.chain_symmetry(conv_net(nn.GroupNorm(2, 4)).state_dict())
    grouped = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3, groups=2))
    with pytest.raises(sym.SymmetryError, match="layer '1' takes 2 inputs after 4 units: not a plain chain, or a gr"):
        sym.chain_symmetry(grouped.state_dict())
    with pytest.raises(sym.SymmetryError, match="layer '0' is no linear layer, convolution or norm"):
        sym.chain_symmetry(nn.Sequential(nn.LSTM(2, 3)).state_dict())
    with pytest.raises(sym.SymmetryError, match="norm '1' of 5 units follows 4 units"):
        sym.chain_symmetry({"0.weight": torch.randn(4, 2), "1.weight": torch.randn(5)})
    with pytest.raises(sym.SymmetryError, match="norm '1' of 4 units cannot have 3 groups"):
        sym.chain_symmetry(conv_net(nn.GroupNorm(2, 4)).state_dict(), norm_groups={"1": 3})
    with pytest.raises(ValueError, match="state_dict"):
        sym.chain_symmetry({})


def test_verify_catches_a_shortcut_taken_for_a_chain():
    class Shortcut(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            h = self.a(x)
            return self.c(h + F.relu(self.b(h)))

    net, x = Shortcut(), torch.randn(3, 4)
    with pytest.raises(sym.SymmetryError, match="a permutation of 'chain' changes its output"):
        sym.verify(net, x, sym.chain_symmetry(net.state_dict()))
    assert [group.units for group in sym.trace(net, x).groups] == [4]


def test_a_chain_whose_order_is_in_doubt_is_refused_until_it_is_chosen():
    """Equal widths fit in any order: a file that lost the order of its layers would give a wrong symmetry."""
    net = nn.Sequential(OrderedDict(stem=nn.Linear(6, 6), act=nn.Tanh(), body=nn.Linear(6, 6), out=nn.Linear(6, 6)))
    state, x = net.state_dict(), torch.randn(3, 6)
    assert sym.verify(net, x, sym.chain_symmetry(state)) < 1e-5
    lost = {key: state[key] for key in sorted(state)}  # as plain safetensors files have it
    with pytest.raises(sym.SymmetryError, match=r"'body', 'out', 'stem', by their names in the order 'stem', 'body'"):
        sym.chain_symmetry(lost)
    found = sym.chain_symmetry(lost, order="names")
    assert found.groups == sym.chain_symmetry(state).groups
    assert len(sym.chain_symmetry(lost, order="definition").groups) == 2
    with pytest.raises(sym.SymmetryError, match="order must be"):
        sym.chain_symmetry(state, order="alphabet")

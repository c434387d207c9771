"""Traced permutations keep the function of every family, and all that there are is found."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from helpers.networks import make
from helpers.symmetry_networks import CONVOLUTIONS, OTHERS, TRANSFORMERS, Fused
from sne_fast import symmetry as sym
from sne_fast.symmetry.checking import random_weights
from sne_fast.zoo.architectures import FAMILIES as ZOO

FAMILIES = {**CONVOLUTIONS, **TRANSFORMERS, **OTHERS}


def sizes(symmetry: sym.Symmetry) -> list[tuple[int, int]]:
    """Return the number of units and of permutations of every group, sorted."""
    return sorted((group.units, group.tables) for group in symmetry.groups)


def uses(symmetry: sym.Symmetry) -> list[set[tuple[str, int]]]:
    return [uses_of(group) for group in symmetry.groups]


def uses_of(group: sym.Group) -> set[tuple[str, int]]:
    return {use[:2] for use in group.uses}


# ---------------------------------------------------------------------------------------------------------------------
# Every family


@pytest.mark.parametrize("name", FAMILIES)
def test_families_keep_their_function(name):
    make_net, inputs, expected = FAMILIES[name]
    torch.manual_seed(0)
    net, inputs = make_net(), inputs()
    symmetry = sym.trace(net, inputs, strict=True)
    assert sizes(symmetry) == sorted(expected)
    assert sym.verify(net, inputs, symmetry) < 1e-5


# Biases that a normalisation or the softmax cancels, and an expert without a token.
WITHOUT_EFFECT = {("instance and layer norm", "0.bias"), ("grouped queries", "k.bias")} | {
    ("routed experts", f"experts.1.{i}.{name}") for i in (0, 2) for name in ("weight", "bias")
}


NO_FLOAT64 = "experts in groups"  # torch has no such product in float64


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != NO_FLOAT64])
def test_every_group_matters(name):
    """Leaving one tensor unpermuted changes the function: each use of each group is needed."""
    make_net, inputs, _ = FAMILIES[name]
    torch.manual_seed(0)
    net, inputs = make_net().double().eval(), inputs()
    inputs = tuple(
        t.double() if t.is_floating_point() else t for t in (inputs if isinstance(inputs, tuple) else (inputs,))
    )
    symmetry = sym.trace(net, inputs, check=False)
    generator = torch.Generator().manual_seed(1)
    weights = {**dict(net.named_buffers()), **random_weights(net, generator)}
    permuted = symmetry.permute_state_dict(weights, generator)
    assert sym.verify(net, inputs, symmetry, tolerance=1e-12) < 1e-12

    def run(state):
        with torch.no_grad():
            out = torch.func.functional_call(net, state, inputs, tie_weights=False)
        return out[0] if isinstance(out, tuple) else out

    before = run(weights)
    assert any(not torch.equal(weights[key], permuted[key]) for key in weights)
    for key in weights:
        if torch.equal(weights[key], permuted[key]) or (name, key) in WITHOUT_EFFECT:
            continue
        mixed = run({**permuted, key: weights[key]})
        assert float((mixed - before).abs().max()) > 1e-6 * float(before.abs().max()), key


@pytest.mark.parametrize("architecture", [name for family in ("mlp", "cnn") for name in ZOO[family]])
def test_zoo_architectures(architecture):
    net = {**ZOO["mlp"], **ZOO["cnn"]}[architecture]()
    x = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    symmetry = sym.trace(net, x, strict=True)
    assert sym.verify(net, x, symmetry) < 1e-5
    layers = [(f"{name}.weight", m.weight) for name, m in net.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    for key, weight in layers[:-1]:  # all hidden units of all layers; those of a GroupNorm as groups and their members
        found = [group.units for group in symmetry.groups if (key, 0) in uses_of(group)]
        assert math.prod(found) == weight.shape[0]


def test_zoo_transformer():
    net, x = ZOO["vit"]["vit"](), torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    symmetry = sym.trace(net, x, strict=True)
    assert sizes(symmetry) == sorted([(16, 1), *[(2, 1), (8, 2), (8, 2), (32, 1)] * 2])
    assert sym.verify(net, x, symmetry) < 1e-5


# ---------------------------------------------------------------------------------------------------------------------
# Symmetries that are found


def test_conv_flatten_linear_permutes_blocks_of_columns():
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2))
    symmetry = sym.trace(net, torch.randn(2, 1, 4, 4))
    state = {k: torch.arange(float(t.numel())).reshape(t.shape) for k, t in net.state_dict().items()}
    out = symmetry.permute_state_dict(state, tables=torch.tensor([2, 0, 1]))
    torch.testing.assert_close(out["0.weight"], state["0.weight"][[2, 0, 1]], rtol=0, atol=0)
    torch.testing.assert_close(out["0.bias"], state["0.bias"][[2, 0, 1]], rtol=0, atol=0)
    columns = [8, 9, 10, 11, 0, 1, 2, 3, 4, 5, 6, 7]
    torch.testing.assert_close(out["3.weight"], state["3.weight"][:, columns], rtol=0, atol=0)
    torch.testing.assert_close(out["3.bias"], state["3.bias"], rtol=0, atol=0)


def test_batch_norm_statistics_are_permuted_with_their_channels():
    net = nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))
    symmetry = sym.trace(net, torch.randn(2, 1, 5, 5))
    assert uses(symmetry) == [
        {("0.weight", 0), ("3.weight", 1)} | {(f"1.{k}", 0) for k in ("weight", "bias", "running_mean", "running_var")}
    ]


def test_residual_streams_are_tied_and_projections_too():
    net = make("resnet_block")
    symmetry = sym.trace(net, torch.randn(2, 1, 8, 8), strict=True)
    first, inner, *_ = uses(symmetry)
    assert {("stem.weight", 0), ("blocks.0.conv2.weight", 0), ("blocks.1.shortcut.0.weight", 1)} <= first
    assert ("blocks.0.conv1.weight", 0) in inner and ("stem.weight", 0) not in inner
    assert any({("blocks.1.conv2.weight", 0), ("blocks.1.shortcut.0.weight", 0)} <= group for group in uses(symmetry))


def test_heads_are_permuted_as_wholes_and_units_inside_each_by_themselves():
    symmetry = sym.trace(Fused(8, 2), torch.randint(0, 7, (2, 5)))
    by_name = {group.name: group for group in symmetry.groups}
    heads = by_name["qkv.weight[0] from 0 in steps of 4"]
    queries = by_name["qkv.weight[0] from 0"]
    values = by_name["qkv.weight[0] from 16"]
    assert (heads.units, heads.tables) == (2, 1) and (queries.units, queries.tables) == (4, 2)
    assert {use[2] for use in heads.uses if use[0] == "qkv.weight"} == {0, 8, 16}  # of queries, keys and values
    assert {use[2] for use in queries.uses if use[0] == "qkv.weight"} == {0, 8}  # of queries and keys
    assert ("proj.weight", 1) in uses_of(values)


def test_tied_tensors_are_permuted_once_under_every_name():
    net = Fused(8, 2)
    symmetry = sym.trace(net, torch.randint(0, 7, (2, 5)))
    permuted = symmetry.permute_state_dict(net.state_dict(), torch.Generator().manual_seed(3))
    assert torch.equal(permuted["out.weight"], permuted["embedding.weight"])
    assert not torch.equal(permuted["out.weight"], net.out.weight)
    assert set(symmetry.shapes) == set(dict(net.named_parameters()))


def test_a_permuted_copy_of_a_resnet_computes_the_same():
    net, x = make("resnet_block").eval(), torch.randn(2, 1, 8, 8)
    symmetry = sym.trace(net, x)
    other = copy.deepcopy(net)
    other.load_state_dict(symmetry.permute_state_dict(net.state_dict(), torch.Generator().manual_seed(0)))
    torch.testing.assert_close(other(x), net(x), rtol=1e-4, atol=1e-5)
    assert not torch.equal(other.stem.weight, net.stem.weight)


def test_trace_leaves_the_module_as_it_is():
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(), nn.Conv2d(4, 2, 1)).train()
    net[1].eval()
    before = copy.deepcopy(net.state_dict())
    fast, onednn = torch.backends.mha.get_fastpath_enabled(), torch.backends.mkldnn.is_available()
    sym.trace(net, torch.randn(2, 1, 5, 5))
    assert [m.training for m in net] == [True, False, True, True, True] and net.training
    assert all(torch.equal(t, before[k]) for k, t in net.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    assert torch.backends.mha.get_fastpath_enabled() == fast and torch.backends.mkldnn.is_available() == onednn


def test_a_compiled_module_is_traced_as_the_original():
    net, x = make("mlp"), torch.randn(2, 5)
    compiled = torch.compile(net, backend="eager")
    symmetry = sym.trace(compiled, x, strict=True)
    assert uses(symmetry) == uses(sym.trace(net, x)) and sym.verify(compiled, x, symmetry) < 1e-5
    moved = symmetry.permute_state_dict(compiled.state_dict(), torch.Generator().manual_seed(0))
    assert list(moved) == list(compiled.state_dict()) and not torch.equal(moved["_orig_mod.0.weight"], net[0].weight)


def test_keyword_and_several_inputs():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 6), nn.Linear(2, 6), nn.Linear(6, 2)

        def forward(self, x, y):
            return {"logits": self.c((self.a(x) * self.b(y)).relu()), "none": None}

    x, y = torch.randn(4, 3), torch.randn(4, 2)
    for inputs in ((x, y), {"y": y, "x": x}):
        symmetry = sym.trace(Two(), inputs, strict=True)
        assert sizes(symmetry) == [(6, 1)]
        assert ("b.weight", 0) in uses(symmetry)[0]


# ---------------------------------------------------------------------------------------------------------------------
# Units that are frozen, and modules that are refused


class Unknown(nn.Module):
    """A matrix function without a rule, between two plain hidden layers."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(5, 2)
        self.idle = nn.Linear(3, 3)

    def forward(self, x):
        h = torch.linalg.svdvals(self.a(x))
        return self.c(self.b(h).tanh())


def test_unknown_operations_freeze_what_they_touch():
    net, x = Unknown(), torch.randn(2, 6, 4)
    symmetry = sym.trace(net, x)
    assert sizes(symmetry) == [(5, 1)]
    (why,) = symmetry.unsupported
    assert "no rule for aten._linalg_svd" in why
    text = symmetry.explain()
    assert "permuted  5 units: b.weight[0]" in text and "no rule for aten._linalg_svd" in text
    assert symmetry.frozen["a.weight[0]"] == why
    assert symmetry.frozen["idle.weight[0]"] == "not used by the example"
    assert symmetry.frozen["a.weight[1]"] == "input" and symmetry.frozen["c.weight[0]"] == "output"
    with pytest.raises(sym.SymmetryError, match=r"no rule for aten._linalg_svd.*strict=False"):
        sym.trace(net, x, strict=True)


def test_the_reason_names_the_module():
    net = nn.Sequential(nn.Linear(4, 6), nn.Fold((2, 3), (1, 1)), nn.Flatten(), nn.Linear(36, 2))
    net[1].forward = lambda h: torch.linalg.svdvals(h.reshape(-1, 2, 3)).repeat(1, 18)
    with pytest.raises(sym.SymmetryError, match=r"no rule for aten._linalg_svd.default \(in '1'\)"):
        sym.trace(net, torch.randn(1, 4), strict=True)


def freezing(forward):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)
            self.register_buffer("scale", torch.arange(6.0) + 1)

        def forward(self, x):
            return forward(self, x)

    return Net()


@pytest.mark.parametrize(
    "forward, reason",
    [
        (lambda n, x: n.c(n.b(n.a(x)) * n.scale), "meets the constant 'scale'"),
        (lambda n, x: n.c(n.b(n.a(x)).cumsum(-1)), "the order along it matters"),
        (lambda n, x: n.c(n.b(n.a(x)).flip(-1)), "the order along it matters"),
        (lambda n, x: n.c(n.b(n.a(x))[:, [3, 1, 2, 0, 5, 4]]), "picked by index"),
        (lambda n, x: n.c(n.b(n.a(x)) * torch.arange(6.0)), "a constant"),
        (lambda n, x: n.c(n.b(n.a(x))) * (n.b(n.a(x)).argmax(-1, keepdim=True)), "a position along it is reported"),
        (lambda n, x: n.c(n.b(n.a(x))) * n.b(n.a(x))[0, 0].item(), "its positions are picked by index"),
        (lambda n, x: n.c(n.b(n.a(x))) @ torch.from_numpy(n.b.weight.numpy())[:2], "its memory is reached past torch"),
        (lambda n, x: n.c(n.b(n.a(x)).sort(-1)[0]), "the order along it matters"),
        (lambda n, x: n.c(F.conv1d(n.b(n.a(x))[:, None], torch.ones(1, 1, 3), padding=1)[:, 0]), "slides along it"),
    ],
)
def test_axes_whose_positions_matter_are_frozen(forward, reason):
    net, x = freezing(forward), torch.randn(3, 4)
    symmetry = sym.trace(net, x)  # ends with verify
    assert reason in symmetry.frozen["b.weight[0]"]
    assert not any(("b.weight", 0) in group for group in uses(symmetry))


def test_units_picked_by_position_are_frozen_and_the_rest_is_permuted():
    net = freezing(lambda n, x: n.c(torch.cat([n.b(n.a(x))[:, :2].cumsum(-1), n.b(n.a(x))[:, 2:]], -1)))
    symmetry = sym.trace(net, torch.randn(3, 4))
    assert sizes(symmetry) == [(4, 1), (6, 1)]


def test_values_read_in_python_and_data_are_followed():
    def forward(n, x):
        h = n.b(n.a(x))
        return n.c(F.linear(h if h.sum().item() > 0 else -h, n.b.weight.data))

    symmetry = sym.trace(freezing(forward), torch.randn(3, 4))
    assert sizes(symmetry) == [(6, 1)] and {("b.weight", 0), ("b.weight", 1), ("a.weight", 0)} <= uses(symmetry)[0]


def test_in_place_changes_of_views_are_followed():
    def forward(n, x):
        h = n.b(n.a(x))
        part = h[:, :3]
        part *= n.a(x)[:, :3]
        h.relu_()
        return n.c(h)

    net, x = freezing(forward), torch.randn(3, 4)
    symmetry = sym.trace(net, x)
    assert sizes(symmetry) == [(3, 1), (3, 1), (3, 1)]
    assert any({("a.weight", 0), ("b.weight", 0), ("c.weight", 1)} <= group for group in uses(symmetry))


def test_no_tensor_in_the_output():
    net = freezing(lambda n, x: None)
    with pytest.raises(sym.SymmetryError, match="the output of Net must hold a tensor, got NoneType"):
        sym.trace(net, torch.randn(3, 4))


def test_lazy_parameters_are_refused_by_name():
    net = nn.Sequential(nn.Linear(4, 6), nn.LazyLinear(3))
    with pytest.raises(sym.SymmetryError, match=r"trace: '1.weight' is not initialised yet \(lazy module\); run"):
        sym.trace(net, torch.randn(2, 4))


def test_half_precision_is_checked_in_float32():
    net, x = make("mlp").bfloat16(), torch.randn(4, 5).bfloat16()
    assert sizes(sym.trace(net, x)) == [(6, 1), (7, 1)]
    assert 0 < sym.verify(net, x) < 1e-5
    assert all(p.dtype == torch.bfloat16 for p in net.parameters())


def test_lossy_control_flow_is_caught_by_the_check():
    """The tracer does not see values that `.tolist()` reads; the check at the end of `trace` fails."""
    net = freezing(lambda n, x: n.c(n.b(n.a(x))) * torch.tensor(n.b(n.a(x)).tolist())[:, :1])
    with pytest.raises(sym.SymmetryError, match="verify: a permutation of 'Net' changes its output by"):
        sym.trace(net, torch.randn(3, 4))


# ---------------------------------------------------------------------------------------------------------------------
# Symmetry objects


def test_draws_are_permutations_and_deterministic():
    symmetry = sym.trace(Fused(8, 2), torch.randint(0, 7, (2, 5)))
    tables = symmetry.draw(torch.Generator().manual_seed(0), 50)
    assert tables.shape == (50, symmetry.table_size) and tables.dtype == torch.int64
    assert torch.equal(tables, symmetry.draw(torch.Generator().manual_seed(0), 50))
    assert not torch.equal(tables, symmetry.draw(torch.Generator().manual_seed(1), 50))
    start = 0
    for group in symmetry.groups:
        for _ in range(group.tables):
            part = tables[:, start : start + group.units]
            assert torch.equal(part.sort(1)[0], torch.arange(group.units).expand(50, -1))
            assert len({tuple(row) for row in part.tolist()}) > 1
            start += group.units
    assert start == symmetry.table_size


def test_draws_are_uniform():
    symmetry = sym.from_spec({"h": [("w", 0)]}, {"w": torch.zeros(3)})
    tables = symmetry.draw(torch.Generator().manual_seed(0), 6000)
    counts = torch.unique(tables, dim=0, return_counts=True)[1]
    assert len(counts) == 6 and int((counts - 1000).abs().max()) < 150  # five standard deviations


def test_identity_and_pickle():
    net = make("transformer")
    symmetry = sym.trace(net, torch.tensor([[0, 1, 4]]))
    state = net.state_dict()
    same = symmetry.permute_state_dict(state, tables=symmetry.identity())
    assert list(same) == list(state) and all(torch.equal(same[k], state[k]) for k in state)
    copied = pickle.loads(pickle.dumps(symmetry))
    assert copied.groups == symmetry.groups
    one, other = (s.permute_state_dict(state, torch.Generator().manual_seed(0)) for s in (symmetry, copied))
    assert all(torch.equal(one[k], other[k]) for k in state)


def test_order_of_a_symmetry():
    symmetry = sym.trace(make("mlp_deep"), torch.randn(2, 3))
    assert symmetry.log10_order == pytest.approx(11 * math.log10(24))
    assert repr(symmetry) == "Symmetry('Sequential', 11 groups, 10^15.2 permutations)"


def test_state_dicts_that_do_not_fit():
    symmetry = sym.trace(make("mlp"), torch.randn(2, 5))
    state = make("mlp").state_dict()
    with pytest.raises(sym.SymmetryError, match=r"'0.bias' must be among the weights, as its units are permuted"):
        symmetry.permute_state_dict({k: t for k, t in state.items() if k != "0.bias"})
    with pytest.raises(sym.SymmetryError, match=r"'0.bias' must have shape \(7,\), got \(8,\); these weights are of"):
        symmetry.permute_state_dict({**state, "0.bias": torch.zeros(8)})
    wrapped = symmetry.permute_state_dict(
        {f"module.{k}": t for k, t in state.items()}, torch.Generator().manual_seed(0)
    )
    plain = symmetry.permute_state_dict(state, torch.Generator().manual_seed(0))
    assert all(torch.equal(wrapped[f"module.{k}"], plain[k]) for k in state)

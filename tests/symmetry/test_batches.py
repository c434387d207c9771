"""A permuted batch has the bits of packed permuted networks; augmentation and the logit-invariance loss."""

from __future__ import annotations

import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import sne_fast
from helpers.networks import make
from helpers.symmetry_networks import CHUNKINGS, CONVOLUTIONS, OTHERS, TRANSFORMERS, assert_same, generator, weights
from sne_fast import symmetry as sym
from sne_fast.data.batch_checks import TENSORS
from sne_fast.zoo import Zoo
from sne_fast.zoo.architectures import ARCHITECTURES

FAMILIES = {**CONVOLUTIONS, **TRANSFORMERS, **OTHERS}


@pytest.fixture(scope="module")
def zoo():
    """Return names, weights and symmetries of every architecture of the digits zoo, each twice."""
    traced = {
        name: sym.trace(f(), torch.randn(2, 1, 8, 8), check=False, name=name) for name, f in ARCHITECTURES.items()
    }
    names = [*ARCHITECTURES, *ARCHITECTURES]
    states = [weights(ARCHITECTURES[name](), seed) for seed, name in enumerate(names)]
    return names, states, [traced[name] for name in names]


@pytest.mark.parametrize("chunking", CHUNKINGS)
@pytest.mark.parametrize("name", FAMILIES)
def test_permuting_a_batch_is_packing_permuted_state_dicts(name, chunking):
    make_net, inputs, _ = FAMILIES[name]
    torch.manual_seed(0)
    net, inputs = make_net(), inputs()
    symmetry = sym.trace(net, inputs, check=False)
    states = [weights(net, seed) for seed in range(3)]
    tables = sym.draw(symmetry, 3, generator(1))
    moved = [symmetry.permute_state_dict(state, tables=t) for state, t in zip(states, tables, strict=True)]
    batch = sne_fast.pack(states, chunk_size=5, chunking=chunking)
    permuted = sym.permute(batch, symmetry, permutations=tables)
    assert_same(permuted, sne_fast.pack(moved, chunk_size=5, chunking=chunking))
    assert not torch.equal(permuted.values, batch.values)
    assert_same(permuted, sym.permute(batch, symmetry, generator(1)))  # the same draw


@pytest.mark.parametrize("chunking", CHUNKINGS)
def test_tied_tensors_of_a_state_dict_stay_tied(chunking):
    net = nn.Sequential(nn.Embedding(7, 6), nn.Linear(6, 6), nn.Linear(6, 7, bias=False))
    net[2].weight = net[0].weight
    state = net.state_dict()
    symmetry = sym.trace(net, torch.tensor([[1, 2]]))
    tables = sym.draw(symmetry, 1, generator(1))
    moved = symmetry.permute_state_dict(state, tables=tables[0])
    assert moved["2.weight"] is moved["0.weight"] and not torch.equal(moved["0.weight"], state["0.weight"])
    permuted = sym.permute(sne_fast.pack(state, chunking=chunking), symmetry, permutations=tables)
    assert_same(permuted, sne_fast.pack(moved, chunking=chunking))


@pytest.mark.parametrize("scale", ["tensor", "none"])
@pytest.mark.parametrize("chunking", CHUNKINGS)
def test_a_zoo_is_permuted_as_one_batch(zoo, chunking, scale):
    _, states, symmetries = zoo
    tables = sym.draw(symmetries, len(states), generator())
    moved = [s.permute_state_dict(state, tables=t) for s, state, t in zip(symmetries, states, tables, strict=True)]
    batch = sne_fast.pack(states, chunk_size=16, chunking=chunking, scale=scale)
    got = sym.permute(batch, symmetries, permutations=tables)
    assert_same(got, sne_fast.pack(moved, chunk_size=16, chunking=chunking, scale=scale))
    assert_same(got, sym.permute(batch, symmetries, generator()))
    for b in range(len(batch)):
        assert not torch.equal(got[b].values, batch[b].values)


def test_permuting_a_packed_module():
    """A batch of a module holds tied tensors once, and fewer buffers than the state_dict."""
    net = make("transformer_tied")
    symmetry = sym.trace(net, torch.tensor([[0, 1, 4]]))
    tables = symmetry.draw(generator())
    batch = sne_fast.pack([net]).detach()
    state = symmetry.permute_state_dict(net.state_dict(), tables=tables)
    assert len(batch.names[0][1]) == len(state) - 1
    other = make("transformer_tied", seed=1)
    other.load_state_dict(state)
    assert_same(sym.permute(batch, symmetry, permutations=list(tables)), sne_fast.pack([other]).detach())


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    st.lists(st.integers(0, 2 * len(ARCHITECTURES) - 1), min_size=1, max_size=12),
    st.integers(0, 1000),
    st.sampled_from(CHUNKINGS),
)
def test_any_selection_of_networks(zoo, rows, seed, chunking):
    _, states, symmetries = zoo
    chosen, syms = [states[row] for row in rows], [symmetries[row] for row in rows]
    tables = sym.draw(syms, len(rows), generator(seed))
    moved = [s.permute_state_dict(state, tables=t) for s, state, t in zip(syms, chosen, tables, strict=True)]
    batch = sne_fast.pack(states, chunking=chunking)[rows]
    assert_same(sym.permute(batch, syms, permutations=tables), sne_fast.pack(moved, chunking=chunking))


def test_draws_differ_between_networks_and_calls(zoo):
    _, states, symmetries = zoo
    batch = sne_fast.pack([states[0]] * 4)
    g = generator()
    one, two = sym.permute(batch, symmetries[0], g), sym.permute(batch, symmetries[0], g)
    rows = [tuple(part.values.tolist()) for part in (*one, *two)]
    assert len(set(rows)) == 8


def test_a_network_without_hidden_units_stays(zoo):
    _, states, symmetries = zoo
    net = nn.Linear(3, 2)
    nothing = sym.trace(net, torch.randn(1, 3))
    assert nothing.groups == () and nothing.log10_order == 0
    batch = sne_fast.pack([states[1], net.state_dict(), states[1]])
    permuted = sym.permute(batch, [symmetries[1], nothing, symmetries[1]], generator())
    assert torch.equal(permuted[1].values, batch[1].values)
    assert not torch.equal(permuted[2].values, batch[2].values)
    assert_same(sym.permute(batch[1], nothing), batch[1])


def test_networks_of_different_sizes_in_one_batch():
    large = nn.Sequential(nn.Linear(90, 200), nn.Tanh(), nn.Linear(200, 60))
    symmetry = sym.trace(large, torch.randn(2, 90), check=False)
    small = sym.chain_symmetry(make("mlp").state_dict())
    states = [make("mlp").state_dict(), large.state_dict(), make("mlp", 1).state_dict()]
    syms = [small, symmetry, small]
    tables = sym.draw(syms, 3, generator())
    moved = [s.permute_state_dict(state, tables=t) for s, state, t in zip(syms, states, tables, strict=True)]
    batch = sne_fast.pack(states)
    assert_same(sym.permute(batch, syms, permutations=tables), sne_fast.pack(moved))
    order = tables[1]
    assert torch.equal(moved[1]["0.weight"], states[1]["0.weight"][order])
    assert torch.equal(moved[1]["2.weight"], states[1]["2.weight"][:, order])


def test_gradients_reach_the_permuted_values(zoo):
    _, states, symmetries = zoo
    state = {key: t.double().requires_grad_() for key, t in states[4].items()}
    tables = symmetries[4].draw(generator())
    packed = sne_fast.pack([state], scale="none", dtype=torch.float64)
    permuted = sym.permute(packed, symmetries[4], permutations=list(tables))
    weight = torch.randn(permuted.num_weights, dtype=torch.float64, generator=generator())
    got = torch.autograd.grad((permuted.values * weight).sum(), list(state.values()))
    moved = sne_fast.pack([symmetries[4].permute_state_dict(state, tables=tables)], scale="none", dtype=torch.float64)
    want = torch.autograd.grad((moved.values * weight).sum(), list(state.values()))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_dtypes_and_an_empty_batch(zoo, dtype):
    _, states, symmetries = zoo
    batch = sne_fast.pack(states, dtype=dtype)
    permuted = sym.permute(batch, symmetries, generator())
    assert permuted.dtype == dtype and permuted.tensor_scale is batch.tensor_scale
    assert torch.equal(permuted.values.sort()[0], batch.values.sort()[0])
    assert len(sym.permute(batch[0:0], [], generator())) == 0


def test_batches_that_do_not_fit_are_refused(zoo):
    names, states, symmetries = zoo
    batch = sne_fast.pack(states[:2])
    with pytest.raises(sym.SymmetryError, match=r"permute: symmetries must be one Symmetry, or one per network \(2\)"):
        sym.permute(batch, symmetries[:3])
    with pytest.raises(sym.SymmetryError, match=r"permute: permutations must be one per network \(2\), got 1"):
        sym.permute(batch, symmetries[:2], permutations=sym.draw(symmetries[0], 1))
    other = symmetries[names.index("cnn3-flatten")]
    with pytest.raises(sym.SymmetryError, match=r"permute: network 0 .*'cnn3-flatten'.* must be among the weights"):
        sym.permute(batch, other)
    with pytest.raises(sym.SymmetryError, match=r"network 1 .*'1.weight' must have shape \(10, 64\), got \(12, 64\)"):
        wider = {k: torch.randn(12, 64) if k == "1.weight" else t for k, t in states[0].items()}
        sym.permute(sne_fast.pack([states[0], wider]), symmetries[0])
    fields = {f: getattr(batch, f) for f in (*TENSORS, "chunk_size", "chunking")}
    with pytest.raises(sym.SymmetryError, match="the batch must have names and shapes"):
        sym.permute(sne_fast.WeightBatch(**fields), symmetries[:2])


# ---------------------------------------------------------------------------------------------------------------------
# With an encoder


def test_an_encoder_changes_only_by_the_order_inside_sets():
    """Hidden units are sets to an encoder without order codes, with chunks per neuron and one chunk per vector."""
    net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
    symmetry = sym.trace(net, torch.randn(2, 5))
    torch.manual_seed(0)
    options = {"hidden_dim": 32, "chunk_size": 8, "chunking": "neuron"}
    unordered = sne_fast.SNE(**options, element_order=False, chunk_order=False).double()
    ordered = sne_fast.SNE(**options).double()
    batch = sne_fast.pack([weights(net, 0)], 8, "neuron", dtype=torch.float64)
    permuted = sym.permute(batch, symmetry, generator())
    with torch.no_grad():
        z, moved = unordered(batch), unordered(permuted)
        assert float((moved - z).abs().max()) < 1e-12 * float(z.abs().max())
        z, moved = ordered(batch), ordered(permuted)
        assert float((moved - z).abs().max()) > 1e-4 * float(z.abs().max())
        broken = sym.permute(batch, sym.from_spec({"columns": [("2.weight", 1)]}, net.state_dict()), generator())
        z, moved = ordered(batch), ordered(broken)
        assert float((moved - z).abs().max()) > 1e-4 * float(z.abs().max())


def test_logit_invariance(zoo):
    _, states, symmetries = zoo
    torch.manual_seed(0)
    predictor = sne_fast.Predictor(sne_fast.SNE(hidden_dim=32), out_features=2, target_transform="logit")
    predictor.set_targets(torch.rand(5, 2))
    batch = predictor.encoder.pack(states[:3])
    permuted = sym.permute(batch, symmetries[:3], generator())
    loss = sym.logit_invariance(predictor, batch, permuted)
    with torch.no_grad():
        a, b = predictor.head(predictor.encoder(batch)), predictor.head(predictor.encoder(permuted))
    want = sum(float((b[i] - a[i]).square().sum()) / 2 for i in range(3)) / 3
    assert float(loss.detach()) == pytest.approx(want, rel=1e-5) and want > 0
    loss.backward()
    assert all(p.grad is not None for p in predictor.head.parameters())
    assert float(predictor.encoder.chunk_encoder.pool.S.grad.abs().max()) > 0
    reused = sym.logit_invariance(predictor, batch, permuted, outputs=a)
    assert float(reused.detach()) == pytest.approx(want, rel=1e-5)
    assert float(sym.logit_invariance(predictor, batch, batch).detach()) == 0
    sums = sym.logit_invariance(lambda part: part.values.new_ones(len(part), 4) * part.values[0], batch, permuted)
    assert float(sums) == pytest.approx(2 * float(permuted.values[0] - batch.values[0]) ** 2, rel=1e-5)
    with pytest.raises(ValueError, match="permuted must hold the 3 networks of batch, got 2"):
        sym.logit_invariance(predictor, batch, permuted[:2])


def test_augmentation_in_training(zoo):
    _, states, symmetries = zoo
    batch = sne_fast.pack(states)
    augment, again = sym.PermutationAugmentation(symmetries, seed=7), sym.PermutationAugmentation(symmetries, seed=7)
    rows = [11, 2, 4, 2]
    first = augment(batch[rows], rows)
    assert_same(first, again(batch[rows], torch.tensor(rows)))
    state = augment.state_dict()
    second = augment(batch[rows], rows)
    assert not torch.equal(first.values, second.values)
    resumed = sym.PermutationAugmentation(symmetries, seed=0)
    resumed.load_state_dict(state)
    assert_same(second, resumed(batch[rows], rows))
    with pytest.raises(sym.SymmetryError, match="rows must say which networks these are, got None"):
        augment(batch)
    same = sym.PermutationAugmentation(symmetries[0], seed=0)
    assert len(same(batch[[0, len(ARCHITECTURES)]])) == 2
    copied = pickle.loads(pickle.dumps(same.symmetries))
    assert_same(sym.permute(batch[0], copied, generator()), sym.permute(batch[0], symmetries[0], generator()))


def test_symmetries_of_a_zoo():
    def table(*architectures):
        names = [str(i) for i in range(len(architectures))]
        return Zoo({"name": names, "architecture": architectures}, source=None)

    found = sym.zoo_symmetries(table("mlp-10", "cnn5-pool", "mlp-10"))
    assert [s.name for s in found] == ["mlp-10", "cnn5-pool", "mlp-10"] and found[0] is found[2]
    with pytest.raises(sym.SymmetryError, match="no constructor of 'other'; known are mlp-10"):
        sym.zoo_symmetries(table("other"))

"""What a predictor does to networks before it encodes them: the same for modules, batches and files, saved with it."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch

import sne_fast
from sne_fast import SNE, Predictor
from sne_fast.nn.preparation import Preparation, relative_places
from sne_fast.symmetry import SymmetryError, canonicalise, chain_symmetry, permute, trace
from sne_fast.symmetry.stored import from_json, same_permutations, to_json
from sne_fast.training import FitSettings, fit
from sne_fast.training.prediction import predict
from sne_fast.zoo.architectures import ARCHITECTURES

IMAGE = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def chains():
    torch.manual_seed(0)
    tanh = torch.nn.Tanh
    return [
        torch.nn.Sequential(torch.nn.Linear(3, 6), tanh(), torch.nn.Linear(6, 5), tanh(), torch.nn.Linear(5, 2)),
        torch.nn.Sequential(torch.nn.Linear(3, 7), tanh(), torch.nn.Linear(7, 2)),
        torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), tanh(), torch.nn.Flatten(), torch.nn.Linear(16, 2)),
    ]


def symmetries():
    return [chain_symmetry(net.state_dict()) for net in chains()]


def make(preparation=None, normalise_inputs=False, **encoder):
    torch.manual_seed(1)
    scale = "none" if normalise_inputs else "tensor"
    made = SNE(**{"hidden_dim": 32, "chunk_size": 8, "scale": scale, **encoder})
    made.fill_code_gains(1.0)
    predictor = Predictor(made, hidden_features=(16,), normalise_inputs=normalise_inputs, preparation=preparation)
    predictor.set_inputs(predictor.pack(chains()).detach())
    return predictor.eval()


OPTIONS = {
    "canonical": {"units": "canonical"},
    "canonical and odd": {"units": "canonical", "odd": True, "jitter": 0.2},
    "relative": {"relative": True},
    "relative and canonical": {"units": "canonical", "relative": True},
    "zeros for nan": {"nonfinite": "zero"},
    "kinds by names": {"kinds": "names"},
}


@torch.no_grad()
def values(predictor, networks):
    return predictor(networks)


@pytest.mark.parametrize("scale", [False, "zoo", "fan_in"])
@pytest.mark.parametrize("name", OPTIONS)
def test_modules_batches_and_files_of_a_saved_predictor_give_the_same(tmp_path, name, scale):
    predictor = make(Preparation(**OPTIONS[name]), scale)
    wanted = values(predictor, chains())
    predictor.save_pretrained(tmp_path / "model")
    loaded = Predictor.from_pretrained(tmp_path / "model")
    assert loaded.preparation == predictor.preparation and loaded.config == predictor.config
    files = []
    for i, net in enumerate(chains()):
        files.append(tmp_path / f"{i}.pt")
        torch.save(net.state_dict(), files[-1])
    raw = loaded.pack(chains())
    for networks in (chains(), files, raw, loaded.prepare(raw), loaded.prepare(loaded.prepare(raw))):
        assert torch.equal(values(loaded, networks), wanted)
    parts = [loaded.prepare(raw)[2], loaded.prepare(raw[:2])]
    assert torch.equal(values(loaded, sne_fast.WeightBatch.cat(parts)), wanted[[2, 0, 1]])
    if name not in ("zeros for nan", "kinds by names"):  # these networks have neither
        assert not torch.equal(wanted, values(make(None, scale), chains())), "the option changes nothing"


@pytest.mark.parametrize("odd", [False, True])
def test_canonical_predictors_are_invariant_to_permutations(odd):
    predictor = make(Preparation(units="canonical", odd=odd))
    raw = predictor.pack(chains()).detach()
    changed = permute(raw, symmetries(), torch.Generator().manual_seed(3))
    assert not torch.equal(changed.values, raw.values)
    torch.testing.assert_close(values(predictor, changed), values(predictor, raw), rtol=1e-5, atol=1e-6)
    prepared = predictor.prepare(raw)
    assert prepared.prepared == predictor.preparation.steps
    again = permute(prepared, symmetries(), torch.Generator().manual_seed(4))
    assert again.prepared == ()  # its units are in any order again
    torch.testing.assert_close(values(predictor, again), values(predictor, raw), rtol=1e-5, atol=1e-6)
    by_hand = canonicalise(raw, symmetries(), odd=odd)
    assert torch.equal(by_hand.values, prepared.values) and torch.equal(
        values(predictor, by_hand), values(predictor, raw)
    )


def test_a_batch_prepared_for_another_predictor_is_refused():
    canonical, relative, plain = make(Preparation(units="canonical")), make(Preparation(relative=True)), make()
    raw = plain.pack(chains())
    with pytest.raises(ValueError, match="prepared otherwise, with relative places, where this predictor takes canon"):
        canonical(relative.prepare(raw))
    with pytest.raises(ValueError, match="canonical units, where this predictor takes networks as they are packed"):
        plain(canonical.prepare(raw))
    with pytest.raises(ValueError, match=r"WeightBatch.cat: prepared must agree"):
        sne_fast.WeightBatch.cat([raw, canonical.prepare(raw)])
    both = make(Preparation(units="canonical", relative=True))
    assert torch.equal(values(both, relative.prepare(raw)), values(both, raw))


def test_what_was_done_stays_with_the_batch():
    prepared = make(Preparation(units="canonical")).prepare(make().pack(chains()).detach())
    for batch in (
        prepared[1:], prepared[[2, 0]], prepared.to(torch.float64), copy.deepcopy(prepared), prepared.detach(),
        pickle.loads(pickle.dumps(prepared)), sne_fast.WeightBatch.cat([prepared, prepared]), prepared[0:0],
    ):  # fmt: skip
        assert batch.prepared == ("canonical units",)
    assert make().pack(chains()).prepared == ()
    assert len(make(Preparation(units="canonical")).prepare(prepared[0:0])) == 0


def test_gradients_reach_the_networks():
    predictor = make(Preparation(units="canonical", odd=True), "fan_in")
    nets = chains()
    predictor(nets).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for net in nets for p in net.parameters())


def test_nonfinite_weights_are_taken_as_the_predictor_says(tmp_path):
    net = chains()[0]
    with torch.no_grad():
        net[0].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"tensor '0\.weight' has 1 NaN"):
        make()([net])
    zeros = chains()[0]
    with torch.no_grad():
        zeros[0].weight[0, 0] = 0
    predictor = make(Preparation(nonfinite="zero"))
    predictor.save_pretrained(tmp_path / "m")
    assert torch.equal(values(Predictor.from_pretrained(tmp_path / "m"), [net]), values(make(), [zeros]))


def test_modules_may_be_typed_as_their_files_are(tmp_path):
    net = torch.nn.Sequential(torch.nn.Linear(3, 6), torch.nn.ConvTranspose1d(6, 2, 3))
    torch.save(net.state_dict(), tmp_path / "net.pt")
    predictor = make(Preparation(kinds="names"))
    predictor.save_pretrained(tmp_path / "m")
    loaded = Predictor.from_pretrained(tmp_path / "m")
    assert torch.equal(values(loaded, [net]), values(loaded, [tmp_path / "net.pt"]))
    assert not torch.equal(values(loaded, [net]), values(make(), [net]))


@pytest.mark.parametrize("scale", ["zoo", "fan_in"])
def test_a_batch_is_scaled_once_and_only_one_that_was_not(scale):
    predictor = make(None, scale)
    raw = predictor.pack(chains())
    scaled = predictor.input_normaliser(raw)
    assert torch.equal(predictor.encoder(scaled), predictor.encode(raw))
    with pytest.raises(ValueError, match="batch was prepared otherwise, with an input scale"):
        predictor(scaled)
    with pytest.raises(ValueError, match="must be packed with scale='none', got one that was scaled already"):
        predictor.input_normaliser(scaled)
    for use in (predictor, predictor.input_normaliser):
        with pytest.raises(ValueError, match="must be packed with scale='none', got scale='tensor'"):
            use(make().pack(chains()))
    if scale == "zoo":
        with pytest.raises(ValueError, match="must be packed with scale='none'"):
            predictor.set_inputs(make().pack(chains()))


# Training


class Recorder:
    """Keep the batches that the encoder is given."""

    def __init__(self, predictor):
        self.batches = []
        predictor.encoder.register_forward_pre_hook(lambda module, args: self.batches.append(args[0]))


def train(predictor, epochs=2, augment=None, **settings):
    raw = predictor.pack(chains()).detach()
    recorder = Recorder(predictor)
    targets = torch.tensor([[1.0], [2.0], [3.0]])
    history = fit(
        predictor, raw, targets, FitSettings(epochs=epochs, lr=1e-3, **settings), validation=(raw, targets),
        augment=augment,
    )  # fmt: skip
    return history, recorder.batches, raw


def test_jitter_is_drawn_in_training_and_only_there():
    predictor = make(Preparation(units="canonical", jitter=3.0))
    _, batches, raw = train(predictor, epochs=6)
    formed = predictor.prepare(raw).values.sort().values
    trained, watched = batches[::2], batches[1::2]  # one step, then the validation, per epoch
    for batch in batches:  # the same numbers, in any order: what went in is a permutation of the networks
        torch.testing.assert_close(batch.values.sort().values, formed)
    orders = {tuple(batch.values.tolist()) for batch in trained}
    assert len(orders) == 6 and len({tuple(batch.values.tolist()) for batch in watched}) == 1
    before = len(batches)
    out, _ = predict(predictor, raw)
    assert torch.equal(out, values(predictor, chains())) and torch.equal(out, values(predictor, predictor.prepare(raw)))
    assert all(torch.equal(b.values, batches[before].values) for b in batches[before:])


def test_without_jitter_training_sees_the_form_itself():
    predictor = make(Preparation(units="canonical", relative=True))
    _, batches, raw = train(predictor)
    wanted = canonicalise(relative_places(raw), symmetries())
    assert all(sorted(batch.values.tolist()) == sorted(wanted.values.tolist()) for batch in batches)
    assert all(set(batch.layer_level.tolist()) <= {0, 1, 2} for batch in batches)
    assert all(set(batch.tensor_type.tolist()) == {0, 1} for batch in batches)


def test_the_invariance_loss_needs_draws():
    with pytest.raises(ValueError, match=r"settings\.invariance .* give augment"):
        train(make(Preparation(units="canonical")), invariance=0.1)
    history, _, _ = train(make(Preparation(units="canonical", jitter=0.1)), invariance=0.1)
    assert len(history.train_loss) == 2


def test_the_input_scale_is_fitted_to_prepared_networks():
    relative = make(Preparation(relative=True), "zoo")
    by_hand = make(None, "zoo")
    by_hand.set_inputs(relative_places(by_hand.pack(chains()).detach()))
    assert torch.equal(relative.input_normaliser.divisor, by_hand.input_normaliser.divisor)


# Symmetries


def architectures():
    torch.manual_seed(0)
    return {name: made() for name, made in ARCHITECTURES.items()}


def test_every_architecture_of_the_zoos_works_from_a_file(tmp_path):
    """Those whose symmetry names and shapes do not tell are stored with the predictor, the others are not."""
    nets = architectures()
    own = [trace(net, IMAGE, name=name) for name, net in nets.items()]
    raw = make().pack(list(nets.values())).detach()
    preparation = Preparation.for_networks(raw, own)
    assert [s.name for s in preparation.symmetries] == ["cnn3-pool-groupnorm", "vit"]
    predictor = make(preparation)
    predictor.save_pretrained(tmp_path / "m")
    loaded = Predictor.from_pretrained(tmp_path / "m")
    formed = canonicalise(raw, own)
    assert torch.equal(loaded.prepare(raw).values, formed.values)
    files = []
    for i, net in enumerate(nets.values()):
        files.append(tmp_path / f"{i}.safetensors")
        sne_fast.data.checkpoints.save_state_dict(net.state_dict(), files[-1])
    assert torch.equal(loaded.prepare(loaded.pack(files)).values, formed.values)
    changed = permute(raw, own, torch.Generator().manual_seed(0))
    assert torch.equal(loaded.prepare(changed).values, canonicalise(changed, own).values)


def test_an_unknown_architecture_is_refused_by_name():
    predictor = make(Preparation(units="canonical"))
    with pytest.raises(SymmetryError, match=r"network 1 \('.*'\): its hidden units cannot .*not among those stored"):
        predictor([chains()[0], ARCHITECTURES["vit"]()])
    names = predictor.pack(chains())
    nameless = sne_fast.WeightBatch(
        names.values, names.chunk_ptr, names.tensor_ptr, names.layer_ptr, names.network_ptr, names.tensor_type,
        names.layer_level, names.tensor_scale, names.chunk_size, names.chunking,
    )  # fmt: skip
    with pytest.raises(SymmetryError, match="the batch must have names and shapes"):
        predictor(nameless)


def test_networks_that_no_file_can_tell_apart_are_refused():
    one, two = (
        torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.GroupNorm(groups, 4), torch.nn.Conv2d(4, 2, 3))
        for groups in (1, 2)
    )
    raw = make().pack([one, two]).detach()
    own = [trace(net, IMAGE) for net in (one, two)]
    with pytest.raises(SymmetryError, match="have tensors of the same names and shapes but other symmetries"):
        Preparation.for_networks(raw, own)
    assert len(Preparation.for_networks(raw[0], own[:1]).symmetries) == 1


def test_stored_symmetries_are_the_same_symmetries():
    for name, net in architectures().items():
        symmetry = trace(net, IMAGE, name=name)
        again = from_json(json.loads(json.dumps(to_json(symmetry))))
        assert again.axes == symmetry.axes and again.boxes == symmetry.boxes and again.alias == symmetry.alias
        assert again.shapes == symmetry.shapes and again.name == name and same_permutations(again, symmetry)
    tied = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 4))
    tied[2].weight = tied[0].weight
    symmetry = trace(tied, torch.randn(2, 4))
    assert from_json(to_json(symmetry)).alias == symmetry.alias


# Values


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"units": "sorted"}, "units must be one of 'given', 'canonical', got 'sorted'"),
        ({"units": "canonical", "odd": 1}, "odd must be True or False, got 1"),
        ({"relative": None}, "relative must be True or False, got None"),
        ({"nonfinite": "drop"}, "nonfinite must be one of 'raise', 'zero', 'keep', got 'drop'"),
        ({"kinds": "modules"}, "kinds must be one of None, 'names', got 'modules'"),
        ({"units": "canonical", "jitter": -0.1}, "jitter must be a number of at least 0, got -0.1"),
        ({"units": "canonical", "jitter": float("nan")}, "jitter must be a number of at least 0, got nan"),
        ({"units": "canonical", "jitter": True}, "jitter must be a number"),
        ({"units": "canonical", "symmetries": [3]}, "symmetries must be a sequence of Symmetry"),
        ({"odd": True}, "odd needs units='canonical'"),
        ({"jitter": 0.1}, "jitter needs units='canonical'"),
    ],
)
def test_values_outside_of_the_choices_are_refused(options, message):
    with pytest.raises(ValueError, match=f"Preparation: {message}"):
        Preparation(**options)


def test_a_predictor_takes_only_a_preparation():
    with pytest.raises(TypeError, match="preparation must be a Preparation, got dict"):
        Predictor(SNE(hidden_dim=32), preparation={"units": "canonical"})


def test_a_predictor_stored_before_preparations_takes_networks_as_they_are(tmp_path):
    predictor = make(None, "fan_in")
    predictor.save_pretrained(tmp_path / "m")
    path = tmp_path / "m" / "config.json"
    config = json.loads(path.read_text())
    del config["preparation"]
    path.write_text(json.dumps(config))
    loaded = Predictor.from_pretrained(tmp_path / "m")
    assert loaded.preparation == Preparation() and torch.equal(values(loaded, chains()), values(predictor, chains()))

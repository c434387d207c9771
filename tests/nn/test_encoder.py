"""SNE equals the brute-force oracle; calling forms, padding, company, gradients, initialisation."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sne_fast
from helpers.brute_force import Oracle, cut_network, oracle_for
from helpers.choices import slow_but_every
from helpers.encoders import encoder_for
from helpers.errors import largest_error
from helpers.networks import MIXED, make, sine_networks
from sne_fast.reference import PaddedSNE

F64 = torch.float64


@pytest.fixture(autouse=True, scope="module")
def reference():
    with sne_fast.use_backend("reference"):
        yield


# ---------------------------------------------------------------------------------------------------------------------
# Against brute force

SWITCHES = [
    dict(zip(("chunking", "layer_norm", "scale", "element_order", "chunk_order", "set_attention"), values, strict=True))
    for values in itertools.product(
        ("flat", "neuron", "kernel"), (True, False), ("tensor", "none"), (True, False), (True, False), ("sab", "isab")
    )
]
WIDTHS = [(32, 1), (32, 2), (32, 4), (64, 1), (64, 2), (64, 4), (64, 8), (128, 1), (128, 2), (128, 4), (128, 8)]
CHUNK_SIZES = [1, 3, 7, 32, 256]


def name_of(config: dict[str, Any]) -> str:
    return "-".join(str(v) for v in config.values())


@pytest.mark.parametrize("config", slow_but_every(11, SWITCHES), ids=name_of)
def test_every_switch_equals_brute_force(config: dict[str, Any]) -> None:
    """All 96 combinations, on a network with kernels, biases, norms, running statistics."""
    config = {**config, "hidden_dim": 32, "num_heads": 2, "chunk_size": 7, "num_inducing": 3}
    encoder = encoder_for(config)
    networks = [make("cnn", 1, F64), make("one_scalar", 2, F64)]
    assert largest_error(encoder(networks), oracle_for(encoder, **config)(networks)) <= 1e-12


WIDTHS_WITH_SWITCHES = [(*wh, SWITCHES[(37 * n + 5) % 96]) for n, wh in enumerate(WIDTHS)]


@pytest.mark.parametrize(("width", "heads", "config"), slow_but_every(4, WIDTHS_WITH_SWITCHES), ids=str)
def test_every_width_and_head_count_equals_brute_force(width: int, heads: int, config: dict[str, Any]) -> None:
    n = WIDTHS.index((width, heads))
    config = {**config, "hidden_dim": width, "num_heads": heads, "chunk_size": CHUNK_SIZES[1:][n % 4]}
    encoder = encoder_for(config, seed=n)
    networks = [make(name, n, F64) for name in ("recurrent", "cnn", "mlp")]
    assert largest_error(encoder(networks), oracle_for(encoder, **config)(networks)) <= 1e-12


@pytest.mark.parametrize("chunk_size", slow_but_every(3, CHUNK_SIZES))
@pytest.mark.parametrize("chunking", ["flat", "neuron", "kernel"])
def test_every_chunk_size_equals_brute_force(chunking: str, chunk_size: int) -> None:
    config = {"hidden_dim": 32, "num_heads": 4, "chunking": chunking, "chunk_size": chunk_size}
    encoder = encoder_for(config)
    networks = [make(name, 3, F64) for name in ("mlp", "cnn")]
    assert largest_error(encoder(networks), oracle_for(encoder, **config)(networks)) <= 1e-12


@pytest.mark.parametrize("name", slow_but_every(2, [*MIXED, "mlp_tiny", "mlp_deep", "transformer_tied", "oddities"]))
def test_every_architecture_equals_brute_force(name: str) -> None:
    config = {"hidden_dim": 32, "num_heads": 4, "chunk_size": 8}
    encoder = encoder_for(config)
    networks = [make(name, seed, F64) for seed in (1, 2)]
    z = encoder(networks)
    assert largest_error(z, oracle_for(encoder, **config)(networks)) <= 1e-12
    assert largest_error(z[:1], z[1:]) > 1e-3  # and the two differ


def test_a_larger_network_with_the_defaults_equals_brute_force() -> None:
    encoder = encoder_for({})
    networks = [make("inr", 0, F64)]
    assert largest_error(encoder(networks), oracle_for(encoder)(networks)) <= 1e-12


@pytest.mark.parametrize("config", [SWITCHES[n] for n in (0, 29, 42, 71, 93)], ids=name_of)
def test_gradients_equal_brute_force(config: dict[str, Any]) -> None:
    """Check gradients of every parameter and of every weight of the networks, through packing and its scale."""
    config = {**config, "hidden_dim": 32, "num_heads": 2, "chunk_size": 5, "num_inducing": 3}
    encoder = encoder_for(config)
    networks = [make("cnn", 1, F64), make("mlp_tiny", 2, F64)]
    weights = [p for network in networks for p in network.parameters()]
    names = [f"network weight {n}" for n in range(len(weights))] + [name for name, _ in encoder.named_parameters()]
    inputs = [*weights, *encoder.parameters()]
    direction = torch.randn(2, 32, dtype=F64, generator=torch.Generator().manual_seed(0))
    expected = torch.autograd.grad(
        (oracle_for(encoder, **config)(networks) * direction).sum(), inputs, allow_unused=True
    )
    actual = torch.autograd.grad((encoder(networks) * direction).sum(), inputs, allow_unused=True)
    largest = max(float(e.abs().max()) for e in expected if e is not None)
    for name, a, e in zip(names, actual, expected, strict=True):
        if e is None:
            assert a is None or a.count_nonzero() == 0, name
        else:
            error = float((a - e).abs().max())
            assert error <= 1e-10 * max(float(e.abs().max()), 1e-4 * largest), f"{name}: {error:.1e}"


@pytest.mark.parametrize("layer_norm", [True, False])
@pytest.mark.parametrize(("width", "heads"), [(32, 4), (64, 4), (128, 8)])
def test_float32_within_2e5_of_float64(width: int, heads: int, layer_norm: bool) -> None:
    encoder = encoder_for({"hidden_dim": width, "num_heads": heads, "layer_norm": layer_norm, "chunk_size": 16})
    exact = encoder([make(name, 5, torch.float32).double() for name in MIXED])
    z = copy.deepcopy(encoder).float()([make(name, 5, torch.float32) for name in MIXED])
    assert z.dtype == torch.float32
    assert largest_error(z, exact) <= 2e-5


def test_the_default_backend_equals_brute_force() -> None:
    config = {"hidden_dim": 32, "num_heads": 4, "chunk_size": 8}
    encoder = encoder_for(config)
    networks = [make(name, 4, F64) for name in ("mlp", "cnn", "one_scalar")]
    with sne_fast.use_backend("auto"):
        assert largest_error(encoder(networks), oracle_for(encoder, **config)(networks)) <= 1e-12


def test_levels_given_by_hand_are_the_ones_encoded() -> None:
    """The codes follow layer_level, not the place of the layer."""
    config = {"hidden_dim": 32, "num_heads": 2, "chunk_size": 4}
    encoder = encoder_for(config)
    network = make("mlp", 1, F64)
    batch = encoder.pack([network])
    levels = [4, 0, 11]
    moved = dataclasses.replace(batch, layer_level=torch.tensor(levels))
    oracle = oracle_for(encoder, **config)
    expected = oracle.encode_network(oracle.cut(network), levels)[None]
    assert largest_error(encoder(moved), expected) <= 1e-12
    assert largest_error(encoder(batch), expected) > 1e-3


def test_codes_far_out_are_computed_in_float64() -> None:
    """The sines of large positions would be noise in float32."""
    encoder = encoder_for({"hidden_dim": 32, "num_heads": 4})
    batch = encoder.pack([make("mlp", 1, F64)])
    far = dataclasses.replace(batch, layer_level=torch.tensor([70_000, 12_345, 999_999]))
    assert largest_error(copy.deepcopy(encoder).float()(far.to(dtype=torch.float32)), encoder(far)) <= 2e-5


def test_scale_is_known_to_the_encoder_and_none_is_the_paper() -> None:
    """With scale="tensor" a network and its double differ through tensor_scale only; with "none" through the values."""
    single, double = make("mlp", 1, F64), make("mlp", 1, F64)
    with torch.no_grad():
        for p in double.parameters():
            p *= 2
    encoder = encoder_for({"hidden_dim": 32, "num_heads": 2})
    a, b = encoder.pack([single]), encoder.pack([double])
    torch.testing.assert_close(a.values, b.values, rtol=1e-14, atol=0)
    torch.testing.assert_close(2 * a.tensor_scale, b.tensor_scale, rtol=1e-14, atol=0)
    assert largest_error(encoder(a), encoder(b)) > 1e-3
    with torch.no_grad():
        encoder.tensor_encoder.magnitude_code.zero_()
    assert largest_error(encoder(a), encoder(b)) < 1e-12
    plain = encoder_for({"hidden_dim": 32, "num_heads": 2, "scale": "none"})
    before = plain([single])
    with torch.no_grad():
        plain.tensor_encoder.magnitude_code.mul_(5)
    assert torch.equal(plain([single]), before)


# ---------------------------------------------------------------------------------------------------------------------
# Calling forms

FORMS = [
    {},
    {"chunk_size": 5, "chunking": "neuron", "scale": "none"},
    {"chunk_size": 9, "chunking": "kernel", "layer_norm": False},
]


@pytest.mark.parametrize("config", FORMS, ids=name_of)
def test_all_calling_forms_agree(config: dict[str, Any], tmp_path) -> None:
    """A batch, modules, state_dicts and paths: all calling forms. The network has only unmistakable tensors."""
    encoder = encoder_for({"hidden_dim": 32, "num_heads": 4, "order": "names", **config})
    networks = [make("cnn", 1, F64), make("mlp", 2, F64)]
    keys = {"chunk_size": 32, "chunking": "flat", "scale": "tensor"}
    by_hand = sne_fast.pack(networks, **{k: config.get(k, v) for k, v in keys.items()}, dtype=F64)
    expected = encoder(by_hand)
    torch.save(networks[1].state_dict(), tmp_path / "mlp.pt")
    assert torch.equal(encoder(encoder.pack(networks)), expected)
    assert torch.equal(encoder(networks), expected)
    assert torch.equal(encoder([networks[0].state_dict(), tmp_path / "mlp.pt"]), expected)
    assert torch.equal(encoder([networks[0], str(tmp_path / "mlp.pt")]), expected)


def test_an_encoder_refuses_a_batch_packed_otherwise() -> None:
    encoder = encoder_for({"hidden_dim": 32, "num_heads": 4, "order": "names"})
    for field, other in {"chunk_size": 16, "chunking": "neuron", "scale": "none", "order": "definition"}.items():
        message = rf"batch must be packed with {field}=.*, got {other!r}; use encoder.pack\(networks\)"
        with pytest.raises(ValueError, match=message):
            encoder(sne_fast.pack([make("mlp")], dtype=F64, **{field: other}))


def test_an_empty_batch_encodes_to_no_rows() -> None:
    for attention in ("sab", "isab"):
        encoder = encoder_for({"hidden_dim": 32, "num_heads": 4, "set_attention": attention})
        z = encoder(encoder.pack([make("mlp"), make("cnn")])[0:0])
        assert z.shape == (0, 32) and z.dtype == F64
        z.sum().backward()  # and it does not disturb a training loop
        assert all(p.grad is None or p.grad.count_nonzero() == 0 for p in encoder.parameters())


# ---------------------------------------------------------------------------------------------------------------------
# Padding and company change nothing

PADDED = [
    {},
    {"layer_norm": False, "chunking": "neuron"},
    {"set_attention": "isab", "num_inducing": 3, "chunking": "kernel", "scale": "none"},
    {"element_order": False, "chunk_order": False},
]


@pytest.mark.parametrize("config", PADDED, ids=name_of)
def test_padded_equals_ragged_and_so_do_the_gradients(config: dict[str, Any]) -> None:
    encoder = encoder_for({"hidden_dim": 32, "num_heads": 4, "chunk_size": 8, **config})
    batch = encoder.pack([make(name, 1, F64) for name in ("mlp", "cnn", "recurrent", "one_scalar")])
    values = batch.values.detach().requires_grad_()
    scales = batch.tensor_scale.detach().requires_grad_()
    batch = dataclasses.replace(batch, values=values, tensor_scale=scales)
    padded = PaddedSNE(encoder)
    ragged_z, padded_z = encoder(batch), padded(batch)
    assert largest_error(padded_z, ragged_z) <= 1e-12
    direction = torch.randn(ragged_z.shape, dtype=F64, generator=torch.Generator().manual_seed(0))
    inputs = {"values": values, "scales": scales, **dict(encoder.named_parameters())}
    ragged = torch.autograd.grad((ragged_z * direction).sum(), list(inputs.values()), allow_unused=True)
    dense = torch.autograd.grad((padded_z * direction).sum(), list(inputs.values()), allow_unused=True)
    largest = max(float(g.abs().max()) for g in ragged if g is not None)
    for name, a, b in zip(inputs, dense, ragged, strict=True):
        a, b = (torch.zeros(1, dtype=F64) if g is None else g for g in (a, b))
        assert torch.isfinite(a).all() and torch.isfinite(b).all(), name
        error = float((a - b).abs().max())
        assert error <= 1e-12 * max(float(b.abs().max()), 1e-2 * largest), f"{name}: {error:.1e}"


def test_padded_shares_the_parameters() -> None:
    encoder = encoder_for({"hidden_dim": 32, "num_heads": 4})
    ours = {p.data_ptr() for p in encoder.parameters()}
    assert {p.data_ptr() for p in PaddedSNE(encoder).parameters()} <= ours


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (F64, 1e-12)])
@pytest.mark.parametrize(
    "config", [{}, {"set_attention": "isab", "num_inducing": 4}, {"chunking": "kernel"}], ids=name_of
)
def test_networks_encode_the_same_alone_and_together(config: dict, dtype: torch.dtype, tolerance: float) -> None:
    encoder = encoder_for({"hidden_dim": 64, "num_heads": 4, "chunk_size": 16, **config}, dtype)
    networks = [make(name, 7, dtype) for name in MIXED]
    together = encoder(networks)
    batch = encoder.pack(networks)
    for n, network in enumerate(networks):
        alone = encoder([network])
        assert largest_error(together[n : n + 1], alone) <= tolerance, MIXED[n]
        assert largest_error(encoder(batch[n]), alone) <= tolerance, MIXED[n]
    order = [3, 0, 5, 1, 4, 2, 0]
    assert largest_error(encoder(batch[order]), together[order]) <= tolerance
    joined = sne_fast.WeightBatch.cat([batch[4:], encoder.pack(networks[:2])])
    assert largest_error(encoder(joined), together[[4, 5, 0, 1]]) <= tolerance


# ---------------------------------------------------------------------------------------------------------------------
# gradcheck


@pytest.mark.slow
def test_gradcheck_through_pack_and_encoder_to_the_weights() -> None:
    for scale, attention in (("tensor", "sab"), ("none", "isab")):
        encoder = encoder_for(
            {"hidden_dim": 16, "num_heads": 2, "chunk_size": 3, "scale": scale, "set_attention": attention}
        )
        shapes = {"0.weight": (3, 2), "0.bias": (3,), "1.weight": (1, 2, 2, 2), "1.factor": ()}
        g = torch.Generator().manual_seed(0)
        weights = [torch.randn(s, dtype=F64, generator=g).requires_grad_() for s in shapes.values()]

        def function(*tensors: Tensor, encoder=encoder, names=tuple(shapes)) -> Tensor:
            return encoder([dict(zip(names, tensors, strict=True))])

        assert torch.autograd.gradcheck(function, weights)


@pytest.mark.slow
def test_gradcheck_through_encoder_to_its_parameters() -> None:
    encoder = encoder_for({"hidden_dim": 16, "num_heads": 2, "chunk_size": 3})
    batch = encoder.pack([make("one_scalar", 1, F64), make("mlp_tiny", 2, F64)])
    names = [name for name, _ in encoder.named_parameters()]

    def function(*parameters: Tensor) -> Tensor:
        return torch.func.functional_call(encoder, dict(zip(names, parameters, strict=True)), (batch,))

    assert torch.autograd.gradcheck(function, tuple(encoder.parameters()), fast_mode=True)


# ---------------------------------------------------------------------------------------------------------------------
# It trains, which its initialisation decides


def spread_over_size(z: Tensor) -> float:
    """Return the root mean square distance from the mean over the root mean square length, across networks."""
    return float((z - z.mean(0)).square().sum(1).mean().sqrt() / z.square().sum(1).mean().sqrt())


@pytest.fixture(scope="module")
def sines() -> list[nn.Module]:
    return list(sine_networks(64, hidden=16, steps=100, seed=0))


def test_spread_of_z_at_step_0(sines: list[nn.Module]) -> None:
    torch.manual_seed(0)
    encoder = sne_fast.SNE(hidden_dim=32, num_heads=4)
    with torch.no_grad(), sne_fast.use_backend("auto"):
        batch = encoder.pack(sines)
        assert spread_over_size(encoder(batch)) >= 0.3
        for name, p in encoder.named_parameters():  # with the modules' defaults it is lost
            if name.endswith("bias") and ".ln" not in name:
                p.uniform_(-0.2, 0.2)
            elif name.endswith("pool.S"):
                nn.init.xavier_uniform_(p)
            elif name.endswith("code_gain"):
                p.fill_(1.0)
        assert spread_over_size(encoder(batch)) < 0.3


@pytest.mark.slow
def test_a_small_training_run_leaves_the_mean_predictor(sines: list[nn.Module]) -> None:
    """The label is plain: the spread of one weight tensor. Also on networks that were not trained on."""
    torch.manual_seed(0)
    encoder = sne_fast.SNE(hidden_dim=32, num_heads=4)
    head = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 1))
    label = torch.stack([n[2].weight.detach().std() for n in sines])[:, None]
    label = (label - label[:48].mean()) / label[:48].std()
    optimiser = torch.optim.Adam([*encoder.parameters(), *head.parameters()], lr=1e-3)
    with torch.no_grad(), sne_fast.use_backend("auto"):
        batch = encoder.pack(sines)
        before = (head(encoder(batch)) - label).square().mean()
    assert before > 0.7  # about the mean predictor's
    with sne_fast.use_backend("auto"):
        for _ in range(150):
            index = torch.randperm(48)[:16]
            loss = (head(encoder(batch[index.tolist()])) - label[index]).square().mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        with torch.no_grad():
            errors = (head(encoder(batch)) - label).square()
    assert errors[:48].mean() < 0.3
    assert errors[48:].mean() < 0.5


# ---------------------------------------------------------------------------------------------------------------------
# The oracle's own sanity: it is no copy of the reference, so it needs a word of its own


def test_oracle_depends_on_every_parameter() -> None:
    config = {"hidden_dim": 32, "num_heads": 2, "chunk_size": 4, "num_inducing": 3, "set_attention": "isab"}
    encoder = encoder_for(config)
    z = oracle_for(encoder, **config)([make("cnn", 1, F64)])
    g = torch.autograd.grad(z.square().sum(), list(encoder.parameters()))
    for (name, _), gradient in zip(encoder.named_parameters(), g, strict=True):
        assert gradient.abs().max() > (0 if name.endswith("fc_k.bias") else 1e-12), name
    assert isinstance(oracle_for(encoder, **config), Oracle)
    assert len(cut_network(make("cnn", 1, F64), 4)) == 4

"""SNE under autocast and torch.compile, and its round trips."""

from __future__ import annotations

import collections
import copy
import io
import pickle
import statistics

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import sne_fast
from helpers.choices import slow_but_every
from helpers.errors import largest_error
from helpers.networks import MIXED, SMALL, make, randomise_
from sne_fast.reference import PaddedSNE


@pytest.fixture(autouse=True, params=["reference", "auto"])
def backend(request):
    """Both what the contract is written in and what a user gets."""
    with sne_fast.use_backend(request.param):
        yield request.param


def encoder_for(dtype: torch.dtype = torch.float32, seed: int = 0, **config) -> nn.Module:
    config = {"hidden_dim": 32, "num_heads": 4, "chunk_size": 16, **config}
    return randomise_(sne_fast.SNE(**config), seed).to(dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Autocast


def rms(x: Tensor) -> float:
    return float(x.detach().double().square().mean().sqrt())


@pytest.mark.parametrize("attention", slow_but_every(2, ["sab", "isab"]))
@pytest.mark.parametrize("layer_norm", [True, False])
def test_autocast_loses_at_most_twice_what_padded_pytorch_loses(layer_norm: bool, attention: str) -> None:
    """bfloat16 on the CPU; errors against float64 over eight encoders. z has the parameters' dtype."""
    ours = theirs = 0.0
    for seed in range(8):
        encoder = encoder_for(seed=seed, layer_norm=layer_norm, set_attention=attention, num_inducing=4)
        if not layer_norm:
            randomise_(encoder, seed, 0.35)
        networks = [make(name, seed) for name in ("mlp", "cnn", "recurrent", "one_scalar")]
        batch = encoder.pack(networks)
        with torch.no_grad():
            exact = copy.deepcopy(encoder).double()(batch.to(dtype=torch.float64))
            with torch.autocast("cpu", dtype=torch.bfloat16):
                z, padded = encoder(batch), PaddedSNE(encoder)(batch)
            assert z.dtype == torch.float32
            full = encoder(batch)
        assert largest_error(full, exact) < 2e-5
        assert not torch.equal(z, full)  # autocast does something
        ours += rms(z - exact) ** 2
        theirs += rms(padded - exact) ** 2
    assert ours**0.5 <= 2 * theirs**0.5, (ours**0.5, theirs**0.5)


@pytest.mark.slow
@pytest.mark.parametrize("layer_norm", [True, False])
def test_gradients_under_autocast(layer_norm: bool) -> None:
    """In the parameters' dtype; no parameter's gradient is off by over twice what it is off by in the padded form.

    Medians over sixteen encoders: a single one may have a ReLU that flips in one form and not in the other.
    """
    ours: dict[str, list[float]] = collections.defaultdict(list)
    theirs: dict[str, list[float]] = collections.defaultdict(list)
    for seed in range(16):
        encoder = encoder_for(seed=seed, layer_norm=layer_norm)
        if not layer_norm:
            randomise_(encoder, seed, 0.35)
        with torch.no_grad():
            batch = encoder.pack([make(name, seed) for name in ("mlp", "cnn", "one_scalar")])
        direction = torch.randn(3, 32, generator=torch.Generator().manual_seed(seed))
        exact = copy.deepcopy(encoder).double()
        loss = (exact(batch.to(dtype=torch.float64)) * direction).sum()
        want = torch.autograd.grad(loss, list(exact.parameters()))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            z, padded = encoder(batch), PaddedSNE(encoder)(batch)
        for errors, out in ((ours, z), (theirs, padded)):
            got = torch.autograd.grad((out.float() * direction).sum(), list(encoder.parameters()))
            for (name, _), g, w in zip(encoder.named_parameters(), got, want, strict=True):
                assert g.dtype == torch.float32 and torch.isfinite(g).all(), name
                if not name.endswith("fc_k.bias"):  # zero in exact arithmetic
                    errors[name].append(float((g - w).norm() / w.norm()))
    ratios = {name: statistics.median(e) / statistics.median(theirs[name]) for name, e in ours.items()}
    worse = {name: f"{ratio:.2f}" for name, ratio in ratios.items() if ratio > 2}
    assert not worse, worse
    assert statistics.median(ratios.values()) <= 1.2


@pytest.mark.parametrize("layer_norm", [True, False])
@pytest.mark.parametrize("dtype", slow_but_every(2, [torch.bfloat16, torch.float16]))
def test_half_parameters_lose_at_most_twice_what_padded_pytorch_loses(dtype: torch.dtype, layer_norm: bool) -> None:
    """An encoder and a batch of a half type throughout, against float64 with the very same rounded numbers."""
    ours = theirs = 0.0
    for seed in range(8):
        encoder = encoder_for(seed=seed, layer_norm=layer_norm)
        if not layer_norm:
            randomise_(encoder, seed, 0.35)
        encoder = encoder.to(dtype)
        with torch.no_grad():
            batch = encoder.pack([make(name, seed) for name in ("mlp", "cnn", "one_scalar")]).to(dtype=dtype)
            z, padded = encoder(batch), PaddedSNE(encoder)(batch)
            exact = copy.deepcopy(encoder).double()(batch.to(dtype=torch.float64))
        assert z.dtype == dtype
        ours += rms(z - exact) ** 2
        theirs += rms(padded - exact) ** 2
    assert ours**0.5 <= 2 * theirs**0.5, (ours**0.5, theirs**0.5)


@pytest.mark.parametrize("factor", [1e-12, 1e-8, 1e8])
def test_scales_beyond_a_half_type_are_encoded(factor: float) -> None:
    """tensor_scale leaves float16 where its logarithm does not."""
    encoder = encoder_for()
    torch.manual_seed(0)
    tensors = {"0.weight": torch.randn(3, 3), "0.bias": factor * torch.randn(3)}
    half = copy.deepcopy(encoder).half()
    with torch.no_grad():
        exact = encoder([tensors])
        assert largest_error(half([tensors]), exact) < 0.05
        assert largest_error(PaddedSNE(half)(half.pack([tensors])), exact) < 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_autocast_keeps_the_parameters_dtype(dtype: torch.dtype) -> None:
    encoder = encoder_for(dtype)
    batch = encoder.pack([make("mlp")]).to(dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert encoder(batch).dtype == dtype
        assert encoder(batch[0:0]).dtype == dtype


# ---------------------------------------------------------------------------------------------------------------------
# torch.compile


# Compiled once: the backend is chosen inside the opaque ops, at run time.
once = pytest.mark.parametrize("backend", ["auto"], indirect=True)


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def outputs_and_gradients(function, encoder: nn.Module, batch: sne_fast.WeightBatch) -> list[Tensor]:
    z = function(batch)
    direction = torch.randn(z.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(z.dtype)
    return [z, *torch.autograd.grad((z * direction).sum(), list(encoder.parameters()))]


def compare(encoder: nn.Module, compiled, batch: sne_fast.WeightBatch, tolerance: float) -> None:
    expected = outputs_and_gradients(encoder, encoder, batch)
    actual = outputs_and_gradients(compiled, encoder, batch)
    largest = max(float(e.abs().max()) for e in expected[1:])
    assert largest_error(actual[0], expected[0]) <= tolerance
    names = [name for name, _ in encoder.named_parameters()]
    for name, a, e in zip(names, actual[1:], expected[1:], strict=True):
        assert float((a - e).abs().max()) <= tolerance * max(float(e.abs().max()), 1e-2 * largest), name


@pytest.mark.slow
@once
@pytest.mark.parametrize(
    "config",
    [{}, {"set_attention": "isab", "num_inducing": 3}, {"layer_norm": False, "element_order": False, "scale": "none"}],
    ids=str,
)
def test_compiled_equals_eager(fresh_compiler, config: dict) -> None:
    """One graph without a break: outputs and gradients, traced and differentiated by the compiler's front half."""
    encoder = encoder_for(torch.float64, **config)
    compiled = torch.compile(encoder, fullgraph=True, backend="aot_eager")
    compare(
        encoder,
        compiled,
        encoder.pack([make(name, 1) for name in ("mlp", "cnn", "one_scalar")], dtype=torch.float64),
        1e-12,
    )


@once
@pytest.mark.slow
def test_compiled_by_inductor_equals_eager(fresh_compiler) -> None:
    encoder = encoder_for()
    compiled = torch.compile(encoder, fullgraph=True)
    # The compiler's own processes would each import torch, which takes longer than a share of these kernels.
    with torch._inductor.config.patch(compile_threads=1):
        compare(encoder, compiled, encoder.pack([make(name, 1) for name in ("mlp", "cnn", "one_scalar")]), 1e-4)


@pytest.mark.slow
@once
def test_twenty_batches_of_different_shapes_stay_below_the_recompile_limit(fresh_compiler) -> None:
    encoder = encoder_for()
    sizes = [[SMALL[(n + k) % len(SMALL)] for k in range(1 + n % 4)] for n in range(20)]
    batches = [encoder.pack([make(name, n) for name in names]) for n, names in enumerate(sizes)]
    assert len({(len(b), b.values.shape, b.chunk_ptr.shape, b.tensor_ptr.shape) for b in batches}) == 20
    compiled = torch.compile(encoder, fullgraph=True, backend="eager")
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for batch in batches:
            assert largest_error(compiled(batch), encoder(batch)) <= 1e-5
    assert counters["stats"]["unique_graphs"] <= 6, counters["stats"]
    assert not counters["graph_break"]


@pytest.mark.slow
@once
def test_compiled_with_autocast_equals_eager_with_autocast(fresh_compiler) -> None:
    encoder = encoder_for()
    batch = encoder.pack([make(name, 1) for name in ("mlp", "cnn")])
    compiled = torch.compile(encoder, fullgraph=True, backend="aot_eager")
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        z, expected = compiled(batch), encoder(batch)
    assert z.dtype == expected.dtype == torch.float32
    full = encoder(batch)
    assert largest_error(z, expected) <= 0.5 * max(1e-3, largest_error(expected, full))


# ---------------------------------------------------------------------------------------------------------------------
# Round trips


def test_copies_encode_the_same() -> None:
    config = {"chunking": "neuron", "set_attention": "isab", "num_inducing": 3, "chunk_order": False}
    encoder = encoder_for(**config)
    networks = [make(name, 1) for name in MIXED]
    expected = encoder(networks)
    for other in (copy.deepcopy(encoder), pickle.loads(pickle.dumps(encoder))):
        assert other.config == encoder.config
        assert torch.equal(other(networks), expected)
        with torch.no_grad():
            next(other.parameters()).add_(1)
        assert not torch.equal(other(networks), expected)
    assert torch.equal(encoder(networks), expected)
    fresh = sne_fast.SNE(**encoder.config)
    file = io.BytesIO()
    torch.save(encoder.state_dict(), file)
    file.seek(0)
    fresh.load_state_dict(torch.load(file, weights_only=True), strict=True)
    assert torch.equal(fresh(networks), expected)


def test_copies_after_a_backward_pass_and_changes_of_dtype() -> None:
    """Whatever a forward pass caches must not travel into copies or survive a change of the parameters."""
    encoder = encoder_for()
    batch = encoder.pack([make("cnn", 1), make("mlp", 1)])
    encoder(batch).sum().backward()
    before = encoder(batch).detach()
    double = copy.deepcopy(encoder).double()
    assert largest_error(double(batch.to(dtype=torch.float64)), before) < 2e-5
    assert largest_error(double.float()(batch), before) < 1e-6
    with torch.no_grad():
        for p in encoder.parameters():
            p.add_(0.01)
    fresh = sne_fast.SNE(**encoder.config)
    fresh.load_state_dict(encoder.state_dict())
    assert torch.equal(encoder(batch), fresh(batch))
    assert not torch.equal(encoder(batch), before)


def test_config_is_the_constructors_arguments() -> None:
    defaults = {
        "hidden_dim": 64, "num_heads": 4, "chunk_size": 32, "chunking": "flat", "layer_norm": True, "scale": "tensor",
        "element_order": True, "chunk_order": True, "set_attention": "sab", "num_inducing": 32,
        "order": "names", "statistics": "none", "chunks": True,
    }  # fmt: skip
    assert dict(sne_fast.SNE().config) == defaults
    other = {
        "hidden_dim": 32, "num_heads": 2, "chunk_size": 8, "chunking": "kernel", "layer_norm": False, "scale": "none",
        "element_order": False, "chunk_order": False, "set_attention": "isab", "num_inducing": 7,
        "order": "definition", "statistics": "relative", "chunks": False,
    }  # fmt: skip
    assert dict(sne_fast.SNE(**other).config) == other


def test_two_runs_give_the_same_bits() -> None:
    encoder = encoder_for()
    batch = encoder.pack([make(name, 1) for name in MIXED])
    first, second = (outputs_and_gradients(encoder, encoder, batch) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def test_longer_sequences_than_seen_before() -> None:
    """Codes are recomputed where a tensor has more chunks, or a network more layers, than any before."""
    encoder, fresh = encoder_for(chunk_size=2), encoder_for(chunk_size=2)
    small, large = make("mlp_tiny", 1), make("zoo_cnn", 1)
    deep = make("mlp_deep", 1)
    encoder([small])
    for network in (large, deep, small):
        assert torch.equal(encoder([network]), fresh([network]))

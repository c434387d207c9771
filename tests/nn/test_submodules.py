"""Every submodule of the encoder is honoured: replaced, subclassed, with hooks, parametrised, pruned, quantised."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import sne_fast
from helpers.networks import make, randomise_
from sne_fast.nn import bounded_memory, plain_modules, stages
from sne_fast.ops import functional

ATTENTIONS = ["sab", "isab"]


def encoder_of(attention: str = "sab", **config: object) -> sne_fast.SNE:
    torch.manual_seed(0)
    options = {"hidden_dim": 32, "chunk_size": 8, "set_attention": attention, "num_inducing": 3, **config}
    return randomise_(sne_fast.SNE(**options).double(), 1, 0.2)


def batch_for(encoder: sne_fast.SNE) -> sne_fast.WeightBatch:
    return encoder.pack([make(name, 1) for name in ("mlp_tiny", "one_scalar", "cnn")]).detach()


def called(encoder: nn.Module) -> dict[str, nn.Module]:
    """Return the modules that a forward pass calls: all but the lists that hold blocks."""
    return {name: m for name, m in encoder.named_modules() if not isinstance(m, nn.ModuleList)}


def names_of(kind: type[nn.Module], encoder: nn.Module | None = None) -> list[str]:
    return [name for name, m in (encoder or encoder_of()).named_modules() if type(m) is kind]


def replace(encoder: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(encoder.get_submodule(parent), child, new)


class LoRA(nn.Module):
    """Add a product of two small matrices to a linear layer, as adapters do."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Parameter(torch.randn(2, base.in_features, dtype=base.weight.dtype))
        self.up = nn.Parameter(torch.randn(base.out_features, 2, dtype=base.weight.dtype))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.down.T @ self.up.T


class LoRALinear(nn.Linear):
    """The same as a subclass, whose `weight` and `bias` are those of the layer without the adapter."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__(base.in_features, base.out_features, dtype=base.weight.dtype)
        self.weight, self.bias = base.weight, base.bias
        self.down = nn.Parameter(torch.randn(2, base.in_features, dtype=base.weight.dtype))
        self.up = nn.Parameter(torch.randn(base.out_features, 2, dtype=base.weight.dtype))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x @ self.down.T @ self.up.T


def merged(encoder: sne_fast.SNE, name: str, lora: LoRA | LoRALinear) -> sne_fast.SNE:
    """Return the encoder with the adapter folded into the weight, which the fused path reads."""
    plain = copy.deepcopy(encoder)
    with torch.no_grad():
        plain.get_submodule(name).weight += lora.up @ lora.down
    return plain


@pytest.fixture
def modules_only(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Take the way that calls every module, though nothing about the modules asks for it."""
    monkeypatch.setattr(plain_modules, "_has_any_global_hook", lambda: True)
    yield


# --------------------------------------------------------------------------------------------- fused and by the modules


@pytest.mark.parametrize(
    "config",
    [{}, {"attention": "isab"}, {"layer_norm": False, "num_heads": 2}, {"element_order": False, "chunk_order": False}],
    ids=str,
)
def test_calling_the_modules_equals_the_fused_way(config: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = encoder_of(**config)
    batch = batch_for(encoder)
    values = batch.values.clone().requires_grad_()
    batch = batch.with_fields(values=values)
    assert encoder.chunk_encoder.is_plain()
    fused = encoder(batch)
    monkeypatch.setattr(plain_modules, "_has_any_global_hook", lambda: True)
    assert not encoder.chunk_encoder.is_plain()
    called = encoder(batch)
    torch.testing.assert_close(called, fused, rtol=1e-11, atol=1e-12)
    inputs = {"values": values, **dict(encoder.named_parameters())}
    direction = torch.randn_like(fused)
    got, want = (torch.autograd.grad((z * direction).sum(), list(inputs.values())) for z in (called, fused))
    largest = max(float(w.abs().max()) for w in want)
    for name, g, w in zip(inputs, got, want, strict=True):
        assert float((g - w).abs().max()) <= 1e-10 * max(float(w.abs().max()), 1e-2 * largest), name


def test_calling_the_modules_in_runs_changes_nothing(modules_only: None, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = encoder_of()
    batch = batch_for(encoder)
    want = encoder(batch).detach()
    monkeypatch.setattr(bounded_memory, "ROWS", {"cpu": 5})
    with torch.no_grad():
        torch.testing.assert_close(encoder(batch), want, rtol=1e-11, atol=1e-12)


def test_calling_the_modules_under_autocast_is_as_close(modules_only: None) -> None:
    encoder = encoder_of().float()
    batch = batch_for(encoder_of()).to(torch.float32)
    with torch.no_grad():
        full = encoder(batch)
        with torch.autocast("cpu", torch.bfloat16):
            half = encoder(batch)
    assert half.dtype == torch.float32
    assert 0 < float((half - full).norm() / full.norm()) < 0.05


def test_an_empty_batch_goes_through_the_modules(modules_only: None) -> None:
    for attention in ATTENTIONS:
        encoder = encoder_of(attention)
        assert encoder(batch_for(encoder)[0:0]).shape == (0, 32)


# ------------------------------------------------------------------------------------------------------------- replaced


@pytest.mark.parametrize("kind", [LoRA, LoRALinear])
@pytest.mark.parametrize("name", names_of(nn.Linear))
def test_every_linear_layer_may_be_replaced(name: str, kind: Callable[[nn.Linear], LoRA]) -> None:
    encoder = encoder_of()
    batch = batch_for(encoder)
    before = encoder(batch).detach()
    torch.manual_seed(1)
    lora = kind(encoder.get_submodule(name))
    want = merged(encoder, name, lora)(batch).detach()
    replace(encoder, name, lora)
    z = encoder(batch)
    torch.testing.assert_close(z, want, rtol=1e-9, atol=1e-10)
    z.pow(2).sum().backward()
    if not name.endswith("pool.mab.fc_k") and lora.down.shape[1] > 1:
        assert float((z - before).abs().max()) > 1e-6
    assert lora.down.grad is not None and lora.up.grad is not None
    assert float(lora.up.grad.abs().max()) > 0


def test_there_are_56_linear_layers() -> None:
    assert len(names_of(nn.Linear)) == 56 and len(called(encoder_of())) == 118


class OtherNorm(nn.LayerNorm):
    """A norm that is a layer norm by class alone."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 1.5


class Weird(nn.Module):
    """A module that does nothing but be another class."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: object, **kwargs: object) -> Tensor:
        return self.inner(*args, **kwargs) * 1.25


@pytest.mark.parametrize("name", names_of(nn.LayerNorm))
def test_every_layer_norm_may_be_replaced(name: str) -> None:
    encoder = encoder_of()
    batch = batch_for(encoder)
    norm = encoder.get_submodule(name)
    scaled = copy.deepcopy(encoder)
    with torch.no_grad():
        scaled.get_submodule(name).weight *= 1.5
        scaled.get_submodule(name).bias *= 1.5
    other = OtherNorm(32, dtype=torch.float64)
    other.weight, other.bias = norm.weight, norm.bias
    replace(encoder, name, other)
    torch.testing.assert_close(encoder(batch), scaled(batch), rtol=1e-9, atol=1e-10)
    replace(encoder, name, nn.LayerNorm(32, eps=0.3, dtype=torch.float64))
    eps = encoder(batch)
    replace(encoder, name, nn.LayerNorm(32, dtype=torch.float64))
    assert float((eps - encoder(batch)).abs().max()) > 1e-6, "another eps"
    replace(encoder, name, nn.LayerNorm(32, bias=False, dtype=torch.float64))
    torch.testing.assert_close(encoder(batch), encoder_with(encoder, name, nn.LayerNorm(32).double())(batch))
    replace(encoder, name, None)
    assert torch.isfinite(encoder(batch)).all()


@pytest.mark.parametrize("child", ["fc_o", "ln0", "ln1"])
@pytest.mark.parametrize("owner", ["chunk_encoder.pool.mab", "tensor_encoder.blocks.1.mab", "network_encoder.pool.mab"])
def test_modules_behind_the_fused_feed_forward_may_be_replaced(
    owner: str, child: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = encoder_of()
    batch = batch_for(encoder)
    before = encoder(batch)
    calls: list[int] = []
    fused = functional.feed_forward
    monkeypatch.setattr(functional, "fuses_feed_forward", lambda rows: True)  # as on a GPU
    monkeypatch.setattr(functional, "fuses_set_block", lambda *args: False)
    monkeypatch.setattr(functional, "feed_forward", lambda *args: calls.append(1) or fused(*args))
    torch.testing.assert_close(encoder(batch), before)
    assert len(calls) == 10  # every block that the chunk stage does not fuse whole
    changed = encoder_with(encoder, f"{owner}.{child}", Weird(encoder.get_submodule(f"{owner}.{child}")))
    assert float((changed(batch) - before).abs().max()) > 1e-6
    assert len(calls) == 19


def encoder_with(encoder: sne_fast.SNE, name: str, new: nn.Module) -> sne_fast.SNE:
    other = copy.deepcopy(encoder)
    replace(other, name, new)
    return other


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_blocks_pools_stages_and_the_embedding_may_be_replaced(attention: str) -> None:
    encoder = encoder_of(attention)
    batch = batch_for(encoder)
    before = encoder(batch)
    for name, module in called(encoder).items():
        if name and not isinstance(module, (nn.Linear, nn.LayerNorm)):
            assert float((encoder_with(encoder, name, Weird(module))(batch) - before).abs().max()) > 1e-6, name


def test_layers_without_bias_and_blocks_of_other_heads_are_computed_as_they_are() -> None:
    encoder = encoder_of()
    batch = batch_for(encoder)
    fc = encoder.chunk_encoder.blocks[1].mab.fc_q
    plain = copy.deepcopy(encoder)
    nn.init.zeros_(plain.chunk_encoder.blocks[1].mab.fc_q.bias)
    fc.register_parameter("bias", None)
    torch.testing.assert_close(encoder(batch), plain(batch))
    two_heads = encoder_of()
    two_heads.chunk_encoder.blocks[2].mab.num_heads = 2
    assert not two_heads.chunk_encoder.is_plain()
    assert float((two_heads(batch) - encoder_of()(batch)).abs().max()) > 1e-6
    fewer = encoder_of()
    fewer.chunk_encoder.blocks = fewer.chunk_encoder.blocks[:3]
    assert fewer(batch).shape == (3, 32)


class Doubled(sne_fast.SAB):
    """A block with a forward of its own."""

    def forward(self, x: Tensor, ptr: Tensor, ptr_host: Tensor | None = None) -> Tensor:
        return 2 * super().forward(x, ptr, ptr_host)


@pytest.mark.parametrize("name", [f"{s}_encoder.blocks.1" for s in ("chunk", "tensor", "layer", "network")])
def test_a_subclass_of_a_block_is_called(name: str) -> None:
    encoder = encoder_of()
    block = Doubled(32, 32, 4, layer_norm=True).double()
    block.load_state_dict(encoder.get_submodule(name).state_dict())
    batch = batch_for(encoder)
    before = encoder(batch)
    replace(encoder, name, block)
    assert float((encoder(batch) - before).abs().max()) > 1e-6


@pytest.mark.parametrize(
    "name", ["chunk_encoder.blocks.0.mab.fc_v", "chunk_encoder.pool", "layer_encoder.pool.mab.fc_o"]
)
def test_a_forward_set_on_an_instance_is_called(name: str) -> None:
    encoder = encoder_of()
    batch = batch_for(encoder)
    before = encoder(batch)
    module = encoder.get_submodule(name)
    own = module.forward
    module.forward = lambda *args, **kwargs: own(*args, **kwargs) * 1.25
    assert float((encoder(batch) - before).abs().max()) > 1e-6


# ---------------------------------------------------------------------------------------------------------------- hooks


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("together", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_hooks_of_every_module_fire(attention: str, together: bool) -> None:
    encoder = encoder_of(attention)
    batch = batch_for(encoder)
    want = encoder(batch)
    fired: dict[str, set[str]] = {}

    def set_hooks(name: str, module: nn.Module) -> list:
        seen = fired.setdefault(name, set())
        return [
            module.register_forward_pre_hook(lambda m, args: seen.add("forward_pre") or None),
            module.register_forward_hook(lambda m, args, out: seen.add("forward") or None),
            module.register_full_backward_hook(lambda m, i, o: seen.add("backward") or None),
        ]

    modules = called(encoder)
    # Inputs of the encoder and of the embedding are no tensors that need gradients.
    rounds = [modules] if together else [{name: m} for name, m in modules.items()]
    for chosen in rounds:
        handles = [handle for name, module in chosen.items() for handle in set_hooks(name, module)]
        z = encoder(batch)
        torch.testing.assert_close(z, want)
        z.sum().backward()
        for handle in handles:
            handle.remove()
    missing = {name: {"forward_pre", "forward", "backward"} - seen for name, seen in fired.items()}
    assert not {name: left for name, left in missing.items() if left}
    assert encoder.chunk_encoder.is_plain()


def test_hooks_for_all_modules_fire() -> None:
    encoder = encoder_of()
    seen: set[nn.Module] = set()
    handle = nn.modules.module.register_module_forward_hook(lambda m, args, out: seen.add(m) and None)
    try:
        encoder(batch_for(encoder))
    finally:
        handle.remove()
    assert set(called(encoder).values()) <= seen


@pytest.mark.parametrize("name", ["chunk_encoder.blocks.2.mab.fc_o", "layer_encoder.pool.mab.fc_v", "tensor_encoder"])
def test_what_a_hook_returns_is_taken(name: str) -> None:
    encoder = encoder_of()
    batch = batch_for(encoder)
    before = encoder(batch)
    handle = encoder.get_submodule(name).register_forward_hook(lambda m, args, out: 0.5 * out)
    assert float((encoder(batch) - before).abs().max()) > 1e-6
    handle.remove()
    torch.testing.assert_close(encoder(batch), before)


@pytest.mark.slow
def test_compiled_encoders_call_their_hooks_and_replaced_layers() -> None:
    encoder = encoder_of()
    batch = batch_for(encoder)
    encoder.chunk_encoder.blocks[1].mab.fc_o.register_forward_hook(lambda m, args, out: 0.5 * out)
    replace(encoder, "tensor_encoder.pool.mab.fc_v", LoRA(encoder.tensor_encoder.pool.mab.fc_v))
    compiled = torch.compile(encoder, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(batch), encoder(batch))


# ------------------------------------------------------------------------------- pruning, parametrisation, quantisation


@pytest.mark.parametrize("name", names_of(nn.Linear)[::5])
def test_pruning_lasts_over_steps_of_training(name: str) -> None:
    encoder = encoder_of()
    batch = batch_for(encoder)
    layer = encoder.get_submodule(name)
    prune.l1_unstructured(layer, "weight", amount=0.5)
    optimiser = torch.optim.SGD(encoder.parameters(), 0.1)
    for _ in range(3):
        optimiser.zero_grad()
        encoder(batch).pow(2).sum().backward()
        optimiser.step()
    z = encoder(batch)
    assert int((layer.weight == 0).sum()) == layer.weight.numel() // 2
    prune.remove(layer, "weight")
    assert encoder.chunk_encoder.is_plain()
    torch.testing.assert_close(encoder(batch), z)


class Halved(nn.Module):
    """A parametrisation by half of the parameter."""

    def forward(self, x: Tensor) -> Tensor:
        return x / 2


PARAMETRISATIONS: dict[str, Callable[[nn.Module], object]] = {
    "weight norm": parametrizations.weight_norm,
    "weight norm by hooks": lambda m: nn.utils.weight_norm(m),
    "spectral norm": parametrizations.spectral_norm,
    "spectral norm by hooks": lambda m: nn.utils.spectral_norm(m),
    "orthogonal": parametrizations.orthogonal,
    "halved": lambda m: parametrize.register_parametrization(m, "weight", Halved()),
    "halved bias": lambda m: parametrize.register_parametrization(m, "bias", Halved()),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", ["chunk_encoder.blocks.1.mab.fc_v", "tensor_encoder.pool.mab.fc_k"])
@pytest.mark.parametrize("how", PARAMETRISATIONS)
def test_parametrised_layers_train_and_equal_layers_of_the_resulting_weight(name: str, how: str) -> None:
    encoder = encoder_of()
    batch = batch_for(encoder)
    layer = encoder.get_submodule(name)
    PARAMETRISATIONS[how](layer)
    optimiser = torch.optim.SGD(encoder.parameters(), 0.01)
    for _ in range(2):
        optimiser.zero_grad()
        encoder(batch).pow(2).sum().backward()
        optimiser.step()
    encoder.eval()
    z = encoder(batch)
    fixed = nn.Linear(32, 32, dtype=torch.float64)
    fixed.load_state_dict({"weight": layer.weight.detach(), "bias": layer.bias.detach()})
    replace(encoder, name, fixed)
    torch.testing.assert_close(encoder(batch), z, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", ["chunk_encoder.pool.S", "tensor_encoder.pool.S", "chunk_encoder.code_gain"])
def test_parametrised_seeds_and_gains_are_honoured(name: str) -> None:
    encoder = encoder_of()
    batch = batch_for(encoder)
    halved = copy.deepcopy(encoder)
    owner, _, parameter = name.rpartition(".")
    with torch.no_grad():
        halved.get_parameter(name).div_(2)
    parametrize.register_parametrization(encoder.get_submodule(owner), parameter, Halved())
    torch.testing.assert_close(encoder(batch), halved(batch))


def test_quantised_and_fake_quantised_layers_are_called() -> None:
    encoder = encoder_of().float()
    batch = batch_for(encoder_of()).to(torch.float32)
    want = encoder(batch).detach()
    observed = copy.deepcopy(encoder)
    for name in names_of(nn.Linear, encoder):
        layer = observed.get_submodule(name)
        fake = torch.ao.nn.qat.Linear(
            layer.in_features, layer.out_features, qconfig=torch.ao.quantization.get_default_qat_qconfig("x86")
        )
        fake.load_state_dict(layer.state_dict(), strict=False)
        replace(observed, name, fake)
    for changed in (observed, torch.ao.quantization.quantize_dynamic(encoder, {nn.Linear})):
        z = changed(batch)
        assert 1e-5 < float((z - want).norm() / want.norm()) < 0.3


def test_data_parallel_around_stages_and_layers_changes_nothing() -> None:
    encoder = encoder_of()
    batch = batch_for(encoder)
    want = encoder(batch)
    for name in ("chunk_encoder", "network_encoder", "chunk_encoder.blocks.1", "tensor_encoder.pool.mab.fc_q"):
        wrapped = encoder_with(encoder, name, nn.DataParallel(encoder.get_submodule(name)))
        torch.testing.assert_close(wrapped(batch), want)


def test_encoders_with_hooks_and_adapters_copy_and_save() -> None:
    encoder = encoder_of()
    batch = batch_for(encoder)
    replace(encoder, "chunk_encoder.blocks.3.mab.fc_q", LoRA(encoder.chunk_encoder.blocks[3].mab.fc_q))
    want = encoder(batch)
    file = io.BytesIO()
    torch.save(encoder, file)
    file.seek(0)
    for other in (copy.deepcopy(encoder), copy.copy(encoder), torch.load(file, weights_only=False)):
        assert torch.equal(other(batch), want)


# ----------------------------------------------------------------------------------------------------- outputs are kept


@pytest.mark.parametrize("rows", [7, 10**9])
def test_outputs_that_hooks_keep_are_never_written_to(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded_memory, "ROWS", {"cpu": rows})
    monkeypatch.setattr(bounded_memory, "WEIGHTS", {"cpu": 10 * rows})
    for attention in ATTENTIONS:
        encoder = encoder_of(attention)
        batch = batch_for(encoder)
        kept: list[tuple[str, Tensor, Tensor]] = []

        def keep(name: str, kept: list = kept) -> Callable[..., None]:
            return lambda m, args, out: kept.extend((name, t, t.clone()) for t in (*args, out) if isinstance(t, Tensor))

        for name, module in called(encoder).items():
            module.register_forward_hook(keep(name))
        with torch.no_grad():
            encoder(batch)
        assert len(kept) > 300
        for name, tensor, then in kept:
            assert torch.equal(tensor, then), name


class Remembering(nn.Module):
    """A block that computes its output once and returns that tensor every time."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block, self.output = block, None

    def forward(self, *args: Tensor) -> Tensor:
        if self.output is None:
            self.output = self.block(*args)
        return self.output


@pytest.mark.parametrize("name", [f"{s}_encoder.blocks.1" for s in ("tensor", "layer", "network")])
def test_a_block_may_return_a_tensor_that_it_remembers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded_memory, "ROWS", {"cpu": 7})
    encoder = encoder_of()
    batch = batch_for(encoder)
    with torch.no_grad():
        want = encoder(batch)
        replace(encoder, name, Remembering(encoder.get_submodule(name)))
        for _ in range(3):
            torch.testing.assert_close(encoder(batch), want)


def test_the_stages_are_modules_of_their_own() -> None:
    encoder = encoder_of()
    kinds = (stages.ChunkEncoder, stages.TensorEncoder, stages.SetEncoder, stages.NetworkEncoder)
    named = (encoder.chunk_encoder, encoder.tensor_encoder, encoder.layer_encoder, encoder.network_encoder)
    assert tuple(type(stage) for stage in named) == kinds

"""The statistics channel of the encoder: widths, names, fitting, saving, and agreement with the padded form."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree

import sne_fast
from sne_fast import SNE, Predictor, tensor_statistics
from sne_fast.data.tensor_statistics import COLUMNS
from sne_fast.nn import Preparation
from sne_fast.nn.bounded_memory import WEIGHTS
from sne_fast.nn.input_scales import FanInScale
from sne_fast.nn.position_codes import position_code
from sne_fast.reference import PaddedSNE


def networks(count: int = 4) -> list[nn.Module]:
    torch.manual_seed(0)
    return [
        nn.Sequential(nn.Conv2d(1, 3 + i, 3), nn.BatchNorm2d(3 + i), nn.Flatten(), nn.Linear(4 * (3 + i), 5))
        for i in range(count)
    ]


def randomised(encoder: SNE) -> SNE:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return encoder


OPTIONS = [
    {"statistics": statistics, "chunks": chunks, "set_attention": attention}
    for statistics, chunks, attention in product(("tensor", "relative"), (True, False), ("sab", "isab"))
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_padded_form_and_parts_of_the_batch_give_the_same(options: dict[str, Any]) -> None:
    encoder = randomised(SNE(hidden_dim=32, num_inducing=4, **options).double())
    batch = encoder.pack(networks()).detach()
    encoder.set_statistics(batch)
    z = encoder(batch)
    assert z.shape == (4, 96) and encoder.out_features == 96
    torch.testing.assert_close(PaddedSNE(encoder)(batch), z)
    torch.testing.assert_close(torch.cat([encoder(batch[:1]), encoder(batch[1:])]), z)
    for name in ("reference", "cpu"):
        with sne_fast.use_backend(name):
            torch.testing.assert_close(encoder(batch), z)


def test_names_and_widths_are_those_of_the_method() -> None:
    plain = set(SNE(hidden_dim=32).state_dict())
    for statistics, count in (("tensor", 23), ("relative", 19)):
        state = SNE(hidden_dim=32, statistics=statistics).state_dict()
        layers = [f"{layer}.{part}" for layer in ("hidden", "to_tensor", "to_pool") for part in ("weight", "bias")]
        assert set(state) - plain == {f"tensor_statistics.{name}" for name in (*layers, "mean", "std")}
        assert plain <= set(state)
        assert state["tensor_statistics.hidden.weight"].shape == (128, count + 64)
        assert state["tensor_statistics.to_tensor.weight"].shape == (32, 128)
        assert state["tensor_statistics.to_pool.weight"].shape == (64, 128)
        assert not state["tensor_statistics.hidden.bias"].any() and bool((state["tensor_statistics.std"] == 1).all())
    alone = SNE(hidden_dim=32, statistics="tensor", chunks=False)
    assert not [name for name in alone.state_dict() if name.startswith(("chunk_encoder", "tensor_encoder"))]
    assert SNE(hidden_dim=32).out_features == 32 and Predictor(alone).head[0].in_features == 96


def test_the_formula_of_the_channel() -> None:
    encoder = randomised(SNE(hidden_dim=32, statistics="relative", chunks=False).double())
    channel = encoder.tensor_statistics
    assert channel is not None
    batch = encoder.pack(networks(2)).detach()
    encoder.set_statistics(batch)
    taken: list[Tensor] = []
    encoder.layer_encoder.register_forward_pre_hook(lambda module, args: taken.append(args[0]))
    z = encoder(batch)
    s = tensor_statistics(batch)[:, list(COLUMNS["relative"])]
    torch.testing.assert_close(channel.mean, s.mean(0))
    t = ((s - channel.mean) / channel.std).clamp(-6, 6)
    level = torch.repeat_interleave(batch.layer_level, batch.layer_ptr.diff())
    code = position_code(level, 32, torch.float64)
    a = torch.relu(channel.hidden(torch.cat([t, encoder.type_embedding(batch.tensor_type), code], 1)))
    torch.testing.assert_close(taken[0], channel.to_tensor(a))
    sizes = batch.layer_ptr[batch.network_ptr].diff().tolist()
    torch.testing.assert_close(z[:, 32:], torch.stack([x.mean(0) for x in channel.to_pool(a).split(sizes)]))


def test_fitting_standardises_and_silences_types_that_were_never_seen() -> None:
    predictor = Predictor(SNE(hidden_dim=32, statistics="tensor", chunks=False))
    encoder = predictor.encoder
    batch = predictor.pack(networks()).detach()
    predictor.set_inputs(batch)
    seen = torch.zeros(64, dtype=torch.bool)
    seen[batch.tensor_type] = True
    silent = ~encoder.type_embedding.weight.any(1)
    assert torch.equal(silent, ~seen)
    s = tensor_statistics(batch).double()
    torch.testing.assert_close(encoder.tensor_statistics.mean.double(), s.mean(0), rtol=1e-5, atol=1e-6)
    std = s.std(0, correction=0).clamp_min(1e-3)
    torch.testing.assert_close(encoder.tensor_statistics.std.double(), std, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        encoder.type_embedding.weight.fill_(1)  # as if learnt
    predictor.set_inputs(batch[:2])
    assert bool(encoder.type_embedding.weight.all())


def test_without_statistics_fitting_does_nothing() -> None:
    encoder = SNE(hidden_dim=32)
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    encoder.set_statistics(encoder.pack(networks()))
    assert all(torch.equal(before[name], tensor) for name, tensor in encoder.state_dict().items())


def test_a_configuration_from_before_means_no_statistics(tmp_path: Path) -> None:
    encoder = SNE(hidden_dim=32)
    encoder.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for name in ("statistics", "chunks"):
        del config[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = SNE.from_pretrained(tmp_path)
    assert loaded.config == encoder.config and loaded.tensor_statistics is None
    batch = encoder.pack(networks())
    assert torch.equal(loaded(batch), encoder(batch))


@pytest.mark.parametrize("options", OPTIONS[::2], ids=str)
def test_saved_predictors_predict_the_same_from_files(options: dict[str, Any], tmp_path: Path) -> None:
    scales = (False, "fan_in", "zoo")
    for scale in scales:
        encoder = SNE(hidden_dim=32, scale="none" if scale else "tensor", **options)
        predictor = Predictor(encoder, normalise_inputs=scale, preparation=Preparation(relative=True))
        predictor.set_inputs(predictor.pack(networks()).detach())
        predictor.save_pretrained(tmp_path)
        loaded = Predictor.from_pretrained(tmp_path)
        torch.testing.assert_close(loaded(networks()), predictor(networks()), atol=1e-6, rtol=1e-5)


def test_an_input_scale_does_not_change_the_statistics() -> None:
    encoder = randomised(SNE(hidden_dim=32, scale="none", statistics="tensor", chunks=False))
    plain, scaled = Predictor(encoder), Predictor(encoder, normalise_inputs="fan_in")
    torch.testing.assert_close(scaled.encode(networks()), plain.encode(networks()))


def test_statistics_of_scaled_values_are_refused() -> None:
    encoder = SNE(hidden_dim=32, scale="none", statistics="tensor")
    batch = sne_fast.pack(networks(), scale="none").detach()
    with pytest.raises(
        ValueError, match="SNE: batch must have its statistics before an input scale changes its values"
    ):
        encoder(FanInScale()(batch))
    tensor_statistics(batch)
    assert encoder(FanInScale()(batch)).shape == (4, 96)


def test_gradients_reach_every_parameter() -> None:
    encoder = randomised(SNE(hidden_dim=32, statistics="tensor").double())
    batch = encoder.pack(networks(2)).detach()
    encoder.set_statistics(batch)
    encoder(batch).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in encoder.tensor_statistics.parameters())
    names = ["hidden.weight", "to_tensor.weight", "to_pool.bias"]
    parameters = [encoder.tensor_statistics.get_parameter(name).detach()[:1].clone().requires_grad_() for name in names]

    def encode(*rows: Tensor) -> Tensor:
        state = {}
        for name, row in zip(names, rows, strict=True):
            whole = encoder.tensor_statistics.get_parameter(name).detach()
            state[f"tensor_statistics.{name}"] = torch.cat([row, whole[1:]])
        return torch.func.functional_call(encoder, state, (batch,)).square().sum()

    assert torch.autograd.gradcheck(encode, parameters)


def test_autocast_stays_close() -> None:
    encoder = randomised(SNE(hidden_dim=32, statistics="tensor"))
    batch = encoder.pack(networks()).detach()
    encoder.set_statistics(batch)
    with torch.autocast("cpu", torch.bfloat16):
        z = encoder(batch)
    assert z.dtype == torch.float32
    assert float((z - encoder(batch)).norm() / encoder(batch).norm()) < 0.05


def test_bounded_memory_and_the_meta_device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    encoder = randomised(SNE(hidden_dim=32, statistics="relative"))
    batch = encoder.pack(networks()).detach()
    with torch.no_grad():
        z = encoder(batch)
        monkeypatch.setitem(WEIGHTS, "cpu", 100)
        torch.testing.assert_close(encoder(batch), z, atol=1e-5, rtol=1e-5)
    encoder.save_pretrained(tmp_path)
    with torch.device("meta"):
        empty = SNE(hidden_dim=32, statistics="relative")
    empty.to_empty(device="cpu").load_state_dict(encoder.state_dict())
    torch.testing.assert_close(empty(batch), encoder(batch))


@pytest.mark.parametrize("chunks", [True, False])
def test_a_batch_that_has_its_statistics_compiles_to_one_graph(chunks: bool) -> None:
    encoder = randomised(SNE(hidden_dim=32, statistics="tensor", chunks=chunks))
    compiled = torch.compile(encoder, fullgraph=True, backend="aot_eager")
    for count in (2, 4):
        batch = encoder.pack(networks(count)).detach()
        assert batch.statistics is not None
        torch.testing.assert_close(compiled(batch), encoder(batch), atol=1e-5, rtol=1e-5)


def test_a_packed_batch_compiles_in_a_predictor_and_one_whose_signs_turn_has_no_statistics_yet() -> None:
    encoder = randomised(SNE(hidden_dim=32, statistics="tensor", chunks=False))
    predictor = Predictor(encoder, normalise_inputs=False)
    batch = predictor.pack(networks()).detach()
    compiled = torch.compile(predictor, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(batch), predictor(batch))
    odd = Predictor(encoder, preparation=Preparation(units="canonical", odd=True), normalise_inputs=False)
    assert batch.statistics is not None and odd.pack(networks()).statistics is None


def test_an_exported_encoder_takes_other_batches_with_their_statistics() -> None:
    encoder = randomised(SNE(hidden_dim=32, statistics="tensor")).eval()
    example, other = encoder.pack(networks(2)).detach(), encoder.pack(networks(3)).detach()
    sizes = {"networks": [{0: torch.export.Dim.AUTO} for _ in _pytree.tree_leaves(example)]}
    program = torch.export.export(encoder, (example,), dynamic_shapes=sizes)
    for batch in (example, other):
        torch.testing.assert_close(program.module()(batch), encoder(batch))
    bare = example.with_fields(values=example.values)
    with pytest.raises(ValueError, match=r"SNE: batch must have its statistics before torch\.export"):
        torch.export.export(encoder, (bare,), strict=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"statistics": "all"}, "SNE: statistics must be one of 'none', 'tensor', 'relative', got 'all'"),
        ({"chunks": 1, "statistics": "tensor"}, "SNE: chunks must be True or False"),
        ({"chunks": False}, "SNE: chunks=False leaves statistics alone; it needs statistics='tensor' or 'relative'"),
    ],
)
def test_mistakes_are_told(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SNE(hidden_dim=32, **options)


def test_a_batch_without_shapes_is_told() -> None:
    encoder = SNE(hidden_dim=32, statistics="tensor")
    with pytest.raises(ValueError, match="the batch must have the shapes of its tensors"):
        batch = encoder.pack(networks()).detach()
        encoder(batch.with_fields(values=batch.values, shapes=()))

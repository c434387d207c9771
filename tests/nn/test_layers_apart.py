"""Layers encoded apart and joined: the same vectors as the whole, and the same bits however layers are grouped."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from sne_fast import SNE, CheckpointError, WeightBatch, pack
from sne_fast.nn import LayerEncodings, bounded_memory
from sne_fast.nn.input_scales import SCALED

OPTIONS = [
    {},
    {"set_attention": "isab", "num_inducing": 4},
    {"statistics": "tensor"},
    {"statistics": "relative", "set_attention": "isab", "num_inducing": 4},
    {"statistics": "tensor", "chunks": False},
    {"chunk_order": False, "element_order": False, "scale": "none"},
]


def networks() -> list[nn.Module]:
    torch.manual_seed(0)
    cnn = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 5))
    return [cnn, nn.Linear(40, 30), nn.Sequential(nn.Linear(6, 7), nn.LayerNorm(7), nn.Linear(7, 2, bias=False))]


def encoder_of(**options: object) -> SNE:
    torch.manual_seed(1)
    return SNE(**{"hidden_dim": 16, "num_heads": 2, "chunk_size": 8, **options}).eval()  # type: ignore[arg-type]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_joined_layers_are_the_whole(options: dict[str, object]) -> None:
    encoder = encoder_of(**options)
    batch = encoder.pack(networks()).detach()
    with torch.no_grad():
        z = encoder(batch)
        encodings = encoder.encode_layers(batch)
        torch.testing.assert_close(encoder.join(encodings, batch.network_ptr), z, rtol=0, atol=1e-5)
        torch.testing.assert_close(encoder.join(encodings, batch.network_ptr.tolist()), z, rtol=0, atol=1e-5)
    assert encodings.names == ("0", "1", "3", "", "0", "1", "2")
    assert encodings.levels.tolist() == [0, 1, 2, 0, 0, 1, 2] and encodings.tensors.tolist() == [2, 4, 2, 2, 2, 2, 1]
    assert not encodings.estimated


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_layer_has_the_same_bits_whichever_layers_are_beside_it(options: dict[str, object]) -> None:
    encoder = encoder_of(**options)
    modules = networks()
    with torch.no_grad():
        together = encoder.encode_layers(modules)
        apart = LayerEncodings.cat([encoder.encode_layers([module]) for module in modules])
        backwards = encoder.encode_layers(encoder.pack(modules)[[2, 1, 0]])
    assert torch.equal(together.vectors, apart.vectors) and together.names == apart.names
    assert torch.equal(together.vectors[[4, 5, 6, 3, 0, 1, 2]], backwards.vectors)
    if together.pooled is not None:
        assert torch.equal(together.pooled, apart.pooled)


def test_gradients_reach_all_parameters_through_layers_apart() -> None:
    encoder = encoder_of(statistics="tensor").double()
    batch = encoder.pack(networks()).detach()
    weights = torch.randn(3, encoder.out_features, dtype=torch.float64)
    (encoder(batch) * weights).sum().backward()
    want = {name: parameter.grad.clone() for name, parameter in encoder.named_parameters()}
    encoder.zero_grad()
    (encoder.join(encoder.encode_layers(batch), batch.network_ptr) * weights).sum().backward()
    for name, parameter in encoder.named_parameters():
        torch.testing.assert_close(parameter.grad, want[name], rtol=1e-6, atol=1e-9, msg=name)


def test_tiles_of_a_large_tensor_are_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = encoder_of(set_attention="isab", num_inducing=4).double()
    batch = encoder.pack([nn.Linear(50, 40).double(), nn.Linear(4, 3).double()])
    with torch.no_grad():
        want = encoder.join(encoder.encode_layers(batch), batch.network_ptr)
        for rows in (7, 64, 249):
            monkeypatch.setattr(bounded_memory, "ROWS", {"cpu": rows})
            torch.testing.assert_close(
                encoder.join(encoder.encode_layers(batch), batch.network_ptr), want, rtol=0, atol=1e-12
            )
    torch.testing.assert_close(encoder(batch), want, rtol=0, atol=1e-12)  # with gradients, so without tiles


def test_tiles_leave_what_a_hook_keeps_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded_memory, "ROWS", {"cpu": 7})
    encoder = encoder_of(set_attention="isab", num_inducing=4)
    batch = encoder.pack([nn.Linear(50, 40)])
    kept: list[tuple[torch.Tensor, torch.Tensor]] = []
    with torch.no_grad():
        want = encoder(batch)
        encoder.chunk_encoder.register_forward_hook(lambda _, __, out: kept.append((out, out.clone())))
        torch.testing.assert_close(encoder(batch), want, rtol=0, atol=1e-6)
    assert kept and all(torch.equal(now, then) for now, then in kept)


@pytest.mark.parametrize("options", [{}, {"statistics": "tensor"}, {"set_attention": "isab"}], ids=str)
def test_a_sample_of_all_chunks_is_the_whole_and_a_smaller_one_is_near(options: dict[str, object]) -> None:
    encoder = encoder_of(**options)
    batch = encoder.pack([nn.Linear(100, 80), nn.Linear(4, 3)])
    with torch.no_grad():
        whole = encoder.encode_layers(batch)
        assert torch.equal(encoder.encode_layers(batch, max_chunks=1000).vectors, whole.vectors)
        sampled = encoder.encode_layers(batch, max_chunks=200, seed=3)
        again = encoder.encode_layers(batch, max_chunks=200, seed=3)
        other = encoder.encode_layers(batch, max_chunks=200, seed=4)
        z, ptr = encoder.join(whole, batch.network_ptr), batch.network_ptr
        errors = (encoder.join(sampled, ptr) - z).norm(dim=1) / z.norm(dim=1)
        spread = encoder.spread(sampled, ptr)
    assert sampled.estimated and torch.equal(sampled.vectors, again.vectors)
    assert not torch.equal(sampled.vectors, other.vectors)
    assert 0 < errors[0] < 0.2 and 0 < spread[0] < 0.2
    assert errors[1] < 1e-6 and spread[1] == 0  # it was not sampled
    if sampled.pooled is not None:
        assert torch.equal(sampled.pooled, whole.pooled)  # statistics are those of all chunks


def test_the_spread_is_the_size_of_the_error_over_seeds() -> None:
    encoder = encoder_of(set_attention="isab")
    batch = encoder.pack([nn.Linear(200, 160)])
    with torch.no_grad():
        z = encoder(batch)
        errors, spreads = [], []
        for seed in range(24):
            sampled = encoder.encode_layers(batch, max_chunks=64, seed=seed)
            errors.append(float((encoder.join(sampled) - z).norm() / z.norm()))
            spreads.append(float(encoder.spread(sampled)))
    mean_error, mean_spread = (sum(v * v for v in values) ** 0.5 for values in (errors, spreads))
    assert 0.5 < mean_spread / mean_error < 2


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(2, 60), st.integers(0, 5), st.integers(1, 40), st.integers(1, 40))
@pytest.mark.fuzz
def test_samples_have_a_chunk_of_each_stratum(most: int, seed: int, rows: int, columns: int) -> None:
    from sne_fast.nn.chunk_samples import sample_chunks

    batch = encoder_of(chunk_size=4).pack([nn.Linear(columns, rows), nn.Linear(2, 2)])
    sample = sample_chunks(batch, most, seed)
    counts = batch.tensor_ptr.diff().tolist()
    if sample is None:
        assert max(counts) <= most
        return
    first, values = 0, batch.values
    for s, n in enumerate(counts):
        taken = min(n, most)
        positions = sample.position[first : first + taken].tolist()
        assert [p * taken // n for p in positions] == list(range(taken)) or all(
            i * n // taken <= p < (i + 1) * n // taken for i, p in enumerate(positions)
        )
        for row, position in enumerate(positions, first):
            chunk = int(batch.tensor_ptr[s]) + position
            want = values[batch.chunk_ptr[chunk] : batch.chunk_ptr[chunk + 1]]
            got = sample.batch.values[sample.batch.chunk_ptr[row] : sample.batch.chunk_ptr[row + 1]]
            assert torch.equal(want, got)
        first += taken
    for half in sample.halves:
        assert torch.equal(sample.position[half.rows], half.position) and int(half.tensor_ptr[-1]) == len(half.rows)


def test_encodings_are_saved_moved_and_joined(tmp_path) -> None:
    encoder = encoder_of(statistics="relative")
    batch = encoder.pack(networks())
    with torch.no_grad():
        encodings = encoder.encode_layers(batch, max_chunks=4)
    encodings.save(tmp_path / "layers.safetensors")
    loaded = LayerEncodings.load(tmp_path / "layers.safetensors")
    assert loaded.names == encodings.names and loaded.estimated
    for name in ("vectors", "levels", "tensors", "pooled", "halves"):
        assert torch.equal(getattr(loaded, name), getattr(encodings, name)), name
    wide = loaded.to("cpu", torch.float64)
    assert wide.vectors.dtype == wide.pooled.dtype == torch.float64 and wide.levels.dtype == torch.int64
    (tmp_path / "other.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    with pytest.raises(CheckpointError, match=r"other\.safetensors: must hold encodings of layers"):
        LayerEncodings.load(tmp_path / "other.safetensors")


def test_what_does_not_fit_is_refused() -> None:
    encoder = encoder_of()
    batch = encoder.pack(networks())
    encodings = encoder.encode_layers(batch)
    for pointers in ([0, 3], [0, 3, 3, 7], [1, 7], [], [[0, 7]], [0.0, 7.0], [False, True], "07"):
        with pytest.raises(ValueError, match=r"SNE\.join: network_ptr must be increasing integers from 0 to .* 7"):
            encoder.join(encodings, pointers)
    with pytest.raises(ValueError, match=r"of width 16 with statistics, got width 16 without"):
        encoder_of(statistics="tensor").join(encodings)
    with pytest.raises(ValueError, match="max_chunks must be an integer of at least 2"):
        encoder.encode_layers(batch, max_chunks=1)
    with pytest.raises(ValueError, match="chunking='neuron'"):
        encoder_of(chunking="neuron").encode_layers(batch)
    with pytest.raises(ValueError, match=r"levels must have shape \(7,\)"):
        LayerEncodings(encodings.vectors, encodings.levels[:3], encodings.tensors)
    with pytest.raises(ValueError, match="at least one"):
        LayerEncodings.cat([])
    with pytest.raises(ValueError, match="all must come from one encoder"):
        LayerEncodings.cat([encodings, encoder_of(statistics="tensor").encode_layers(networks())])


def test_statistics_of_scaled_values_are_refused() -> None:
    encoder = encoder_of(statistics="tensor")
    batch = pack(networks(), chunk_size=8).detach()
    scaled = batch.with_fields(values=batch.values * 3, prepared=(SCALED,))
    for encode in (encoder, encoder.encode_layers):
        with pytest.raises(ValueError, match="must have its statistics before an input scale"):
            encode(scaled)


def test_no_networks_have_no_layers() -> None:
    encoder = encoder_of()
    batch: WeightBatch = encoder.pack(networks())[0:0]
    assert len(encoder.encode_layers(batch)) == 0

"""`SNE.encode`: files of any format layer by layer, memory that is known before, and what is refused."""

from __future__ import annotations

import json
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file, save_model
from torch import nn

from sne_fast import SNE, CheckpointError, pack
from sne_fast.data.checkpoints import load_state_dict, open_checkpoint, save_state_dict
from sne_fast.data.layer_stream import LayerStream
from sne_fast.free_memory import MemoryNeeded, available_bytes
from sne_fast.nn.memory_needs import memory_needed


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(30, 16)
        self.blocks = nn.ModuleList([nn.ModuleDict({"norm": nn.LayerNorm(16), "fc": nn.Linear(16, 16)}) for _ in "ab"])
        self.lm_head = nn.Linear(16, 30, bias=False)
        self.lm_head.weight = self.embed_tokens.weight
        self.register_buffer("attn_mask", torch.ones(4, 4).tril())


def network() -> Tied:
    torch.manual_seed(0)
    return Tied()


def encoder_of(**options: object) -> SNE:
    torch.manual_seed(1)
    return SNE(**{"hidden_dim": 16, "num_heads": 2, "chunk_size": 8, **options}).eval()  # type: ignore[arg-type]


def write(folder: Path, form: str) -> Path:
    state = network().state_dict()
    apart = {name: tensor.clone() for name, tensor in state.items()}
    file = folder / {"pt": "m.pt", "legacy": "m.pth", "bytes": "m.safetensors"}.get(form, form)
    if form == "pt":
        torch.save({"model": state, "epoch": 3, "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}}}, file)
    elif form == "legacy":
        torch.save(state, file, _use_new_zipfile_serialization=False)
    elif form == "tied.safetensors":
        save_model(network(), str(file))
    elif form == "ordered.safetensors":
        save_state_dict(state, file)
    elif form == "half.safetensors":
        save_file({name: tensor.bfloat16() for name, tensor in apart.items()}, file)
    elif form == "shards":
        file.mkdir()
        names = list(apart)
        parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
        for part, held in parts.items():
            save_file({name: apart[name] for name in held}, file / part)
        index = {"weight_map": {name: part for part, held in parts.items() for name in held}}
        (file / "model.safetensors.index.json").write_text(json.dumps(index))
    return file


FORMS = ("pt", "legacy", "tied.safetensors", "ordered.safetensors", "half.safetensors", "shards")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("options", [{}, {"statistics": "tensor", "set_attention": "isab"}], ids=["sab", "statistics"])
def test_a_file_read_layer_by_layer_is_the_file_read_whole(form: str, options: dict, tmp_path: Path) -> None:
    encoder, file = encoder_of(**options), write(tmp_path, form)
    with torch.no_grad():
        want = encoder([file])[0]
    got = encoder.encode(file)
    assert got.shape == (encoder.out_features,) and not got.requires_grad
    torch.testing.assert_close(got, want, rtol=0, atol=5e-6)
    stream, whole = LayerStream(file), pack([file])
    assert stream.network.skipped == [*whole.skipped[0]]
    names = tuple(name for layer in stream.network.layers for name, _ in layer.tensors)
    assert names == whole.names[0][1] and stream.num_weights == whole.num_weights


@pytest.mark.parametrize("order", ["names", "definition"])
def test_modules_and_state_dicts_are_taken_as_they_are(order: str) -> None:
    encoder, module = encoder_of(order=order), network()
    for source in (module, module.state_dict()):
        torch.testing.assert_close(encoder.encode(source), encoder([source])[0], rtol=0, atol=5e-6)
    rows = encoder.encode([module, module.state_dict()])
    torch.testing.assert_close(rows, encoder.encode(module).expand(2, 16), rtol=0, atol=5e-6)


def test_layers_are_the_layers_of_the_whole_batch(tmp_path: Path) -> None:
    file = write(tmp_path, "half.safetensors")
    whole = pack([file], chunk_size=8)
    layers = list(LayerStream(file).batches(chunk_size=8))
    assert [layer.layer_level.tolist() for layer in layers] == [[level] for level in range(whole.num_layers)]
    assert torch.equal(torch.cat([layer.values for layer in layers]), whole.values)
    assert torch.equal(torch.cat([layer.tensor_type for layer in layers]), whole.tensor_type)
    assert torch.equal(torch.cat([layer.tensor_scale for layer in layers]), whole.tensor_scale)


def test_kinds_and_order_are_those_of_pack(tmp_path: Path) -> None:
    file = write(tmp_path, "pt")
    for kinds in ("names", {"blocks.*": "other", "lm_head": "embedding", "embed_tokens": "linear"}):
        kinds = kinds if isinstance(kinds, str) else {k: v for k, v in kinds.items() if k != "lm_head"}
        want = pack([file], kinds=kinds).tensor_type
        got = torch.cat([layer.tensor_type for layer in LayerStream(file, kinds=kinds).batches()])
        assert torch.equal(got, want)
    with pytest.raises(CheckpointError, match="does not say in which order"):
        LayerStream(write(tmp_path, "half.safetensors"), order="definition")


def test_quantised_weights_are_decoded_layer_by_layer(tmp_path: Path) -> None:
    torch.manual_seed(0)
    state: dict[str, torch.Tensor] = {"embed_tokens.weight": torch.randn(6, 8)}
    for i in range(2):
        state[f"layers.{i}.weight"] = torch.randint(-100, 100, (8, 8), dtype=torch.int8)
        state[f"layers.{i}.SCB"] = torch.rand(8)
        state[f"layers.{i}.bias"] = torch.randn(8)
    file = tmp_path / "int8.safetensors"
    save_file(state, file)
    whole = pack([file])
    layers = list(LayerStream(file).batches())
    assert torch.equal(torch.cat([layer.values for layer in layers]), whole.values)
    assert LayerStream(file).network.skipped == [*whole.skipped[0]]
    encoder = encoder_of()
    torch.testing.assert_close(encoder.encode(file), encoder([file])[0], rtol=0, atol=5e-6)


@pytest.mark.parametrize("kinds", [None, {"fc": "other"}])
def test_a_quantised_weight_has_the_kind_of_what_it_is_decoded_to(kinds: dict | None, tmp_path: Path) -> None:
    said = {"blocksize": 8, "shape": [4, 2, 3, 3], "quant_type": "nf4", "dtype": "float16"}
    state = {
        "conv.weight": torch.arange(36, dtype=torch.uint8)[:, None],
        "conv.weight.absmax": torch.rand(9),
        "conv.weight.quant_map": torch.linspace(-1, 1, 16),
        "conv.weight.quant_state.bitsandbytes__nf4": torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8),
        "fc.weight": torch.randn(3, 4),
    }
    save_file(state, tmp_path / "m.safetensors")
    whole = pack([tmp_path / "m.safetensors"], kinds=kinds)
    layers = list(LayerStream(tmp_path / "m.safetensors", kinds=kinds).batches())
    assert torch.equal(torch.cat([layer.tensor_type for layer in layers]), whole.tensor_type)
    assert torch.equal(torch.cat([layer.values for layer in layers]), whole.values)


def test_buffers_that_only_their_values_tell_are_left_out(tmp_path: Path) -> None:
    angles = torch.arange(40.0)[:, None] * torch.tensor([1.0, 0.1])
    table = torch.stack([angles.sin(), angles.cos()], -1).flatten(1)
    file = tmp_path / "m.pt"
    torch.save({"pos_encoder.pe": table[None], "fc.weight": torch.randn(4, 4)}, file)
    assert LayerStream(file).network.skipped == [*pack([file]).skipped[0]]


def test_nothing_but_headers_is_read_before_a_layer_is_asked_for(tmp_path: Path) -> None:
    file = tmp_path / "big.safetensors"
    save_file({f"layers.{i}.weight": torch.zeros(1024, 1024) for i in range(16)}, file)
    read: list[str] = []
    checkpoint = open_checkpoint(file)
    for name, tensor in checkpoint.tensors.items():
        object.__setattr__(tensor, "read", lambda name=name, own=tensor.read: read.append(name) or own())
    stream = LayerStream(checkpoint)
    assert len(stream) == 16 and stream.num_weights == 2**24 and read == []
    for i, _ in enumerate(stream.batches()):
        assert len(read) <= i + 2  # one ahead


def test_memory_is_known_before_any_work(tmp_path: Path) -> None:
    file = tmp_path / "big.safetensors"
    save_file({"small.weight": torch.zeros(4, 4), "lm_head.weight": torch.zeros(2048, 1024)}, file)
    encoder = encoder_of(hidden_dim=64, set_attention="isab")
    need = memory_needed(LayerStream(file), encoder.config)
    assert need.layer == "lm_head" and need.weights == 2**21
    assert memory_needed(LayerStream(file), encoder.config, 64).total < need.total
    with pytest.raises(
        MemoryNeeded, match=r"needs 0\.\d GiB for layer 'lm_head' of 2,097,152 weights, and 0\.1 GiB may"
    ):
        encoder.encode(file, max_memory=1e8)
    assert 0 < available_bytes() < 1e15


def test_memory_depends_on_cut_and_dtype(tmp_path: Path) -> None:
    stream = LayerStream(nn.Conv2d(64, 64, 3))
    encoder = encoder_of(chunk_size=32, chunking="kernel")
    for chunking in ("flat", "neuron", "kernel"):
        batch = encoder_of(chunk_size=32, chunking=chunking).pack([nn.Conv2d(64, 64, 3)])
        assert stream.chunk_counts(32, chunking) == [batch.tensor_ptr_host.diff().tolist()]
    need = memory_needed(stream, encoder.config)
    assert need.total > memory_needed(stream, encoder_of(chunk_size=32).config).total
    assert memory_needed(stream, encoder.config, itemsize=8).total > need.total
    wide = encoder_of(chunk_size=32, hidden_dim=512, set_attention="isab").double()
    with pytest.raises(MemoryNeeded):
        wide.encode(nn.Conv2d(64, 64, 3).double(), max_memory=memory_needed(stream, wide.config).total)


def test_quadratic_attention_on_a_large_tensor_warns_with_its_time(tmp_path: Path) -> None:
    stream = LayerStream({"fc.weight": torch.zeros(4096, 1)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder_of().check_stream(stream)
    file = tmp_path / "big.safetensors"
    save_file({"fc.weight": torch.zeros(1024, 1024)}, file)
    with pytest.warns(UserWarning, match=r"quadratic in the chunks of a tensor, about \d+ \w+ on one core"):
        encoder_of(chunk_size=4).check_stream(LayerStream(file))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder_of(chunk_size=4, set_attention="isab").check_stream(LayerStream(file))
        encoder_of(chunk_size=4).check_stream(LayerStream(file), max_chunks=1000)


def test_a_file_that_shrinks_while_it_is_read_is_named(tmp_path: Path) -> None:
    file = tmp_path / "m.safetensors"
    save_file({f"layers.{i}.weight": torch.randn(64, 64) for i in range(3)}, file)
    stream = LayerStream(file)
    with open(file, "rb+") as opened:
        opened.truncate(file.stat().st_size - 20_000)
    with pytest.raises(CheckpointError, match=r"m\.safetensors: is damaged: it ends \d+ bytes too early"):
        list(stream.batches())


def test_bad_arguments_and_values_are_named(tmp_path: Path) -> None:
    encoder = encoder_of()
    with pytest.raises(ValueError, match="source must hold at least one network"):
        encoder.encode([])
    with pytest.raises(CheckpointError, match=r"network 0: .*there is no such file"):
        encoder.encode(tmp_path / "none.pt")
    with pytest.raises(CheckpointError, match="key= is for files of torch"):
        encoder.encode(network(), key="model")
    for options, said in (
        ({"max_memory": float("nan")}, "max_memory must be a number of bytes above 0, got nan"),
        ({"max_memory": "8G"}, "max_memory must be a number of bytes above 0, got '8G'"),
        ({"max_chunks": "many"}, "max_chunks must be an integer of at least 2, got 'many'"),
    ):
        with pytest.raises(ValueError, match=said):
            encoder.encode(network(), **options)
    stream = LayerStream(network())
    for own in ({"key": "model"}, {"kinds": "names"}, {"nonfinite": "zero"}):
        with pytest.raises(ValueError, match="are those of the LayerStream"):
            encoder.encode(stream, **own)
    for run in (slice(0, 0), slice(0, 3, 2), 1):
        with pytest.raises(ValueError, match="must be a slice of step 1 with at least one layer"):
            stream[run]
    state = {"a.weight": torch.tensor([[1.0, float("nan")]])}
    with pytest.raises(ValueError, match=r"network 1 \('state_dict'\), tensor 'a\.weight' has 1 NaN"):
        encoder.encode([network(), state])
    with pytest.raises(MemoryNeeded, match=r"^network 0 \('Tied'\): encoding needs"):
        encoder.encode([network()], max_memory=1e6)
    with pytest.raises(ValueError, match=r"'a\.weight' has 1 NaN"):
        encoder.encode(state)
    torch.testing.assert_close(encoder.encode(state, nonfinite="zero"), encoder.encode({"a.weight": torch.eye(2)[:1]}))


def test_opened_tensors_are_those_that_are_loaded(tmp_path: Path) -> None:
    for form in FORMS:
        file = write(tmp_path, form)
        opened, loaded = open_checkpoint(file), load_state_dict(file)
        assert list(opened.tensors) == list(loaded)
        for name, tensor in opened.tensors.items():
            one = tensor if isinstance(tensor, torch.Tensor) else tensor.read()
            assert torch.equal(one, loaded[name]) and tensor.shape == loaded[name].shape
            assert tensor.dtype == loaded[name].dtype


@pytest.mark.parametrize("form", ["safetensors", "legacy", "zip"])
def test_threads_read_tensors_of_one_file_at_once(form: str, tmp_path: Path) -> None:
    file, state = tmp_path / "m", {f"layers.{i}.weight": torch.full((64, 64), float(i)) for i in range(8)}
    if form == "safetensors":
        save_file(state, file)
    else:
        torch.save(state, file, _use_new_zipfile_serialization=form == "zip")
    tensors = list(open_checkpoint(file).tensors.values())
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(tensors[i % 8].read) for i in range(800)]
        assert all(bool((job.result() == i % 8).all()) for i, job in enumerate(jobs))

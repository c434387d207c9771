"""Contents of the WeightBatch that `pack` makes, against cutting element by element."""

from __future__ import annotations

import dataclasses
import itertools
import json
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

import sne_fast
from helpers.brute_force import Network, arrays, cut_indices, cut_network, layers_of
from helpers.networks import MIXED, SMALL, make

F64 = torch.float64
CHUNKINGS = ["flat", "neuron", "kernel"]
POINTERS = ["chunk_ptr", "tensor_ptr", "layer_ptr", "network_ptr"]
EXACT = [*POINTERS, "tensor_type", "layer_level"]


def check(batch: sne_fast.WeightBatch, expected: list[Network], rtol: float = 1e-14) -> None:
    """Compare every field of the batch with nested lists."""
    want = arrays(expected)
    for field in EXACT:
        got = getattr(batch, field)
        assert got.dtype == torch.int64, field
        assert got.tolist() == want[field].tolist(), field
    for field in ("values", "tensor_scale"):
        got = getattr(batch, field)
        assert got.shape == want[field].shape, field
        torch.testing.assert_close(got.double(), want[field], rtol=rtol, atol=rtol * 1e-3)
    assert [name for _, names in batch.names for name in names] == [t.name for n in expected for la in n for t in la]
    assert [tuple(s) for shapes in batch.shapes for s in shapes] == [t.shape for n in expected for la in n for t in la]


# ---------------------------------------------------------------------------------------------------------------------
# Cutting: worked by hand first, so that the oracle itself is pinned down


def pieces(tensor: Tensor, chunk_size: int, chunking: str) -> list[list[float]]:
    """Return what pack makes of one tensor, as lists."""
    batch = sne_fast.pack([{"0.weight": tensor}], chunk_size, chunking, scale="none", dtype=F64)
    return [p.tolist() for p in batch.values.split(batch.chunk_ptr.diff().tolist())]


BY_HAND = [
    # W[out=2, in=3] = 0..5
    ((2, 3), 4, "flat", [[0, 1, 2, 3], [4, 5]]),
    ((2, 3), 2, "neuron", [[0, 1], [2], [3, 4], [5]]),
    ((2, 3), 2, "kernel", [[0, 1], [2], [3, 4], [5]]),
    # W[out=2, in=2, k=3] = 0..11: element (o, i, p) is 6 o + 3 i + p
    ((2, 2, 3), 3, "flat", [[0, 3, 6], [9], [1, 4, 7], [10], [2, 5, 8], [11]]),
    ((2, 2, 3), 3, "neuron", [[0, 3], [6, 9], [1, 4], [7, 10], [2, 5], [8, 11]]),
    ((2, 2, 3), 2, "kernel", [[0, 1], [2], [3, 4], [5], [6, 7], [8], [9, 10], [11]]),
    # W[out=1, in=2, 2, 2]: kernel positions row-major
    ((1, 2, 2, 2), 8, "flat", [[0, 4], [1, 5], [2, 6], [3, 7]]),
    ((1, 2, 2, 2), 8, "kernel", [[0, 1, 2, 3], [4, 5, 6, 7]]),
    ((5,), 2, "flat", [[0, 1], [2, 3], [4]]),
    ((5,), 2, "neuron", [[0, 1], [2, 3], [4]]),
    ((5,), 2, "kernel", [[0, 1], [2, 3], [4]]),
    ((), 2, "flat", [[0]]),
    ((), 2, "neuron", [[0]]),
    ((), 2, "kernel", [[0]]),
]


@pytest.mark.parametrize(("shape", "chunk_size", "chunking", "expected"), BY_HAND, ids=str)
def test_cutting_by_hand(shape: tuple, chunk_size: int, chunking: str, expected: list[list[int]]) -> None:
    tensor = torch.arange(torch.Size(shape).numel(), dtype=F64).reshape(shape)
    assert [[tensor[i].item() for i in piece] for piece in cut_indices(shape, chunk_size, chunking)] == expected
    assert pieces(tensor, chunk_size, chunking) == expected


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.lists(st.integers(1, 5), max_size=5),
    st.integers(1, 12),
    st.sampled_from(CHUNKINGS),
    st.randoms(use_true_random=False),
)
def test_cutting_of_any_shape_and_layout(shape: list[int], chunk_size: int, chunking: str, random) -> None:
    """Any number of dimensions, any strides."""
    order = list(range(len(shape)))
    random.shuffle(order)
    numbers = torch.arange(torch.Size(shape).numel(), dtype=F64)
    stored = numbers.reshape([shape[i] for i in order])
    tensor = stored.permute([order.index(i) for i in range(len(shape))]) if shape else stored
    assert list(tensor.shape) == shape
    expected = [[tensor[i].item() for i in piece] for piece in cut_indices(tuple(shape), chunk_size, chunking)]
    assert pieces(tensor, chunk_size, chunking) == expected


# ---------------------------------------------------------------------------------------------------------------------
# Whole networks


@pytest.mark.parametrize("scale", ["tensor", "none"])
@pytest.mark.parametrize("chunk_size", [1, 8, 32, 256])
@pytest.mark.parametrize("chunking", CHUNKINGS)
@pytest.mark.parametrize("name", SMALL)
def test_every_field_of_every_architecture(name: str, chunking: str, chunk_size: int, scale: str) -> None:
    network = make(name, 1, F64)
    batch = sne_fast.pack([network], chunk_size, chunking, scale=scale, order="definition", dtype=F64)
    check(batch, [cut_network(network, chunk_size, chunking, scale)])
    assert batch.chunk_size == chunk_size and batch.chunking == chunking
    if scale == "none":
        assert (batch.tensor_scale == 1).all()


def test_several_networks_and_the_defaults() -> None:
    networks = [make(name, 2) for name in MIXED]
    batch = sne_fast.pack(networks, order="definition")
    check(batch, [cut_network(n) for n in networks], 1e-6)
    assert (batch.chunk_size, batch.chunking, batch.scale) == (32, "flat", "tensor")
    assert sne_fast.pack(networks).order == "names"
    assert batch.values.dtype == torch.float32
    assert len(batch) == len(batch.names) == len(batch.shapes) == len(MIXED)


def test_it_is_a_frozen_dataclass_with_the_fields_in_order() -> None:
    fields = [f.name for f in dataclasses.fields(sne_fast.WeightBatch) if f.init]
    scalars = ["chunk_size", "chunking", "scale", "order", "names", "shapes", "skipped", "prepared"]
    assert fields == ["values", *POINTERS, "tensor_type", "layer_level", "tensor_scale", *scalars]
    batch = sne_fast.pack([make("mlp")])
    with pytest.raises(dataclasses.FrozenInstanceError):
        batch.chunk_size = 3  # type: ignore[misc]


def test_only_parameters_and_running_statistics() -> None:
    """Check `oddities`: no plain buffer and no counter; complex, frozen and strided parameters are in."""
    batch = sne_fast.pack([make("oddities", 1)], order="definition")
    names = set(batch.names[0][1])
    assert names.isdisjoint({"constant", "batch.num_batches_tracked", "tied.weight", "again.weight"})
    assert names >= {"own", "phase", "frozen.weight", "batch.running_var", "instance.running_mean", "transposed.weight"}


def test_tied_parameters_stand_once_at_their_first_place() -> None:
    tied, free = make("transformer_tied", 1), make("transformer", 1)
    names, all_names = (sne_fast.pack([n]).names[0][1] for n in (tied, free))
    assert "embedding.weight" in names and "head.weight" not in names and "head.weight" in all_names
    batch = sne_fast.pack([tied])
    assert batch.layer_level.tolist() == list(range(len(batch.layer_level)))


def test_buffers_of_that_name_elsewhere_are_no_running_statistics() -> None:
    class Tracker(nn.Linear):
        def __init__(self) -> None:
            super().__init__(2, 2)
            self.register_buffer("running_mean", torch.randn(2))

    assert sne_fast.pack([nn.Sequential(Tracker())]).names[0][1] == ("0.weight", "0.bias")


# ---------------------------------------------------------------------------------------------------------------------
# Types

TYPES = [
    (nn.Linear(2, 2), [0, 1]),
    (nn.Conv1d(2, 2, 2), [8, 9]),
    (nn.Conv2d(2, 2, 2), [8, 9]),
    (nn.Conv3d(2, 2, 2), [8, 9]),
    (nn.ConvTranspose1d(2, 2, 2), [16, 17]),
    (nn.ConvTranspose2d(2, 2, 2), [16, 17]),
    (nn.ConvTranspose3d(2, 2, 2), [16, 17]),
    (nn.BatchNorm1d(2), [24, 25, 26, 27]),
    (nn.BatchNorm2d(2), [24, 25, 26, 27]),
    (nn.BatchNorm3d(2), [24, 25, 26, 27]),
    (nn.SyncBatchNorm(2), [24, 25, 26, 27]),
    (nn.InstanceNorm2d(2, affine=True), [24, 25]),
    (nn.InstanceNorm2d(2, affine=True, track_running_stats=True), [24, 25, 26, 27]),
    (nn.LayerNorm(2), [24, 25]),
    (nn.GroupNorm(1, 2), [24, 25]),
    (nn.RMSNorm(2), [24]),
    (nn.Embedding(2, 2), [32]),
    (nn.EmbeddingBag(2, 2), [32]),
    (nn.RNN(2, 2), [40, 40, 41, 41]),
    (nn.LSTM(2, 2, num_layers=2), [40, 40, 41, 41] * 2),
    (nn.GRU(2, 2, bidirectional=True), [40, 40, 41, 41] * 2),
    (nn.RNNCell(2, 2), [40, 40, 41, 41]),
    (nn.LSTMCell(2, 2), [40, 40, 41, 41]),
    (nn.GRUCell(2, 2), [40, 40, 41, 41]),
    (nn.PReLU(), [56]),
]


@pytest.mark.parametrize(("module", "types"), TYPES, ids=lambda v: type(v).__name__)
def test_types_of_modules(module: nn.Module, types: list[int]) -> None:
    for network in (module, nn.Sequential(module)):  # also where the network is itself one layer
        batch = sne_fast.pack([network])
        assert batch.tensor_type.tolist() == types
        assert batch.layer_ptr.tolist() == [0, len(types)]
    assert [s.type for layer in layers_of(module) for s in layer] == types


def test_types_of_attention_and_of_unknown_modules() -> None:
    class Unknown(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gamma = nn.Parameter(torch.ones(2))
            self.bias = nn.Parameter(torch.ones(2))

    assert sne_fast.pack([Unknown()]).tensor_type.tolist() == [60, 57]
    attention = sne_fast.pack([nn.MultiheadAttention(4, 2)])
    types = dict(zip(attention.names[0][1], attention.tensor_type.tolist(), strict=True))
    assert (types["in_proj_weight"], types["in_proj_bias"]) == (48, 49)
    assert attention.layer_ptr.tolist() == [0, 2, 4]  # the output projection is a module of its own


@pytest.mark.parametrize("name", ["mlp", "mlp_deep", "cnn", "resnet_block", "recurrent", "inr", "lenet"])
def test_a_state_dict_of_plain_layers_packs_like_its_module(name: str) -> None:
    network = make(name, 1)
    a, b = sne_fast.pack([network]), sne_fast.pack([network.state_dict()])
    for field in [*EXACT, "values", "tensor_scale"]:
        assert torch.equal(getattr(a, field), getattr(b, field)), field
    assert a.names[0][1] == b.names[0][1]


def test_subclasses_count_as_their_base() -> None:
    class Own(nn.Linear):
        pass

    assert sne_fast.pack([Own(2, 2)]).tensor_type.tolist() == [0, 1]


# ---------------------------------------------------------------------------------------------------------------------
# Order


def test_layers_stand_in_definition_order_not_in_order_of_use() -> None:
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.z_last = nn.Linear(2, 2)
            self.a_first = nn.Linear(2, 2)
            self.m = nn.ModuleDict({"y": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
            self.own = nn.Parameter(torch.ones(3))

    network = Backwards()
    order = ("own", "z_last.weight", "z_last.bias", "a_first.weight", "a_first.bias")
    order += ("m.y.weight", "m.y.bias", "m.b.weight", "m.b.bias")
    for form in (network, network.state_dict()):
        batch = sne_fast.pack([form], order="definition")
        assert batch.names[0][1] == order
        assert batch.layer_level.tolist() == [0, 1, 2, 3, 4]
        layers = [name.rpartition(".")[0] for name in sne_fast.pack([form]).names[0][1]]
        assert list(dict.fromkeys(layers)) == ["", "a_first", "m.b", "m.y", "z_last"]


def test_a_file_that_lost_its_order_is_sorted_naturally(tmp_path) -> None:
    names = [f"layers.{n}.{r}" for n in range(12) for r in ("bias", "weight")]
    tensors = {n: torch.randn(2, 2) if n.endswith("weight") else torch.randn(2) for n in reversed(names)}
    save_file(tensors, tmp_path / "x.safetensors")
    batch = sne_fast.pack([tmp_path / "x.safetensors"])
    assert [n.rpartition(".")[0] for n in batch.names[0][1]] == [f"layers.{n // 2}" for n in range(24)]
    assert batch.layer_level.tolist() == list(range(12))
    by_hand = sne_fast.pack([{n: tensors[n] for n in batch.names[0][1]}])
    assert torch.equal(batch.values, by_hand.values)


def test_a_file_with_our_order_keeps_it(tmp_path) -> None:
    """`sne_fast.order` in the file's metadata: the names, in order."""
    names = ["z.weight", "z.bias", "a.weight", "a.bias", "layers.10.weight", "layers.2.weight"]
    tensors = {n: torch.randn(2) if n.endswith("bias") else torch.randn(2, 2) for n in names}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"sne_fast.order": json.dumps(names)})
    batch = sne_fast.pack([tmp_path / "x.safetensors"], order="definition")
    assert list(batch.names[0][1]) == names
    assert batch.layer_ptr.tolist() == [0, 2, 4, 5, 6]


def test_a_state_dict_cannot_tell_a_transposed_convolution() -> None:
    assert sne_fast.pack([nn.ConvTranspose2d(2, 3, 2).state_dict()]).tensor_type.tolist() == [8, 9]


# ---------------------------------------------------------------------------------------------------------------------
# Scale


def test_scale_is_the_root_mean_square_and_zeros_are_left_alone() -> None:
    w = torch.tensor([[3.0, -4.0], [0.0, 0.0]], dtype=F64)
    batch = sne_fast.pack([{"0.weight": w, "0.bias": torch.zeros(2, dtype=F64)}], dtype=F64)
    assert batch.tensor_scale.tolist() == [2.5, 1.0]
    assert batch.values.tolist() == [1.2, -1.6, 0.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("factor", [1e-12, 1e12])
def test_scale_of_very_small_and_very_large_tensors(factor: float) -> None:
    """The root mean square is above 0 even where the mean square leaves float32."""
    w = torch.tensor([[3.0, -4.0], [0.0, 0.0]]) * factor
    for exponent in (1, 2):
        batch = sne_fast.pack([{"0.weight": w * (factor if exponent == 2 else 1.0)}])
        torch.testing.assert_close(batch.values, torch.tensor([1.2, -1.6, 0.0, 0.0]), rtol=1e-5, atol=0)
        torch.testing.assert_close(batch.tensor_scale, torch.tensor([2.5 * factor**exponent]), rtol=1e-5, atol=0)


# ---------------------------------------------------------------------------------------------------------------------
# Dtypes, gradients


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_short_floats_convert(dtype: torch.dtype) -> None:
    network = make("cnn", 1)
    short = {k: v.to(dtype) if v.is_floating_point() else v for k, v in network.state_dict().items()}
    long = {k: v.float() if v.is_floating_point() else v for k, v in short.items()}
    a, b = sne_fast.pack([short]), sne_fast.pack([long])
    assert a.values.dtype == torch.float32
    torch.testing.assert_close(a.values, b.values, rtol=1e-6, atol=0)
    torch.testing.assert_close(a.tensor_scale, b.tensor_scale, rtol=1e-6, atol=0)


def test_dtype_follows_the_default_unless_given() -> None:
    assert sne_fast.pack([make("mlp", 0, F64)]).values.dtype == torch.float32
    assert sne_fast.pack([make("mlp")], dtype=F64).values.dtype == F64
    torch.set_default_dtype(F64)
    try:
        assert sne_fast.pack([make("mlp", 0, torch.float32)]).values.dtype == F64
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("chunking", CHUNKINGS)
@pytest.mark.parametrize("scale", ["tensor", "none"])
def test_gradients_reach_the_tensors(chunking: str, scale: str) -> None:
    """Gradients of values and of tensor_scale are those of the oracle's autograd."""
    for name in ("cnn", "oddities", "transformer_tied"):
        network = make(name, 1, F64)
        parameters = [p for p in network.parameters() if p.requires_grad]

        def gradients(values: Tensor, scales: Tensor, parameters=parameters) -> list[Tensor]:
            g = torch.Generator().manual_seed(0)
            total = (values * torch.randn(values.shape, dtype=F64, generator=g)).sum()
            total = total + (scales * torch.randn(scales.shape, dtype=F64, generator=g)).sum()
            return list(torch.autograd.grad(total, parameters))

        batch = sne_fast.pack([network], 5, chunking, scale=scale, order="definition", dtype=F64)
        want = arrays([cut_network(network, 5, chunking, scale)])
        for a, b in zip(
            gradients(batch.values, batch.tensor_scale), gradients(want["values"], want["tensor_scale"]), strict=True
        ):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_gradcheck_of_pack() -> None:
    shapes = {"0.weight": (3, 2), "0.bias": (3,), "1.weight": (2, 2, 1, 3), "1.factor": ()}
    g = torch.Generator().manual_seed(0)
    weights = [torch.randn(s, dtype=F64, generator=g).requires_grad_() for s in shapes.values()]
    for chunking, scale in itertools.product(CHUNKINGS, ("tensor", "none")):

        def function(*tensors: Tensor, options=(chunking, scale)) -> tuple[Tensor, ...]:
            chunking, scale = options
            named = dict(zip(shapes, tensors, strict=True))
            batch = sne_fast.pack([named], 2, chunking, scale=scale, dtype=F64)
            return (batch.values, batch.tensor_scale) if scale == "tensor" else (batch.values,)

        assert torch.autograd.gradcheck(function, weights)


def test_no_graph_without_need() -> None:
    with torch.no_grad():
        assert not sne_fast.pack([make("mlp")]).values.requires_grad
    assert not sne_fast.pack([make("mlp").requires_grad_(False)]).values.requires_grad


# ---------------------------------------------------------------------------------------------------------------------
# The batch as a container


def same(a: sne_fast.WeightBatch, b: sne_fast.WeightBatch) -> None:
    for field in [*EXACT, "values", "tensor_scale"]:
        assert torch.equal(getattr(a, field), getattr(b, field)), field
    assert (a.chunk_size, a.chunking, a.shapes) == (b.chunk_size, b.chunking, b.shapes)
    assert [n[1] for n in a.names] == [n[1] for n in b.names]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(st.sampled_from(MIXED), min_size=1, max_size=5),
    st.integers(-6, 6),
    st.integers(-6, 6),
    st.sampled_from([1, 2, -1]),
)
def test_slices_are_the_same_networks_packed_alone(names: list[str], start: int, stop: int, step: int) -> None:
    networks = [make(name, seed) for seed, name in enumerate(names)]
    batch = sne_fast.pack(networks)
    picked = networks[start:stop:step]
    if picked:
        same(batch[start:stop:step], sne_fast.pack(picked))
    else:
        assert len(batch[start:stop:step]) == 0
    same(batch[-1], sne_fast.pack(networks[-1:]))
    same(sne_fast.WeightBatch.cat([batch[n] for n in range(len(networks))]), batch)
    same(sne_fast.WeightBatch.cat([batch[0:0], batch, batch[0:0]]), batch)


def test_an_empty_slice_is_a_whole_batch_of_nothing() -> None:
    empty = sne_fast.pack([make("mlp"), make("cnn")])[0:0]
    assert len(empty) == 0 and empty.values.shape == (0,)
    for name in POINTERS:
        assert getattr(empty, name).tolist() == [0]
    assert empty.tensor_type.shape == empty.layer_level.shape == empty.tensor_scale.shape == (0,)
    assert (empty.chunk_size, empty.chunking) == (32, "flat")


def test_an_index_out_of_range_ends_iteration() -> None:
    batch = sne_fast.pack([make("mlp"), make("cnn")])
    for n in (2, -3):
        with pytest.raises(IndexError):
            batch[n]
    assert [len(one) for one in batch] == [1, 1]


def test_gradients_pass_slicing_and_joining() -> None:
    networks = [make("mlp", 1, F64), make("cnn", 2, F64)]
    batch = sne_fast.pack(networks, scale="none", dtype=F64)
    again = sne_fast.WeightBatch.cat([batch[1], batch[0]]).to(dtype=torch.float32)
    again.values.sum().backward()
    for p in (*networks[0].parameters(), *networks[1].parameters()):
        assert torch.equal(p.grad, torch.ones_like(p))


def test_to_changes_values_and_scales_only() -> None:
    batch = sne_fast.pack([make("cnn")])
    other = batch.to("cpu", F64)
    assert other.values.dtype == other.tensor_scale.dtype == F64
    assert torch.equal(other.values.float(), batch.values)
    for name in EXACT:
        assert getattr(other, name).dtype == torch.int64
        assert torch.equal(getattr(other, name), getattr(batch, name))


def test_host_copies_are_cpu_int64_tensors() -> None:
    batch = sne_fast.pack([make("cnn"), make("mlp")])
    for one in (batch, batch[1], batch.to(dtype=F64), pickle.loads(pickle.dumps(batch))):
        for name in POINTERS:
            host = getattr(one, name + "_host")
            assert host.device.type == "cpu" and host.dtype == torch.int64
            assert torch.equal(host, getattr(one, name).cpu())


def test_pickle_round_trip() -> None:
    batch = sne_fast.pack([make("cnn"), make("mlp")])
    same(pickle.loads(pickle.dumps(batch)), batch)


def test_pack_takes_every_form_at_once(tmp_path) -> None:
    network = make("mlp", 1)
    torch.save(network.state_dict(), tmp_path / "a.pt")
    save_file(network.state_dict(), tmp_path / "b.safetensors")
    batch = sne_fast.pack([network, network.state_dict(), tmp_path / "a.pt", str(tmp_path / "b.safetensors")])
    assert len(batch) == 4
    for n in (1, 2, 3):
        same(batch[n], batch[0])

"""WeightBatch: its checks, slicing, gathering, joining, moving and pickling, on batches written out by hand."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader

from sne_fast import WeightBatch

POINTERS = ("chunk_ptr", "tensor_ptr", "layer_ptr", "network_ptr")
TENSORS = ("values", *POINTERS, "tensor_type", "layer_level", "tensor_scale")


def fields() -> dict:
    """Return the fields of two networks: 'a' of one layer with one 2x3 tensor, 'b' of two layers with three tensors."""
    return {
        "values": torch.arange(14.0),
        "chunk_ptr": torch.tensor([0, 3, 6, 7, 9, 12, 14]),
        "tensor_ptr": torch.tensor([0, 2, 3, 5, 6]),
        "layer_ptr": torch.tensor([0, 1, 3, 4]),
        "network_ptr": torch.tensor([0, 1, 3]),
        "tensor_type": torch.tensor([0, 1, 8, 63]),
        "layer_level": torch.tensor([0, 0, 1]),
        "tensor_scale": torch.tensor([1.0, 2.0, 3.0, 4.0]),
        "chunk_size": 3,
        "chunking": "flat",
        "names": (("a", ("w",)), ("b", ("x.bias", "x.weight", "y"))),
        "shapes": (((2, 3),), ((1,), (5,), (2, 1))),
    }


def batch(**changes) -> WeightBatch:
    return WeightBatch(**(fields() | changes))


def same(one: WeightBatch, other: WeightBatch) -> None:
    for field in TENSORS:
        a, b = getattr(one, field), getattr(other, field)
        assert a.dtype == b.dtype and a.device == b.device and torch.equal(a, b), field
    for field in POINTERS:
        host = getattr(one, f"{field}_host")
        assert host.device.type == "cpu" and torch.equal(host, getattr(other, f"{field}_host")), field
    for field in ("chunk_size", "chunking", "scale", "order", "names", "shapes", "skipped"):
        assert getattr(one, field) == getattr(other, field), field


def valid(one: WeightBatch) -> None:
    """Check what internal constructors made, which they do not check themselves."""
    same(one, dataclasses.replace(one))


def random_batch(lengths: list[list[list[list[int]]]]) -> WeightBatch:
    """Make a batch of networks > layers > tensors > chunk lengths."""
    layers = [layer for network in lengths for layer in network]
    tensors = [tensor for layer in layers for tensor in layer]
    chunks = [chunk for tensor in tensors for chunk in tensor]

    def pointer(groups: list) -> Tensor:
        return torch.tensor([0, *np.cumsum([g if isinstance(g, int) else len(g) for g in groups])], dtype=torch.int64)

    return WeightBatch(
        torch.arange(float(sum(chunks))), pointer(chunks), pointer(tensors), pointer(layers), pointer(lengths),
        torch.arange(len(tensors)) % 64, torch.arange(len(layers)), 1.0 + torch.arange(len(tensors)),
        9, "kernel", "none", "definition",
        tuple((f"n{i}", tuple(f"t{j}" for j in range(sum(map(len, n))))) for i, n in enumerate(lengths)),
        tuple(tuple((sum(t),) for layer in n for t in layer) for n in lengths),
        tuple(((f"n{i}.mask", "a mask"),) * (i % 2) for i in range(len(lengths))),
    )  # fmt: skip


def lists(inner, size: int) -> st.SearchStrategy:
    return st.lists(inner, min_size=1, max_size=size)


NETWORKS = lists(lists(lists(lists(st.integers(1, 9), 3), 3), 3), 5)


# ---------------------------------------------------------------------------------------------------------------------
# Sizes, names


def test_sizes_and_names() -> None:
    b = batch()
    sizes = (len(b), b.num_networks, b.num_layers, b.num_tensors, b.num_chunks, b.num_weights)
    assert sizes == (2, 2, 3, 4, 6, 14)
    assert b.dtype == torch.float32 and b.device == torch.device("cpu")
    assert b.network_name(1) == "network 1 ('b')"
    names = [b.tensor_name(s) for s in range(4)]
    assert names[0] == "network 0 ('a'), tensor 'w'" and names[3] == "network 1 ('b'), tensor 'y'"
    nameless = batch(names=(), shapes=())
    assert nameless.network_name(1) == "network 1" and nameless.tensor_name(3) == "network 1, tensor 2"
    assert repr(b) == (
        "WeightBatch(2 networks, 3 layers, 4 tensors, 6 chunks, 14 weights, chunk_size=3, chunking='flat', "
        "scale='tensor', order='names', dtype=torch.float32, device='cpu')"
    )


def test_host_copies_are_the_pointers_themselves_on_a_cpu() -> None:
    for b in (batch(), batch()[1], batch()[[1, 0]], WeightBatch.cat([batch(), batch()]), batch().to(torch.float64)):
        for field in POINTERS:
            assert getattr(b, f"{field}_host") is getattr(b, field)


def test_it_is_frozen_and_compares_by_identity() -> None:
    b = batch()
    with pytest.raises(dataclasses.FrozenInstanceError):
        b.chunk_size = 4  # type: ignore[misc]
    assert b == b and b != batch() and len({b, batch()}) == 2


# ---------------------------------------------------------------------------------------------------------------------
# Checks

T = torch.tensor
WRONG = [
    ({"values": [1.0]}, TypeError, "values must be a tensor, got list"),
    ({"values": torch.arange(14)}, ValueError, r"values must be floating of shape \(V,\), got torch.int64 \(14,\)"),
    ({"values": torch.zeros(14, 1)}, ValueError, r"values must have shape \(V,\), got \(14, 1\)"),
    ({"chunk_ptr": T([0, 14], dtype=torch.int32)}, ValueError, r"chunk_ptr must be int64 of shape \(N\+1,\), got"),
    ({"tensor_ptr": torch.zeros(0, dtype=torch.int64)}, ValueError, r"tensor_ptr must have shape \(T\+1,\), got"),
    ({"layer_ptr": T([1, 2, 3, 4])}, ValueError, "layer_ptr must start at 0, got 1"),
    ({"layer_ptr": T([0, 1, 1, 4])}, ValueError, "layer_ptr must increase.* got 1 then 1 for layer 1"),
    ({"network_ptr": T([0, 4, 3])}, ValueError, "network_ptr must increase.* got 4 then 3 for network 1"),
    ({"network_ptr": T([0, 1, 2])}, ValueError, "network_ptr must end at the 3 layers, got 2"),
    ({"chunk_ptr": T([0, 3, 6, 7, 9, 12, 13])}, ValueError, "chunk_ptr must end at the 14 values, got 13"),
    ({"chunk_ptr": T([0, 3, 6, 7, 8, 12, 14])}, ValueError, "1..3 values, got 4 in chunk 4 of network 1.*'x.weight'"),
    ({"tensor_type": T([0, 1, 8])}, ValueError, r"tensor_type must have one entry per tensor, shape \(4,\)"),
    ({"tensor_type": T([0, 1, 8, 64])}, ValueError, r"tensor_type must be .* 0..63, got 64 for network 1 .*tensor 'y'"),
    ({"tensor_type": T([0, -1, 8, 3])}, ValueError, r"got -1 for network 1 \('b'\), tensor 'x.bias'"),
    ({"layer_level": T([0, 0])}, ValueError, r"layer_level must have one entry per layer, shape \(3,\)"),
    ({"layer_level": T([0, 0, -2])}, ValueError, r"layer_level must be at least 0, got -2 for layer 2 in network 1"),
    ({"tensor_scale": torch.ones(5)}, ValueError, r"tensor_scale must have one entry per tensor"),
    ({"tensor_scale": T([1, 1, 1, 1])}, ValueError, "tensor_scale must be floating"),
    ({"tensor_scale": torch.tensor([1.0, 0, 1, 1])}, ValueError, "tensor_scale must be finite and above 0.* got 0.0"),
    ({"tensor_scale": torch.tensor([1.0, 1, -1, 1])}, ValueError, "got -1.0 for network 1.*tensor"),
    ({"tensor_scale": torch.tensor([1.0, 1, 1, float("nan")])}, ValueError, "tensor_scale must be .* got nan for"),
    ({"tensor_scale": torch.tensor([1.0, 1, 1, float("inf")])}, ValueError, "tensor_scale must be .* got inf for"),
    ({"tensor_scale": torch.ones(4, device="meta")}, ValueError, "tensor_scale must be on cpu like values, got meta"),
    ({"chunk_size": 0}, ValueError, "chunk_size must be an integer of at least 1, got 0"),
    ({"chunk_size": 2.5}, ValueError, "chunk_size must be an integer of at least 1, got 2.5"),
    ({"chunk_size": True}, ValueError, "chunk_size must be an integer"),
    ({"chunking": "rows"}, ValueError, "chunking must be one of flat, neuron, kernel, got 'rows'"),
    ({"names": (("a", ("w",)),)}, ValueError, "names must have one entry per network, got 1 for 2"),
    ({"names": (("a", ("w",)), ("b", ("x", "y")))}, ValueError, r"names must list the 3 tensors of network 1 .*got 2"),
    ({"shapes": (((2, 3),),)}, ValueError, "shapes must have one entry per network"),
    ({"shapes": (((2, 3),), ((1,), (5,), (3,)))}, ValueError, r"got \(3,\) for the 2 of network 1 \('b'\), tensor 'y'"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "error", "message"), WRONG, ids=[w[2][:40] for w in WRONG])
def test_fields_that_do_not_fit_are_refused(changes: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        batch(**changes)
    with pytest.raises(error, match=message):
        dataclasses.replace(batch(), **changes)


def test_an_empty_batch_is_valid() -> None:
    none = torch.zeros(0)
    zero = T([0])
    ids = torch.zeros(0, dtype=torch.int64)
    empty = WeightBatch(none, zero, zero, zero, zero, ids, ids, none, 3, "flat")
    assert len(empty) == 0 and empty.num_weights == 0
    same(empty, batch()[0:0])


# ---------------------------------------------------------------------------------------------------------------------
# Slicing and joining


def test_one_network() -> None:
    b = batch()[1]
    assert b.values.tolist() == [6, 7, 8, 9, 10, 11, 12, 13]
    assert b.chunk_ptr.tolist() == [0, 1, 3, 6, 8] and b.tensor_ptr.tolist() == [0, 1, 3, 4]
    assert b.layer_ptr.tolist() == [0, 2, 3] and b.network_ptr.tolist() == [0, 2]
    assert b.tensor_type.tolist() == [1, 8, 63] and b.layer_level.tolist() == [0, 1]
    assert b.tensor_scale.tolist() == [2, 3, 4]
    assert b.names == (("b", ("x.bias", "x.weight", "y")),) and b.shapes == (((1,), (5,), (2, 1)),)
    same(b, batch()[-1])
    same(b, batch()[np.int64(1)])
    same(b, batch()[T(1)])


def test_contiguous_slices_share_memory() -> None:
    b = batch()
    assert b[:] is b and b[0:5] is b
    b.values[6] = -1
    assert b[1].values[0] == -1 and b[1:].values[0] == -1
    b[[1, 0]].values.zero_()
    assert b.values[6] == -1


@settings(max_examples=60, deadline=None, derandomize=True)
@given(NETWORKS, st.data())
def test_choosing_networks_is_joining_single_ones(lengths: list, data: st.DataObject) -> None:
    b = random_batch(lengths)
    index = data.draw(st.lists(st.integers(-len(b), len(b) - 1), min_size=1, max_size=8))
    chosen = b[index]
    valid(chosen)
    same(chosen, WeightBatch.cat([b[i] for i in index]))
    same(chosen, b[T(index)])
    same(chosen, b[np.array(index)])
    mask = [bool(i % 2) for i in range(len(b))]
    same(b[mask], b[1::2])
    same(b[T(mask)], b[1::2])
    cut = data.draw(st.integers(0, len(b)))
    valid(b[:cut])
    same(WeightBatch.cat([b[:cut], b[cut:]]), b)
    same(WeightBatch.cat(list(b)), b)
    same(b[::-1], b[list(range(len(b)))[::-1]])


def test_empty_choices() -> None:
    b = batch()
    for empty in (b[0:0], b[2:1], b[[]], b[[False, False]], b[T([], dtype=torch.int64)], b[5:]):
        valid(empty)
        assert len(empty) == 0 and empty.names == () and empty.chunk_ptr.tolist() == [0]
        same(WeightBatch.cat([empty, b, empty]), b)
    assert list(b[0:0]) == []


@pytest.mark.parametrize(
    ("index", "error", "message"),
    [
        (2, IndexError, "index 2 is outside a batch of 2 networks"),
        (-3, IndexError, "index -3 is outside"),
        ([0, 2], IndexError, "index 2 is outside"),
        ([True], IndexError, "mask must have one entry per network, got 1 for 2"),
        (True, TypeError, "single boolean"),
        (T(True), TypeError, "single boolean"),
        (0.5, TypeError, "got float"),
        (None, TypeError, "got NoneType"),
        ([0.5], TypeError, "must be ints or booleans"),
        ([[0]], TypeError, "in one dimension"),
        ("ab", TypeError, "must be ints|in one dimension"),
    ],
    ids=str,
)
def test_indices_that_fit_nothing(index, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        batch()[index]


def test_joining_refuses_batches_that_differ() -> None:
    with pytest.raises(ValueError, match="at least one WeightBatch, got none"):
        WeightBatch.cat([])
    with pytest.raises(TypeError, match="item 1 must be a WeightBatch, got int"):
        WeightBatch.cat([batch(), 3])  # type: ignore[list-item]
    others = {
        "chunk_size": batch(chunk_size=4),
        "chunking": batch(chunking="neuron"),
        "scale": batch(scale="none"),
        "order": batch(order="definition"),
        "dtype": batch().to(torch.float64),
        "device": batch().to("meta"),
    }
    for field, other in others.items():
        with pytest.raises(ValueError, match=f"{field} must agree, batch 0 has .* and batch 1 has "):
            WeightBatch.cat([batch(), other])


def test_what_was_skipped_goes_with_its_network() -> None:
    skipped = ((("mask", "an attention mask"),), ())
    b = batch(skipped=skipped)
    assert (
        b[1].skipped == ((),) and b[[1, 0]].skipped == skipped[::-1] and WeightBatch.cat([b, b]).skipped == skipped * 2
    )
    assert WeightBatch.cat([b, batch()]).skipped == ()
    for copied in (b.to(torch.float64), b.detach(), pickle.loads(pickle.dumps(b)), copy.deepcopy(b)):
        assert copied.skipped == skipped
    with pytest.raises(ValueError, match="skipped must have one entry per network, got 1 for 2"):
        batch(skipped=((),))


def test_joining_keeps_names_only_if_all_have_them() -> None:
    joined = WeightBatch.cat([batch(), batch(names=())])
    assert joined.names == () and joined.shapes == batch().shapes * 2


def test_gradients_pass_choosing_joining_and_casting() -> None:
    values = torch.arange(14.0).requires_grad_()
    scale = torch.ones(4).requires_grad_()
    b = batch(values=values, tensor_scale=scale)
    joined = WeightBatch.cat([b[1], b[[1, 0]]]).to(torch.float64)
    (joined.values.square().sum() + joined.tensor_scale.sum()).backward()
    times = torch.tensor([1.0] * 6 + [2.0] * 8)  # network 1 stands there twice
    torch.testing.assert_close(values.grad, 2 * times * torch.arange(14.0))
    assert scale.grad.tolist() == [1, 2, 2, 2]


def test_detach() -> None:
    b = batch()
    assert b.detach() is b
    values = torch.arange(14.0).requires_grad_()
    for changes in ({"values": values * 1}, {"tensor_scale": torch.ones(4, requires_grad=True)}):
        cut = batch(**changes).detach()
        assert not cut.values.requires_grad and not cut.tensor_scale.requires_grad
        valid(cut)
    same(batch(values=values).detach(), b)


# ---------------------------------------------------------------------------------------------------------------------
# Moving, pickling, loading


def test_to() -> None:
    b = batch()
    assert b.to() is b and b.to("cpu") is b and b.to(torch.float32) is b and b.to(None, torch.float32) is b
    double = b.to(torch.float64)
    valid(double)
    assert double.values.dtype == double.tensor_scale.dtype == torch.float64 and double.chunk_ptr is b.chunk_ptr
    half = b.to("cpu", torch.bfloat16, non_blocking=True)
    assert half.values.dtype == torch.bfloat16 and half.tensor_scale.dtype == torch.float32
    with pytest.raises(ValueError, match=r"dtype must be floating, got torch.int64"):
        b.to(dtype=torch.int64)
    with pytest.raises(TypeError, match="dtype given twice"):
        b.to(torch.float64, torch.float64)


def test_host_copies_stay_behind_and_slicing_needs_nothing_from_the_device() -> None:
    away = batch().to("meta")  # a device that cannot be read at all
    for b in (away, away[1], away[[1, 0]], WeightBatch.cat([away, away]), away.to(torch.float64), away[0:0]):
        for field in (*TENSORS, *(f"{p}_host" for p in POINTERS)):
            assert getattr(b, field).device.type == ("cpu" if field.endswith("host") else "meta"), field
    assert away[[1, 0]].chunk_ptr_host.tolist() == [0, 1, 3, 6, 8, 11, 14]


def test_pinning_without_an_accelerator_changes_nothing() -> None:
    if torch.accelerator.is_available():
        pytest.skip("there is an accelerator")
    b = batch()
    assert b.pin_memory() is b


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_pinning_and_moving_to_a_gpu() -> None:
    pinned = batch().pin_memory()
    assert all(getattr(pinned, field).is_pinned() for field in TENSORS) and pinned.chunk_ptr_host is pinned.chunk_ptr
    b = pinned.to("cuda", non_blocking=True)
    assert b.device.type == "cuda" and b.chunk_ptr_host is pinned.chunk_ptr
    same(b.to("cpu"), batch())
    valid(b)
    with torch.cuda.stream(torch.cuda.Stream()):
        same(b[1].to("cpu"), batch()[1])
        same(b[[1, 0]].to("cpu"), batch()[[1, 0]])
        same(WeightBatch.cat([b, b[0]]).to("cpu"), batch()[[0, 1, 0]])
    same(pickle.loads(pickle.dumps(b)).to("cpu"), batch())


def test_pickling_copies_only_the_slice_and_drops_the_graph() -> None:
    values = torch.zeros(100_000, requires_grad=True)
    pointer = T([0, 50_000, 100_000])
    ids = torch.zeros(2, dtype=torch.int64)
    one = T([0, 1, 2])
    b = WeightBatch(values * 1, pointer, one, one, one, ids, ids, torch.ones(2), 50_000, "flat")
    data = pickle.dumps(b[1])
    assert len(data) < 250_000
    back = pickle.loads(data)
    same(back, b[1])
    valid(back)
    assert not back.values.requires_grad and back.chunk_ptr_host is back.chunk_ptr
    assert not copy.deepcopy(b).values.requires_grad and copy.copy(b).values.requires_grad
    leaf = dataclasses.replace(b, values=values)
    assert pickle.loads(pickle.dumps(leaf)).values.requires_grad


@pytest.mark.parametrize("workers", [0, 2])
def test_data_loader_with_worker_processes(workers: int) -> None:
    items = [batch(values=torch.arange(14.0) + 100 * i)[i % 2] for i in range(7)]
    loader = DataLoader(items, batch_size=3, collate_fn=WeightBatch.collate, num_workers=workers, timeout=60 * workers)
    batches = list(loader)
    assert [len(b) for b in batches] == [3, 3, 1]
    for b in batches:
        valid(b)
    same(WeightBatch.cat(batches), WeightBatch.cat(items))


def test_data_loader_over_one_batch_with_a_batch_sampler() -> None:
    b = random_batch([[[[2, 3]], [[1]]]] * 10)
    loader = DataLoader(b, batch_size=4, collate_fn=WeightBatch.collate, num_workers=2, timeout=60)  # type: ignore[type-var]
    same(WeightBatch.cat(list(loader)), b)


# ---------------------------------------------------------------------------------------------------------------------
# torch.compile


def test_one_graph_serves_batches_of_all_sizes() -> None:
    import torch._dynamo.testing  # the marks are made only once it is there

    graphs = torch._dynamo.testing.CompileCounter()

    @torch.compile(backend=graphs, fullgraph=True)
    def total(b: WeightBatch) -> Tensor:
        lengths = b.chunk_ptr.diff()
        return (b.values.sum() + lengths.sum() + b.layer_level.sum()) * b.tensor_scale.mean() + b.chunk_size

    batches = [random_batch([[[[2, 3]] * i, [[1, j], [4]]]] * (i + j)) for i in (2, 3, 4) for j in (2, 5)]
    for b in [*batches, batches[0][1:], batches[0][[1, 0, 1]], pickle.loads(pickle.dumps(batches[1]))]:
        want = (b.values.sum() + b.num_weights + b.layer_level.sum()) * b.tensor_scale.mean() + 9
        torch.testing.assert_close(total(b), want)
    assert graphs.frame_count == 1
    assert "dynamo" not in repr(pickle.dumps(batches[0]))


def test_making_a_batch_does_not_import_the_compiler() -> None:
    code = (
        "import sys, torch, sne_fast; before = 'torch._dynamo' in sys.modules; p = torch.tensor([0, 1]); i = p[:1]\n"
        "sne_fast.WeightBatch(torch.ones(1), p, p, p, p, i, i, torch.ones(1), 1, 'flat')\n"
        "assert before or 'torch._dynamo' not in sys.modules; print(before)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "False"

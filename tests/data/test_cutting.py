"""Which tensors have kernel dimensions, and how the others of three and more dimensions are cut."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sne_fast import WeightBatch, pack
from sne_fast.data.cutting import has_kernel, packed_strides
from sne_fast.nn.preparation import relative_places
from sne_fast.symmetry import permute, trace

CHUNKINGS = ("flat", "neuron", "kernel")


def chunks(batch: WeightBatch) -> list[list[float]]:
    return [part.tolist() for part in batch.values.split(batch.chunk_ptr.diff().tolist())]


def cut(tensor: Tensor, chunking: str, name: str = "cls_token", chunk_size: int = 4) -> list[list[float]]:
    return chunks(pack([{name: tensor}], chunk_size, chunking, scale="none"))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 5), min_size=3, max_size=5), st.integers(1, 9), st.sampled_from(CHUNKINGS))
def test_a_tensor_without_kernel_is_cut_as_the_matrix_of_its_last_dimension(
    shape: list[int], chunk_size: int, chunking: str
) -> None:
    tensor = torch.arange(float(torch.Size(shape).numel())).reshape(shape)
    matrix = tensor.reshape(-1, shape[-1])
    rows = [tensor.flatten()] if chunking == "flat" else list(matrix)
    expected = [part.tolist() for row in rows for part in row.split(chunk_size)]
    assert cut(tensor, chunking, "pos_embed", chunk_size) == expected


def test_a_class_token_keeps_more_than_its_signs() -> None:
    token = torch.arange(1.0, 6.0).reshape(1, 1, 5)
    assert cut(token, "flat") == cut(token, "neuron") == cut(token, "kernel") == [[1, 2, 3, 4], [5]]


def test_a_position_table_is_no_kernel_for_each_of_its_weights() -> None:
    batch = pack([{"attn.pos_table": torch.randn(1, 1, 1829, 32)}])
    assert batch.num_chunks == 1829
    assert pack([{"pos_embed.weight": torch.randn(1, 1, 1829, 32)}]).num_chunks == 1829


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(3, 4, 6))
        self.down_proj = nn.Parameter(torch.randn(3, 3, 4))


class Stacked(nn.Module):
    def __init__(self, *shape: int, bias: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape))
        if bias:
            self.bias = nn.Parameter(torch.randn(bias))


class Parts(nn.Module):
    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)


def test_no_chunk_mixes_two_experts() -> None:
    network = Parts(experts=Experts())
    for source in (network, network.state_dict()):
        batch = pack([source], 6, scale="none")
        assert chunks(batch)[6:] == network.experts.gate_up_proj.detach().reshape(-1, 6).tolist()
        assert not batch.kernels.any()


OTHERS = {
    "experts": Stacked(3, 4, 6), "bilinear": nn.Bilinear(4, 5, 6), "gate_proj": Stacked(3, 4, 6),
    "pos_embed": Stacked(1, 5, 6), "linears": Stacked(3, 4, 6, bias=(3, 4)), "table": Stacked(2, 3, 400),
    "w1": Stacked(3, 4, 6), "query_tokens": Stacked(1, 3, 6), "any": Stacked(4, 6, 70),
}  # fmt: skip
CONVOLUTIONS = {
    "0": nn.Conv1d(3, 4, 5), "patch_embed": nn.Conv2d(3, 4, 16, 16, bias=False), "proj": nn.Conv2d(3, 4, 16, 16),
    "up": nn.ConvTranspose2d(6, 4, 3), "grouped": nn.ConvTranspose1d(6, 4, 3, groups=2),
    "pos_conv": nn.Conv1d(4, 4, 128), "patch_embedding": nn.Conv2d(3, 4, 32, bias=False),
    "q_proj": nn.Conv1d(3, 4, 1), "downsample": nn.Conv3d(2, 2, 2),
    "emb": nn.Conv2d(1, 4, 3),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_stacked_matrices_and_tables_are_no_convolutions(name: str) -> None:
    network = Parts(**{name: OTHERS[name]})
    for source in (network, network.state_dict()):
        batch = pack([source])
        assert batch.tensor_type[0] == 56 and not batch.kernels.any()


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_weights_of_convolutions_have_kernels_in_a_state_dict_too(name: str) -> None:
    network = Parts(**{name: CONVOLUTIONS[name]})
    module, state = pack([network]), pack([network.state_dict()])
    assert module.kernels.tolist() == state.kernels.tolist() == [True] + [False] * (module.num_tensors - 1)
    assert torch.equal(module.values, state.values) and torch.equal(module.chunk_ptr, state.chunk_ptr)


def test_the_kind_that_is_given_decides() -> None:
    state = {"a.weight": torch.randn(2, 3, 4)}
    as_convolution, as_other = pack([state]), pack([state], kinds={"a": "other"})
    assert as_convolution.kernels.tolist() == [True] and as_other.kernels.tolist() == [False]
    assert (as_convolution.num_chunks, as_other.num_chunks) == (4, 1)


def test_the_cut_goes_with_the_tensors() -> None:
    networks = [nn.Conv2d(2, 3, 2), nn.Linear(2, 3), nn.Conv1d(1, 2, 3)]
    batch = pack(networks).detach()
    want = [True, False, False, False, True, False]
    assert batch.kernels.tolist() == want
    assert batch[1:].kernels.tolist() == want[2:] and batch[[2, 0]].kernels.tolist() == want[4:] + want[:2]
    assert WeightBatch.cat(list(batch)).kernels.tolist() == want
    for copied in (batch.to(torch.float64), pickle.loads(pickle.dumps(batch)), copy.deepcopy(batch)):
        assert copied.kernels.tolist() == want
    fields = {name: getattr(batch, name) for name in ("values", "chunk_ptr", "tensor_ptr", "layer_ptr", "network_ptr")}
    fields |= {name: getattr(batch, name) for name in ("tensor_type", "layer_level", "tensor_scale", "shapes")}
    assert WeightBatch(**fields, chunk_size=32, chunking="flat").kernels.tolist() == want


def test_a_batch_pickled_before_it_knew_order_and_cut_has_those_of_then() -> None:
    batch = pack([nn.Conv2d(2, 3, 2)]).detach()
    old = {name: value for name, value in batch.__getstate__().items() if name not in ("order", "kernels", "skipped")}
    restored = WeightBatch.__new__(WeightBatch)
    restored.__setstate__(old)
    assert restored.order == "definition" and restored.kernels.tolist() == [True, False] and restored.skipped == ()
    assert len(restored[0]) == 1 and batch.order == pickle.loads(pickle.dumps(batch)).order == "names"


@pytest.mark.parametrize("chunking", CHUNKINGS)
def test_permuting_follows_the_cut(chunking: str) -> None:
    """A convolution's kernels stand apart, whatever type it has been given since; an expert's matrix does not."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.conv2 = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 2, 3)
            self.scale = nn.Parameter(torch.randn(4, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return self.conv2((self.conv1(x) * self.scale).relu())

    torch.manual_seed(0)
    network = Net()
    symmetry = trace(network, torch.zeros(1, 1, 6, 6))
    tables = symmetry.draw(torch.Generator().manual_seed(1))
    permuted = symmetry.permute_state_dict(network.state_dict(), tables=tables)
    assert not torch.equal(permuted["conv1.weight"], network.conv1.weight)
    batch = pack([network], 5, chunking).detach()
    want = pack([permuted], 5, chunking)
    for one in (batch, relative_places(batch)):
        assert torch.equal(permute(one, symmetry, permutations=[tables[0]]).values, want.values)


def test_only_weights_of_convolutions_have_kernel_dimensions() -> None:
    assert has_kernel(8, 3) and has_kernel(16, 5)
    assert not any(has_kernel(tensor_type, 4) for tensor_type in range(64) if tensor_type not in (8, 16))
    assert packed_strides((2, 3, 4), True, "flat") == [3, 1, 6] and packed_strides((2, 3, 4), False, "flat") == [
        12,
        4,
        1,
    ]

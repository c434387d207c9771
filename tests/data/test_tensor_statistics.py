"""Statistics of tensors: against NumPy and SciPy, on both backends, kept in the batch, the same under permutations."""

from __future__ import annotations

import copy
import io
import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten
from torch.utils.data import DataLoader

import sne_fast
from sne_fast import WeightBatch, tensor_statistics
from sne_fast.data import tensor_statistics as module
from sne_fast.data.tensor_statistics import COLUMNS, NAMES
from sne_fast.symmetry import canonicalise, chain_symmetry, permute

CHUNKINGS = ("flat", "neuron", "kernel")


def networks() -> list[nn.Module]:
    """Return networks with tensors of every number of dimensions, and layers with several tensors."""
    torch.manual_seed(0)
    vit = nn.Module()
    vit.cls_token = nn.Parameter(torch.randn(1, 1, 6))
    vit.scale = nn.Parameter(torch.tensor(0.3))
    vit.experts = nn.Parameter(torch.randn(3, 4, 5))
    return [
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1), nn.Flatten(), nn.Linear(16, 10)),
        nn.Sequential(nn.Conv1d(2, 5, 4), nn.ConvTranspose2d(3, 2, (2, 3)), nn.Conv3d(2, 2, (1, 2, 3))),
        nn.LSTM(3, 4),
        vit,
        nn.Sequential(nn.Linear(1, 9), nn.Linear(9, 1, bias=False), nn.Linear(70, 90), nn.Embedding(7, 3)),
    ]


def stored(batch: WeightBatch, modules: list[nn.Module]) -> list[tuple[str, np.ndarray]]:
    """Return name and values of every tensor of the batch, as the modules hold it."""
    found = []
    for (_, names), net in zip(batch.names, modules, strict=True):
        state = net.state_dict()
        found += [(name, state[name].double().numpy()) for name in names]
    return found


def by_hand(w: np.ndarray, fan_in: int, fan_out: int) -> np.ndarray:
    """Compute the statistics of one tensor with NumPy and SciPy."""
    r = max(math.sqrt(np.mean(w**2)), 1e-12)
    u = w.ravel() / r
    constant = u.std() < 1e-6
    skewness = 0.0 if constant else float(np.clip(stats.skew(u), -20, 20))
    kurtosis = 1.0 if constant else float(np.clip(stats.kurtosis(u, fisher=False), 1, 200))
    quantiles = np.quantile(u, [0, 0.1, 0.25, 0.5, 0.75, 0.9, 1]).clip(-12, 12)
    numbers = [
        math.log(r),
        math.log(r * math.sqrt(fan_in)),
        u.mean(),
        u.std(),
        skewness,
        math.log(kurtosis),
        *quantiles,
    ]
    numbers += [math.log(w.size), math.log(fan_in), math.log(fan_out)]
    if w.ndim < 2:
        return np.array([*numbers, *[0.0] * 7])
    x = (w / r).reshape(w.shape[0], w.shape[1], -1)

    def rms(*axes: int) -> np.ndarray:
        return np.sqrt((x**2).mean(axes))

    matrix = x.reshape(x.shape[0], -1)
    spectral = np.linalg.svd(matrix, compute_uv=False)[0] / max(np.linalg.norm(matrix), 1e-300)
    spreads = [norms.std() / max(norms.mean(), 1e-9) for norms in (rms(1, 2), rms(0, 2), rms(0, 1))]
    numbers += [spreads[0], spreads[1], x.mean((1, 2)).std(), math.sqrt((x.mean((0, 2)) ** 2).mean())]
    numbers += [math.log(spectral * math.sqrt(min(matrix.shape))) if x.any() else 0.0, rms(1, 2).max(), spreads[2]]
    return np.array(numbers)


def expected(batch: WeightBatch, modules: list[nn.Module]) -> np.ndarray:
    """Compute the statistics of a batch by hand."""
    tensors, layers = stored(batch, modules), batch.layer_ptr_host.tolist()
    rows = []
    for first, last in pairwise(layers):
        matrices = [w for _, w in tensors[first:last] if w.ndim > 1]
        for _, w in tensors[first:last]:
            fans = (matrices[-1][0].size, len(matrices[-1])) if matrices else (1, w.size)
            rows.append(by_hand(w, *fans))
    return np.stack(rows)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("scale", ["tensor", "none"])
@pytest.mark.parametrize("chunking", CHUNKINGS)
def test_statistics_are_those_of_numpy_and_scipy(chunking: Any, scale: Any, backend: str) -> None:
    nets = networks()
    batch = sne_fast.pack(nets, chunking=chunking, scale=scale, dtype=torch.float64).detach()
    with sne_fast.use_backend(backend):
        found = tensor_statistics(batch)
    assert found.shape == (batch.num_tensors, len(NAMES)) and found.dtype == torch.float64
    np.testing.assert_allclose(found.numpy(), expected(batch, nets), atol=1e-6, rtol=1e-9)


@pytest.mark.parametrize("threads", [2, 3])
def test_the_number_of_threads_does_not_change_a_bit(threads: int) -> None:
    batch = sne_fast.pack(networks() * 3).detach()
    before = torch.get_num_threads()
    found = []
    try:
        for count in (1, threads):
            torch.set_num_threads(count)
            with sne_fast.use_backend("cpu"):
                found.append(tensor_statistics(batch.with_fields(values=batch.values)))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


def count_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    calls: list[int] = []
    compute = module.functional.tensor_statistics

    def counted(values: Tensor, *args: Any, **options: Any) -> Tensor:
        calls.append(values.shape[0])
        return compute(values, *args, **options)

    monkeypatch.setattr(module.functional, "tensor_statistics", counted)
    return calls


def test_they_are_computed_once_and_kept_by_what_is_made_of_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = count_calls(monkeypatch)
    batch = sne_fast.pack(networks()).detach()
    whole = tensor_statistics(batch)
    sizes = batch.layer_ptr_host[batch.network_ptr_host]
    parts = [batch[1], batch[1:2], batch[[1]], batch.to(torch.float64)[1], copy.deepcopy(batch)[1]]
    parts.append(batch.with_fields(prepared=("a step",))[1])
    for part in parts:
        torch.testing.assert_close(tensor_statistics(part).float(), whole[sizes[1] : sizes[2]], atol=0, rtol=0)
    again = tensor_statistics(WeightBatch.cat([batch[2:], batch[:2]]))
    assert torch.equal(again, torch.cat([whole[sizes[2] :], whole[: sizes[2]]]))
    file = io.BytesIO()
    torch.save(batch, file)
    file.seek(0)
    assert torch.equal(tensor_statistics(torch.load(file, weights_only=False)), whole)
    assert calls == [batch.num_weights]


@pytest.mark.parametrize("workers", [0, 2])
def test_loaders_and_pytrees_carry_them(workers: int) -> None:
    batch = sne_fast.pack(networks()).detach()
    whole = tensor_statistics(batch)
    examples = [{"networks": batch[b], "target": float(b)} for b in range(len(batch))]
    (loaded,) = DataLoader(examples, batch_size=len(batch), num_workers=workers)
    assert torch.equal(loaded["networks"].statistics, whole)
    doubled = tree_map_only(Tensor, lambda leaf: 2 * leaf if leaf.is_floating_point() else leaf, batch)
    assert torch.equal(doubled.statistics, 2 * whole)
    leaves, structure = tree_flatten(batch)
    assert torch.equal(tree_unflatten(leaves, structure).statistics, whole)
    bare = batch.with_fields(values=batch.values)
    assert structure != tree_flatten(bare)[1] and tree_unflatten(*tree_flatten(bare)).statistics is None
    assert batch.to("meta").statistics.shape == whole.shape
    assert batch.to(torch.bfloat16).statistics.dtype == torch.float32


def test_other_values_or_scales_have_statistics_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = count_calls(monkeypatch)
    batch = sne_fast.pack(networks()).detach()
    tensor_statistics(batch)
    louder = batch.with_fields(tensor_scale=2 * batch.tensor_scale)
    before, after = tensor_statistics(batch)[:, 0], tensor_statistics(louder)[:, 0]
    some = before > math.log(1e-6)  # of zeros, the root mean square counts as 1e-12
    torch.testing.assert_close(after[some], before[some] + math.log(2))
    assert batch.with_fields(values=batch.values + 1).statistics is None
    assert WeightBatch.cat([batch, louder.with_fields(values=batch.values)]).statistics is None
    assert len(calls) == 2


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), widths=st.lists(st.integers(1, 20), min_size=3, max_size=4))
def test_permuted_networks_have_the_same(seed: int, widths: list[int]) -> None:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), nn.Tanh()]
    net = nn.Sequential(*layers)
    batch, symmetry = sne_fast.pack([net]).detach(), chain_symmetry(net.state_dict())
    before_ = tensor_statistics(batch)
    permuted = permute(batch, symmetry, torch.Generator().manual_seed(seed))
    assert permuted.statistics is before_
    fresh = tensor_statistics(permuted.with_fields(values=permuted.values))
    torch.testing.assert_close(fresh, before_, atol=1e-5, rtol=0)


def test_turned_signs_change_them_and_are_not_missed() -> None:
    net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))
    batch = sne_fast.pack([net]).detach()
    tensor_statistics(batch)
    turned = canonicalise(batch, chain_symmetry(net.state_dict()), odd=True)
    assert turned.statistics is None
    state = turned.values[:15] * turned.tensor_scale[0]
    np.testing.assert_allclose(
        tensor_statistics(turned)[0].numpy(), by_hand(state.view(5, 3).double().numpy(), 3, 5), atol=1e-5
    )


def test_they_have_no_gradient_and_keep_that_of_the_batch() -> None:
    net = nn.Linear(3, 2)
    batch = sne_fast.pack([net])
    found = tensor_statistics(batch)
    assert not found.requires_grad and batch.values.requires_grad


def test_under_torch_func_they_are_a_constant() -> None:
    encoder = sne_fast.SNE(hidden_dim=32, statistics="tensor").double()
    batch = sne_fast.pack([nn.Linear(3, 2).double()], dtype=torch.float64).detach()

    def loss(values: Tensor) -> Tensor:
        return encoder(batch.with_fields(values=values)).square().sum()

    values = batch.values.clone().requires_grad_()
    loss(values).backward()
    torch.testing.assert_close(torch.func.grad(loss)(batch.values), values.grad)
    _, tangent = torch.func.jvp(loss, (batch.values,), (torch.ones_like(batch.values),))
    assert values.grad is not None
    torch.testing.assert_close(tangent, values.grad.sum())


def test_vmap_takes_values_whose_statistics_are_known_and_says_so() -> None:
    encoder = sne_fast.SNE(hidden_dim=32, statistics="tensor").double()
    batch = encoder.pack([nn.Linear(3, 2).double()]).detach()
    values = torch.stack([batch.values, 2 * batch.values])
    with pytest.raises(ValueError, match=r"tensor_statistics: values must not be batched by torch\.func\.vmap"):
        torch.func.vmap(lambda v: encoder(batch.with_fields(values=v)))(values)
    known = {"statistics": batch.statistics}
    z = torch.func.vmap(lambda v: encoder(batch.with_fields(values=v, **known)))(values)
    torch.testing.assert_close(z, torch.stack([encoder(batch.with_fields(values=v, **known)) for v in values]))


def test_per_sample_gradients_of_parameters() -> None:
    encoder = sne_fast.SNE(hidden_dim=32, statistics="tensor", chunks=False).double()
    batch = encoder.pack([nn.Linear(3, 2).double(), nn.Linear(2, 4).double()]).detach()
    weight = encoder.tensor_statistics.hidden.weight

    def z(w: Tensor) -> Tensor:
        return torch.func.functional_call(encoder, {"tensor_statistics.hidden.weight": w}, (batch,)).sum(1)

    found = torch.func.jacrev(z)(weight.detach())
    for b in range(2):
        (alone,) = torch.autograd.grad(encoder(batch[b]).sum(), weight)
        torch.testing.assert_close(found[b], alone)


def test_a_batch_without_shapes_is_refused() -> None:
    batch = sne_fast.pack([nn.Linear(3, 2)]).detach().with_fields(shapes=())
    with pytest.raises(ValueError, match="tensor_statistics: the batch must have the shapes of its tensors"):
        tensor_statistics(batch)


def test_empty_batches_have_none() -> None:
    empty = sne_fast.pack([nn.Linear(3, 2)]).detach()[0:0]
    assert tensor_statistics(empty).shape == (0, 23)


def test_relative_leaves_out_what_names_a_size() -> None:
    assert len(NAMES) == 23 and len(COLUMNS["relative"]) == 19
    assert {NAMES[i] for i in range(23) if i not in COLUMNS["relative"]} == {
        "log_rms", "log_numel", "log_fan_in", "log_fan_out",
    }  # fmt: skip

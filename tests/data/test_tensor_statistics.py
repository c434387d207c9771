"""Statistics of tensors: against NumPy and SciPy, on both backends, kept in the batch, the same under permutations."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor, nn

import sne_fast
from sne_fast import WeightBatch, tensor_statistics
from sne_fast.data import tensor_statistics as module
from sne_fast.data.tensor_statistics import COLUMNS, NAMES
from sne_fast.ops import reference
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


def single(w: Tensor, dtype: torch.dtype = torch.float32) -> WeightBatch:
    return sne_fast.pack([{"weight": w}], dtype=dtype, scale="none").detach()


EXTREMES: dict[str, Callable[[], Tensor]] = {
    "zeros": lambda: torch.zeros(5, 4),
    "constant": lambda: torch.full((6, 7), -0.7),
    "one element": lambda: torch.tensor([[2.5]]),
    "one row": lambda: torch.randn(1, 300),
    "one column": lambda: torch.randn(300, 1),
    "tiny": lambda: torch.randn(30, 40) * 1e-30,
    "huge": lambda: torch.randn(30, 40) * 1e30,
    "denormal": lambda: torch.randn(9, 9) * 1e-41,
    "ties": lambda: torch.randint(0, 3, (50, 60)).float(),
    "heavy tails": lambda: torch.randn(80, 90).pow(9),
    "one outlier": lambda: torch.zeros(100, 100).index_put((torch.tensor(3), torch.tensor(4)), torch.tensor(1.0)),
    "sorted": lambda: torch.arange(5000.0).view(50, 100),
    "organ pipe": lambda: torch.cat([torch.arange(3000.0), torch.arange(3000.0).flip(0)]).view(60, 100),
    "rank one": lambda: torch.randn(200, 1) @ torch.randn(1, 300),
    "two equal singular values": lambda: torch.eye(128),
}


@pytest.mark.parametrize("name", EXTREMES)
def test_backends_agree_on_extremes(name: str) -> None:
    torch.manual_seed(1)
    w = EXTREMES[name]()
    with sne_fast.use_backend("reference"):
        want = tensor_statistics(single(w))
    with sne_fast.use_backend("cpu"):
        got = tensor_statistics(single(w))
    assert want.isfinite().all()
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize("shape", [(65, 65), (300, 200), (100, 2000), (512, 512)])
@pytest.mark.parametrize("seed", [0, 1])
def test_spectral_norms_of_large_matrices_are_found_within_the_stated_error(shape: tuple[int, int], seed: int) -> None:
    w = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    with sne_fast.use_backend("cpu"):
        found = tensor_statistics(single(w, torch.float64))[0, NAMES.index("log_spectral_norm")]
    want = math.log(torch.linalg.svdvals(w)[0] / w.norm() * math.sqrt(min(shape)))
    assert abs(float(found) - want) < 1e-4


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_tensor_with_a_value_that_is_not_finite_has_nan_statistics_and_others_do_not(
    backend: str, value: float
) -> None:
    net = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    with torch.no_grad():
        net[0].weight[1, 2] = value
    batch = sne_fast.pack([net], nonfinite="keep").detach()
    with sne_fast.use_backend(backend):
        found = tensor_statistics(batch)
    bad = [name == "0.weight" for name in batch.names[0][1]]
    assert found[torch.tensor(bad)].isnan().all() and found[~torch.tensor(bad)].isfinite().all()


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


def good() -> dict[str, Any]:
    start = torch.tensor([0, 12, 17])
    dims = torch.tensor([[3, 2, 2, 4, 3, 1], [5, 0, 1, 4, 3, 0]])
    return {"values": torch.randn(17), "start": start, "scale": torch.ones(2), "dims": dims}


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("values", torch.ones(17, dtype=torch.int64), TypeError, "values must be floating of shape"),
        ("values", torch.ones(16), ValueError, "start must start at 0"),
        (
            "start",
            torch.tensor([0, 13, 17]),
            ValueError,
            r"dims\[0\] must be out, in, k, fan-in and fan-out of a tensor",
        ),
        ("scale", torch.ones(3), TypeError, r"scale must be float32 or float64 of shape \(T,\)"),
        ("dims", torch.ones(2, 5, dtype=torch.int64), TypeError, r"dims must be int64 of shape \(T, 6\)"),
        ("dims", torch.tensor([[3, 2, 2, 4, 3, 1], [5, 0, 1, 0, 3, 0]]), ValueError, r"dims\[1\] must be out"),
    ],
)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_bad_arguments_are_named(backend: str, name: str, value: Tensor, error: type, message: str) -> None:
    arguments = {**good(), name: value}
    with sne_fast.use_backend(backend):
        with pytest.raises(error, match=f"tensor_statistics: {message}"):
            sne_fast.functional.tensor_statistics(**arguments)
        with pytest.raises((error, sne_fast.BackendError), match="tensor_statistics: "):
            torch.ops.sne_fast.tensor_statistics(*arguments.values(), arguments["start"])


def test_the_reference_is_public() -> None:
    given = good()
    assert sne_fast.reference.tensor_statistics is reference.tensor_statistics
    assert reference.tensor_statistics(*given.values(), given["start"]).shape == (2, 23)

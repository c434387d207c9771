"""The op tensor_statistics: both backends on extreme tensors, the spectral norm's error, NaN, and its messages."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sne_fast
from sne_fast import WeightBatch, tensor_statistics
from sne_fast.data.tensor_statistics import NAMES
from sne_fast.ops import reference


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
BEYOND_FLOAT32 = (1e-300, 1e-155, 1e-100, 1e100, 1e150)


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


@pytest.mark.parametrize("magnitude", BEYOND_FLOAT32)
def test_backends_agree_on_the_range_of_float64(magnitude: float) -> None:
    w = torch.randn(30, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * magnitude
    found = {}
    for backend in ("reference", "cpu"):
        with sne_fast.use_backend(backend):
            found[backend] = tensor_statistics(single(w, torch.float64))
    assert found["reference"].isfinite().all()
    torch.testing.assert_close(found["cpu"], found["reference"], atol=1e-9, rtol=1e-9)


def spectra(n: int) -> dict[str, Tensor]:
    """Return singular values whose largest are hard to tell apart."""
    k = torch.arange(n, dtype=torch.float64)
    return {
        "evenly spaced": 1 - k / n,
        "one just above equals": torch.where(k == 0, 1.001, 1.0).double(),
        "dense at the top": (1 + torch.cos(math.pi * k / n)) / 2 + 1e-3,
        "slow decay": (1 + k) ** -0.05,
        "two": torch.where(k < 2, 1 - 0.001 * k, 0.0),
    }


@pytest.mark.parametrize("name", spectra(1))
@pytest.mark.parametrize("n", [300, 700])
def test_the_stated_error_holds_for_close_singular_values(n: int, name: str) -> None:
    generator = torch.Generator().manual_seed(n)
    left, right = (
        torch.linalg.qr(torch.randn(rows, n, generator=generator, dtype=torch.float64))[0] for rows in (n, n + 50)
    )
    w = left * spectra(n)[name] @ right.mT
    with sne_fast.use_backend("cpu"):
        found = tensor_statistics(single(w, torch.float64))[0, NAMES.index("log_spectral_norm")]
    assert abs(float(found) - math.log(float(spectra(n)[name].max() / w.norm()) * math.sqrt(n))) < 1e-4


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

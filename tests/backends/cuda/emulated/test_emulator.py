"""The emulator notices missing barriers, threads that part ways and unwritten shared memory; its matrices are right."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import emulate
import native_build
import pytest
import torch
from torch import Tensor

from helpers import artefacts

pytestmark = pytest.mark.build

SOURCE = Path(__file__).with_name("emulator_kernels.cu")
SCHEDULES = range(1, 9)
NAN = float("nan")


@pytest.fixture(scope="session")
def file() -> Path:
    emulator = emulate.CSRC / "cuda" / "emulator" / "emulator.cpp"
    command = [*native_build.host_compiler(), *emulate.FLAGS, "-Werror", "-shared", "-x", "c++", str(SOURCE)]
    key = artefacts.digest([*command, artefacts.version(command[0])], [SOURCE, *artefacts.native_sources("cuda")])

    def make(folder: Path) -> None:
        subprocess.run([*command, str(emulator), "-o", str(folder / "kernels.so")], check=True)

    return artefacts.kept("emulator_kernels", key, make) / "kernels.so"


@pytest.fixture
def kernels(file: Path) -> ctypes.CDLL:
    lib = ctypes.CDLL(str(file))
    lib.error.restype = ctypes.c_char_p
    lib.schedule.argtypes = [ctypes.c_uint64]
    lib.schedule(0)
    return lib


def address(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def run(lib: ctypes.CDLL, function: str, *args: int | Tensor) -> None:
    status = getattr(lib, function)(*(address(a) if isinstance(a, Tensor) else a for a in args))
    assert status == 0, lib.error().decode()


def in_every_order(lib: ctypes.CDLL, call: Callable[[], Tensor]) -> list[Tensor]:
    results = [call().clone()]
    for seed in SCHEDULES:
        lib.schedule(seed)
        results.append(call().clone())
    return results


def test_a_missing_barrier_shows(kernels: ctypes.CDLL) -> None:
    out = torch.empty(64)

    def passed_on(barrier: int) -> Tensor:
        run(kernels, "race", out, 64, barrier)
        return out

    want = torch.arange(64.0).sub(1).clamp(min=0)
    assert all(torch.equal(got, want) for got in in_every_order(kernels, lambda: passed_on(1)))
    kernels.schedule(0)
    first, *others = in_every_order(kernels, lambda: passed_on(0))
    assert torch.equal(first, want), "by the numbers of threads it happens to be right"
    assert all(other.isnan().any() for other in others)


def test_a_schedule_is_the_same_when_it_is_set_again(kernels: ctypes.CDLL) -> None:
    out = torch.empty(2, 128)
    for got in out:
        kernels.schedule(5)
        run(kernels, "race", got, 128, 0)
    torch.testing.assert_close(*out, rtol=0, atol=0, equal_nan=True)


def test_barriers_of_parts_of_a_block(kernels: ctypes.CDLL) -> None:
    out = torch.full((3, 128), NAN)

    def call() -> Tensor:
        run(kernels, "halves", out.fill_(NAN), 128, 3)
        return out

    want = torch.cat([torch.arange(64.0).roll(1), torch.arange(64.0).roll(1) + 64]).expand(3, 128)
    assert all(torch.equal(got, want) for got in in_every_order(kernels, call))


def test_shared_memory_starts_as_nan_in_every_block(kernels: ctypes.CDLL) -> None:
    out = torch.zeros(3, 64)
    run(kernels, "unwritten", out, 64, 3)
    assert out.isnan().all()


def test_memory_behind_the_shared_is_not_there(file: Path) -> None:
    code = (
        "import ctypes, sys\n"
        f"lib = ctypes.CDLL({str(file)!r})\n"
        "out = (ctypes.c_float * 32)()\n"
        "print(lib.beyond(out, 64, 63), flush=True)\n"
        "lib.beyond(out, 64, 64)\n"
        "print('still here')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == -11 and done.stdout == "0\n"


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (0, "threads wait for others that have ended or wait elsewhere; at sync_block"),
        (1, "threads wait for others that have ended or wait elsewhere; in a warp at shuffle"),
        (2, "where others wait at s"),
    ],
)
def test_threads_that_part_ways_are_reported(kernels: ctypes.CDLL, kind: int, message: str) -> None:
    out = torch.zeros(64)
    for seed in (0, *SCHEDULES):
        kernels.schedule(seed)
        assert kernels.divergence(address(out), 64, kind) == 999
        assert message in kernels.error().decode()
    kernels.schedule(0)
    run(kernels, "race", out, 64, 1)  # the next launch is not disturbed
    assert out[-1] == 62


@pytest.mark.parametrize("threads", [0, 33, 2048])
def test_launches_that_no_gpu_takes(kernels: ctypes.CDLL, threads: int) -> None:
    assert kernels.unwritten(address(torch.zeros(4096)), threads, 1) == 999
    assert f"a launch of {threads} threads" in kernels.error().decode()


def test_lanes_exchange(kernels: ctypes.CDLL) -> None:
    summed, three, odd = torch.empty(64), torch.empty(64), torch.empty(64, dtype=torch.int32)
    run(kernels, "exchanges", summed, odd, three, 64)
    lanes = torch.arange(64.0).view(2, 32)
    assert torch.equal(summed.view(2, 32), lanes.sum(1, keepdim=True).expand(2, 32))
    assert torch.equal(three.view(2, 32), lanes[:, 3:4].expand(2, 32))
    assert (odd.long() & 0xFFFFFFFF == 0xAAAAAAAA).all()


# --------------------------------------------------------------------------------------------------------- matrices


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


@pytest.mark.parametrize(("width", "columns"), [(32, 24), (64, 8)])
@pytest.mark.parametrize(
    ("op", "dtype", "exact", "error"),
    [
        pytest.param(0, torch.float32, torch.float32, 3e-7, id="float"),
        pytest.param(1, torch.float32, torch.float32, 1e-3, id="tf32"),
        pytest.param(2, torch.float16, torch.float16, 1e-3, id="half"),
        pytest.param(3, torch.bfloat16, torch.bfloat16, 1e-2, id="bfloat"),
    ],
)
def test_products(kernels: ctypes.CDLL, op: int, dtype, exact, error: float, width: int, columns: int) -> None:
    generator = torch.Generator().manual_seed(op)
    x = torch.randn(16, width, generator=generator).to(exact).float()
    w = torch.randn(columns, width, generator=generator).to(dtype)
    y, paired, left = (torch.full((16, columns), NAN) for _ in range(3))
    z = torch.full((16, width), NAN)

    def call() -> Tensor:
        run(kernels, "products", op, x, w, y, paired, left, z, width, columns)
        return torch.cat([t.flatten() for t in (y, paired, left, z)])

    results = in_every_order(kernels, call)
    assert all(torch.equal(results[0], other) for other in results)
    a, b = x.double(), w.double()
    products_of_halves = 3e-7 if dtype != torch.float32 else error  # their products are exact in float32
    assert relative(y, a @ b.T) < products_of_halves and torch.equal(y, paired)
    assert relative(left, a[:, :8] @ b[:, :8].T) < products_of_halves
    assert relative(z, a @ a.T @ a) < error  # a @ a.T is rounded to an operand


def test_matrices_of_16_bits(kernels: ctypes.CDLL) -> None:
    stored = torch.randint(-(2**15), 2**15, (4, 8, 8), dtype=torch.int16)
    plain, transposed, moved = (torch.zeros_like(stored) for _ in range(3))
    run(kernels, "matrices", stored, plain, transposed, moved)
    assert torch.equal(plain, stored)
    assert torch.equal(transposed, stored.mT) and torch.equal(moved, stored.mT)


def test_rounding_to_half_types(kernels: ctypes.CDLL) -> None:
    """Every float16 and its neighbours, subnormal numbers, ties, overflow, infinity and NaN."""
    halves = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
    near = torch.cat([halves, halves.nextafter(torch.tensor(9e9)), halves.nextafter(torch.tensor(-9e9))])
    between = (halves[:-1] + halves[1:]) / 2
    edges = torch.tensor([3.4e38, -3.4e38, 65519.9, 65520.0, 1e-45])
    values = torch.cat([near, between, near * 1e-5, near * 1e9, edges])
    results = [torch.empty_like(values) for _ in range(3)]
    kernels.rounded(*map(address, (values, *results)), ctypes.c_int64(len(values)))
    for got, dtype in zip(results, (torch.float16, torch.bfloat16, torch.float16), strict=True):
        torch.testing.assert_close(got, values.to(dtype).float(), rtol=0, atol=0, equal_nan=True)

"""set_block's CUDA kernels in the emulator: forward and gradients against the float64 reference, whole and in parts."""

from __future__ import annotations

import math

import pytest
import torch

import sne_fast
from helpers import set_block_checks as checks
from helpers.errors import relative_error
from helpers.op_cases import products
from helpers.set_block_checks import BRAIN, HALF, RAGGED, SINGLE, across, check, exact, itself, run, upstream
from sne_fast import ISAB, SAB
from sne_fast.backends.cuda import library
from sne_fast.backends.cuda import set_block as module
from sne_fast.ops import selftest, selftest_cases

pytestmark = pytest.mark.build

SHAPES = [(32, 1), (32, 2), (32, 4), (64, 1), (64, 2), (64, 4), (64, 8)]
MANY_SHORT = [2, 1, 3, 1, 1] * 16 + [5]


def is_whole(args) -> bool:
    return module.takes_whole(args[0], args[1], args[4], args[-4], args[-1])


@pytest.mark.parametrize("dtype", [SINGLE, HALF, BRAIN], ids=str)
@pytest.mark.parametrize("layer_norm", [True, False])
@pytest.mark.parametrize(("h", "heads"), SHAPES)
def test_widths_and_heads(h: int, heads: int, layer_norm: bool, dtype: torch.dtype) -> None:
    args = itself(RAGGED, h, heads, dtype, layer_norm)
    assert is_whole(args)
    check(module, args)


@pytest.mark.parametrize("lengths", [*checks.FEW_ROWS, [1, 15, 16, 17, 100], [512], MANY_SHORT, [64, 64, 63]], ids=str)
@pytest.mark.parametrize("dtype", [SINGLE, BRAIN], ids=str)
def test_numbers_of_rows(lengths: list[int], dtype: torch.dtype) -> None:
    check(module, itself(lengths, 32, 2, dtype))


def test_thread_blocks_of_several_tiles() -> None:
    args = itself([300, 7, 400, 90, 500], 32, 4, HALF)
    assert is_whole(args) and args[0].shape[0] > 64 * 4 * library.multiprocessors(args[0].device)
    check(module, args)


def test_tf32() -> None:
    args = itself(RAGGED, 64, 4, SINGLE)
    with products("high"):
        got = checks.compare(module, args, 3e-3, 1.5e-2)
    assert relative_error(got[0], exact(args)[0]) > 1e-5, "products were rounded"


@pytest.mark.parametrize(("h", "heads"), [(64, 4), (64, 8), (32, 1)])
@pytest.mark.parametrize("dtype", [HALF, BRAIN], ids=str)
def test_half_types_lose_at_most_twice_what_torch_loses(h: int, heads: int, dtype: torch.dtype) -> None:
    checks.loses_at_most_twice_what_torch_loses(module, itself([70, 5, 0, 33], h, heads, dtype))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["x", "grad"])
@pytest.mark.parametrize("lengths", [(4, 6, 3), (70, 90, 9)], ids=str)
@pytest.mark.parametrize("dtype", [SINGLE, BRAIN], ids=str)
def test_what_is_not_finite_stays_in_its_set(where: str, value: float, lengths, dtype: torch.dtype) -> None:
    checks.what_is_not_finite_stays_in_its_set(module, where, value, lengths, 4, dtype)


def test_large_logits() -> None:
    x, *rest = itself([40, 3], 32, 2, SINGLE)
    assert all(t.isfinite().all() for t in run(module, (300 * x, *rest)))


@pytest.mark.parametrize("dtype", [SINGLE, BRAIN], ids=str)
@pytest.mark.parametrize("lengths", [RAGGED, [300]], ids=str)
def test_the_same_bits_in_every_order_of_threads(lengths: list[int], dtype: torch.dtype) -> None:
    args = itself(lengths, 32, 2, dtype)
    want = run(module, args)
    for seed in (1, 2, 3):
        library.library().sne_fast_cuda_emulated_schedule(seed)
        assert all(torch.equal(a, b) for a, b in zip(run(module, args), want, strict=True)), seed


# ----------------------------------------------------------------------------------------------------------- in parts


@pytest.mark.parametrize(("dims", "heads"), [((48, 16, 32), 4), ((64, 64, 64), 4), ((128, 128, 128), 8)], ids=str)
def test_in_parts(dims: tuple[int, int, int], heads: int) -> None:
    args = across(dims, heads, SINGLE)
    assert not is_whole(args)
    check(module, args)


@pytest.mark.parametrize(("h", "heads", "longest"), [(32, 2, 513), (128, 4, 9)])
def test_what_goes_in_parts(h: int, heads: int, longest: int) -> None:
    args = itself([5, longest], h, heads, BRAIN)
    assert not is_whole(args)
    check(module, args)


def test_gpus_of_little_shared_memory_go_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "EMULATED_SHARED", 99 << 10)
    assert is_whole(itself([5], 64, 4, BRAIN)) and is_whole(itself([5], 32, 4, SINGLE))
    args = itself([5, 20], 64, 4, SINGLE)
    assert not is_whole(args)
    check(module, args)


def test_why_not() -> None:
    args = itself([2], 48, 4, SINGLE)
    assert module.why_not("set_block", args) == ["width must be one of 32, 64, 128, 256, got 48"]
    args = itself([2], 32, 4, SINGLE)
    assert module.why_not("set_block_backward", (upstream(args), *args)) == []


# ------------------------------------------------------------------------------------------------ behind the functions


def test_through_the_backend_with_views() -> None:
    """Operands that are no multiple of 16 bytes into their storage, and gradients by autograd."""
    x, _, ptr, *_ = args = itself([5, 9], 32, 4, HALF)
    storage = torch.zeros(x.numel() + 1, dtype=HALF)
    storage[1:] = x.flatten()
    leaves = [t.detach().requires_grad_() for t in (storage[1:].view_as(x), *args[6:-1])]
    with sne_fast.use_backend("cuda"):
        out = sne_fast.functional.set_block(leaves[0], leaves[0], ptr, ptr, *leaves[1:], 4)
        out.backward(upstream(args))
    for a, b in zip([out, *(t.grad for t in leaves)], run(module, args), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", [SAB, ISAB])
def test_modules_call_it(kind, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    block = kind(32, 32, 4, layer_norm=True) if kind is SAB else kind(32, 32, 4, num_inducing=3, layer_norm=True)
    x, ptr = torch.randn(11, 32, requires_grad=True), torch.tensor([0, 3, 3, 11])
    leaves, calls = [x, *block.parameters()], []
    run_op = module.set_block
    monkeypatch.setattr(module, "set_block", lambda *args: (calls.append(args[1] is None), run_op(*args))[1])
    found = []
    for name in ("cuda", "reference"):
        with sne_fast.use_backend(name):
            out = block(x, ptr)
            found.append([out.detach(), *torch.autograd.grad(out.square().sum(), leaves)])
    assert calls == ([True] if kind is SAB else [False, False])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_opcheck_and_report() -> None:
    x, k, *rest = itself(RAGGED, 32, 4, SINGLE)
    args = (x, k, *(t.clone() for t in rest[:4]), *rest[4:])
    report = {entry.op: entry.reasons for entry in sne_fast.explain("cpu") if entry.backend == "cuda"}
    assert report["set_block"] == () and report["pool_block"]
    with sne_fast.use_backend("cuda"):
        torch.library.opcheck(torch.ops.sne_fast.set_block.default, args)
        torch.library.opcheck(torch.ops.sne_fast.set_block_backward.default, (upstream(args), *args))


@pytest.mark.parametrize("dtype", [SINGLE, BRAIN], ids=str)
def test_the_self_test_passes(dtype: torch.dtype) -> None:
    from sne_fast.backends.cuda.backend import BACKEND

    case = selftest_cases.variant("set_block", itself([3], 64, 4, dtype))
    assert selftest.check(BACKEND, case, torch.device("cpu")) == []

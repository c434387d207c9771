"""set_block: the reference against the modules of a block, and when a MAB calls the op."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn

import sne_fast
from helpers.op_cases import block_case
from sne_fast import ISAB, MAB, SAB
from sne_fast.ops import compositions, dispatch, functional, reference
from sne_fast.ops.schema import BLOCK_PARAMETERS

DOUBLE, SINGLE = torch.float64, torch.float32
NAMES = ("q", "k", "q_ptr", "k_ptr", *BLOCK_PARAMETERS)
RAGGED = ([3, 0, 2, 7], [2, 3, 0, 9])


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(dispatch.ENVIRONMENT_VARIABLE, raising=False)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of q, of every call of the op by a module."""
    made: list[tuple[int, ...]] = []
    function = functional.set_block

    def counted(*args: Tensor, **hosts: Tensor) -> Tensor:
        made.append(tuple(args[0].shape))
        return function(*args, **hosts)

    monkeypatch.setattr(functional, "set_block", counted)
    return made


def with_gradients(function, leaves: list[Tensor]) -> list[Tensor]:
    out = function()
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=DOUBLE).to(out.dtype)
    grads = torch.autograd.grad(out, leaves, grad, materialize_grads=True)
    return [out.detach(), *grads]


def all_close(got: list[Tensor], want: list[Tensor], tolerance: float) -> None:
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# --------------------------------------------------------------------------------------------------------- reference


@pytest.mark.parametrize("layer_norm", [True, False])
@pytest.mark.parametrize("lengths", [RAGGED, ([], []), ([0], [2])], ids=str)
def test_the_reference_is_what_the_modules_compute(lengths: tuple[list[int], list[int]], layer_norm: bool) -> None:
    q, k, q_ptr, k_ptr, *parameters = block_case(*lengths, layer_norm=layer_norm)
    leaves = [t.requires_grad_() for t in (q, k, *parameters)]
    mab = MAB(8, 6, 8, num_heads=2, layer_norm=layer_norm).double()
    names = [f"fc_{which}.{kind}" for which in "qkvo" for kind in ("weight", "bias")]
    state = dict(zip(names, parameters, strict=False))
    if layer_norm:
        norms = ("ln0.weight", "ln0.bias", "ln1.weight", "ln1.bias")
        state |= dict(zip(norms, parameters[-1].unbind(), strict=True))
    with sne_fast.use_backend("reference"):
        want = with_gradients(lambda: torch.func.functional_call(mab, state, (q, k, q_ptr, k_ptr)), leaves)
        got = with_gradients(lambda: functional.set_block(q, k, q_ptr, k_ptr, *parameters, 2), leaves)
    all_close(got, want, 1e-12)


@pytest.mark.parametrize("layer_norm", [True, False])
def test_gradcheck(layer_norm: bool) -> None:
    q, k, q_ptr, k_ptr, *parameters = block_case([2, 0, 1], [3, 1, 0], (3, 2, 4), layer_norm)
    inputs = [t.requires_grad_(t.numel() > 0) for t in (q, k, *parameters)]
    with sne_fast.use_backend("reference"):
        assert torch.autograd.gradcheck(lambda q, k, *p: functional.set_block(q, k, q_ptr, k_ptr, *p, 2), inputs)


def test_half_types_are_rounded_once() -> None:
    case = block_case(*RAGGED, (32, 32, 32), dtype=torch.bfloat16)
    q, k, q_ptr, k_ptr, *parameters = case
    args = (q, k, q_ptr, k_ptr, q_ptr, k_ptr, *parameters, 4)
    wide = reference.set_block(*(t.float() if isinstance(t, Tensor) and t.is_floating_point() else t for t in args))
    for function in (reference.set_block, compositions.set_block):
        assert function(*args).dtype == torch.bfloat16
        torch.testing.assert_close(function(*args).float(), wide, rtol=2**-8, atol=1e-6)


def test_autocast_casts_once_and_gradients_return_in_the_inputs_dtype() -> None:
    q, k, q_ptr, k_ptr, *parameters = block_case(*RAGGED, (32, 32, 32), dtype=SINGLE)
    leaves = [t.requires_grad_() for t in (q, k, *parameters)]
    with torch.autocast("cpu", torch.bfloat16):
        out = functional.set_block(q, k, q_ptr, k_ptr, *parameters, 4)
    out.float().square().sum().backward()
    assert out.dtype == torch.bfloat16 and all(t.grad is not None and t.grad.dtype == SINGLE for t in leaves)


def test_double_backward_is_refused_by_name() -> None:
    q, k, *rest = block_case(*RAGGED)
    out = functional.set_block(q.requires_grad_(), k, *rest, 2)
    with pytest.raises(RuntimeError, match="set_block: double backward is not implemented"):
        torch.autograd.grad(out.sum(), q, create_graph=True)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"q": torch.zeros(12, 8).int()}, "set_block: q must be a tensor of float16, bfloat16, float32 or float64"),
        ({"q": torch.zeros(12)}, "q must have shape (rows_q, dim_q), got float32 (12,)"),
        ({"k": torch.zeros(14, 5)}, "w_k must have shape (h, width of its rows) = (8, 5), got float32 (8, 6)"),
        ({"k": torch.zeros(14, 6).double()}, "k must have the dtype and device of q"),
        ({"w_o": torch.zeros(8, 4)}, "w_o must have shape (h, h), got float32 (8, 4)"),
        ({"b_v": torch.zeros(1, 8)}, "b_v must have shape (h,) with h = 8"),
        ({"norm": torch.zeros(2, 8)}, "norm must have shape (4, h), or (0, h) for no layer norm, with h = 8"),
        ({"q_ptr": torch.tensor([0, 3, 3, 12])}, "k_ptr must have as many sets as q_ptr, got 4 and 3"),
        ({"q_ptr": torch.tensor([0, 3, 3, 5, 11])}, "q_ptr must start at 0, never decrease and end at"),
        ({"k_ptr": torch.tensor([0, 3, 2, 5, 14])}, "k_ptr must start at 0, never decrease and end at"),
        ({"num_heads": 3}, "num_heads must be an integer that divides the width h = 8, got 3"),
    ],
)  # fmt: skip
def test_errors(change: dict[str, Tensor], message: str) -> None:
    inputs = {**dict(zip(NAMES, block_case(*RAGGED, dtype=SINGLE), strict=True)), "num_heads": 2}
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        functional.set_block(**{**inputs, **change})


# --------------------------------------------------------------------------------------------- when a block calls it


def test_which_backends_fuse() -> None:
    said = {}
    for name in ("auto", *dispatch.backend_names()):
        with sne_fast.use_backend(name):
            said[name] = [dispatch.fuses("set_block", torch.device(kind)) for kind in ("cpu", "cuda", "meta")]
    no = [False] * 3
    # By name the device is not asked: an op before has refused tensors elsewhere.
    assert said.pop("cpu") == said.pop("triton") == said.pop("cuda") == [True] * 3
    assert said == {"auto": [True, True, False], "reference": no}


def blocks(layer_norm: bool = True) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {
        "sab": SAB(32, 64, num_heads=4, layer_norm=layer_norm).double(),
        "isab": ISAB(32, 64, num_heads=4, num_inducing=3, layer_norm=layer_norm).double(),
    }


@pytest.mark.parametrize("layer_norm", [True, False])
@pytest.mark.parametrize("kind", ["sab", "isab"])
def test_blocks_through_it(calls, kind: str, layer_norm: bool) -> None:
    block, ptr = blocks(layer_norm)[kind], torch.tensor([0, 3, 3, 11])
    x = torch.randn(11, 32, dtype=DOUBLE, requires_grad=True)
    leaves = [x, *block.parameters()]
    with sne_fast.use_backend("reference"):
        want = with_gradients(lambda: block(x, ptr), leaves)
    assert calls == []
    got = with_gradients(lambda: block(x, ptr), leaves)
    assert calls == ([(11, 32)] if kind == "sab" else [(9, 64), (11, 32)])
    all_close(got, want, 1e-9)
    with torch.no_grad():
        torch.testing.assert_close(block(x, ptr), want[0], rtol=1e-9, atol=1e-9)


def changed(what: str) -> MAB:
    mab = MAB(32, 32, 32, num_heads=2, layer_norm=True)
    if what == "hook":
        mab.fc_o.register_forward_hook(lambda module, args, out: out)
    elif what == "replaced":
        mab.fc_k = nn.Sequential(mab.fc_k)  # type: ignore[assignment]
    elif what == "no norm":
        mab.ln1 = nn.Identity()  # type: ignore[assignment]
    elif what == "no bias":
        mab.fc_v = nn.Linear(32, 32, bias=False)
    elif what == "own class":
        mab.__class__ = type("Own", (MAB,), {"feed_forward": lambda self, o: o})
    return mab


@pytest.mark.parametrize("what", ["hook", "replaced", "no norm", "no bias", "own class"])
def test_changed_blocks_are_called_part_by_part(calls, what: str) -> None:
    mab, x, ptr = changed(what), torch.randn(7, 32), torch.tensor([0, 3, 7])
    mab(x, x, ptr, ptr)
    assert calls == []
    plain = MAB(32, 32, 32, num_heads=2)
    plain(x, x, ptr, ptr)
    assert calls == [(7, 32)]


def test_widths_that_no_kernel_takes(calls) -> None:
    ptr = torch.tensor([0, 3, 7])
    for dims, heads in (((1, 1, 32), 2), ((32, 32, 48), 4), ((32, 32, 32), 32)):
        mab = MAB(*dims, num_heads=heads)
        mab(torch.randn(7, dims[0]), torch.randn(7, dims[1]), ptr, ptr)
    assert calls == []


def test_compiled_into_one_graph_that_follows_the_choice_of_backend(calls) -> None:
    mab = MAB(32, 32, 32, num_heads=4, layer_norm=True).double()
    x, ptr = torch.randn(7, 32, dtype=DOUBLE, requires_grad=True), torch.tensor([0, 3, 7])
    leaves = [x, *mab.parameters()]
    compiled = torch.compile(mab, fullgraph=True, backend="aot_eager")
    for name in ("auto", "reference", "cpu"):
        with sne_fast.use_backend(name):
            got, want = (
                with_gradients(lambda run=run: run(x, x, ptr, ptr, ptr, ptr), leaves) for run in (compiled, mab)
            )
        all_close(got, want, 1e-10)
    assert calls.count((7, 32)) >= 3


def test_a_backward_under_another_backend_is_the_references() -> None:
    q, k, q_ptr, k_ptr, *parameters = block_case(*RAGGED, (32, 32, 32))
    leaves = [t.requires_grad_() for t in (q, k, *parameters)]
    with sne_fast.use_backend("reference"):
        want = torch.autograd.grad(functional.set_block(q, k, q_ptr, k_ptr, *parameters, 4).square().sum(), leaves)
    out = functional.set_block(q, k, q_ptr, k_ptr, *parameters, 4).square().sum()
    with sne_fast.use_backend("reference"):
        all_close(list(torch.autograd.grad(out, leaves)), list(want), 1e-9)


def test_one_level_of_torch_func_runs_on_the_op_and_more_on_its_parts(calls) -> None:
    mab, ptr = MAB(32, 32, 32, num_heads=4).double(), torch.tensor([0, 2, 3])
    x = torch.randn(3, 32, dtype=DOUBLE)

    def loss(x: Tensor) -> Tensor:
        return mab(x, x, ptr, ptr).square().sum()

    got = torch.func.grad(loss)(x)
    assert calls == [(3, 32)]
    (want,) = torch.autograd.grad(loss(x.requires_grad_()), x)
    torch.testing.assert_close(got, want)
    calls.clear()
    torch.testing.assert_close(torch.func.jacfwd(loss)(x.detach()), want)
    assert calls == []

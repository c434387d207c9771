"""set_block on a processor that multiplies bfloat16: errors against what PyTorch loses, and the same bits."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from helpers.cpu_cases import cast
from helpers.errors import relative_error
from helpers.op_cases import block_case
from sne_fast import reference
from sne_fast.backends.cpu import backend as cpu
from sne_fast.backends.cpu import library
from sne_fast.ops.schema import BLOCK_PARAMETERS
from sne_fast.training.threads import torch_threads

ISA = "avx512_bf16"
pytestmark = pytest.mark.skipif(
    bool(library.reasons()) or ISA not in library.supported_isas(), reason=f"needs a processor with {ISA}"
)
BRAIN = torch.bfloat16
NAMES = ("out", "q", "k", *BLOCK_PARAMETERS)
RAGGED = ([1, 3, 17, 0, 100, 5, 2], [2, 3, 0, 4, 130, 65, 1])


@pytest.fixture(autouse=True)
def isa():
    with library.use_isa(ISA):
        yield


def arguments(
    lengths: tuple[list[int], list[int]], dims: tuple[int, int, int], heads: int, norms: bool = True
) -> tuple:
    """Return the arguments of the op in bfloat16."""
    q, k, q_ptr, k_ptr, *parameters = cast(block_case(*lengths, dims, norms), BRAIN)
    return q, k, q_ptr, k_ptr, q_ptr, k_ptr, *parameters, heads


def gradient(args: tuple) -> Tensor:
    shape = len(args[0]), args[-4].shape[0]
    return torch.randn(shape, generator=torch.Generator().manual_seed(5)).to(BRAIN)


def results(backend, args: tuple, dtype: torch.dtype = BRAIN) -> tuple[Tensor, ...]:
    args = tuple(t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t for t in args)
    grad = gradient(args).to(dtype)
    return backend.set_block(*args), *backend.set_block_backward(grad, *args)


def by_torch(args: tuple) -> tuple[Tensor, ...]:
    """Compute the same with PyTorch's own operations in bfloat16, set by set."""
    *tensors, heads = args
    leaves = [t.clone().requires_grad_() for t in tensors if t.is_floating_point()]
    q, k, w_q, b_q, w_k, b_k, w_v, b_v, w_o, b_o, norm = leaves
    h = w_o.shape[0]
    query, key, value = F.linear(q, w_q, b_q), F.linear(k, w_k, b_k), F.linear(k, w_v, b_v)
    sums = []
    for (a, b), (c, d) in zip(*(itertools.pairwise(ptr.tolist()) for ptr in tensors[2:4]), strict=True):
        rows, keys, values = (t.unflatten(1, (heads, -1)).transpose(0, 1) for t in (query[a:b], key[c:d], value[c:d]))
        attended = torch.softmax(rows @ keys.mT / math.sqrt(h), -1) @ values
        sums.append(query[a:b] + attended.transpose(0, 1).flatten(1))
    o = torch.cat(sums)
    o = F.layer_norm(o, (h,), norm[0], norm[1]) if len(norm) else o
    out = o + F.linear(o, w_o, b_o).relu()
    out = F.layer_norm(out, (h,), norm[2], norm[3]) if len(norm) else out
    grads = torch.autograd.grad(out, leaves, gradient(args), allow_unused=True)
    return out.detach(), *(torch.zeros_like(t) if g is None else g for g, t in zip(grads, leaves, strict=True))


def loses_at_most_twice_what_torch_loses(args: tuple, names: tuple[str, ...] = NAMES) -> None:
    exact = results(reference, args, torch.float64)
    for name, a, b, c in zip(NAMES, results(cpu, args), by_torch(args), exact, strict=True):
        assert a.shape == c.shape and a.dtype == BRAIN
        if name in names and name != "b_k":  # zero but for rounding
            lost, allowed = relative_error(a, c), relative_error(b, c)
            assert lost <= 2 * allowed, (name, lost, allowed)


def same(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("layer_norm", [True, False])
@pytest.mark.parametrize(
    ("dims", "heads"), [((32, 32, 32), 4), ((32, 96, 64), 8), ((64, 64, 64), 4), ((128, 64, 256), 32)], ids=str
)
def test_loses_at_most_twice_what_torch_loses(dims: tuple[int, int, int], heads: int, layer_norm: bool) -> None:
    args = list(arguments(RAGGED, dims, heads, layer_norm))
    b_o = args[-3]
    b_o.fill_(6)[::2] = -6  # no relu is flipped by rounding, which costs either side tenfold
    loses_at_most_twice_what_torch_loses(tuple(args))


@pytest.mark.parametrize(
    "lengths", [([], []), ([0, 0], [0, 3]), ([1], [1]), ([2100, 3], [40, 0]), ([4, 1], [2100, 9])], ids=str
)
def test_numbers_of_rows(lengths: tuple[list[int], list[int]]) -> None:
    args = arguments(lengths, (32, 32, 32), 4)
    for a, b in zip(results(cpu, args), results(reference, args, torch.float64), strict=True):
        assert a.shape == b.shape
        assert float((a.double() - b).norm()) <= 0.05 * float(b.norm()) + 0.5


def test_the_same_bits_for_any_number_of_threads() -> None:
    args = arguments(([900, 3, 0, 200, 1, 40], [300, 3, 5, 900, 1, 40]), (32, 32, 32), 4)
    with torch_threads(1):
        want = results(cpu, args)
    for count in (2, 5):
        with torch_threads(count):
            assert same(results(cpu, args), want)


def test_products_are_of_bfloat16_where_these_pay() -> None:
    few = [100], [155]
    for lengths, dims, rounded in (
        (RAGGED, (32, 32, 32), True),
        (RAGGED, (48, 32, 32), False),
        (few, (32, 32, 32), False),
    ):
        args = arguments(lengths, dims, 4)
        got = results(cpu, args)
        with library.use_isa("avx512"):
            assert same(results(cpu, args), got) != rounded
            single = results(cpu, args, torch.float32)
        assert same(results(cpu, args, torch.float32), single)


def test_what_is_not_finite_stays_in_its_set() -> None:
    args = arguments(([4, 120, 3], [5, 170, 3]), (32, 32, 32), 4)
    want = results(cpu, args)
    for place, row in ((0, 6), (1, 30)):
        for value in (math.nan, math.inf):
            bad = [t.clone() if isinstance(t, Tensor) else t for t in args]
            bad[place][row, 3] = value
            got = results(cpu, tuple(bad))
            for which, ptr in ((0, args[2]), (1, args[2]), (2, args[3])):
                outside = torch.ones(len(got[which]), dtype=torch.bool)
                outside[int(ptr[1]) : int(ptr[2])] = False
                assert torch.equal(got[which][outside], want[which][outside])
            assert got[0][4:124].isnan().any()


@pytest.mark.parametrize("size", [30.0, 1000.0])
def test_large_logits_pick_one_key(size: float) -> None:
    """Sums of more than 64 keys whose log-sum-exp is large are computed from the keys again."""
    args = list(arguments(([70], [200]), (32, 32, 32), 4))
    args[0] = args[0] * size
    assert all(t.isfinite().all() for t in results(cpu, tuple(args)))
    loses_at_most_twice_what_torch_loses(tuple(args), ("out",))

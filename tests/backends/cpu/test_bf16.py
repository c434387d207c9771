"""The CPU backend on a processor that multiplies bfloat16: errors against what PyTorch loses, and the same bits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import sne_fast
from helpers import chunk_checks
from helpers.cpu_cases import cast, chunk_encode_case
from helpers.op_cases import GRADED_NAMES, ChunkCase
from sne_fast.backends.cpu import backend as cpu
from sne_fast.backends.cpu import library
from sne_fast.training.threads import torch_threads

ISA = "avx512_bf16"
pytestmark = pytest.mark.skipif(
    bool(library.reasons()) or ISA not in library.supported_isas(), reason=f"needs a processor with {ISA}"
)
BRAIN = torch.bfloat16


@pytest.fixture(autouse=True)
def isa():
    with library.use_isa(ISA):
        yield


CASES = [
    (32, 4, [[32, 9, 2]], True),
    (32, 1, [[1, 1, 1, 3, 3, 7, 1], [1] * 20], True),
    (64, 8, [[32, 9]], True),
    (64, 4, [[33, 1, 17, 90, 5, 64, 48, 31]], True),
    (64, 4, [[32] * 5, [31, 16]], False),
    (128, 2, [[1, 2, 31, 32], [33]], True),
    (128, 16, [[130, 40, 3]], False),
    (256, 4, [[20, 9]], True),
]


@pytest.mark.parametrize(("width", "heads", "tensors", "layer_norm"), CASES)
def test_chunk_encode_loses_at_most_twice_what_torch_loses(width, heads, tensors, layer_norm):
    # Now and then rounding flips a relu, which costs either side tenfold: gradients are judged by the median of seeds.
    ratios = []
    for seed in range(5 if width < 256 else 3):
        case = ChunkCase.make(tensors, width, heads, 130, layer_norm=layer_norm, dtype=BRAIN, seed=seed)
        args = chunk_checks.arguments(case)
        args = args if layer_norm else chunk_checks.gentle(args)
        ratios.append(chunk_checks.loses_at_most_twice_what_torch_loses(cpu, args))
    for name, ratio in zip(GRADED_NAMES, torch.tensor(ratios).median(0).values.tolist(), strict=True):
        # Without layer norm, norm is empty: no error.
        assert ratio <= 2, name


def results(lengths: list[int], dtype: torch.dtype = BRAIN, h: int = 64) -> list[Tensor]:
    args = cast(chunk_encode_case(h, 4, lengths), dtype)
    out = cpu.chunk_encode(*args)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).to(dtype)
    return [out, *cpu.chunk_encode_backward(grad, *args)]


def same(got: list[Tensor], want: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_the_same_bits_for_any_number_of_threads():
    lengths = [32] * 90 + [1, 7, 31] * 40
    with torch_threads(1):
        want = results(lengths)
    for count in (2, 3, 8):
        with torch_threads(count):
            assert same(results(lengths), want)


def test_products_are_of_bfloat16_for_bfloat16_alone():
    lengths = [32, 32, 5, 1]
    rounded, single, double = results(lengths), results(lengths, torch.float32), results(lengths, torch.float64)
    with library.use_isa("avx512"):
        assert same(results(lengths, torch.float32), single) and same(results(lengths, torch.float64), double)
        assert not any(torch.equal(a, b) for a, b in zip(results(lengths), rounded, strict=True))


@pytest.mark.parametrize("lengths", [[], [1], [0, 1, 0, 32, 2, 0]])
def test_few_and_empty_chunks(lengths):
    out, *grads = results(lengths, h=32)
    assert out.shape == (len(lengths), 4, 32) and all(t.isfinite().all() for t in (out, *grads))
    empty = [n == 0 for n in lengths]
    assert not out[empty].any()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("layer_norm", [True, False])
def test_overflow_stays_in_its_chunk(value, layer_norm):
    args = list(cast(chunk_encode_case(64, 4, [5, 5, 32, 32, 3], layer_norm=layer_norm), BRAIN))
    want = cpu.chunk_encode(*args)
    args[0][6], args[0][12] = value, value
    out, *grads = cpu.chunk_encode(*args), *cpu.chunk_encode_backward(torch.ones_like(want), *args)
    assert not out[1].isfinite().all() and not out[2].isfinite().all()
    torch.testing.assert_close(out[[0, 3, 4]], want[[0, 3, 4]], rtol=3e-2, atol=3e-2)
    assert grads[0][:5].isfinite().all() and grads[0][42:].isfinite().all()


def test_autocast_of_an_encoder_multiplies_bfloat16():
    torch.manual_seed(0)
    encoder = sne_fast.SNE(hidden_dim=32)
    batch = encoder.pack([torch.nn.Linear(20, 30), torch.nn.Linear(5, 5)])

    def run(isa: str) -> Tensor:
        with library.use_isa(isa), sne_fast.use_backend("cpu"), torch.autocast("cpu", BRAIN), torch.no_grad():
            return encoder(batch)

    with torch.no_grad():
        want = encoder(batch)
    rounded = run(ISA)
    assert rounded.dtype == torch.float32 and not torch.equal(rounded, run("avx512"))
    assert 1e-4 < float((rounded - want).norm() / want.norm()) < 0.05

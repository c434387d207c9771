"""The CPU backend gives the same bits for any number of threads, and may be called from several Python threads."""

from __future__ import annotations

import threading

import pytest
import torch

from helpers.cpu_cases import NEEDS_BACKEND, cast, chunk_encode_case
from helpers.op_cases import block_case, pointer
from sne_fast.backends.cpu import backend as cpu
from sne_fast.backends.cpu import library
from sne_fast.training.threads import torch_threads

pytestmark = pytest.mark.skipif(bool(library.reasons()), reason=NEEDS_BACKEND)


def all_results(seed: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Return results and gradients of every op on one set of inputs, large enough for several threads to have work."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 33, (400,), generator=g).tolist() + [32] * 200
    args = cast(chunk_encode_case(64, 4, lengths), dtype)
    grad = torch.randn(len(lengths), 4, 64, generator=g).to(dtype)
    results = [cpu.chunk_encode(*args), *cpu.chunk_encode_backward(grad, *args)]

    sets = [*torch.randint(0, 90, (50,), generator=g).tolist(), 3000]
    ptr = pointer(sets)
    q, k, v, grad = (torch.randn(sum(sets), 64, generator=g).to(dtype) for _ in range(4))
    out, lse = cpu.set_attention(q, k, v, ptr, ptr, ptr, ptr, 4)
    results += [out, lse, *cpu.set_attention_backward(grad, q, k, v, out, lse, ptr, ptr, ptr, ptr, 4)]

    q, k, q_ptr, k_ptr, *parameters = block_case(sets, sets[::-1], (64, 32, 64), dtype=dtype, seed=seed)
    args = (q, k, q_ptr, k_ptr, q_ptr, k_ptr, *parameters, 4)
    results += [cpu.set_block(*args), *cpu.set_block_backward(torch.randn(len(q), 64, generator=g).to(dtype), *args)]

    sets[-1] = 20000
    ptr = pointer(sets)
    x, logits = torch.randn(sum(sets), 64, generator=g).to(dtype), torch.randn(sum(sets), 4, generator=g).to(dtype)
    out, lse = cpu.segment_pool(x, logits, ptr, ptr)
    grad = torch.randn(out.shape, generator=g).to(dtype)
    results += [out, lse, *cpu.segment_pool_backward(grad, x, logits, out, lse, ptr, ptr)]

    shapes = [(300, 20), (64, 900), (200000, 1)]
    tensors = [torch.randn(s, generator=g) for s in shapes]
    plan, scale = torch.tensor(shapes), torch.rand(3, generator=g) + 0.5
    values = cpu.gather_chunks(tensors, scale, plan, dtype)
    grads, scale_grad = cpu.gather_chunks_backward(torch.ones_like(values), values, tensors, scale, plan)
    return [*results, values, *grads, scale_grad]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_same_bits_for_any_number_of_threads(dtype):
    with torch_threads(1):
        want = all_results(0, dtype)
    for count in (2, 3, 8):
        with torch_threads(count):
            assert all(torch.equal(a, b) for a, b in zip(all_results(0, dtype), want, strict=True))


def test_two_runs_give_the_same_bits():
    for a, b in zip(all_results(1, torch.float32), all_results(1, torch.float32), strict=True):
        assert torch.equal(a, b)


@pytest.mark.slow
def test_several_python_threads_at_once():
    with torch_threads(2):
        want = [all_results(seed, torch.float32) for seed in range(4)]
        got: list[list[torch.Tensor] | None] = [None] * 4
        failures: list[BaseException] = []

        def work(seed: int) -> None:
            try:
                for _ in range(2):
                    got[seed] = all_results(seed, torch.float32)
            except BaseException as error:  # shown by the assertion below
                failures.append(error)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failures
    for a, b in zip(got, want, strict=True):
        assert a is not None and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_chunks_do_not_depend_on_their_neighbours_in_the_batch():
    """The same chunk in other company: equal up to rounding, whatever tile it lands in."""
    args = cast(chunk_encode_case(64, 4, [32, 7, 32, 1, 20, 32]), torch.float32)
    together = cpu.chunk_encode(*args)
    ptr = args[1]
    owner = torch.repeat_interleave(torch.arange(len(args[2]) - 1), args[2].diff())
    for t in range(6):
        values, one = args[0][ptr[t] : ptr[t + 1]], torch.tensor([0, int(ptr[t + 1] - ptr[t])])
        alone = cpu.chunk_encode(
            values, one, torch.tensor([0, 1]), one, torch.tensor([0, 1]), args[5][owner[t]][None], *args[6:]
        )
        torch.testing.assert_close(alone[0], together[t], rtol=1e-5, atol=1e-5)

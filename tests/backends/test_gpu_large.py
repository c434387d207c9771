"""The backends for a GPU on tensors of more than 2^31 values: offsets that do not fit 32 bits."""

from __future__ import annotations

import pytest
import torch

import sne_fast
from helpers.errors import relative_error
from helpers.op_cases import pointer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

GPU, HALF, BRAIN = torch.device("cuda"), torch.float16, torch.bfloat16


@pytest.fixture(autouse=True)
def every_backend(gpu_backend: str) -> None:
    """Each test with each of them."""


def need_memory(gigabytes: int) -> None:
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < gigabytes << 30:
        pytest.skip(f"needs {gigabytes} GB of free GPU memory")


def test_gathering_more_than_2_to_31_values() -> None:
    need_memory(24)
    rows = (1 << 30) + 100
    tensors = [torch.empty(rows, 2, dtype=HALF, device=GPU).uniform_(), torch.randn(1000, 1, device=GPU)]
    plan, scale = torch.tensor([[rows, 2], [1000, 1]]), torch.tensor([2.0, 4.0], device=GPU)
    values = torch.ops.sne_fast.gather_chunks(tensors, scale, plan, HALF)
    at = torch.randint(rows, (10000,), device=GPU)
    at[:2] = torch.tensor([0, rows - 1], device=GPU)
    for k in (0, 1):
        torch.testing.assert_close(values[k * rows + at], tensors[0][at, k] / 2)
    torch.testing.assert_close(values[2 * rows :], (tensors[1][:, 0] / 4).half())
    grads, _ = torch.ops.sne_fast.gather_chunks_backward(values, values, tensors, scale, plan)
    torch.testing.assert_close(grads[0][at, 1], values[rows + at] / 2)
    torch.testing.assert_close(grads[1][:, 0], values[2 * rows :].float() / 4)


def test_pooling_more_than_2_to_31_values() -> None:
    need_memory(24)
    lengths = [1 << 25, 40000, 3]
    ptr = pointer(lengths)
    rows, last = sum(lengths), slice(-3, None)
    x, logits = torch.empty(rows, 64, dtype=HALF, device=GPU).uniform_(), torch.randn(rows, 1, device=GPU).half()
    out, lse = torch.ops.sne_fast.segment_pool(x, logits, ptr.to(GPU), ptr)
    weights = torch.softmax(logits[last].float(), 0)
    torch.testing.assert_close(out[2], (weights.T @ x[last].float()).half(), rtol=2e-3, atol=2e-3)
    assert abs(float(out[0].float().mean()) - 0.5) < 1e-2
    grad = torch.ones_like(out)
    grad_x, _ = torch.ops.sne_fast.segment_pool_backward(grad, x, logits, out, lse, ptr.to(GPU), ptr)
    torch.testing.assert_close(grad_x[last], weights.expand(3, 64).half(), rtol=2e-3, atol=2e-3)


def test_attention_over_more_than_2_to_31_values() -> None:
    need_memory(48)
    sets, keys = (1 << 13) + 10, 4096
    q_ptr, k_ptr = pointer([4] * sets), pointer([keys] * sets)
    q = torch.randn(4 * sets, 64, device=GPU).to(BRAIN)
    k, v = (torch.empty(keys * sets, 64, dtype=BRAIN, device=GPU).normal_() for _ in range(2))
    pointers = (q_ptr.to(GPU), k_ptr.to(GPU), q_ptr, k_ptr)
    out, lse = torch.ops.sne_fast.set_attention(q, k, v, *pointers, 4)
    grads = torch.ops.sne_fast.set_attention_backward(out, q, k, v, out, lse, *pointers, 4)
    few = (pointer([4]), pointer([keys]))
    few = (few[0].to(GPU), few[1].to(GPU), *few)
    part = (q[-4:].double(), k[-keys:].double(), v[-keys:].double())
    with sne_fast.use_backend("reference"):
        want, want_lse = torch.ops.sne_fast.set_attention(*part, *few, 4)
        want_grads = torch.ops.sne_fast.set_attention_backward(
            out[-4:].double(), *part, want, want_lse, *few, 4
        )  # fmt: skip
    assert relative_error(out[-4:], want) < 3e-2 and relative_error(lse[-4:], want_lse) < 1e-3
    for got, wanted, rows in zip(grads, want_grads, (4, keys, keys), strict=True):
        assert relative_error(got[-rows:], wanted) < 0.1

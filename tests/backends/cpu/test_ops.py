"""The CPU backend against the float64 reference: every op, every gradient, every instruction set this machine runs."""

from __future__ import annotations

import re
from contextlib import AbstractContextManager

import pytest
import torch

import sne_fast
from helpers.cpu_cases import ISAS, NEEDS_BACKEND, cast, chunk_encode_case
from helpers.errors import relative_error
from helpers.op_cases import GRADED_NAMES, pointer
from sne_fast import reference
from sne_fast.backends.cpu import backend as cpu
from sne_fast.backends.cpu import library

pytestmark = pytest.mark.skipif(bool(library.reasons()), reason=NEEDS_BACKEND)
# dtype, largest relative error of results, of gradients.
PRECISIONS = [(torch.float32, 2e-5, 1e-4), (torch.float64, 1e-11, 1e-11)]

LENGTHS = {
    "full": [32] * 9,
    "edges": [1, 2, 31, 32, 32, 1, 1, 2, 31],
    "short": [1] * 70 + [3] * 20 + [7] * 5,
    "mixed": [32] * 7 + [1, 2, 31, 5, 17, 16, 48, 1, 32],
    "long": [100, 90, 3, 256, 48, 64, 1],
    "one": [1],
    "none": [],
}


@pytest.fixture(params=ISAS)
def isa(request):
    with library.use_isa(request.param):
        yield request.param


def compare_chunk_encode(args64, tolerance=PRECISIONS):
    want = reference.chunk_encode(*args64)
    grad = torch.randn(want.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    want_grads = reference.chunk_encode_backward(grad, *args64)
    for dtype, forward, backward in tolerance:
        args = cast(args64, dtype)
        got = cpu.chunk_encode(*args)
        assert got.dtype == dtype and relative_error(got, want) < forward
        for name, a, b in zip(GRADED_NAMES, cpu.chunk_encode_backward(grad.to(dtype), *args), want_grads, strict=True):
            assert a.shape == b.shape and a.dtype == dtype, name
            assert relative_error(a, b) < backward, (name, dtype)


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_chunk_encode_lengths(isa, lengths):
    compare_chunk_encode(chunk_encode_case(64, 4, lengths))


@pytest.mark.parametrize(("h", "heads"), [(32, 1), (32, 4), (64, 1), (64, 8), (128, 2), (128, 16), (256, 4), (256, 32)])
def test_chunk_encode_widths_and_heads(isa, h, heads):
    compare_chunk_encode(chunk_encode_case(h, heads, [20, 1, 32, 32, 33]))


@pytest.mark.parametrize("lengths", [[32] * 3, [1, 2, 31, 40]])
def test_chunk_encode_without_layer_norm(isa, lengths):
    # Unnormalised activations grow from block to block, and so does what float32 loses.
    compare_chunk_encode(
        chunk_encode_case(64, 4, lengths, layer_norm=False), [(torch.float32, 2e-5, 1e-3), PRECISIONS[1]]
    )


def test_chunk_encode_unused_code_rows_and_tensors_without_chunks(isa):
    args = list(chunk_encode_case(32, 2, [5, 9, 9], rows=40))
    args[2] = args[4] = torch.tensor([0, 0, 2, 2, 3])
    args[5] = torch.randn(4, 32, dtype=torch.float64)
    compare_chunk_encode(tuple(args))
    grads = cpu.chunk_encode_backward(torch.ones(3, 2, 32, dtype=torch.float64), *args)
    assert torch.count_nonzero(grads[1][[0, 2]]) == 0 and torch.count_nonzero(grads[2][9:]) == 0


def test_chunk_encode_gradcheck(isa):
    args = chunk_encode_case(32, 2, [1, 3, 2], rows=3)
    grad = torch.randn(3, 2, 32, dtype=torch.float64)
    grads = cpu.chunk_encode_backward(grad, *args)
    places = [0, *range(5, 15)]
    g = torch.Generator().manual_seed(0)
    for name, place, gradient in zip(GRADED_NAMES, places, grads, strict=True):
        direction = torch.randn(args[place].shape, generator=g, dtype=torch.float64)
        step = 1e-6

        def along(t, place=place, direction=direction):
            moved = [a + t * direction if i == place else a for i, a in enumerate(args)]
            return float((cpu.chunk_encode(*moved) * grad).sum())

        numeric = (along(step) - along(-step)) / (2 * step)
        assert numeric == pytest.approx(float((gradient * direction).sum()), rel=1e-6, abs=1e-7), name


def test_chunk_encode_extreme_values(isa):
    """Logits of a million on both sides: the softmax must not overflow, and gradients stay those of the reference."""
    args = list(chunk_encode_case(64, 4, [32, 17, 2]))
    args[0] = args[0] * torch.tensor([1e3, 1e-4, 1.0], dtype=torch.float64).repeat(17)
    compare_chunk_encode(tuple(args), [(torch.float64, 1e-9, 1e-7)])
    single = cast(args, torch.float32)
    out = cpu.chunk_encode(*single)
    assert out.isfinite().all()
    assert all(g.isfinite().all() for g in cpu.chunk_encode_backward(torch.ones_like(out), *single))


@pytest.mark.parametrize("size", [1e2, 1e3, 1e5, 1e6])
@pytest.mark.parametrize("lengths", [[32] * 4, [20, 1, 33, 7]], ids=["full", "ragged"])
def test_chunk_encode_saturated_softmax_in_float32(isa, size, lengths):
    """Block 0's softmax on large weights: float32 loses no more than the reference does in float32."""
    args = list(chunk_encode_case(32, 4, lengths))
    args[0] = args[0] * size
    args = cast(args, torch.float32)
    grad = torch.randn(len(lengths), 4, 32, generator=torch.Generator().manual_seed(5))

    def results(backend, *inputs):
        return backend.chunk_encode(*inputs[1:]), *backend.chunk_encode_backward(*inputs)

    exact = results(reference, *cast((grad, *args), torch.float64))
    single, got = results(reference, grad, *args), results(cpu, grad, *args)
    for name, a, b, want in zip(("out", *GRADED_NAMES), got, single, exact, strict=True):
        # The gradient of logit vanishes, down to exact zeros.
        small = float(want.norm()) < 1e-6
        lost, allowed = (float((t.double() - want).norm()) if small else relative_error(t, want) for t in (a, b))
        assert lost < 2 * allowed + (1e-12 if small else 2e-6), (name, lost, allowed)


def test_chunk_encode_huge_logits_do_not_wrap(isa):
    torch.manual_seed(0)
    encoder = sne_fast.SNE(hidden_dim=32, scale="none")
    network = torch.nn.Linear(33, 20, bias=False)
    network.weight.data = torch.randn(20, 33) * 4e4
    with torch.no_grad():
        with sne_fast.use_backend("cpu"):
            got = encoder([network])
        with sne_fast.use_backend("reference"):
            want = encoder.double()([network.double()])
    assert relative_error(got, want) < 2e-5


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("layer_norm", [True, False])
def test_chunk_encode_overflow_stays_in_its_chunk(isa, value, layer_norm):
    args = list(cast(chunk_encode_case(64, 4, [5, 5, 32, 32, 3], layer_norm=layer_norm), torch.float32))
    want = cpu.chunk_encode(*args)
    args[0][6], args[0][12] = value, value
    out = cpu.chunk_encode(*args)
    assert not out[1].isfinite().all() and not out[2].isfinite().all()
    torch.testing.assert_close(out[[0, 3, 4]], want[[0, 3, 4]], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("h", "heads", "queries", "keys"),
    [
        (64, 4, [1, 3, 17, 40, 100, 700, 0, 5], [2, 3, 17, 0, 100, 700, 4, 65]),
        (32, 4, [64] * 3, [64, 63, 1]),
        (256, 4, [5], [300]),
        (128, 16, [33, 16], [33, 16]),
        (64, 8, [], []),
        (32, 1, [0, 0], [0, 3]),
    ],
)
def test_set_attention(isa, h, heads, queries, keys):
    g = torch.Generator().manual_seed(7)
    q, k, v = (2 * torch.randn(sum(n), h, generator=g, dtype=torch.float64) for n in (queries, keys, keys))
    ptrs = (pointer(queries), pointer(keys)) * 2
    out, lse = reference.set_attention(q, k, v, *ptrs, heads)
    grad = torch.randn(out.shape, generator=g, dtype=torch.float64)
    grads = reference.set_attention_backward(grad, q, k, v, out, lse, *ptrs, heads)
    finite = lse.isfinite()
    for dtype, forward, backward in PRECISIONS:
        inputs = cast((q, k, v), dtype)
        got, got_lse = cpu.set_attention(*inputs, *ptrs, heads)
        assert relative_error(got, out) < forward
        assert torch.equal(got_lse.isfinite(), finite) and relative_error(got_lse[finite], lse[finite]) < forward
        for a, b in zip(
            cpu.set_attention_backward(grad.to(dtype), *inputs, got, got_lse, *ptrs, heads), grads, strict=True
        ):
            assert a.shape == b.shape and relative_error(a, b) < backward


@pytest.mark.parametrize(
    ("h", "heads", "lengths"),
    [(64, 4, [1, 2, 0, 70, 5000, 3]), (32, 1, [9]), (256, 7, [9, 2049]), (48, 3, [5, 6]), (64, 4, []), (64, 2, [0])],
)
def test_segment_pool(isa, h, heads, lengths):
    g = torch.Generator().manual_seed(8)
    x = torch.randn(sum(lengths), h, generator=g, dtype=torch.float64)
    logits = 3 * torch.randn(sum(lengths), heads, generator=g, dtype=torch.float64)
    ptr = pointer(lengths)
    out, lse = reference.segment_pool(x, logits, ptr, ptr)
    grad = torch.randn(out.shape, generator=g, dtype=torch.float64)
    grads = reference.segment_pool_backward(grad, x, logits, out, lse, ptr, ptr)
    finite = lse.isfinite()
    for dtype, forward, backward in PRECISIONS:
        inputs = cast((x, logits), dtype)
        got, got_lse = cpu.segment_pool(*inputs, ptr, ptr)
        assert relative_error(got, out) < forward
        assert torch.equal(got_lse.isfinite(), finite) and relative_error(got_lse[finite], lse[finite]) < forward
        for a, b in zip(cpu.segment_pool_backward(grad.to(dtype), *inputs, got, got_lse, ptr, ptr), grads, strict=True):
            assert a.shape == b.shape and relative_error(a, b) < backward


def test_rows_masked_by_their_logit_have_no_weight(isa):
    g = torch.Generator().manual_seed(3)
    x, logits, ptr = torch.randn(5000, 32, generator=g), torch.randn(5000, 2, generator=g), pointer([10, 4990])
    logits[4:9], logits[20:4500] = float("-inf"), float("-inf")  # whole pieces of the long segment among them
    kept = logits[:, 0].isfinite()
    few = pointer([5, 510])
    want, want_lse = cpu.segment_pool(x[kept], logits[kept], few, few)
    x[~kept] = 1e32
    out, lse = cpu.segment_pool(x, logits, ptr, ptr)
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(lse, want_lse)
    grads = cpu.segment_pool_backward(torch.ones_like(out), x, logits, out, lse, ptr, ptr)
    assert all(t.isfinite().all() and torch.count_nonzero(t[~kept]) == 0 for t in grads)

    q, k, v = (torch.randn(n, 32, generator=g) for n in (70, 200, 200))
    q[:, 0], k[:, 0], k[5:140, 0] = 1.0, 0.0, -1e32
    v[5:140] = 1e32
    seen = torch.cat([torch.arange(5), torch.arange(140, 200)])
    rows, all_keys, few = pointer([70]), pointer([200]), pointer([65])
    got, got_lse = cpu.set_attention(q, k, v, rows, all_keys, rows, all_keys, 1)
    want, want_lse = cpu.set_attention(q, k[seen], v[seen], rows, few, rows, few, 1)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(got_lse, want_lse)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_gather_chunks(dtype):
    g = torch.Generator().manual_seed(9)
    shapes = [(7, 9), (130, 33), (5, 1), (40, 40), (300, 1), (3, 70000)]
    types = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float32, torch.float32]
    tensors = [torch.randn(s, generator=g).to(t) for s, t in zip(shapes, types, strict=True)]
    tensors[2][0], tensors[2][1], tensors[2][2] = 3e-7, float("inf"), -0.0  # a subnormal half among them
    plan, scale = torch.tensor(shapes), torch.rand(6, generator=g) + 0.5
    values = cpu.gather_chunks(tensors, scale, plan, dtype)
    assert torch.equal(values, reference.gather_chunks(tensors, scale, plan, dtype))
    tensors[2][1] = 1.0
    values = cpu.gather_chunks(tensors, scale, plan, dtype)
    grad = torch.randn(values.shape, generator=g).to(dtype)
    grads, scale_grad = cpu.gather_chunks_backward(grad, values, tensors, scale, plan)
    want, want_scale = reference.gather_chunks_backward(grad, values, tensors, scale, plan)
    for a, b in zip(grads, want, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(scale_grad, want_scale, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_lose_no_more_than_rounding(dtype):
    args = cast(chunk_encode_case(64, 4, [32, 5, 17]), dtype)
    got = cpu.chunk_encode(*args)
    assert got.dtype == dtype
    want = reference.chunk_encode(*cast(args, torch.float64))
    assert relative_error(got, want) < 1.1 * torch.finfo(dtype).eps
    grads = cpu.chunk_encode_backward(torch.ones_like(got), *args)
    assert all(g.dtype == dtype and g.isfinite().all() for g in grads)


def test_non_contiguous_inputs():
    args = cast(chunk_encode_case(64, 4, [32, 5, 17]), torch.float32)
    strided = tuple(torch.stack([a, a], -1)[..., 0] for a in args)
    assert not strided[9].is_contiguous()
    assert torch.equal(cpu.chunk_encode(*strided), cpu.chunk_encode(*args))
    grad = torch.randn(64, 4, 3).permute(2, 1, 0)
    for a, b in zip(
        cpu.chunk_encode_backward(grad, *strided), cpu.chunk_encode_backward(grad.contiguous(), *args), strict=True
    ):
        assert torch.equal(a, b)


def test_encoder_with_both_backends_agrees():
    torch.manual_seed(0)
    networks = [
        torch.nn.Sequential(torch.nn.Conv2d(1, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.Linear(30, 11)),
        torch.nn.TransformerEncoderLayer(16, 2, 32),
        torch.nn.Linear(1, 1),
    ]
    encoder = sne_fast.SNE(hidden_dim=64, num_heads=4).double()
    results = {}
    for name in ("cpu", "reference"):
        encoder.zero_grad()
        with sne_fast.use_backend(name):
            z = encoder(encoder.pack(networks, dtype=torch.float64))
            z.square().sum().backward()
        results[name] = [z.detach(), *(p.grad for p in encoder.parameters())]
    for a, b in zip(results["cpu"], results["reference"], strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            # Zero biases and one-element chunks put norms at their eps: gradients near 1e4, and as much less exact.
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-8 * float(b.abs().max()) + 1e-12)


def refused(message: str) -> AbstractContextManager[object]:
    return pytest.raises(ValueError, match=re.escape(message))


@pytest.mark.parametrize("place", [0, 5, 6, 7, 8, 9, 10, 11, 12, 13])
def test_chunk_encode_refuses_wrong_shapes(place):
    args = list(cast(chunk_encode_case(32, 4, [5, 9, 9]), torch.float32))
    grad = torch.randn(3, 4, 32)
    with refused("chunk_encode_backward: grad must have shape (3, 4, 32), got float32 (2, 4, 32) on cpu"):
        cpu.chunk_encode_backward(grad[:2], *args)
    with pytest.raises(TypeError, match=r"chunk_encode: .* must have the dtype and device of values .float.*, got flo"):
        cpu.chunk_encode(*args[:place], args[place].half(), *args[place + 1 :])
    args[place] = args[place][..., :-1]
    name = GRADED_NAMES[max(0, place - 4)]
    message = f"chunk_encode: {name} must have shape .*, got "
    if place == 0:
        message = "chunk_ptr_host must start at 0, .* end at the number of rows, 22"
    with pytest.raises(Exception, match=message):
        cpu.chunk_encode(*args)


def test_other_ops_refuse_wrong_shapes():
    x, lse, ptr = torch.randn(6, 32), torch.randn(6, 4), pointer([2, 4])
    ptrs = (ptr, ptr, ptr, ptr)
    for bad in (x[:5], x[:, :31]):
        with refused("set_attention: v must have shape that of k, (6, 32), got float32 "):
            cpu.set_attention(x, x, bad, *ptrs, 4)
        for place, name in ((0, "grad"), (4, "out")):
            inputs = [x] * 5
            inputs[place] = bad
            with refused(f"set_attention_backward: {name} must have shape (6, 32), got float32 "):
                cpu.set_attention_backward(*inputs, lse, *ptrs, 4)
    with refused("lse must have shape (6, 4), got float32 (6, 3) on cpu"):
        cpu.set_attention_backward(x, x, x, x, x, lse[:, :3], *ptrs, 4)
    with refused("set_attention_backward: grad must be on cpu beside the inputs, got float32 (6, 32) on meta"):
        cpu.set_attention_backward(x.to("meta"), x, x, x, x, lse, *ptrs, 4)
    with refused("k_ptr_host must be a CPU copy of k_ptr (int64 (3,) on cpu), got int64 (2,) on cpu"):
        cpu.set_attention(x, x, x, ptr, ptr, ptr, ptr[:2], 4)
    with refused("q_ptr_host must be a CPU copy of q_ptr (int64 (3,) on cpu), got int32 (3,) on cpu"):
        cpu.set_attention(x, x, x, ptr, ptr, ptr.int(), ptr, 4)
    with refused("segment_pool: logits must have shape (rows, A) with rows = 6, got float32 (5, 4) on cpu"):
        cpu.segment_pool(x, lse[:5], ptr, ptr)
    out, out_lse = cpu.segment_pool(x, lse, ptr, ptr)
    with refused("segment_pool_backward: grad must have shape (2, 4, 32), got float32 (1, 4, 32) on cpu"):
        cpu.segment_pool_backward(out[:1], x, lse, out, out_lse, ptr, ptr)
    scale, plan = torch.ones(1), torch.tensor([[6, 33]])
    with refused("gather_chunks: tensors[0] must be floating with plan[0] = 6 x 33 elements, got float32 (6, 32)"):
        cpu.gather_chunks([x], scale, plan, torch.float32)


def test_compiled_calls_are_checked_by_the_backend():
    args = list(cast(chunk_encode_case(32, 4, [5, 9, 9, 3], tensors=4), torch.float32))
    assert args[5].shape == (4, 32)
    encode = torch.compile(sne_fast.functional.chunk_encode, backend="eager")
    attend = torch.compile(sne_fast.functional.set_attention, backend="eager")
    x, ptr = torch.randn(6, 32), pointer([2, 4])

    def call(row_code):
        named = dict(zip(GRADED_NAMES[2:], args[6:], strict=True))
        return encode(args[0], args[1], args[2], row_code=row_code, **named)

    with sne_fast.use_backend("cpu"):
        assert call(args[5]).shape == (4, 4, 32) and attend(x, x, x, ptr, ptr, num_heads=4).shape == (6, 32)
        with refused("chunk_encode: row_code must have shape (T, h) with T = 4, H = 4, h = 32, got float32 (1, 32)"):
            call(args[5][:1])
        with refused("set_attention: v must have shape that of k, (6, 32), got float32 (4, 32) on cpu"):
            attend(x, x, x[:4], ptr, ptr, num_heads=4)

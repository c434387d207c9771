"""Ops on a GPU against the limits of the hardware.

`set_attention` is measured beside PyTorch's own ragged attention, `feed_forward` beside the torch operations it fuses.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.batch import WeightBatch
from ..nn.blocks import MAB
from ..ops import functional
from ..ops.dispatch import use_backend
from ..ops.pointer_facts import owners
from ..ops.precision import product_precision
from ..ops.schema import BLOCK_PARAMETERS, DIFFERENTIABLE_OPS
from .cases import CASES
from .checks import LOSS_RATIO, CheckFailed, relative_error
from .gpu_limits import median_seconds
from .limits import FORWARDS_PER_STEP, chunk_operations
from .networks import BottleneckResNet

Row = dict[str, Any]
MEASURED_OPS = tuple(op for op in DIFFERENTIABLE_OPS if op not in ("pool_block", "add_codes"))
"""Ops that both GPU backends have kernels for, and ``feed_forward``, each with a function of its name here."""
WIDTH = 64
HALF_TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 2e-3}  # float32 products may be tf32


def _shape(backend: str, dtype: torch.dtype, width: int, heads: int, length: float, rows: int) -> Row:
    """Return the fields of a row that say what was measured; ``length`` is the mean length of a set."""
    return {"backend": backend, "dtype": str(dtype), "products": product_precision(dtype), "width": width,
            "heads": heads, "length": length, "rows": rows}  # fmt: skip


def shape_of(row: Row) -> tuple[Any, ...]:
    """Return what two backends' rows of the same work have in common."""
    return tuple(row.get(key) for key in ("op", "dtype", "products", "width", "heads", "length", "rows"))


def _agree(what: str, actual: Tensor, expected: Tensor, dtype: torch.dtype) -> float:
    error = relative_error(actual, expected)
    if not error <= HALF_TOLERANCE[dtype]:
        raise CheckFailed(f"{what} in {dtype}: off by {error:.1e} from the reference; its speed is not reported")
    return error


def _fraction(rate: float, limit: float | None) -> float | None:
    """Return the share of a limit of the device that a rate is, None where the limit could not be measured."""
    return None if limit is None else rate / limit


def _random(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=device).to(dtype)


def _both(
    forward: Callable[[], Tensor], inputs: list[Tensor], device: torch.device, backend: str
) -> tuple[float, float]:
    """Return the seconds of the forward without gradients, and of forward and backward, both on ``backend``."""
    with use_backend(backend):  # around the step as a whole: a backward runs on the backend chosen at that moment
        with torch.no_grad():
            alone = median_seconds(forward, device)
        for tensor in inputs:
            tensor.requires_grad_()
        direction = torch.randn_like(forward())

        def step() -> None:
            torch.autograd.grad(forward(), inputs, direction)

        return alone, median_seconds(step, device)


# ------------------------------------------------------------------------------------------------------- chunk_encode


def zoo_batch(weights: int, device: torch.device) -> WeightBatch:
    """Pack CNNs of 4,970 weights, as in the case `zoo`, about `weights` in all."""
    case = CASES["zoo"]
    some = case.batch(case.encoder(), "full" if weights > 1_000_000 else "tiny")
    return WeightBatch.cat([some] * max(1, round(weights / some.num_weights))).to(device)


def chunk_encode(
    device: torch.device, dtype: torch.dtype, weights: int, product_rate: float | None, backend: str
) -> Iterator[Row]:
    """Measure weights per second of the chunk stage, h = 64, 4 heads, chunks of 32, forward and training step."""
    encoder = CASES["zoo"].encoder().to(device)
    stage, heads = encoder.chunk_encoder, int(encoder.config["num_heads"])
    assert stage is not None
    batch = zoo_batch(weights, device)
    small = batch[:2]

    def run(part: WeightBatch, name: str) -> Tensor:
        code = _random((len(part.tensor_type), WIDTH), device, torch.float32, 4)
        half = nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype=dtype)
        with use_backend(name), half:
            return stage.pooled_rows(part, code)

    with torch.no_grad():
        error = _agree("chunk_encode", run(small, backend), run(small, "reference"), dtype)
    forward, step = _both(lambda: run(batch, backend), [stage.code_gain], device, backend)
    operations = chunk_operations(batch, WIDTH)
    chunks = batch.chunk_ptr.shape[0] - 1
    yield {
        "op": "chunk_encode", **_shape(backend, dtype, WIDTH, heads, batch.num_weights / chunks, batch.num_weights),
        "weights": batch.num_weights, "error": error,
        "forward_seconds": forward, "step_seconds": step,
        "forward_weights_per_second": batch.num_weights / forward, "step_weights_per_second": batch.num_weights / step,
        "forward_fraction_of_products": _fraction(operations / forward, product_rate),
        "step_fraction_of_products": _fraction(FORWARDS_PER_STEP * operations / step, product_rate),
    }  # fmt: skip


# ------------------------------------------------------------------------------------------- set_attention, set_block


def _sets(rows: int, longest: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return lengths of sets of 1 to `longest` rows, about `rows` in all, their pointer, and that of a few of them."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, longest + 1, (max(1, 2 * rows // (longest + 1)),), generator=generator)
    ptr = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    few = int(torch.searchsorted(ptr, min(int(ptr[-1]), 4096), right=True)) - 1
    return lengths, ptr, ptr[: max(1, few) + 1]


def _attention_operations(lengths: Tensor) -> float:
    return 4.0 * WIDTH * float((lengths.double() ** 2).sum())


def _varlen(q: Tensor, k: Tensor, v: Tensor, ptr: Tensor, longest: int, heads: int) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    offsets = ptr.to(torch.int32)
    query, key, value = (t.unflatten(-1, (heads, -1)) for t in (q, k, v))
    out = varlen_attn(query, key, value, offsets, offsets, longest, longest)
    assert isinstance(out, Tensor)
    return out.flatten(1)


def _flex(ptr: Tensor, rows: int, heads: int) -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    owner = owners(ptr, rows)

    def same_set(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return owner[query] == owner[key]

    mask = create_block_mask(same_set, None, None, rows, rows, device=ptr.device, _compile=True)
    compiled = torch.compile(flex_attention)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        query, key, value = (t.unflatten(-1, (heads, -1)).transpose(0, 1)[None] for t in (q, k, v))
        out = compiled(query, key, value, block_mask=mask, scale=1 / math.sqrt(q.shape[1]))
        return out[0].transpose(0, 1).flatten(1)

    return run


def set_attention(
    device: torch.device,
    dtype: torch.dtype,
    rows: int,
    longest: int,
    heads: int,
    product_rate: float | None,
    backend: str,
    rivals: bool = False,
) -> Iterator[Row]:
    """Measure self attention in sets of 1 to `longest` rows, h = 64: ours or, as `rivals`, those of PyTorch.

    Those are `varlen_attn` and FlexAttention, on a GPU only; `backend` is then what they must agree with.
    """
    lengths, host, head = _sets(rows, longest)
    ptr, rows, cut = host.to(device), int(host[-1]), int(head[-1])
    q, k, v = (_random((rows, WIDTH), device, dtype, seed) for seed in range(3))
    operations = _attention_operations(lengths)

    def ours(q: Tensor, k: Tensor, v: Tensor, name: str = backend, at: Tensor = host) -> Tensor:
        on_device = ptr[: at.shape[0]]
        with use_backend(name):
            return functional.set_attention(q, k, v, on_device, on_device, heads, q_ptr_host=at, k_ptr_host=at)

    with torch.no_grad():
        part = q[:cut], k[:cut], v[:cut]
        error = _agree("set_attention", ours(*part, at=head), ours(*part, name="reference", at=head), dtype)
        expected = ours(q, k, v)
    row = {"op": "set_attention", "dtype": str(dtype), "rows": rows, "longest": longest, "head_width": WIDTH // heads}
    own = _shape(backend, dtype, WIDTH, heads, rows / len(lengths), rows)

    def measured(name: str, run: Callable[..., Tensor], queries: Tensor = q) -> Row:
        inputs = [queries, k, v]
        with torch.no_grad():
            off = relative_error(run(*inputs), expected)
        if not off <= LOSS_RATIO * HALF_TOLERANCE[dtype]:
            raise CheckFailed(f"set_attention and {name} differ by {off:.1e}; nothing is reported")
        forward, step = _both(lambda: run(*inputs), inputs, device, backend)
        return {
            **row, "by": name, "error": error, "forward_seconds": forward, "step_seconds": step,
            "forward_fraction_of_products": _fraction(operations / forward, product_rate),
        }  # fmt: skip

    if not rivals:
        yield {**measured("sne_fast", ours), **own}
        return
    if device.type != "cuda":
        return
    others: dict[str, Callable[[], Row]] = {}
    if dtype != torch.float32:
        # Its scale is 1/sqrt(d), ours 1/sqrt(h): its queries come in scaled by the difference.
        scaled = q.detach() / math.sqrt(heads)
        others["torch.nn.attention.varlen"] = lambda: measured(
            "torch.nn.attention.varlen", lambda q, k, v: _varlen(q, k, v, ptr, longest, heads), scaled
        )
    others["FlexAttention"] = lambda: measured("FlexAttention", _flex(ptr, rows, heads))
    for name, measure in others.items():
        try:
            yield measure()
        except Exception as error_of_rival:  # a rival that fails is reported, not hidden
            yield {**row, "by": name, "skipped": f"{type(error_of_rival).__name__}: {str(error_of_rival)[:200]}"}


def set_block(
    device: torch.device,
    dtype: torch.dtype,
    rows: int,
    longest: int,
    heads: int,
    product_rate: float | None,
    backend: str,
) -> Iterator[Row]:
    """Measure whole attention blocks with layer norm, h = 64, of sets of 1 to `longest` rows."""
    torch.manual_seed(0)
    mab = MAB(WIDTH, WIDTH, WIDTH, num_heads=heads, layer_norm=True).to(device, dtype)
    norm = mab.norm_parameters()
    assert norm is not None
    linears = [p for fc in (mab.fc_q, mab.fc_k, mab.fc_v, mab.fc_o) for p in (fc.weight, fc.bias)]
    parameters = {name: t.detach() for name, t in zip(BLOCK_PARAMETERS, (*linears, norm), strict=True)}
    lengths, host, head = _sets(rows, longest)
    ptr, rows = host.to(device), int(host[-1])
    x = _random((rows, WIDTH), device, dtype, 0)

    def run(x: Tensor = x, at: Tensor = host, name: str = backend) -> Tensor:
        on_device = ptr[: at.shape[0]]
        with use_backend(name):
            return functional.set_block(
                x, x, on_device, on_device, **parameters, num_heads=heads, q_ptr_host=at, k_ptr_host=at
            )

    few = x[: int(head[-1])]
    with torch.no_grad():
        error = _agree("set_block", run(few, head), run(few, head, "reference"), dtype)
    forward, step = _both(run, [x, *parameters.values()], device, backend)
    operations = _attention_operations(lengths) + 8.0 * WIDTH**2 * rows
    yield {
        "op": "set_block", **_shape(backend, dtype, WIDTH, heads, rows / len(lengths), rows), "longest": longest,
        "error": error, "forward_seconds": forward, "step_seconds": step,
        "forward_fraction_of_products": _fraction(operations / forward, product_rate),
        "step_fraction_of_products": _fraction(FORWARDS_PER_STEP * operations / step, product_rate),
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------------- feed_forward


def feed_forward(
    device: torch.device, dtype: torch.dtype, rows: int, bandwidth: float | None, backend: str, rivals: bool = False
) -> Iterator[Row]:
    """Measure residual, norms and fc_o of `rows` rows, h = 64: ours or, as `rivals` on a GPU, the operations it fuses.

    The limit is the copy bandwidth: two tensors of rows read and one written, in a step four more.
    """
    mab = MAB(WIDTH, WIDTH, WIDTH, num_heads=1, layer_norm=True).to(device, dtype)
    norm = mab.norm_parameters()
    assert norm is not None
    inputs = [_random((rows, WIDTH), device, dtype, 0), _random((rows, WIDTH), device, dtype, 1)]
    inputs += [t.detach() for t in (mab.fc_o.weight, mab.fc_o.bias, norm)]

    def ours(*args: Tensor, name: str = backend) -> Tensor:
        with use_backend(name):
            return functional.feed_forward(*args)

    def eager(q: Tensor, attended: Tensor, w: Tensor, b: Tensor, norm: Tensor) -> Tensor:
        o = F.layer_norm(q + attended, (WIDTH,), norm[0], norm[1])
        return F.layer_norm(o + F.relu(F.linear(o, w, b)), (WIDTH,), norm[2], norm[3])

    few = [inputs[0][:4096], inputs[1][:4096], *inputs[2:]]
    with torch.no_grad():
        right = ours(*few, name="reference")
    moved = inputs[0].element_size() * rows * WIDTH
    row = {"op": "feed_forward", "dtype": str(dtype), "rows": rows}

    def measured(name: str, run: Callable[..., Tensor], error: float) -> Row:
        forward, step = _both(functools.partial(run, *inputs), inputs, device, backend)
        return {
            **row, "by": name, "error": error, "forward_seconds": forward, "step_seconds": step,
            "forward_fraction_of_copy": _fraction(3 * moved / forward, bandwidth),
            "step_fraction_of_copy": _fraction(7 * moved / step, bandwidth),
        }  # fmt: skip

    if not rivals:
        with torch.no_grad():
            error = _agree("feed_forward", ours(*few), right, dtype)
        yield {**measured("sne_fast", ours, error), **_shape(backend, dtype, WIDTH, 0, 0, rows)}
        return
    if device.type != "cuda":
        return
    for name, run in {"eager": eager, "torch.compile": torch.compile(eager)}.items():
        try:
            with torch.no_grad():
                error = relative_error(run(*few), right)
            yield measured(name, run, error)
        except Exception as error_of_rival:  # a rival that fails is reported, not hidden
            yield {**row, "by": name, "skipped": f"{type(error_of_rival).__name__}: {str(error_of_rival)[:200]}"}


# --------------------------------------------------------------------------------------- segment_pool, gather_chunks


def segment_pool(
    device: torch.device, dtype: torch.dtype, rows: int, length: int, bandwidth: float | None, backend: str
) -> Iterator[Row]:
    """Measure the pooling of segments of `length` rows by four queries, h = 64: share of the copy bandwidth."""
    queries, segments = 4, max(1, rows // length)
    host = torch.arange(segments + 1) * length
    ptr, rows = host.to(device), segments * length
    x, logits = _random((rows, WIDTH), device, dtype, 0), _random((rows, queries), device, dtype, 1)

    def run(count: int = segments, name: str = backend) -> Tensor:
        with use_backend(name):
            end = count * length
            return functional.segment_pool(x[:end], logits[:end], ptr[: count + 1], ptr_host=host[: count + 1])

    few = max(1, min(segments, 4096 // length))
    with torch.no_grad():
        error = _agree("segment_pool", run(few), run(few, "reference"), dtype)
    forward, step = _both(run, [x, logits], device, backend)
    size = x.element_size()
    moved = size * (rows * (WIDTH + queries) + segments * queries * WIDTH)
    yield {
        "op": "segment_pool", **_shape(backend, dtype, WIDTH, queries, length, rows), "error": error,
        "forward_seconds": forward, "step_seconds": step,
        "forward_fraction_of_copy": _fraction(moved / forward, bandwidth),
    }  # fmt: skip


def gather_chunks(
    device: torch.device, dtype: torch.dtype, copies: int, bandwidth: float | None, backend: str
) -> Iterator[Row]:
    """Measure ResNet-50's float32 tensors, several copies, put in chunk order: share of the copy bandwidth.

    Without a copy, the tensors of a much smaller one.
    """
    network = BottleneckResNet() if copies else BottleneckResNet((8, 16), (1, 1), 10)
    tensors = [p.detach().to(device) for p in network.parameters()]
    tensors += [t.clone() for _ in range(copies - 1) for t in tensors]
    plan = torch.tensor([[math.prod(t.shape[:2]), math.prod(t.shape[2:])] for t in tensors])
    scale = torch.rand(len(tensors), device=device) + 0.5

    def run(name: str = backend) -> Tensor:
        with use_backend(name):
            return functional.gather_chunks(tensors, scale, plan, dtype)

    with torch.no_grad():
        error = _agree("gather_chunks", run(), run("reference"), dtype)
        forward = median_seconds(run, device)
    count = sum(t.numel() for t in tensors)
    moved = 4 * count + torch.empty(0, dtype=dtype).element_size() * count
    yield {
        "op": "gather_chunks", **_shape(backend, dtype, 0, 0, 0, count), "weights": count, "tensors": len(tensors),
        "error": error,
        "forward_seconds": forward, "forward_fraction_of_copy": _fraction(moved / forward, bandwidth),
    }  # fmt: skip

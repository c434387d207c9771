"""Cases of the backends' self-test, compared with the reference in float64 on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import reference
from .schema import named


@dataclass(frozen=True)
class Variant:
    """The properties of a call that decide which code runs; each variant is tested once."""

    op: str
    dtype: torch.dtype
    width: int = 0
    heads: int = 0
    layer_norm: bool = False

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        norm = " norm" if self.layer_norm else ""
        heads = f" H={self.heads}" if self.heads else ""
        return f"{self.op} {dtype}" + (f" h={self.width}{heads}{norm}" if self.width else "")


@dataclass(frozen=True)
class Comparison:
    """One result or gradient of a backend beside that of the reference."""

    name: str
    got: Tensor
    want: Tensor
    is_gradient: bool


def variant(op: str, args: tuple[Any, ...]) -> Variant:
    """Return the variant of a call with the arguments of the op's schema."""
    forward, given = op.removesuffix("_backward"), named(op, args)
    if forward == "gather_stored":
        return Variant(forward, given["dtype"])
    if forward == "gather_chunks":
        return Variant(forward, given["dtype"] if "dtype" in given else given["values"].dtype)
    if forward == "chunk_encode":
        heads, width = given["pool_query"].shape
        return Variant(forward, given["values"].dtype, width, heads, given["norm"].shape[0] > 0)
    if forward == "set_attention":
        return Variant(forward, given["q"].dtype, given["q"].shape[1], given["num_heads"])
    if forward == "set_block":
        width = given["w_o"].shape[0]
        return Variant(forward, given["q"].dtype, width, given["num_heads"], given["norm"].shape[0] > 0)
    if forward == "pool_block":
        heads, width = given["logits"].shape
        return Variant(forward, given["x"].dtype, width, heads, given["norm"].shape[0] > 0)
    if forward == "add_codes":
        return Variant(forward, args[0].dtype, given["level"].shape[1])
    if forward == "tensor_statistics":
        return Variant(forward, given["values"].dtype)
    if forward == "feed_forward":
        return Variant(forward, given["q"].dtype, given["q"].shape[1], 0, given["norm"].shape[0] > 0)
    return Variant(forward, given["x"].dtype, given["x"].shape[1], given["logits"].shape[1])


class _Draw:
    """Draws random inputs, rounded to the variant's dtype and kept in float64 on the CPU."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.generator = torch.Generator(device="cpu").manual_seed(0)

    def __call__(self, *shape: int, size: float = 1.0, offset: float = 0.0) -> Tensor:
        drawn = torch.randn(shape, generator=self.generator, dtype=torch.float64, device="cpu")
        return (size * drawn + offset).to(self.dtype).double()


def _pointer(*lengths: int) -> Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int64, device="cpu").cumsum(0)


@dataclass(frozen=True)
class _Call:
    """Arguments in schema order; ``host`` holds the indices of those that stay on the CPU."""

    args: tuple[Any, ...]
    host: tuple[int, ...]


def _chunk_encode(case: Variant, draw: _Draw) -> Iterator[_Call]:
    # Inputs and weights are small, because half types lose all of a gradient where softmax saturates, without being
    # wrong. Chunks of up to 64 are included because several backends have separate code for them.
    h, heads = case.width, case.heads
    for lengths, of_tensors, codes in (((32, 7, 32, 1, 2, 20, 32, 32, 32), (4, 0, 5), 32), ((64, 40, 5), (1, 2), 64)):
        chunks, tensors = _pointer(*lengths), _pointer(*of_tensors)
        norm = draw(4 if case.layer_norm else 0, 4, h, size=0.2)
        norm[:, ::2] += 1
        yield _Call(
            (
                draw(sum(lengths), size=0.5), chunks, tensors, chunks, tensors, draw(len(of_tensors), h, size=0.3),
                draw(codes, h, size=0.3), draw(2, heads), draw(3, h, size=0.5),
                draw(3, 3 * h, h, size=0.5 * h**-0.5), draw(3, 3 * h, size=0.1), draw(4, h, h, size=0.5 * h**-0.5),
                draw(4, h, size=0.1), norm.to(case.dtype).double(), draw(heads, h, size=h**-0.5),
            ),
            (3, 4),
        )  # fmt: skip


def _set_attention(case: Variant, draw: _Draw) -> Iterator[_Call]:
    h = case.width
    for queries, keys in (((1, 17, 0, 140), (1, 17, 3, 140)), ((3, 2, 4), (2100, 0, 5))):
        q_ptr, k_ptr = _pointer(*queries), _pointer(*keys)
        rows = (draw(sum(queries), h), draw(sum(keys), h), draw(sum(keys), h))
        yield _Call((*rows, q_ptr, k_ptr, q_ptr, k_ptr, case.heads), (5, 6))


def _segment_pool(case: Variant, draw: _Draw) -> Iterator[_Call]:
    for lengths in ((3, 0, 1, 40), (700, 5, 300)):
        ptr = _pointer(*lengths)
        yield _Call((draw(sum(lengths), case.width), draw(sum(lengths), case.heads), ptr, ptr), (3,))


def _gather_chunks(case: Variant, draw: _Draw) -> Iterator[_Call]:
    plan = torch.tensor([[7, 9], [33, 1], [0, 3], [130, 20], [1, 5]], device="cpu")
    tensors = [draw(rows, positions) for rows, positions in plan.tolist()]
    scale = torch.linspace(0.5, 2, len(tensors), dtype=torch.float32, device="cpu")
    yield _Call((tensors, scale, plan, case.dtype), (2,))


def _feed_forward(case: Variant, draw: _Draw) -> Iterator[_Call]:
    h = case.width
    norm = draw(4 if case.layer_norm else 0, h, size=0.2)
    norm[::2] += 1
    parameters = (draw(h, h, size=h**-0.5), draw(h, size=0.1), norm.to(case.dtype).double())
    # Enough rows for several tiles per program, also on the largest GPUs; then one query for all rows.
    many = (3 << 20 if torch.cuda.is_available() else 1 << 16) // h + 5
    for rows, queries in ((many, many), (70, 1)):
        yield _Call((draw(queries, h).expand(rows, h), draw(rows, h), *parameters), ())


def _set_block(case: Variant, draw: _Draw) -> Iterator[_Call]:
    h = case.width
    for queries, keys, dim_q, dim_k in (((1, 17, 0, 140), (1, 17, 3, 140), h, h), ((3, 2, 4), (300, 0, 5), 16, 32)):
        q_ptr, k_ptr = _pointer(*queries), _pointer(*keys)
        norm = draw(4 if case.layer_norm else 0, h, size=0.2)
        norm[::2] += 1
        linear = [
            part for dim in (dim_q, dim_k, dim_k, h) for part in (draw(h, dim, size=dim**-0.5), draw(h, size=0.1))
        ]
        rows = (draw(sum(queries), dim_q), draw(sum(keys), dim_k))
        norm = norm.to(case.dtype).double()
        yield _Call((*rows, q_ptr, k_ptr, q_ptr, k_ptr, *linear, norm, case.heads), (4, 5))
        if dim_q == h:  # rows that attend to each other
            yield _Call((rows[0], None, q_ptr, q_ptr, q_ptr, q_ptr, *linear, norm, case.heads), (4, 5))


def _pool_block(case: Variant, draw: _Draw) -> Iterator[_Call]:
    h = case.width
    for lengths in ((3, 0, 1, 40, 2, 90), (2, 1, 3) * 30, (1200, 5)):
        ptr, norm = _pointer(*lengths), draw(4 if case.layer_norm else 0, h, size=0.2)
        norm[::2] += 1
        parameters = (
            draw(case.heads, h, size=h**-0.5), draw(h), draw(case.heads, h // case.heads, h, size=h**-0.5),
            draw(h, size=0.1), draw(h, h, size=h**-0.5), draw(h, size=0.1), norm.to(case.dtype).double(),
        )  # fmt: skip
        yield _Call((draw(sum(lengths), h), ptr, ptr, *parameters), (2,))


def _add_codes(case: Variant, draw: _Draw) -> Iterator[_Call]:
    h, lengths = case.width, (3, 0, 1, 40)
    ptr, level, table, scale = (
        _pointer(*lengths),
        draw(len(lengths), h),
        draw(40, h),
        draw(len(lengths), size=0.1, offset=1),
    )
    yield _Call((draw(sum(lengths), h), ptr, ptr, level, table, scale, draw(h), draw()), (2,))
    yield _Call((draw(len(lengths), h), ptr[:0], ptr[:0], level, table[:0], scale[:0], draw(h), draw()), (2,))


def _tensor_statistics(case: Variant, draw: _Draw) -> Iterator[_Call]:
    rows = [
        [12, 7, 9, 63, 12, 1],
        [80, 90, 1, 90, 80, 0],
        [33, 0, 1, 90, 80, 0],
        [1, 0, 1, 1, 1, 0],
        [4, 3, 5, 15, 4, 0],
    ]
    dims = torch.tensor(rows, device="cpu")
    start = _pointer(*(out * max(inn, 1) * kernel for out, inn, kernel, *_ in rows))
    scale = torch.linspace(0.5, 2, len(rows), dtype=torch.float32, device="cpu")
    yield _Call((draw(int(start[-1])), start, scale, dims, start), (3, 4))


def _gather_stored(case: Variant, draw: _Draw) -> Iterator[_Call]:
    table = [[1, 16, 1, 7, 9], [0, 0, 1, 33, 1], [0, 0, 1, 0, 3], [1, 800, 1, 3, 5]]
    scale = torch.linspace(0.5, 2, len(table), dtype=torch.float32, device="cpu")
    yield _Call(([draw(33), draw(120)], torch.tensor(table, device="cpu"), scale, 111, case.dtype), (0, 1, 2))


_CALLS: dict[str, Callable[[Variant, _Draw], Iterator[_Call]]] = {
    "gather_chunks": _gather_chunks,
    "chunk_encode": _chunk_encode,
    "set_attention": _set_attention,
    "segment_pool": _segment_pool,
    "feed_forward": _feed_forward,
    "set_block": _set_block,
    "pool_block": _pool_block,
    "add_codes": _add_codes,
    "tensor_statistics": _tensor_statistics,
    "gather_stored": _gather_stored,
}


def _on(value: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """Return ``value`` on the device, with float64 cast to the variant's dtype."""
    if isinstance(value, list):
        return [_on(v, dtype, device) for v in value]
    if not isinstance(value, Tensor):
        return value
    if value.dim() == 2 and value.shape[0] > 1 and value.stride(0) == 0:  # one row expanded to many stays one
        return _on(value[:1], dtype, device).expand_as(value)
    return value.to(device, dtype if value.dtype == torch.float64 else value.dtype)


def _as_tuple(results: Any) -> tuple[Any, ...]:
    return results if isinstance(results, tuple) else (results,)


def _saved(op: str, args: tuple[Any, ...], results: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the arguments of the backward op after the gradient."""
    if op == "gather_chunks":
        return (results[0], *args[:3])
    if op in ("chunk_encode", "feed_forward", "set_block", "pool_block"):
        return args
    if op == "add_codes":
        return args[1:]
    rows = 3 if op == "set_attention" else 2
    return (*args[:rows], *results, *args[rows:])


def _placed(call: _Call, case: Variant, device: torch.device) -> tuple[Any, ...]:
    return tuple(
        value if place in call.host else _on(value, case.dtype, device) for place, value in enumerate(call.args)
    )


def example(case: Variant, device: torch.device) -> tuple[Any, ...]:
    """Return the arguments of one call of the op, on the device."""
    return _placed(next(_CALLS[case.op](case, _Draw(case.dtype))), case, device)


def comparisons(case: Variant, kernels: Mapping[str, Callable[..., Any]], device: torch.device) -> Iterator[Comparison]:
    """Yield every result and gradient of the op, by ``kernels`` on ``device`` and by the reference."""
    draw, op = _Draw(case.dtype), case.op
    for call in _CALLS[op](case, draw):
        args = _placed(call, case, device)
        exact = call.args
        if op == "gather_chunks":
            exact = (*call.args[:3], torch.float64)
        elif op == "gather_stored":
            exact = (*call.args[:4], torch.float64)
        got, want = _as_tuple(kernels[op](*args)), _as_tuple(getattr(reference, op)(*exact))
        for which, pair in enumerate(zip(got, want, strict=True)):
            yield Comparison(f"result {which}", *pair, is_gradient=False)
        if f"{op}_backward" not in kernels:
            continue
        grad = draw(*want[0].shape)
        got = kernels[f"{op}_backward"](_on(grad, case.dtype, device), *_saved(op, args, got))
        want = getattr(reference, f"{op}_backward")(grad, *_saved(op, exact, want))
        if op == "gather_chunks":
            got, want = (*got[0], got[1]), (*want[0], want[1])
        for which, pair in enumerate(zip(got, want, strict=True)):
            yield Comparison(f"gradient {which}", *pair, is_gradient=True)

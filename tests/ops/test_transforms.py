"""Forward-mode derivatives and `torch.func`: the right numbers, or a refusal that names the op."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import (
    functional_call,
    grad,
    grad_and_value,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    stack_module_state,
    vjp,
    vmap,
)

import sne_fast
from helpers.networks import randomise_
from helpers.op_cases import (
    ChunkCase,
    attention_case,
    block_case,
    feed_forward_case,
    pointer,
    pool_block_case,
    pool_case,
)
from sne_fast import functional as F
from sne_fast.ops import compositions, reference

F64 = torch.float64


def cases() -> dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]]:
    """Return op -> function of its floating inputs, and those; sets without rows among them."""
    values, chunk_ptr, tensor_ptr, *parameters = ChunkCase.make([[3, 2], [1], [3]], 8, 2, 3).args
    q, k, v, q_ptr, k_ptr = attention_case([2, 0, 3, 1], [3, 2, 0, 1], 8)
    x, logits, ptr = pool_case([2, 0, 3], 8, 3)
    rows_q, rows_k, of_q, of_k, *weights = block_case([2, 0, 3, 1], [3, 2, 0, 1])
    of_rows, of_pool, *of_block = pool_block_case([2, 0, 3], 8, 2)
    plan = torch.tensor([[6, 2], [5, 1], [0, 3]])
    tensors = (torch.randn(2, 3, 2, dtype=F64), torch.randn(5, dtype=F64), torch.randn(0, 3, dtype=F64))
    return {
        "chunk_encode": (lambda v, *p: F.chunk_encode(v, chunk_ptr, tensor_ptr, *p), (values, *parameters)),
        "set_attention": (lambda q, k, v: F.set_attention(q, k, v, q_ptr, k_ptr, 2), (q, k, v)),
        "segment_pool": (lambda x, logits: F.segment_pool(x, logits, ptr), (x, logits)),
        "feed_forward": (F.feed_forward, feed_forward_case(5, 8)),
        "set_block": (lambda q, k, *p: F.set_block(q, k, of_q, of_k, *p, 2), (rows_q, rows_k, *weights)),
        "pool_block": (lambda x, *p: F.pool_block(x, of_pool, *p), (of_rows, *of_block)),
        "gather_chunks": (lambda s, *t: F.gather_chunks(t, s, plan, F64), (torch.rand(3, dtype=F64) + 0.5, *tensors)),
    }


ops = pytest.mark.parametrize(
    "op", ["gather_chunks", "chunk_encode", "set_attention", "segment_pool", "feed_forward", "set_block", "pool_block"]
)


def numerical_tangent(function: Callable[..., Tensor], inputs: Any, tangents: Any, step: float = 1e-6) -> Tensor:
    forward, backward = (
        function(*(x + sign * step * t for x, t in zip(inputs, tangents, strict=True))) for sign in (1, -1)
    )
    return (forward - backward).detach() / (2 * step)


def close(got: Tensor, want: Tensor, tolerance: float = 1e-11) -> None:
    got, want = got.detach(), want.detach()
    assert got.shape == want.shape
    torch.testing.assert_close(got, want, rtol=0, atol=tolerance * (1 + float(want.abs().sum())))


def directions(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(torch.randn_like(x) for x in inputs)


@ops
def test_compositions_equal_the_ops(op: str) -> None:
    function, inputs = cases()[op]
    transformed, _ = jvp(function, inputs, directions(inputs))
    close(transformed, function(*inputs))


@ops
def test_jvp_and_dual_tensors_give_the_tangent(op: str) -> None:
    function, inputs = cases()[op]
    tangents = directions(inputs)
    want = numerical_tangent(function, inputs, tangents)
    close(jvp(function, inputs, tangents)[1], want, 1e-7)
    with forward_ad.dual_level():
        out = function(*(forward_ad.make_dual(x, t) for x, t in zip(inputs, tangents, strict=True)))
        close(forward_ad.unpack_dual(out).tangent, want, 1e-7)
        assert forward_ad.unpack_dual(function(*inputs)).tangent is None


@ops
def test_grad_vjp_and_jacobians_of_torch_func_equal_backward(op: str) -> None:
    function, inputs = cases()[op]
    every = tuple(range(len(inputs)))

    def loss(*inputs: Tensor) -> Tensor:
        return function(*inputs).sin().sum()

    leaves = [x.clone().requires_grad_() for x in inputs]
    want = torch.autograd.grad(loss(*leaves), leaves)
    gradients, value = grad_and_value(loss, every)(*inputs)
    close(value, loss(*inputs))
    by_vjp = vjp(loss, *inputs)[1](torch.ones((), dtype=F64))
    for got in (gradients, by_vjp, grad(loss, every)(*inputs), jacrev(loss, every)(*inputs)):
        for g, w in zip(got, want, strict=True):
            close(g, w, 1e-10)
    forward, backward = jacfwd(function, every)(*inputs), jacrev(function, every)(*inputs)
    for g, w in zip(forward, backward, strict=True):
        close(g, w)


@ops
def test_vmap_equals_a_loop_and_so_do_gradients_per_sample(op: str) -> None:
    function, inputs = cases()[op]
    stacked = tuple(torch.stack([x, 1.5 * x]) for x in inputs)
    close(vmap(function)(*stacked), torch.stack([function(*(s[n] for s in stacked)) for n in range(2)]))

    def loss(*inputs: Tensor) -> Tensor:
        return function(*inputs).pow(2).sum()

    got = vmap(grad(loss))(*stacked)
    close(got, torch.stack([grad(loss)(*(s[n] for s in stacked)) for n in range(2)]))


@ops
def test_second_derivatives_of_torch_func_are_right(op: str) -> None:
    function, inputs = cases()[op]

    def loss(x: Tensor) -> Tensor:
        return function(x, *inputs[1:]).sin().sum()

    first = jacrev(loss)
    eye = torch.eye(inputs[0].numel(), dtype=F64).view(-1, *inputs[0].shape)
    columns = [(first(inputs[0] + 1e-5 * e) - first(inputs[0] - 1e-5 * e)) / 2e-5 for e in eye]
    want = torch.stack(columns).movedim(0, -1).reshape(*inputs[0].shape, *inputs[0].shape)
    for second in (hessian(loss), jacrev(jacrev(loss)), jacfwd(jacfwd(loss)), jacrev(jacfwd(loss))):
        close(second(inputs[0]), want, 1e-6)


@ops
def test_a_gradient_of_torch_func_differentiated_by_autograd_is_refused_by_name(op: str) -> None:
    function, inputs = cases()[op]
    x = inputs[0].clone().requires_grad_()
    gradient = grad(lambda x: function(x, *inputs[1:]).pow(2).sum())(x)
    with pytest.raises(RuntimeError, match=f"{op}: double backward is not implemented"):
        gradient.pow(2).sum().backward()


def test_parameters_outside_of_torch_func_get_the_gradient_of_what_was_computed_inside() -> None:
    q, k, v, q_ptr, k_ptr = attention_case([2, 3], [3, 1], 8)
    outer = k.clone().requires_grad_()

    def function(weight: Tensor) -> Tensor:
        return (weight * F.set_attention(q, outer, v, q_ptr, k_ptr, 2)).sum()

    attended = grad(function)(torch.ones_like(q))
    (got,) = torch.autograd.grad(attended.sum(), outer)
    (want,) = torch.autograd.grad(F.set_attention(q, outer, v, q_ptr, k_ptr, 2).sum(), outer)
    close(got, want)


# ------------------------------------------------------------------------------------------------------- whole encoder


@pytest.fixture
def encoder() -> sne_fast.SNE:
    torch.manual_seed(0)
    return randomise_(sne_fast.SNE(hidden_dim=32, chunk_size=8).double(), 1, 0.2)


def network() -> dict[str, Tensor]:
    return {"0.weight": torch.randn(4, 3, dtype=F64), "0.bias": torch.randn(4, dtype=F64)}


@pytest.mark.parametrize("scale", ["tensor", "none"])
def test_tangents_pass_through_pack_and_encoder(encoder: sne_fast.SNE, scale: str) -> None:
    names, tensors = zip(*network().items(), strict=True)
    encoder._config["scale"] = scale

    def function(*tensors: Tensor) -> Tensor:
        return encoder([dict(zip(names, tensors, strict=True))])

    tangents = directions(tensors)
    want = numerical_tangent(function, tensors, tangents)
    close(jvp(function, tensors, tangents)[1], want, 1e-7)
    with forward_ad.dual_level():
        dual = [forward_ad.make_dual(x, t) for x, t in zip(tensors, tangents, strict=True)]
        close(forward_ad.unpack_dual(function(*dual)).tangent, want, 1e-7)
    leaves = [x.clone().requires_grad_() for x in tensors]
    gradients = torch.autograd.grad(function(*leaves).sum(), leaves)
    for g, w in zip(grad(lambda *t: function(*t).sum(), (0, 1))(*tensors), gradients, strict=True):
        close(g, w)

    def loss(bias: Tensor) -> Tensor:
        return function(tensors[0], bias).pow(2).sum()

    second = hessian(loss)(tensors[1])
    close(second, second.T)
    close(jacfwd(jacfwd(loss))(tensors[1]), second)
    stacked = [torch.stack([x, 2 * x]) for x in tensors]
    close(vmap(function)(*stacked), torch.stack([function(*tensors), function(*(2 * x for x in tensors))]))


@pytest.mark.parametrize("damage", [float("nan"), float("inf")])
def test_pack_refuses_values_that_are_not_finite_inside_transforms_too(encoder: sne_fast.SNE, damage: float) -> None:
    broken = network()
    broken["0.bias"][1] = damage
    for transform in (lambda f: grad(f)(broken), lambda f: jvp(f, (broken,), (network(),))):
        with pytest.raises(ValueError, match=r"tensor '0.bias' has . NaN and . inf among 4 values"):
            transform(lambda state: encoder([state]).sum())
    zeroed = encoder.pack([broken], nonfinite="zero").values
    close(jvp(lambda s: encoder.pack([s], nonfinite="zero").values, (broken,), (network(),))[0], zeroed)


def test_functional_call_transforms_over_the_parameters(encoder: sne_fast.SNE) -> None:
    batch = encoder.pack([network()])
    parameters = {name: p.detach() for name, p in encoder.named_parameters()}
    tangents = {name: torch.randn_like(p) for name, p in parameters.items()}

    def function(parameters: dict[str, Tensor]) -> Tensor:
        return functional_call(encoder, parameters, (batch,))

    want = numerical_tangent(
        lambda *values: function(dict(zip(parameters, values, strict=True))),
        tuple(parameters.values()),
        tuple(tangents.values()),
    )
    close(jvp(function, (parameters,), (tangents,))[1], want, 1e-6)
    gradients = grad(lambda p: function(p).sum())(parameters)
    encoder(batch).sum().backward()
    for name, parameter in encoder.named_parameters():
        close(gradients[name], parameter.grad)
    state, _ = stack_module_state([encoder, encoder])  # an ensemble of encoders
    close(vmap(function)(state), encoder(batch).expand(2, -1, -1))


# -------------------------------------------------------------------------------------------------- inside the compiler


@pytest.mark.slow
def test_torch_func_in_a_compiled_function_is_right_or_refused() -> None:
    x, ptr = torch.randn(5, 8), pointer([2, 3])

    def attend(x: Tensor) -> Tensor:
        return F.set_attention(x, x, x, ptr, ptr, 2)

    def tangent(x: Tensor) -> Tensor:
        return jvp(attend, (x,), (torch.ones_like(x),))[1]

    want = tangent(x)
    close(torch.compile(tangent, backend="eager")(x), want, 1e-6)  # a break of the graph, then eagerly
    torch._dynamo.reset()
    with pytest.raises(Exception, match=r"torch\.func inside torch\.compile is not supported"):
        torch.compile(tangent, backend="eager", fullgraph=True)(x)
    torch._dynamo.reset()
    for compiler in ("eager", "aot_eager"):
        compiled = torch.compile(attend, backend=compiler)
        compiled(x)
        with forward_ad.dual_level(), pytest.raises(RuntimeError, match="set_attention: forward-mode differentiation"):
            compiled(forward_ad.make_dual(x, torch.ones_like(x)))
        torch._dynamo.reset()


def test_a_direct_call_of_an_op_refuses_dual_tensors() -> None:
    x, ptr = torch.randn(5, 8), pointer([2, 3])
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(RuntimeError, match="segment_pool: forward-mode differentiation"):
            torch.ops.sne_fast.segment_pool(dual, x, ptr, ptr)


def test_compositions_round_half_types_once() -> None:
    q, k, v, q_ptr, k_ptr = (t.to(torch.bfloat16) if t.is_floating_point() else t for t in attention_case([9], [9], 32))
    args = (q, k, v, q_ptr, k_ptr, q_ptr, k_ptr, 4)
    assert torch.equal(compositions.set_attention(*args), reference.set_attention(*args)[0])

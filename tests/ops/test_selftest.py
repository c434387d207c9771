"""The self-test that stands between ``auto`` and a backend, with fake backends on the CPU."""

from __future__ import annotations

import dataclasses
import json
import os

import pytest
import torch

import sne_fast
from helpers.op_cases import attention_case, feed_forward_case, pool_case
from sne_fast import functional
from sne_fast.ops import dispatch, found_backends, selftest, selftest_cases
from sne_fast.ops.backend import Backend
from sne_fast.ops.schema import FORWARD_OPS, SCHEMAS

CALLS: list[str] = []
HONEST = found_backends.BACKENDS["reference"].kernels


def backend(spoil: str = "", fail: bool = False) -> Backend:
    """Make the reference's kernels a GPU backend's; ``spoil`` names the op that gives twice its results."""

    def kernel(op: str):
        def run(*args):
            CALLS.append(op)
            if fail:
                raise RuntimeError("no kernel image is available")
            results = HONEST[op](*args)
            if op != spoil:
                return results
            return (2 * results[0], *results[1:]) if isinstance(results, tuple) else 2 * results

        return run

    kernels = {op: kernel(op) for op in HONEST}
    return Backend(name="triton", kernels=kernels, devices=("cpu",), priority=1000, self_test=True)


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path):
    """No memory of other tests, a cache folder of its own."""
    monkeypatch.setattr(selftest, "_results", {})
    monkeypatch.setenv(selftest.CACHE_ENVIRONMENT_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.delenv(dispatch.ENVIRONMENT_VARIABLE, raising=False)
    CALLS.clear()


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch):
    def put(backend: Backend) -> None:
        monkeypatch.setitem(found_backends.BACKENDS, backend.name, backend)

    return put


def pool(dtype: torch.dtype = torch.float32, requires_grad: bool = False) -> torch.Tensor:
    x, logits, ptr = pool_case([2, 3], 16, 3, dtype)
    return functional.segment_pool(x.requires_grad_(requires_grad), logits, ptr)


def test_auto_tests_once_and_then_takes_the_backend(install) -> None:
    install(backend())
    pool()
    tested = len(CALLS)
    assert "segment_pool_backward" in CALLS and tested > 2, "forward and backward are tested before the first call"
    pool()
    assert CALLS[tested:] == ["segment_pool"]
    pool(torch.float64)
    assert len(CALLS) > tested + 2, "another dtype is another variant"
    assert not any(op.startswith("set_attention") for op in CALLS)


@pytest.mark.parametrize("spoil", ["segment_pool", "segment_pool_backward"])
def test_a_wrong_backend_is_not_taken_and_explained(install, spoil: str) -> None:
    install(backend(spoil))
    with pytest.warns(RuntimeWarning, match="'triton' failed its self-test on cpu and is not used: segment_pool"):
        wrong = pool()
    with sne_fast.use_backend("reference"):
        assert torch.allclose(wrong, pool(), atol=1e-5)
    said = [r.reasons for r in sne_fast.explain("cpu") if r.backend == "triton" and r.op == "segment_pool"]
    assert "is off by" in said[0][0] and said[0][0].startswith("self-test: ")
    assert not selftest.cache_file().exists()


def test_a_backend_that_raises_is_not_taken(install) -> None:
    install(backend(fail=True))
    with pytest.warns(RuntimeWarning, match="RuntimeError: no kernel image is available"):
        assert pool().shape == (2, 3, 16)


def test_an_explicit_choice_is_not_tested(install) -> None:
    install(backend("segment_pool"))
    with sne_fast.use_backend("triton"):
        pool()
    assert CALLS == ["segment_pool"]


def test_what_passed_is_remembered_on_disk(install, monkeypatch: pytest.MonkeyPatch) -> None:
    install(backend())
    pool()
    (variants,) = json.loads(selftest.cache_file().read_text()).values()
    assert variants == ["triton segment_pool float32 h=16 H=3 ieee"]
    monkeypatch.setattr(selftest, "_results", {})  # another process
    CALLS.clear()
    pool()
    assert CALLS == ["segment_pool"]
    monkeypatch.setattr(selftest, "_results", {})
    monkeypatch.setattr(selftest, "_driver", lambda: "another driver")
    CALLS.clear()
    pool()
    assert len(CALLS) > 1


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"x": 1}', "[" * 5000, "\xff", "{KEY: 5}", "{KEY: [[1]]}", "{KEY: null}"]
)
def test_a_broken_cache_is_ignored_and_replaced(install, monkeypatch: pytest.MonkeyPatch, content: str) -> None:
    file = selftest.cache_file()
    file.parent.mkdir(parents=True)
    gpu = backend()
    key = selftest._environment_key(selftest.device_key(torch.device("cpu")), gpu)
    file.write_bytes(content.replace("KEY", json.dumps(key)).encode("latin-1"))
    install(gpu)
    assert pool().shape == (2, 3, 16) and len(CALLS) > 1
    assert json.loads(file.read_text())[key]


def test_a_pipe_in_the_place_of_the_cache_is_not_waited_for(install) -> None:
    file = selftest.cache_file()
    file.parent.mkdir(parents=True)
    os.mkfifo(file)
    install(backend())
    assert pool().shape == (2, 3, 16) and len(CALLS) > 1


def test_a_cache_folder_that_cannot_be_made_is_fine(install, monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv(selftest.CACHE_ENVIRONMENT_VARIABLE, str(blocked))
    install(backend())
    assert pool().shape == (2, 3, 16)
    monkeypatch.delenv(selftest.CACHE_ENVIRONMENT_VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert selftest.cache_file() == tmp_path / "xdg" / "sne_fast" / "selftest.json"


def test_not_while_capturing(install, monkeypatch: pytest.MonkeyPatch) -> None:
    install(backend())
    monkeypatch.setattr(selftest, "_may_run", lambda device: False)
    pool()
    assert CALLS == [], "a backend that was not tested is passed by"
    monkeypatch.undo()


@pytest.mark.filterwarnings("error:sne_fast")
def test_inside_inference_mode_autocast_and_a_backward(install, monkeypatch: pytest.MonkeyPatch) -> None:
    install(backend())
    with torch.inference_mode():
        pool()
    with torch.autocast("cpu", torch.bfloat16):
        q, k, v, q_ptr, k_ptr = attention_case([3, 2], [3, 2], 32, torch.float32)
        assert functional.set_attention(q, k, v, q_ptr, k_ptr, 4).dtype == torch.bfloat16
    with sne_fast.use_backend("reference"):
        out = pool(torch.float64, requires_grad=True)
    monkeypatch.setattr(selftest, "_results", {})
    out.sum().backward()  # the first that auto sees of this variant is its backward
    assert any("segment_pool_backward" in op for op in CALLS)
    assert selftest._results and not any(selftest._results.values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("op", FORWARD_OPS)
def test_the_reference_passes_in_every_dtype(op: str, dtype: torch.dtype) -> None:
    case = selftest_cases.Variant(op, dtype, 64, 4, layer_norm=True)
    assert selftest.check(backend(), case, torch.device("cpu")) == []


@pytest.mark.parametrize("op", [op for op in SCHEMAS if not op.startswith(("segment_pool", "set_attention"))])
def test_other_ops_are_caught_too(op: str) -> None:
    case = selftest_cases.Variant(op.removesuffix("_backward"), torch.float32, 32, 4)
    spoilt = backend(op)
    if op == "gather_chunks_backward":
        right = spoilt.kernels[op]
        wrong = {op: lambda *args: ([2 * g for g in HONEST[op](*args)[0]], right(*args)[1])}
        spoilt = dataclasses.replace(spoilt, kernels={**spoilt.kernels, **wrong})
    assert selftest.check(spoilt, case, torch.device("cpu"))


def test_variants_of_calls() -> None:
    x, logits, ptr = pool_case([2, 3], 16, 3, torch.float16)
    assert str(selftest_cases.variant("segment_pool", (x, logits, ptr, ptr))) == "segment_pool float16 h=16 H=3"
    backward = ("segment_pool_backward", (x, x, logits, x, x, ptr, ptr))
    assert selftest_cases.variant(*backward) == selftest_cases.variant("segment_pool", (x, logits, ptr, ptr))
    attention = (x, x, x, ptr, ptr, ptr, ptr, 2)
    assert str(selftest_cases.variant("set_attention", attention)) == "set_attention float16 h=16 H=2"
    gather = ([x], ptr, ptr, torch.float64)
    assert str(selftest_cases.variant("gather_chunks", gather)) == "gather_chunks float64"
    assert selftest_cases.variant("gather_chunks_backward", (x, x, [x], ptr, ptr)).dtype == torch.float16
    rows = feed_forward_case(3, 32, dtype=torch.bfloat16)
    assert str(selftest_cases.variant("feed_forward", rows)) == "feed_forward bfloat16 h=32 norm"
    plain = (rows[0], *feed_forward_case(3, 32, layer_norm=False))
    assert str(selftest_cases.variant("feed_forward_backward", plain)) == "feed_forward float64 h=32"


def test_one_query_for_all_rows_reaches_the_backend_as_such() -> None:
    case = selftest_cases.Variant("feed_forward", torch.float32, 32, 0, True)
    strides: list[int] = []
    right = HONEST["feed_forward"]
    kernels = {**HONEST, "feed_forward": lambda *args: (strides.append(args[0].stride(0)), right(*args))[1]}
    spied = dataclasses.replace(backend(), kernels=kernels)
    assert selftest.check(spied, case, torch.device("cpu")) == [] and strides == [32, 0]

"""The GPU backend that ``auto`` asks first: Triton's, but for calls that a committed measurement names."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import sne_fast
from helpers.cpu_cases import chunk_encode_case
from helpers.op_cases import attention_case, block_case, feed_forward_case, pool_case
from helpers.paths import ROOT
from helpers.toy_backend import backend, pooled
from sne_fast.backends.cuda import winners
from sne_fast.backends.cuda.winners import Call, Rule
from sne_fast.ops import devices, found_backends

MEASURED = Call("set_attention", "9.0", "bfloat16", "ieee", 64, 4, 16.0, 1 << 20)


def test_a_preferred_backend_is_asked_before_one_of_higher_priority(install) -> None:
    wanted: list[tuple[str, int]] = []

    def preferred(op: str, args: tuple[Any, ...]) -> bool:
        wanted.append((op, len(args)))
        return True

    install(backend("triton", priority=2000, kernels={"segment_pool": lambda *args: 1 / 0}))
    install(backend("cuda", priority=-5, preferred=preferred))
    assert pooled() == 7 and wanted == [("segment_pool", 4)]
    install(backend("cuda", priority=-5, preferred=preferred, auto_devices=("cuda",)))
    with pytest.raises(ZeroDivisionError):
        pooled()
    assert len(wanted) == 1, "on a device that it does not serve it is not even asked"
    install(backend("cuda", priority=-5, preferred=lambda op, args: False))
    with pytest.raises(ZeroDivisionError):
        pooled()


def test_a_preferred_backend_that_cannot_run_is_passed_by(install) -> None:
    install(backend("cuda", preferred=lambda op, args: True, why_not=lambda op, args: ["not this width"]))
    assert pooled() != 7


def test_without_triton_cuda_is_taken_before_the_reference(install, monkeypatch) -> None:
    """By priority alone, with no rule for the call."""
    loaded = dict(found_backends.BACKENDS)
    assert loaded["triton"].priority > loaded["cuda"].priority > loaded["reference"].priority
    install(backend("triton", priority=loaded["triton"].priority, unavailable=lambda: ["Triton is not installed"]))
    install(backend("cuda", priority=loaded["cuda"].priority, preferred=lambda op, args: False))
    install(backend("cpu", unavailable=lambda: ["not on a GPU"]))
    assert pooled() == 7


def test_a_rule_holds_for_calls_like_the_measured_one() -> None:
    rule = Rule(MEASURED, 1.2, "gpu.json")
    for holds, call in (
        (True, MEASURED),
        (True, replace(MEASURED, length=31.0, rows=1 << 25)),
        (True, replace(MEASURED, length=8.0, rows=1 << 16)),
        (False, replace(MEASURED, length=33.0)),
        (False, replace(MEASURED, length=7.9)),
        (False, replace(MEASURED, rows=1000)),
        (False, replace(MEASURED, capability="8.0")),
        (False, replace(MEASURED, width=128)),
        (False, replace(MEASURED, heads=1)),
        (False, replace(MEASURED, dtype="float32")),
        (False, replace(MEASURED, products="tf32")),
        (False, replace(MEASURED, op="set_attention_backward")),
    ):
        assert rule.holds(call) == holds, call


def test_calls_are_described_by_their_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "capability", lambda device: (9, 0))
    q, k, v, q_ptr, k_ptr = attention_case([2, 6], [10, 30], 64, torch.bfloat16)
    attention = Call("set_attention", "9.0", "bfloat16", "ieee", 64, 4, 20.0, 40)
    assert winners.call_of("set_attention", (q, k, v, q_ptr, k_ptr, q_ptr, k_ptr, 4)) == attention
    backward = (q, q, k, v, q, q, q_ptr, k_ptr, q_ptr, k_ptr, 4)
    assert winners.call_of("set_attention_backward", backward) == replace(attention, op="set_attention_backward")
    x, logits, ptr = pool_case([2, 0, 4], 48, 3, torch.float32)
    pool = Call("segment_pool", "9.0", "float32", "ieee", 48, 3, 2.0, 6)
    assert winners.call_of("segment_pool", (x, logits, ptr, ptr)) == pool
    assert winners.call_of("segment_pool_backward", (x, x, logits, x, x, ptr, ptr)) == replace(
        pool, op="segment_pool_backward"
    )
    args = chunk_encode_case(64, 4, [5, 7])
    encode = Call("chunk_encode", "9.0", "float64", "ieee", 64, 4, 6.0, 12)
    assert winners.call_of("chunk_encode", tuple(args)) == encode
    assert winners.call_of("chunk_encode_backward", (x, *args)) == replace(encode, op="chunk_encode_backward")
    gather = Call("gather_chunks", "9.0", "float16", "ieee", 0, 0, 0.0, x.numel())
    assert winners.call_of("gather_chunks", ([x], logits, ptr, torch.float16)) == gather
    values = torch.zeros(x.numel(), dtype=torch.float16)
    assert winners.call_of("gather_chunks_backward", (values, values, [x], logits, ptr)) == replace(
        gather, op="gather_chunks_backward"
    )
    rows = feed_forward_case(6, 32, dtype=torch.float32)
    tail = Call("feed_forward", "9.0", "float32", "ieee", 32, 0, 0.0, 6)
    assert winners.call_of("feed_forward", rows) == tail
    assert winners.call_of("feed_forward_backward", (rows[0], *rows)) == replace(tail, op="feed_forward_backward")
    q, k, q_ptr, k_ptr, *parameters = block_case([2, 6], [1, 3], (32, 32, 32), dtype=torch.float32)
    block = Call("set_block", "9.0", "float32", "ieee", 32, 4, 4.0, 8)
    itself, across = ((q, rows, q_ptr, q_ptr, q_ptr, q_ptr, *parameters, 4) for rows in (None, k))
    assert winners.call_of("set_block", itself) == block
    assert winners.call_of("set_block_backward", (q, *itself)) == replace(block, op="set_block_backward")
    monkeypatch.setattr(winners, "rules", lambda: (Rule(pool, 2.0, "gpu.json"), Rule(block, 2.0, "gpu.json")))
    assert winners.preferred("set_block", itself) and not winners.preferred("set_block", across)
    assert winners.preferred("segment_pool", (x, logits, ptr, ptr))
    assert not winners.preferred("segment_pool_backward", (x, x, logits, x, x, ptr, ptr))


# --------------------------------------------------------------------------------------------------------- the table


def result(**changes: Any) -> dict[str, Any]:
    """Return a result as bench/gpu_suite.py writes it: cuda is faster in the forward, Triton in the step."""
    shape = {"op": "set_attention", "dtype": "torch.bfloat16", "products": "ieee", "width": 64, "heads": 4,
             "length": 16.0, "rows": 1 << 20, "error": 1e-3}  # fmt: skip
    rows = [
        {**shape, "backend": "triton", "forward_seconds": 1.2e-3, "step_seconds": 3.0e-3},
        {**shape, "backend": "cuda", "forward_seconds": 1.0e-3, "step_seconds": 3.5e-3},
        {**shape, "by": "FlexAttention", "forward_seconds": 1e-6, "step_seconds": 2e-6},
        {**shape, "op": "gather_chunks", "backend": "cuda", "forward_seconds": 1e-3},
    ]
    environment = {"capability": [9, 0], "dirty": False, **changes}
    return {"errors": {}, "parts": {"environment": environment, "ops": rows}}


def test_rules_come_from_what_was_measured_with_both() -> None:
    assert winners.rules_from(result(), "gpu_h200.json") == [Rule(MEASURED, 1.2, "gpu_h200.json")]
    with pytest.raises(ValueError, match="not committed"):
        winners.rules_from(result(dirty=True), "gpu_h200.json")
    with pytest.raises(ValueError, match="with errors decides nothing: sanitizer memcheck"):
        winners.rules_from({**result(), "errors": {"sanitizer memcheck": "..."}}, "gpu_h200.json")


def test_what_is_written_is_read(tmp_path: Path) -> None:
    rules = winners.rules_from(result(), "gpu_h200.json")
    winners.write(rules, tmp_path / "winners.json")
    assert winners.read(tmp_path / "winners.json") == tuple(rules)


def test_every_rule_of_the_package_was_measured() -> None:
    """It names a committed result, which says the same."""
    for rule in winners.read():
        file = ROOT / "bench" / "results" / rule.measured
        assert rule in winners.rules_from(json.loads(file.read_text()), file.name), rule


def test_the_table_is_not_read_for_calls_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise AssertionError("read")

    monkeypatch.setattr(winners, "rules", refuse)
    with sne_fast.use_backend("auto"):
        pooled()

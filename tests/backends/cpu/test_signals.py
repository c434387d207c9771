"""Signals and forks: a long call ends where a handler raises, else goes on; a forked child computes."""

from __future__ import annotations

import ctypes
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch

import sne_fast
from helpers.cpu_cases import NEEDS_BACKEND, cast, chunk_encode_case
from helpers.op_cases import pointer
from sne_fast import functional
from sne_fast.backends.cpu import backend as cpu
from sne_fast.backends.cpu import library
from sne_fast.training.threads import torch_threads

pytestmark = [
    pytest.mark.skipif(bool(library.reasons()), reason=NEEDS_BACKEND),
    pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs Unix signals"),
]
ROWS = 40000
FEWER_ROWS = 16000


class Stop(Exception):
    """What the handler raises."""


@contextmanager
def alarm(handler: Callable[[int, object], None], seconds: float = 0.1) -> Iterator[None]:
    before = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def raise_stop(number: int, frame: object) -> None:
    raise Stop


@pytest.mark.parametrize("threads", [1, 2])
def test_a_long_call_ends_where_a_handler_raises(threads):
    ptr, q = pointer([ROWS]), torch.randn(ROWS, 32)
    out, lse = torch.full_like(q, float("nan")), torch.zeros(ROWS, 1)
    with torch_threads(threads):
        struct = cpu._set_attention_args(q, q, q, ptr, ptr, 1, out, lse)
        with pytest.raises(Stop), alarm(raise_stop):
            library.library().sne_fast_cpu_set_attention(0, ctypes.byref(struct))
    assert out.isnan().any()  # it had not come to its end


def test_a_backward_pass_ends_where_a_handler_raises():
    ptr, q = pointer([ROWS]), torch.randn(ROWS, 32)
    grads = [torch.full_like(q, float("nan")) for _ in range(3)]
    struct = cpu._set_attention_args(q, q, q, ptr, ptr, 1, q, torch.full((ROWS, 1), 8.0))
    pointers = library.SetAttentionGrads(q.data_ptr(), *(t.data_ptr() for t in grads))
    with pytest.raises(Stop), alarm(raise_stop):
        library.library().sne_fast_cpu_set_attention_backward(0, ctypes.byref(struct), ctypes.byref(pointers))
    assert any(t.isnan().any() for t in grads)


def test_an_interrupt_reaches_the_caller_of_autograd():
    ptr, q = pointer([ROWS]), torch.randn(ROWS, 32, requires_grad=True)
    with sne_fast.use_backend("cpu"):
        loss = functional.set_attention(q, q, q, ptr, ptr, 1).sum()
        with pytest.raises(Stop), alarm(raise_stop):
            loss.backward()


@pytest.mark.parametrize("backward", [False, True])
def test_chunk_encode_ends_where_a_handler_raises(backward):
    args = cast(chunk_encode_case(128, 4, [32] * 1500), torch.float32)
    with pytest.raises(Stop), alarm(raise_stop):
        for _ in range(1000):  # within one of the calls, or between two
            cpu.chunk_encode_backward(torch.ones(1500, 4, 128), *args) if backward else cpu.chunk_encode(*args)


def test_a_call_goes_on_where_no_handler_raises():
    heard: list[int] = []
    ptr, q = pointer([FEWER_ROWS]), torch.randn(FEWER_ROWS, 32)
    with alarm(lambda number, frame: heard.append(number), seconds=0.01):
        got, _ = cpu.set_attention(q, q, q, ptr, ptr, ptr, ptr, 1)
        assert heard == [signal.SIGALRM]
    want, _ = cpu.set_attention(q, q, q, ptr, ptr, ptr, ptr, 1)
    assert torch.equal(got, want)


def test_other_threads_run_meanwhile():
    ptr, q = pointer([FEWER_ROWS]), torch.randn(FEWER_ROWS, 32)
    steps, ended = 0, threading.Event()

    def work() -> None:
        cpu.set_attention(q, q, q, ptr, ptr, ptr, ptr, 1)
        ended.set()

    thread = threading.Thread(target=work)
    thread.start()
    while not ended.is_set():
        time.sleep(0.01)
        steps += 1
    thread.join()
    assert steps > 3


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_computes_what_its_parent_does():
    args = cast(chunk_encode_case(64, 4, [32] * 300), torch.float32)
    with torch_threads(2):
        want = cpu.chunk_encode(*args).numpy().tobytes()  # starts threads, which the child does not have
        assert library.num_threads() == 2
        child = os.fork()
        if child == 0:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(60)  # a child that hangs is killed, and seen below
            good = library.num_threads() == 1 and cpu.chunk_encode(*args).numpy().tobytes() == want
            os._exit(0 if good else 1)
        _, status = os.waitpid(child, 0)
    assert status == 0

"""Threads of ops beside those of torch, and the steps of a training that keep them apart."""

from __future__ import annotations

import threading

import pytest
import torch

from helpers.small_trainings import goals, make, packed
from sne_fast.backends.cpu import library
from sne_fast.ops.op_threads import one_thread_between_ops, threads_of_ops
from sne_fast.training import FitSettings, fit, steps
from sne_fast.training.threads import torch_threads


def both() -> tuple[int, int]:
    return torch.get_num_threads(), threads_of_ops()


def test_blocks_nest_and_end_by_exceptions() -> None:
    with torch_threads(3):
        assert both() == (3, 3)
        with pytest.raises(KeyError), one_thread_between_ops():
            with one_thread_between_ops():
                assert both() == (1, 3) and library.num_threads() == 3
            assert both() == (1, 3)
            raise KeyError
        assert both() == (3, 3)


def test_blocks_of_another_python_thread_change_nothing_here() -> None:
    inside, go_on = threading.Event(), threading.Event()
    seen = []

    def other() -> None:
        torch.set_num_threads(2)
        with one_thread_between_ops():
            seen.append(both())
            inside.set()
            go_on.wait(30)

    with torch_threads(3):
        thread = threading.Thread(target=other)
        thread.start()
        assert inside.wait(30) and seen == [(1, 2)] and both() == (3, 3)
        with one_thread_between_ops():
            go_on.set()
            thread.join(30)
            assert both() == (1, 3)
        assert both() == (3, 3)


@pytest.mark.parametrize("limit", [steps.SMALL_PART, 0])
def test_small_steps_of_a_training(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    monkeypatch.setattr(steps, "SMALL_PART", limit)
    predictor = make()
    seen = set()
    predictor.encoder.register_forward_hook(lambda *_: seen.add((predictor.training, *both())))
    with torch_threads(2):
        fit(predictor, packed(predictor, 2), goals(2), settings=FitSettings(epochs=1))
        assert both() == (2, 2)
    assert (True, 1 if limit else 2, 2) in seen

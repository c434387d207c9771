"""Batches of one bucket: the same launches, and with bounds in place of lengths the same results."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import interpreter

import sne_fast
from helpers.launch_bounds import check_loose_bounds
from helpers.recorded_graphs import Recorder
from sne_fast.backends.gpu_plans.chunks import CLASSES
from sne_fast.backends.triton.backend import BACKEND
from sne_fast.backends.triton.chunk_launches import FUSED_CLASSES
from sne_fast.data.buckets import buffers_like
from sne_fast.ops.launch_bounds import LENGTH_GROUPS
from sne_fast.training import FitSettings
from sne_fast.training.capture import CapturedSteps
from sne_fast.training.objective import Supervised
from sne_fast.training.optimiser import adamw


def networks(count: int = 24) -> list[nn.Module]:
    """Return multilayer perceptrons of several sizes."""
    torch.manual_seed(0)
    return [nn.Sequential(nn.Linear(4 + k % 3, 9), nn.Tanh(), nn.Linear(9, 2 + k % 2)) for k in range(count)]


def test_a_launch_takes_whole_groups_of_lengths() -> None:
    for one in (*CLASSES, *FUSED_CLASSES):
        inside = [(first, last) for first, last in LENGTH_GROUPS if one.min_length <= first <= one.longest]
        assert inside[0][0] == one.min_length and inside[-1][1] == one.longest


WAITING = {"scalar_tensor", "nonzero", "masked_select", "unique_dim"}
"""Operations that copy a number to the device, or whose results have sizes that only the device knows."""


class Signature(TorchDispatchMode):
    """Records what is launched: kernels of Triton with their grids, operations of torch, and all sizes and numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[Any] = []

    def kernel(self, fn: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        grid = kwargs.pop("grid")
        self.launches.append((fn.__name__, tuple(grid), described(args), described(kwargs)))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace != "sne_fast":
            self.launches.append((str(func), described(args), described(kwargs or {})))
        return result


def described(value: Any) -> Any:
    if isinstance(value, Tensor):
        return (tuple(value.shape), tuple(value.stride()), str(value.dtype))
    if isinstance(value, dict):
        return {name: described(one) for name, one in value.items()}
    if isinstance(value, (tuple, list)):
        return [described(one) for one in value]
    return value if isinstance(value, (int, float, str, bool)) else str(value)


def signature(monkeypatch: pytest.MonkeyPatch, work: Callable[[], Any]) -> list[Any]:
    """Return what is launched, without running kernels of Triton."""
    seen = Signature()

    def inside(kernel: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            with seen:  # an op of the package is opaque to the mode around it
                return kernel(*args)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(
            interpreter.InterpretedFunction, "run", lambda self, *args, **kwargs: seen.kernel(self.fn, args, kwargs)
        )
        for op, kernel in list(BACKEND.kernels.items()):
            patch.setitem(BACKEND.kernels, op, inside(kernel))
        with sne_fast.use_backend("triton"), seen:
            work()
    return seen.launches


@pytest.mark.parametrize("options", [{}, {"set_attention": "isab"}, {"statistics": "relative"}], ids=str)
def test_two_batches_of_a_bucket_launch_the_same(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    predictor = sne_fast.Predictor(sne_fast.SNE(hidden_dim=32, chunk_size=32, **options), hidden_features=(8,))
    batch = predictor.pack(networks()).detach()
    settings = FitSettings(buckets=True, amp="float16", ranking=0.5)
    objective = Supervised(predictor, torch.rand(len(batch), 1), settings)
    optimiser = adamw(predictor, 1e-3, 1e-2)
    captured = CapturedSteps(
        predictor, objective, optimiser, torch.amp.GradScaler("cpu", enabled=False), settings, Recorder()
    )
    parts = [list(range(14)), list(range(1, 14)), list(range(3))]
    inputs = [objective.inputs(batch[rows], rows, torch.Generator()) for rows in parts]
    assert inputs[0].buckets == inputs[1].buckets != inputs[2].buckets
    assert batch[parts[0]].num_weights != batch[parts[1]].num_weights

    def step(one: Any) -> Callable[[], None]:
        def work() -> None:
            captured.begin(7, 1e-3)
            captured._add_gradients(one)
            captured._update_parameters()

        return work

    for one in inputs:  # the first call makes gradients, the state of the optimiser, and what is derived from pointers
        signature(monkeypatch, step(one))
    found = [signature(monkeypatch, step(one)) for one in inputs]
    assert sum(name[0].endswith("_kernel") for name in found[0]) > 50
    assert found[0] == found[1] != found[2]
    fresh = [dataclasses.replace(one, batches=tuple(buffers_like(b) for b in one.batches)) for one in inputs]
    found = [signature(monkeypatch, step(one)) for one in fresh]
    assert found[0] == found[1] != found[2], "as a graph records it, with nothing derived before"
    waiting = {name[0].split(".")[1] for name in found[0] if name[0].startswith("aten.")} & WAITING
    assert not waiting, "a graph cannot record what waits for the device"


def test_bounds_do_not_change_results() -> None:
    check_loose_bounds("triton")

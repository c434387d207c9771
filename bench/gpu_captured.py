"""Captured training steps: `bench/gpu_suite.py --captured CASE` measures those of `fit` with CUDA graphs and without.

Three trainings of the same networks from the same parameters: "captured" replays padded steps, "padded" takes the same
steps without graphs, "plain" takes them unpadded. Losses and parameters are compared before any time is taken.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any
from unittest import mock

import gpu_cases
import torch
from gpu_cases import OutOfTime
from torch import Tensor

import sne_fast
from sne_fast import Predictor, WeightBatch
from sne_fast.benchmark import GPU_CASES, CheckFailed
from sne_fast.training import steps
from sne_fast.training.capture import check_capture
from sne_fast.training.distributed import World
from sne_fast.training.loop import networks_of, trainer_of
from sne_fast.training.networks import fit_inputs
from sne_fast.training.progress import Progress
from sne_fast.training.settings import FitSettings

if TYPE_CHECKING:
    from gpu_suite import Suite

Json = dict[str, Any]
WAYS = {"captured": (True, True), "padded": (True, False), "plain": (False, False)}
"""Values of the settings `buckets` and `capture`."""
COMPARED_EPOCHS = 3  # a graph is recorded when its size comes a second time
LOSSES_ALLOWED = {"bfloat16": 2e-2, "float32": 1e-3}  # relative differences of the mean losses of epochs
PARAMETERS_ALLOWED = 0.1  # of how far they moved: AdamW makes rounding of gradients that are almost 0 visible
LEAST_NETWORKS, LEAST_STEPS = 8, 4


class Waits:
    """Counts the seconds in which the host waits for the device, to read numbers or for an event."""

    def __init__(self) -> None:
        self.seconds = 0.0

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Count inside the ``with`` block."""
        waits = [(torch.Tensor, "tolist"), (torch.Tensor, "item"), (torch.cuda.Event, "synchronize")]
        with ExitStack() as stack:
            for of, name in waits:
                stack.enter_context(mock.patch.object(of, name, self._timed(getattr(of, name))))
            yield

    def _timed(self, wait: Callable[..., Any]) -> Callable[..., Any]:
        def call(waited: Any, *args: Any) -> Any:
            if isinstance(waited, Tensor) and waited.device.type == "cpu":
                return wait(waited, *args)
            start = time.perf_counter()
            try:
                return wait(waited, *args)
            finally:
                self.seconds += time.perf_counter() - start

        return call


@dataclass
class Training:
    """One training, as `fit` makes it of the same arguments."""

    trainer: steps.Trainer
    predictor: Predictor
    losses: list[float] = field(default_factory=list)
    progress: Progress = field(default_factory=Progress)

    @classmethod
    def make(cls, predictor: Predictor, batch: WeightBatch, targets: Tensor, settings: FitSettings) -> Training:
        """Begin a training of a copy of the predictor."""
        predictor, world = copy.deepcopy(predictor), World()
        networks = networks_of(batch, targets, predictor)
        graphs = check_capture(predictor, world.size) if settings.capture else None
        fit_inputs(predictor, networks, world)
        return cls(trainer_of(predictor, networks, settings, world, graphs), predictor)

    @property
    def steps_per_epoch(self) -> float:
        """Mean over the epochs that the training is planned for."""
        return self.trainer.plan.steps / self.trainer.settings.epochs

    def epoch(self, on_batch: Callable[[int], None] | None = None) -> None:
        """Train for an epoch, at a constant rate that float32 holds exactly, as captured steps have it."""
        with mock.patch.object(steps, "warm_cosine", lambda *_: 1.0):
            self.losses.append(self.trainer.epoch(self.progress, on_batch))
        self.progress.epoch += 1

    def timed(self, seconds: float) -> Json:
        """Return the times of a step: medians over epochs, of the steps after the first of each."""
        waits, end = Waits(), time.monotonic() + seconds
        marks: list[tuple[float, float]] = []
        found: list[tuple[float, float]] = []

        def mark(_: int) -> None:
            marks.append((time.perf_counter(), waits.seconds))

        with waits.counted():
            while not found or time.monotonic() < end:
                marks.clear()
                self.epoch(mark)
                count, (first, first_waits), (last, last_waits) = len(marks) - 1, marks[0], marks[-1]
                found.append(((last - first) / count, (last - first - last_waits + first_waits) / count))
        step, host = (median(times) for times in zip(*found, strict=True))
        return {
            "milliseconds": 1e3 * step, "host_milliseconds": 1e3 * host,
            "networks_per_second": len(self.trainer.plan.weights) / self.steps_per_epoch / step,
        }  # fmt: skip


def _vector(predictor: Predictor) -> Tensor:
    """Return all parameters in one vector."""
    return torch.cat([p.detach().double().flatten() for p in predictor.parameters()])


def measure(suite: Suite) -> Iterator[Json]:
    """Yield a row per dtype of the case; one that fails is recorded and does not stop the other."""
    for kind in gpu_cases.kinds(suite.options.captured):
        suite.need(10)
        try:
            with sne_fast.use_backend((suite.options.backend or ["auto"])[0]):
                row = _row(suite, suite.options.captured, kind)
        except OutOfTime:
            raise
        except Exception as error:
            suite.fail(f"captured {kind}", error)
        else:
            yield row


def _row(suite: Suite, name: str, kind: str) -> Json:
    case = GPU_CASES[name]
    torch.manual_seed(0)
    predictor = Predictor(case.encoder(), hidden_features=(64,)).to(suite.device)
    batch = case.batch(predictor.encoder, suite.size["cases"])
    batch = WeightBatch.cat([batch] * -(-LEAST_NETWORKS // len(batch)))
    targets = torch.rand(len(batch), 1, generator=torch.Generator().manual_seed(1))
    budget = min(FitSettings.batch_weights, batch.num_weights // LEAST_STEPS)
    common: Json = {"epochs": 1000, "lr": 2**-10, "batch_weights": budget}
    common["amp"] = None if kind == "float32" else kind
    start, trainings = _vector(predictor), {}
    for way, (buckets, capture) in WAYS.items():
        settings = FitSettings(**common, buckets=buckets, capture=capture)
        trainings[way] = Training.make(predictor, batch, targets, settings)
        for _ in range(COMPARED_EPOCHS):
            trainings[way].epoch()
    checks = {way: _check(trainings[way], trainings["padded"], start, way, kind) for way in ("captured", "plain")}
    row: Json = {
        "case": name, "dtype": kind, "mode": "captured steps", "backend": (suite.options.backend or ["auto"])[0],
        "weights": batch.num_weights, "networks": len(batch), "batch_weights": budget,
        "steps_per_epoch": trainings["padded"].steps_per_epoch, "checks": checks,
    }  # fmt: skip
    for way, training in trainings.items():
        suite.need(2)
        row[way] = training.timed(gpu_cases.MEASURED_SECONDS)
    captured = trainings["captured"].trainer.captured
    assert captured is not None
    taken = trainings["captured"].progress.step
    row |= {"graphs": len(captured.parts) + 1, "replays": captured.replayed, "steps": taken}  # one is of the update
    row["ratios"] = {way: row[way]["milliseconds"] / row["captured"]["milliseconds"] for way in ("padded", "plain")}
    return row


def _check(training: Training, padded: Training, start: Tensor, way: str, kind: str) -> Json:
    """Return how far losses and parameters are from those of padded steps.

    Raises:
        CheckFailed: too far for the same training; its speed is not reported.
    """
    pairs = list(zip(training.losses, padded.losses, strict=True))
    loss_error = max(abs(loss - want) / abs(want) for loss, want in pairs)
    got, want = _vector(training.predictor), _vector(padded.predictor)
    error = float((got - want).norm() / (want - start).norm())
    if not loss_error <= LOSSES_ALLOWED[kind] or (way == "captured" and not error <= PARAMETERS_ALLOWED):
        raise CheckFailed(
            f"{way} steps in {kind}: losses are off by {loss_error:.1e}, parameters by {error:.1e} of how far they "
            "moved; their speed is not reported"
        )
    return {"loss_error": loss_error, "parameter_error": error, "same_bits": torch.equal(got, want)}

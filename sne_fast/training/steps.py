"""Steps of a training: gradients of the parts of a step, summed over parts and processes, and one update."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..data.batch import WeightBatch
from ..data.layers_apart import layers_apart
from ..ops.op_threads import one_thread_between_ops
from .capture import CapturedSteps, Graphs
from .distributed import World
from .objective import Encode, Losses, Objective, PaddedObjective
from .optimiser import adamw, draws_of, set_learning_rate, warm_cosine
from .planning import Part, Plan
from .progress import Progress, not_finite
from .settings import FitSettings
from .split_networks import deal_layers
from .streams import NetworkStream

MOST_SKIPPED = 32
"""Steps in a row that may be skipped under float16: its scale, 65536 at first, is halved by each, down to 2**-16."""
SMALL_PART = 50_000
"""Weights of a part on a CPU up to which no operation between ops wakes threads: see bench/small_batches.py."""
_SHOWN = 5  # networks named in a message


class Deal(NamedTuple):
    """Which process takes which places of a step: whole parts by process, and networks that all share by layers."""

    shares: list[list[int]]
    split: list[int]

    def places(self, rank: int) -> list[int]:
        """Return the places of the parts that a process reads."""
        return [*self.shares[rank], *self.split]


class _Unread(NamedTuple):
    """A step that was taken and whose numbers were not read: what reads them, its networks, and words for an error."""

    read: Callable[[], list[float]]
    rows: list[int]
    where: str


class Trainer:
    """What a training keeps from step to step: the plan, the optimiser and the scale of its losses.

    Args:
        module: has the parameters, of which the first tells device and dtype.
        objective: what is minimised.
        encode: encodes a batch for the objective.
        encode_split: does the same together with the other processes, each of which encodes some layers; called with
            the processes, what `deal_layers` returned, and the batch.
        networks: the training networks, prepared for the objective.
        settings: of the training.
        world: the processes that share each step.
        graphs: records and replays the steps, where `settings.capture` asks for it.
    """

    def __init__(
        self,
        module: nn.Module,
        objective: Objective,
        encode: Encode,
        encode_split: Callable[[World, Sequence[Sequence[int]], WeightBatch], Tensor],
        networks: NetworkStream,
        settings: FitSettings,
        world: World,
        graphs: Graphs | None = None,
    ) -> None:
        self.module, self.objective = module, objective
        self.encode, self.encode_split = encode, encode_split
        self.networks, self.settings, self.world = networks, settings, world
        self.weight = next(p for p in module.parameters() if p.is_floating_point())
        self.parameters = dict(module.named_parameters())
        self.plan = Plan(networks, settings, world.size)
        self.optimiser = adamw(module, settings.lr, settings.weight_decay)
        self.scaler = torch.amp.GradScaler(self.weight.device.type, enabled=settings.amp == "float16")
        self.scaler.scale(self.weight.new_zeros(()))  # makes the scale also where a process has no part of a step
        self.lr = settings.lr
        self.skipped = 0
        self.captured: CapturedSteps | None = None
        if graphs is not None:
            self.captured = CapturedSteps(module, self._padded, self.optimiser, self.scaler, settings, graphs)
        self._unread: _Unread | None = None

    @property
    def _padded(self) -> PaddedObjective:
        assert isinstance(self.objective, PaddedObjective)
        return self.objective

    def epoch(
        self, state: Progress, on_batch: Callable[[int], None] | None = None, on_step: Callable[[], None] | None = None
    ) -> float:
        """Train what is left of an epoch, and return the mean loss of its networks.

        Args:
            state: where the training stands; it moves on with every step.
            on_batch: called after each step with the number of weights trained on in this epoch.
            on_step: called after each step but the last one.

        Raises:
            ValueError: a loss, a gradient or a parameter that is not finite.
        """
        self.module.train()
        steps = self.plan.epoch(state.epoch)
        left = steps[state.taken :]
        dealt = [Deal(self.plan.shares(step), self.plan.split_places(step)) for step in left]
        batches = self.networks.parts(
            step[place] for step, deal in zip(left, dealt, strict=True) for place in deal.places(self.world.rank)
        )
        done = sum(self.plan.load(part) for step in steps[: state.taken] for part in step)
        for step, deal in zip(left, dealt, strict=True):
            k = state.taken
            self.lr = self.settings.lr * warm_cosine(state.step, self.plan.steps, self.settings.warmup)
            where = (
                f"epoch {state.epoch}; lower lr ({self.settings.lr}), or look at batch {k + 1} of {len(steps)} in it"
            )
            with self._threads(step):
                if self.captured is None:
                    state.total += self._step(step, deal, batches, state.step, where)
                else:
                    self._captured_step(self.captured, state, step, deal, batches, where)
            state.step += 1
            state.taken += 1
            done += sum(self.plan.load(part) for part in step)
            if on_batch is not None:
                on_batch(done)
            if on_step is not None and state.taken < len(steps):
                on_step()
        self.settle(state)
        self.check_finite(state.epoch)
        mean = state.total / len(self.plan.weights)
        state.total, state.taken = 0.0, 0
        return mean

    def _threads(self, step: Sequence[Part]) -> AbstractContextManager[None]:
        small = self.weight.device.type == "cpu" and max(map(self.plan.load, step)) <= SMALL_PART
        return one_thread_between_ops() if small else nullcontext()

    def check_finite(self, epoch: int) -> None:
        """Check the parameters and the state of the optimiser.

        Raises:
            ValueError: one of them is not finite.
        """
        spoilt = not_finite({"predictor": self.module.state_dict(), "optimiser": self.optimiser.state_dict()})
        if spoilt is not None:
            raise ValueError(f"fit: {spoilt} is not finite after epoch {epoch}; lower lr ({self.settings.lr})")

    def _step(self, step: Sequence[Part], deal: Deal, batches: Iterator[WeightBatch], number: int, where: str) -> float:
        """Take one step, and return the summed loss of its networks.

        Args:
            step: its parts.
            deal: of the parts.
            batches: the networks of the parts that this process reads.
            number: of the step.
            where: the middle of the sentence of an error.

        Raises:
            ValueError: a loss or a gradient that is not finite; the step is not taken.
        """
        rows = self.plan.networks_of(step)
        set_learning_rate(self.optimiser, self.lr)
        self.optimiser.zero_grad()
        sums = torch.zeros(2, dtype=torch.float64, device=self.weight.device)  # shown and minimised losses
        own: list[tuple[Part, Tensor]] = []
        loads = [sum(self.plan.load(step[place]) for place in share) for share in deal.shares]
        for place in deal.places(self.world.rank):
            part = next(batches).to(self.weight.device, self.weight.dtype)
            generator = draws_of(self.settings.seed, number * self.plan.parts + place)
            encode, counts = self.encode, True
            if place in deal.split:  # all processes compute its loss, and one counts it
                dealt = deal_layers(part, loads)
                layers = layers_apart(part).network_sizes.tolist()
                loads = [load + sum(layers[k] for k in ks) for load, ks in zip(loads, dealt, strict=True)]
                encode = partial(self.encode_split, self.world, dealt)
                counts = place % self.world.size == self.world.rank
            losses = self._losses(part, step[place], generator, encode if place in deal.split else None)
            self.scaler.scale(losses.minimised * counts / len(rows)).backward()
            shown = losses.shown.detach()[: len(step[place])]
            sums = sums + counts * torch.stack([shown.sum(), losses.minimised.detach()])
            own.append((step[place], shown))
        sums = self.world.sum_gradients(self.parameters.values(), sums)
        self.scaler.unscale_(self.optimiser)
        gradients = {name: p.grad for name, p in self.parameters.items() if p.grad is not None}
        norm = nn.utils.get_total_norm(gradients.values())
        # Read together, so that a GPU is waited for once in a step.
        summed, whole, length = torch.stack([*sums.double(), norm.double()]).tolist()
        if not math.isfinite(whole):
            pairs = ((row, ok) for part, shown in own for row, ok in zip(part, shown.isfinite().tolist(), strict=True))
            rows = [row for row, finite in pairs if not finite] or rows
        self._check_numbers(whole, length, gradients, f"{where}, {self._named(rows)}")
        nn.utils.clip_grads_with_norm_(self.parameters.values(), self.settings.clip, norm)
        self.scaler.step(self.optimiser)
        self.scaler.update()
        return summed

    def _losses(
        self, part: WeightBatch, rows: Sequence[int], generator: torch.Generator, encode: Encode | None
    ) -> Losses:  # fmt: skip
        """Return the losses of a part, of padded inputs if it is not shared and settings say so."""
        if encode is None and self.settings.buckets:
            return self._padded.losses_of(self._padded.inputs(part, rows, generator))
        return self.objective(part, rows, generator, self.encode if encode is None else encode)

    def _captured_step(
        self,
        captured: CapturedSteps,
        state: Progress,
        step: Sequence[Part],
        deal: Deal,
        batches: Iterator[WeightBatch],
        where: str,
    ) -> None:
        """Take one step, and check the one before, for which the device has most likely not to be waited for.

        Raises:
            ValueError: a loss or a gradient of the step before that is not finite; neither step is taken.
        """
        rows = self.plan.networks_of(step)
        captured.begin(len(rows), self.lr)
        for place in deal.places(self.world.rank):
            part = next(batches)
            if part.device.type == "cpu":  # to be copied without waiting
                part = part.pin_memory()
            part = part.to(self.weight.device, self.weight.dtype, non_blocking=True)
            generator = draws_of(self.settings.seed, state.step * self.plan.parts + place)
            captured.part(self._padded.inputs(part, step[place], generator))
        read = captured.update()
        self.settle(state)
        self._unread = _Unread(read, rows, where)

    def settle(self, state: Progress) -> None:
        """Read what the last step has computed, if it was captured, and add its loss to the state.

        Raises:
            ValueError: a loss or a gradient that is not finite; the step is not taken.
        """
        if self._unread is None:
            return
        read, rows, where = self._unread
        self._unread = None
        summed, whole, length = read()
        self._check_numbers(whole, length, {}, f"{where}, {self._named(rows)}")
        state.total += summed

    def _check_numbers(self, loss: float, norm: float, gradients: Mapping[str, Tensor], where: str) -> None:
        if not math.isfinite(loss):
            raise ValueError(f"fit: the loss became {loss} in {where}; no step was taken")
        self._check_gradients(norm, gradients, where)

    def _check_gradients(self, norm: float, gradients: Mapping[str, Tensor], where: str) -> None:
        self.skipped = 0 if math.isfinite(norm) else self.skipped + 1
        if not self.skipped or (self.scaler.is_enabled() and self.skipped <= MOST_SKIPPED):
            return
        of = [name for name, gradient in gradients.items() if not bool(gradient.isfinite().all())]
        row = f" in {self.skipped} steps in a row, the last" if self.scaler.is_enabled() else ""
        which = f"that of {of[0]}{f' and {len(of) - 1} more' if len(of) > 1 else ''}" if of else "their norm"
        raise ValueError(f"fit: the gradients became not finite ({which}){row} in {where}; no step was taken")

    def _named(self, rows: Sequence[int]) -> str:
        more = f" and {len(rows) - _SHOWN} more" if len(rows) > _SHOWN else ""
        return ", ".join(self.networks.network_name(row) for row in rows[:_SHOWN]) + more

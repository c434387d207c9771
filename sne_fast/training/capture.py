"""Training steps as CUDA graphs: one for the gradients of a part of each bucket, and one for the update.

A graph reads the same memory at every replay. So inputs are copied into buffers, gradients are added to tensors that
stay, the learning rate is a tensor, and what the host wants to know is read one step later.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..data.buckets import Bucket, buffers_like, copy_into
from ..nn.predictor import Predictor
from ..ops.dispatch import current_backend, explain
from ..ops.supported_widths import width_reasons
from .objective import PaddedInputs, PaddedObjective
from .settings import FitSettings

MOST_GRAPHS = 64
"""Graphs of parts that are kept; of more, the one that was not used for the longest time is dropped."""
MOST_SEEN = 4096
"""Buckets that are remembered, of which no graph was recorded yet."""
WIDEST, LONGEST = 64, 64
"""Width and chunk size up to which launches depend on nothing but a bucket."""
_OPS = ("chunk_encode", "set_attention", "segment_pool")

Work = Callable[[], None]


class Graphs(Protocol):
    """What records work on the device, and replays it."""

    def run(self, work: Work) -> None:
        """Do work without recording it, so that what happens at a first call only is done."""

    def record(self, work: Work) -> Work:
        """Record work that `run` has done before, without doing it, and return what replays it."""

    def later(self, numbers: Tensor) -> Callable[[], list[float]]:
        """Begin to copy numbers to the host, and return what waits for the copy and returns them."""


class CudaGraphs:
    """CUDA graphs, which share one pool of memory: they are replayed one after another, and leave nothing in it.

    Args:
        device: where the work is done.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    def run(self, work: Work) -> None:
        """Do work in the stream in which graphs are recorded."""
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            work()
        current.wait_stream(self.stream)

    def record(self, work: Work) -> Work:
        """Record work."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
            work()
        return graph.replay

    def later(self, numbers: Tensor) -> Callable[[], list[float]]:
        """Copy numbers to the host, and wait for nothing but the copy."""
        copy = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
        copy.copy_(numbers, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record(torch.cuda.current_stream(self.device))

        def read() -> list[float]:
            copied.synchronize()
            return copy.tolist()

        return read


def check_capture(predictor: Predictor, processes: int) -> Graphs:
    """Return what records the steps of a predictor.

    Raises:
        ValueError: it is not on a CUDA device, several processes train it, or its launches depend on more than sizes.
    """
    device = predictor.target_mean.device
    if device.type != "cuda":
        raise ValueError(
            f"fit: capture records CUDA graphs, the predictor is on {device}; move it to a CUDA device, "
            "or use capture=False"
        )
    if processes > 1:
        raise ValueError(f"fit: capture is for one process, got {processes}; use capture=False")
    config = predictor.config["encoder"]
    width, heads = config["hidden_dim"], config["num_heads"]
    reasons = width_reasons(width, heads)
    if width > WIDEST:
        reasons.append(f"hidden_dim must be at most {WIDEST}, got {width}")
    if config["chunks"] and config["chunk_size"] > LONGEST:
        reasons.append(f"chunk_size must be at most {LONGEST}, got {config['chunk_size']}")
    usable = {name: [entry for entry in explain(device) if entry.backend == name] for name in ("cuda", "triton")}
    chosen = current_backend()
    able = [
        name
        for name, entries in usable.items()
        if chosen in ("auto", name) and not any(entry.reasons for entry in entries if entry.op in _OPS)
    ]
    if not able:
        reasons.append(f"neither of the backends cuda and triton can run on {device}, see sne_fast.explain()")
    if reasons:
        raise ValueError(f"fit: capture cannot record this predictor: {'; '.join(reasons)}; use capture=False")
    return CudaGraphs(device)


class CapturedSteps:
    """Steps of a training whose parts are recorded when their bucket comes a second time, and replayed from then on.

    A part of a new bucket runs as usual. With the first step all gradients are there, as tensors that stay.

    Args:
        module: has the parameters.
        objective: computes the losses.
        optimiser: fused AdamW, whose learning rate becomes a tensor.
        scaler: of the losses.
        settings: of the training.
        graphs: records the work.
        most: number of graphs of parts that are kept.
    """

    def __init__(
        self,
        module: nn.Module,
        objective: PaddedObjective,
        optimiser: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        settings: FitSettings,
        graphs: Graphs,
        most: int = MOST_GRAPHS,
    ) -> None:
        self.module, self.objective, self.optimiser, self.scaler = module, objective, optimiser, scaler
        self.settings, self.graphs, self.most = settings, graphs, most
        weight = next(p for p in module.parameters() if p.is_floating_point())
        self.sums = torch.zeros(2, dtype=torch.float64, device=weight.device)  # shown and minimised losses
        self.results = torch.zeros(3, dtype=torch.float64, device=weight.device)  # the same, and the norm
        self.networks = torch.ones((), dtype=weight.dtype, device=weight.device)
        self.lr = torch.zeros((), dtype=torch.float32, device=weight.device)
        self.failed = torch.zeros((), dtype=torch.float32, device=weight.device)
        self.parts: OrderedDict[tuple[Bucket, ...], tuple[PaddedInputs, Work]] = OrderedDict()
        self.seen: OrderedDict[tuple[Bucket, ...], None] = OrderedDict()
        self.replayed = 0
        self._has_gradients = False
        self._updates = 0
        self._update: Work | None = None
        optimiser.register_state_dict_post_hook(_as_usual)

    def begin(self, networks: int, lr: float) -> None:
        """Begin a step.

        Args:
            networks: number of its networks.
            lr: its learning rate.
        """
        if not self._updates:  # also after a checkpoint has restored the optimiser
            for group in self.optimiser.param_groups:
                group.update(lr=self.lr, capturable=True)
            self.module.zero_grad()
        self.networks.fill_(networks)
        self.lr.fill_(lr)

    def part(self, inputs: PaddedInputs) -> None:
        """Add the gradients of a part."""
        buckets = inputs.buckets
        if buckets in self.parts:
            self.parts.move_to_end(buckets)
        elif buckets in self.seen:
            del self.seen[buckets]
            self.parts[buckets] = self._recorded(inputs)
            if len(self.parts) > self.most:
                self.parts.popitem(last=False)
        else:
            self.seen[buckets] = None
            if len(self.seen) > MOST_SEEN:
                self.seen.popitem(last=False)
            self.graphs.run(lambda: self._add_gradients(inputs))
            if not self._has_gradients:  # the first ones may share memory
                self._has_gradients = True
                for parameter in self.module.parameters():
                    parameter.grad = None if parameter.grad is None else parameter.grad.clone()
            return
        buffers, replay = self.parts[buckets]
        for to, batch in zip(buffers.batches, inputs.batches, strict=True):
            copy_into(to, batch)
        buffers.goals.copy_(inputs.goals)
        buffers.real.copy_(inputs.real)
        replay()
        self.replayed += 1

    def update(self) -> Callable[[], list[float]]:
        """Update the parameters, and return what waits for three sums over the parts and returns them.

        These are the losses shown and minimised, and the norm of the gradients. Where the minimised loss is not finite,
        or the norm is not and the losses are not scaled, neither this update changes a parameter nor does a later one.
        """
        self._updates += 1
        if self._updates == 1:
            self.graphs.run(self._update_parameters)
        else:
            if self._update is None:
                self._update = self.graphs.record(self._update_parameters)
            self._update()
        return self.graphs.later(self.results)

    def _recorded(self, inputs: PaddedInputs) -> tuple[PaddedInputs, Work]:
        buffers = PaddedInputs(
            tuple(buffers_like(batch) for batch in inputs.batches), inputs.goals.clone(), inputs.real.clone()
        )
        return buffers, self.graphs.record(lambda: self._add_gradients(buffers))

    def _add_gradients(self, inputs: PaddedInputs) -> None:
        losses = self.objective.losses_of(inputs)
        self.scaler.scale(losses.minimised / self.networks).backward()
        self.sums.add_(torch.stack([losses.shown.detach().sum(), losses.minimised.detach()]))

    def _update_parameters(self) -> None:
        parameters = [p for p in self.module.parameters() if p.grad is not None]
        gradients = [p.grad for p in parameters if p.grad is not None]
        scaled = self.scaler.is_enabled()
        if scaled:  # what the scaler finds, it takes for an overflow, and takes no step
            self.failed.copy_(torch.maximum(self.failed, 1 - self.sums[1].isfinite().float()))
            gradients[0].add_(torch.zeros_like(self.failed).masked_fill(self.failed > 0, torch.inf))
        self.scaler.unscale_(self.optimiser)
        norm = nn.utils.get_total_norm(gradients)
        self.results.copy_(torch.cat([self.sums, norm.double()[None]]))
        nn.utils.clip_grads_with_norm_(parameters, self.settings.clip, norm)
        if not scaled:
            self.failed.copy_(torch.maximum(self.failed, 1 - self.results[1:].isfinite().all().float()))
            self.optimiser.found_inf = self.failed  # type: ignore[attr-defined]
        self.scaler.step(self.optimiser)
        self.scaler.update()
        torch._foreach_zero_(gradients)
        self.sums.zero_()


def _as_usual(optimiser: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Let a checkpoint hold the groups as those of an optimiser that is not captured."""
    for group in state["param_groups"]:
        group.update(lr=float(group["lr"]), capturable=False)

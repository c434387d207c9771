"""Data parallel training: the parameters, gradients and sums that processes share."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

TIMEOUT_VARIABLE = "SNE_FAST_PROCESS_TIMEOUT"
TIMEOUT = 600.0
"""Seconds for which processes wait for each other, unless the variable says otherwise."""
_ROLL_CALL = 5.0  # seconds in which processes that are alive notice that another one is not


class World:
    """Processes that train together; one process where no process group of `torch.distributed` was set up.

    Every process holds all parameters and plans the same steps. Each takes its share of the parts of a step, and
    gradients are summed: since losses are divided by the number of networks of the whole step, the sum is the gradient
    of the whole step, whatever the sizes of the shares, also where a share is empty.

    Raises:
        ConnectionError: by every method that waits for other processes, where one of them has ended or does not answer
            within the time-out of the process group; the message names it by its rank.
    """

    def __init__(self) -> None:
        ready = dist.is_available() and dist.is_initialized()
        self.rank, self.size = (dist.get_rank(), dist.get_world_size()) if ready else (0, 1)

    @property
    def first(self) -> bool:
        """True for the one process that writes files and shows progress."""
        return self.rank == 0

    def share_parameters(self, module: nn.Module) -> None:
        """Copy the parameters and buffers of the first process to all others."""
        if self.size > 1:
            for tensor in (*module.parameters(), *module.buffers()):
                self._together(partial(dist.broadcast, tensor.data, 0))

    def share_error(self, error: Exception | None) -> None:
        """Raise the error of the first process, if it has one, in all processes."""
        if self.size > 1:
            message = [None if error is None else str(error)]
            self._together(partial(dist.broadcast_object_list, message, 0))
            if error is None and message[0] is not None:
                raise ConnectionError(f"process {self.rank} of {self.size} ends as the first one does: {message[0]}")
        if error is not None:
            raise error

    def of_first(self, value: Any) -> Any:
        """Return the value that the first process gives, on every process; of plain values."""
        if self.size == 1:
            return value
        message = [value]
        self._together(partial(dist.broadcast_object_list, message, 0))
        return message[0]

    def sum_gradients(self, parameters: Iterable[nn.Parameter], numbers: Tensor) -> Tensor:
        """Sum the gradients over all processes, in one call per dtype; a missing gradient counts as zero.

        Args:
            parameters: of the module, of which at least one requires a gradient.
            numbers: `(k,)`, of this process, to be summed in the same call.

        Returns:
            The sums of the numbers, on every process.
        """
        if self.size == 1:
            return numbers
        by_dtype: dict[torch.dtype, list[nn.Parameter]] = {}
        for parameter in parameters:
            if parameter.requires_grad:
                by_dtype.setdefault(parameter.dtype, []).append(parameter)
        for i, (dtype, group) in enumerate(by_dtype.items()):
            grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in group]
            more = [numbers.to(dtype)] if i == 0 else []
            flat = torch.cat([*(g.reshape(-1) for g in grads), *more])
            self._together(partial(dist.all_reduce, flat))
            *parts, last = flat.split([*(p.numel() for p in group), len(numbers) if more else 0])
            for p, part in zip(group, parts, strict=True):
                p.grad = part.view_as(p)
            numbers = last.to(numbers.dtype) if more else numbers
        return numbers

    def sum(self, *numbers: float, device: torch.device) -> list[float]:
        """Return each number summed over all processes."""
        if self.size == 1:
            return list(numbers)
        total = torch.tensor(numbers, dtype=torch.float64, device=device)
        self._together(partial(dist.all_reduce, total))
        return total.tolist()

    def sum_tensor(self, tensor: Tensor, device: torch.device) -> Tensor:
        """Return a tensor summed over all processes, in which it has one shape; it may be changed.

        Args:
            tensor: of this process.
            device: of the parameters, on which processes talk to each other.
        """
        if self.size == 1:
            return tensor
        total = tensor.to(device)
        self._together(partial(dist.all_reduce, total))
        return total.to(tensor.device)

    def wait(self) -> None:
        """Wait until all processes have come here."""
        if self.size > 1:
            self._together(dist.barrier)

    def _together(self, call: Callable[[], object]) -> None:
        """Make a call that all processes make, and say which of them did not if it fails."""
        begin = time.monotonic()
        try:
            call()
        except RuntimeError as error:
            waited = time.monotonic() - begin
            missing = self._missing()
            who = f"process {missing[0]}" if len(missing) == 1 else f"processes {', '.join(map(str, missing))}"
            if not missing:
                who = "another process"
            raise ConnectionError(
                f"process {self.rank} of {self.size} waited {waited:.0f} s for {who}, which ended, was stopped or is "
                f"too slow; start all again to resume from the checkpoint, and for slow steps set {TIMEOUT_VARIABLE} "
                "to more seconds"
            ) from error

    def _missing(self) -> list[int]:
        """Return the ranks of the processes that do not say within a few seconds that they are here."""
        others = [rank for rank in range(self.size) if rank != self.rank]
        try:
            store = dist.distributed_c10d._get_default_store()
            store.set(f"sne_fast/here/{self.rank}", "1")
        except RuntimeError:
            return [0] if self.rank else others  # the first process holds the store where no launcher does
        end = time.monotonic() + _ROLL_CALL
        while others and time.monotonic() < end:
            time.sleep(0.1)
            try:
                others = [rank for rank in others if not store.check([f"sne_fast/here/{rank}"])]
            except RuntimeError:
                return [0]
        return others


def timeout() -> timedelta:
    """Return for how long processes wait for each other.

    Raises:
        ValueError: the environment variable is no number of seconds above 0.
    """
    text = os.environ.get(TIMEOUT_VARIABLE, "").strip()
    try:
        seconds = float(text) if text else TIMEOUT
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < 1e9:
        raise ValueError(f"{TIMEOUT_VARIABLE} must be a number of seconds above 0, got {text!r}")
    return timedelta(seconds=seconds)


@contextmanager
def processes() -> Iterator[World]:
    """Join the processes that `torchrun` started, by gloo on CPUs and nccl on GPUs; without it there is one process.

    They wait for each other for at most ten minutes, or as many seconds as `SNE_FAST_PROCESS_TIMEOUT` says.

    Raises:
        ConnectionError: the others do not come.
        ValueError: `SNE_FAST_PROCESS_TIMEOUT` is no number of seconds above 0.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield World()
        return
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    limit = timeout()
    try:
        dist.init_process_group("nccl" if on_gpu else "gloo", timeout=limit)
    except RuntimeError as error:
        raise ConnectionError(
            f"process {os.environ.get('RANK')} of {os.environ['WORLD_SIZE']} could not join the others within "
            f"{limit.total_seconds():.0f} s; start all again, or set {TIMEOUT_VARIABLE} to more seconds"
        ) from error
    try:
        yield World()
    finally:
        dist.destroy_process_group()

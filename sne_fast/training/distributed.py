"""Data parallel training: the parameters, gradients and sums that processes share."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn


class World:
    """Processes that train together; one process where no process group of `torch.distributed` was set up.

    Every process holds all parameters and plans the same batches. Each takes its shard of a batch, and gradients are
    summed: since losses are divided by the number of networks of the whole batch, the sum is the gradient of the whole
    batch, whatever the sizes of the shards, also where a shard is empty.
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
                dist.broadcast(tensor.data, 0)

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Sum the gradients over all processes, in one call per dtype; a missing gradient counts as zero."""
        if self.size == 1:
            return
        by_dtype: dict[torch.dtype, list[nn.Parameter]] = {}
        for parameter in parameters:
            if parameter.requires_grad:
                by_dtype.setdefault(parameter.dtype, []).append(parameter)
        for group in by_dtype.values():
            grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in group]
            flat = torch.cat([g.reshape(-1) for g in grads])
            dist.all_reduce(flat)
            for p, part in zip(group, flat.split([p.numel() for p in group]), strict=True):
                p.grad = part.view_as(p)

    def sum(self, *numbers: float, device: torch.device) -> list[float]:
        """Return each number summed over all processes."""
        if self.size == 1:
            return list(numbers)
        total = torch.tensor(numbers, dtype=torch.float64, device=device)
        dist.all_reduce(total)
        return total.tolist()

    def wait(self) -> None:
        """Wait until all processes have come here."""
        if self.size > 1:
            dist.barrier()


@contextmanager
def processes() -> Iterator[World]:
    """Join the processes that `torchrun` started, by gloo on CPUs and nccl on GPUs; without it there is one process."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield World()
        return
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("nccl" if on_gpu else "gloo")
    try:
        yield World()
    finally:
        dist.destroy_process_group()


def part_of(places: list[int], rows: Tensor) -> Tensor:
    """Return the rows of a tensor at some places; without places, an empty tensor."""
    return rows[torch.tensor(places, dtype=torch.int64, device=rows.device)]

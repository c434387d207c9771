"""Data parallel training: what one process of several must share with the others."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn


class World:
    """The processes that train together; a world of one where none was set up.

    Every process holds all parameters and plans the same batches. Each takes its shard of a batch, and gradients are
    summed: with losses divided by the networks of the whole batch that is the gradient of the whole batch, whatever
    the shards' sizes, also where a shard is empty.
    """

    def __init__(self) -> None:
        ready = dist.is_available() and dist.is_initialized()
        self.rank, self.size = (dist.get_rank(), dist.get_world_size()) if ready else (0, 1)

    @property
    def first(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    def share_parameters(self, module: nn.Module) -> None:
        """Parameters and buffers of the first process to all."""
        if self.size > 1:
            for tensor in (*module.parameters(), *module.buffers()):
                dist.broadcast(tensor.data, 0)

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Gradients summed over all processes, in one call per dtype; a missing one counts as zero."""
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
        """Each number summed over all processes."""
        if self.size == 1:
            return list(numbers)
        total = torch.tensor(numbers, dtype=torch.float64, device=device)
        dist.all_reduce(total)
        return total.tolist()

    def wait(self) -> None:
        """Until all processes are here."""
        if self.size > 1:
            dist.barrier()


@contextmanager
def processes() -> Iterator[World]:
    """Join the processes that `torchrun` started (gloo on CPUs, nccl on GPUs); a world of one without it."""
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
    """Rows of a tensor by their places, as an empty tensor where there are none."""
    return rows[torch.tensor(places, dtype=torch.int64, device=rows.device)]

"""Workers of a Dask cluster that encode units."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ..extras import require
from ..free_memory import available_bytes
from .dataset import EmbeddingDataset
from .units import Unit
from .workers import Job, encode, job_of

if TYPE_CHECKING:
    from distributed import Client, Future

__all__ = ["Cluster"]

MEMORY = 0.8
"""Share of the memory of a Dask worker that may be used; its nanny ends it at 0.95."""


class Cluster:
    """A Dask cluster; each worker encodes one unit at a time, with as many threads as it has.

    A worker that dies is restarted by its nanny, and its unit is tried by Dask on another; a unit that Dask gives up
    comes back. At most as many units as there are workers are given to Dask at once, so that a death concerns one unit,
    and at most that many results wait here.

    Args:
        dataset: whose units are encoded.
        scheduler: address of the scheduler, or a client of it, which stays open.
        device: of the encoder on the workers.
        max_memory: bytes that a network may take on each worker; None is what is free there. It is never more than the
            worker's own limit leaves.

    Raises:
        ModuleNotFoundError: distributed is missing.
        OSError: there is no scheduler at that address.
    """

    def __init__(
        self, dataset: EmbeddingDataset, scheduler: str | Client, device: str, max_memory: float | None
    ) -> None:
        require("distributed", extra="cluster", why="encoding on a Dask cluster")
        from distributed import Client, as_completed

        self._own = isinstance(scheduler, str)
        self._client = Client(scheduler, set_as_default=False) if isinstance(scheduler, str) else scheduler
        self._futures: dict[Future, Unit] = {}
        self._done = as_completed(loop=self._client.loop)
        # A task's result and no scattered data: Dask makes it again when the worker that holds it dies.
        self._job = self._client.submit(_same, job_of(dataset, device, max_memory), pure=False)

    @property
    def count(self) -> int:
        """Workers, at least 1."""
        return max(1, len(self._client.nthreads()))

    def free(self) -> int:
        """Return the number of units that may be started."""
        return max(0, self.count - len(self._futures))

    def start(self, unit: Unit) -> None:
        """Give a unit to Dask."""
        future = self._client.submit(_encode, self._job, unit, pure=False)
        self._futures[future] = unit
        self._done.add(future)

    def finished(self) -> Iterator[tuple[Unit, Any, int]]:
        """Wait for a unit; yield it with its table, or with None and the number of workers that died with it."""
        from distributed import KilledWorker

        future = next(self._done)
        unit = self._futures.pop(future)
        if future.cancelled():
            address = self._client.scheduler.addr if self._client.scheduler else "of the cluster"
            raise ConnectionError(f"the scheduler {address} has lost the work; encode again, what is done stays done")
        error = future.exception()
        if error is None:
            yield unit, future.result(), 0
        elif isinstance(error, KilledWorker):
            yield unit, None, error.allowed_failures + 1
        else:
            raise error

    def close(self) -> None:
        """Cancel what has not started; what runs ends by itself, and its result is dropped."""
        if self._futures:
            self._client.cancel(list(self._futures))
        self._job.release()
        if self._own:
            self._client.close()


def _same(job: Job) -> Job:
    return job


def _encode(job: Job, unit: Unit) -> Any:
    """Encode a unit on a worker, within its threads and its memory."""
    import torch
    from distributed import get_worker

    worker = get_worker()
    torch.set_num_threads(worker.state.nthreads)
    limit, max_memory = worker.memory_manager.memory_limit, job.options["max_memory"]
    if limit is not None:
        left = max(1.0, MEMORY * limit - worker.monitor.proc.memory_info().rss)
        max_memory = min(available_bytes() if max_memory is None else max_memory, left)
    return encode(job, unit, max_memory=max_memory)

"""Units done one after another: in this process, in several on this machine, or on a cluster."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any, Protocol

from .cluster import Cluster
from .dataset import EmbeddingDataset
from .processes import Processes
from .units import Unit, cut_for, embed_unit, halves, schema

if TYPE_CHECKING:
    from distributed import Client

__all__ = ["Work", "embed_units"]

DEATHS = 3
"""Times that a process may die with a network, before it counts as failed."""


class Carrier(Protocol):
    """Where units are encoded."""

    @property
    def count(self) -> int:
        """Processes among which the units are shared."""

    def free(self) -> int:
        """Return the number of units that may be started."""

    def start(self, unit: Unit) -> None:
        """Start a unit."""

    def finished(self) -> Iterator[tuple[Unit, Any, int]]:
        """Wait for units; yield each with its table, or with None and the number of processes that died with it."""

    def close(self) -> None:
        """End what is going on."""


class Work:
    """Units that are encoded while it is iterated over, and how far that is.

    Attributes:
        left: the networks that are not done, by their paths, each with the number of its units.
        done: the paths of those that this work has done.
        weights: those that are encoded.
        total: weights of all units.
        seconds: since the first unit was asked for.
    """

    def __init__(self, waiting: Sequence[Unit], units: Generator[Unit, None, None]) -> None:
        self.left = Counter(network.uri for unit in waiting for network in unit.networks)
        self.done: set[str] = set()
        self.weights, self.total = 0, sum(unit.weights for unit in waiting)
        self.seconds = 0.0
        self._units = units

    @property
    def share(self) -> float:
        """Share of the weights that is done, in [0, 1]."""
        return self.weights / self.total if self.total else 1.0

    def __iter__(self) -> Iterator[Unit]:
        start = time.perf_counter()
        with closing(self._units):  # ends processes where the loop is left
            for unit in self._units:
                self._add(unit)
                self.seconds = time.perf_counter() - start
                yield unit

    def _add(self, unit: Unit) -> None:
        self.weights += unit.weights
        for network in unit.networks:
            self.left[network.uri] -= 1
            if self.left[network.uri] == 0:  # the last of its runs of layers
                del self.left[network.uri]
                self.done.add(network.uri)


def embed_units(
    dataset: EmbeddingDataset,
    units: Sequence[Unit],
    *,
    workers: int = 1,
    scheduler: str | Client | None = None,
    device: str = "cpu",
    max_memory: float | None = None,
    retry: bool = False,
) -> Work:
    """Encode units and write each to the dataset as soon as it is done; what is done already is left out.

    Args:
        dataset: where results go.
        units: of `plan`; those of several networks are cut where there are several processes.
        workers: processes on this machine, each with its share of the threads; 1 works in this process.
        scheduler: address of the scheduler of a Dask cluster, such as "tcp://host:8786", or a client of it; None is
            this machine. The workers need this package and see the networks under the same paths; the encoder is
            sent to them, and results come back and are written here.
        device: of the encoder.
        max_memory: bytes that a network may take in each process; None is what is free there.
        retry: whether networks that failed before are encoded again.

    Returns:
        An iterable of the units, each as soon as its file is written, which tells how far it is. A unit that kills its
        process is tried again, at the second time in two parts, so that a network that kills three processes is
        recorded as failed and takes no other with it. (A cluster tries by itself as often as its
        `distributed.scheduler.allowed-failures` says, before it gives the unit back.)

    Raises:
        ValueError: `workers` and `scheduler`.
        ModuleNotFoundError: distributed is missing; like the next, when the first unit is asked for.
        OSError: there is no scheduler at that address, or it went away.
    """
    if scheduler is not None and workers != 1:
        raise ValueError("embed_units: give workers= or scheduler=, not both; a cluster has its own workers")
    waiting = dataset.missing(units, retry=retry)
    return Work(waiting, _run(dataset, waiting, workers, scheduler, device, max_memory))


def _run(
    dataset: EmbeddingDataset,
    units: Sequence[Unit],
    workers: int,
    scheduler: str | Client | None,
    device: str,
    max_memory: float | None,
) -> Generator[Unit, None, None]:
    carrier: Carrier
    if not units:
        return
    if scheduler is not None:
        carrier = Cluster(dataset, scheduler, device, max_memory)
    elif workers > 1:
        carrier = Processes(dataset, workers, device, max_memory)
    else:
        carrier = _Here(dataset, device, max_memory)
    try:
        queue, running, deaths = deque(cut_for(units, carrier.count)), 0, Counter[str]()
        while queue or running:
            for _ in range(min(carrier.free(), len(queue))):
                carrier.start(queue.popleft())
                running += 1
            for unit, table, died in carrier.finished():
                running -= 1
                deaths[unit.id] += died
                if table is None and (deaths[unit.id] < DEATHS or len(unit.networks) > 1):
                    queue.extendleft(_after_death(unit, deaths))
                    continue
                dataset.write(unit, _died(dataset, unit, deaths[unit.id]) if table is None else table)
                yield unit
    finally:
        carrier.close()


class _Here:
    """The process that asks for the units."""

    count = 1

    def __init__(self, dataset: EmbeddingDataset, device: str, max_memory: float | None) -> None:
        self._encoder = dataset.encoder.to(device)
        self._options = {**dataset.options, "max_memory": max_memory}
        self._given: list[Unit] = []

    def free(self) -> int:
        return 1 - len(self._given)

    def start(self, unit: Unit) -> None:
        self._given.append(unit)

    def finished(self) -> Iterator[tuple[Unit, Any, int]]:
        unit = self._given.pop()
        yield unit, embed_unit(self._encoder, unit, **self._options), 0

    def close(self) -> None:
        pass


def _after_death(unit: Unit, deaths: Counter[str]) -> list[Unit]:
    """Return what to try after a death during a unit: the same, or its halves from the second time on."""
    if deaths[unit.id] < 2 or len(unit.networks) == 1:
        return [unit]
    parts = halves(unit)
    deaths.update({part.id: 1 for part in parts})
    return parts


def _died(dataset: EmbeddingDataset, unit: Unit, deaths: int) -> Any:
    import pyarrow as pa

    error = f"the process that encoded it died {deaths} times, perhaps for lack of memory"
    run = {} if unit.layers is None else {"first_layer": unit.layers[0], "num_layers": unit.layers[2]}
    rows = [{**vars(network), "error": error, "seconds": 0.0, **run} for network in unit.networks]
    return pa.Table.from_pylist(rows, schema=schema(dataset.encoder))

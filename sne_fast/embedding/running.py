"""Units done one after another, or by several processes on this machine."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import threading
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import torch

from ..free_memory import available_bytes
from ..nn.encoder import SNE
from ..nn.predictor import Predictor, load_encoder
from .dataset import MODEL, EmbeddingDataset
from .units import Unit, cut_for, embed_unit, schema

__all__ = ["embed_units"]

DEATHS = 3
"""Times that a process may die with a network, before it counts as failed."""
START = "spawn"
"""How processes start; a fork of a process with threads may hang."""

_loaded: dict[str, SNE | Predictor] = {}


def embed_units(
    dataset: EmbeddingDataset,
    units: Sequence[Unit],
    *,
    workers: int = 1,
    device: str = "cpu",
    max_memory: float | None = None,
    retry: bool = False,
) -> Iterator[Unit]:
    """Encode units and write each to the dataset; what is done already is left out.

    Args:
        dataset: where results go.
        units: of `plan`; those of several networks are cut where there are several processes.
        workers: processes, each with its share of the threads; 1 works in this process.
        device: of the encoder.
        max_memory: bytes that a network may take in each process; None is what is free.
        retry: whether networks that failed before are encoded again.

    Yields:
        Each unit, as soon as its file is written. A unit that kills its process is tried again, at the second time in
        two parts, so that a network that kills three processes is recorded as failed and takes no other with it.
    """
    waiting = cut_for(dataset.missing(units, retry=retry), workers)
    if workers == 1:
        for unit in waiting:
            found = embed_unit(dataset.encoder.to(device), unit, max_memory=max_memory, **dataset.options)
            dataset.write(unit, found)
            yield unit
        return
    if max_memory is None:
        max_memory = available_bytes() / workers
    job = (str(dataset.path / MODEL), device, {**dataset.options, "max_memory": max_memory})
    threads = max(1, torch.get_num_threads() // workers)
    queue, deaths = deque(waiting), Counter[str]()
    processes: list[ProcessPoolExecutor | None] = [None] * workers  # one each, so that a death names its unit
    running: dict[Future[Any], tuple[int, Unit]] = {}
    try:
        while queue or running:
            for i in set(range(workers)) - {place for place, _ in running.values()}:
                if queue:
                    unit = queue.popleft()
                    processes[i], future = _started(processes[i], threads, *job, unit)
                    running[future] = i, unit
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                i, unit = running.pop(future)
                try:
                    table = future.result()
                except BrokenProcessPool:
                    processes[i] = None
                    deaths[unit.id] += 1
                    if deaths[unit.id] < DEATHS or len(unit.networks) > 1:
                        queue.extendleft(_after_death(unit, deaths))
                        continue
                    table = _died(dataset, unit)
                dataset.write(unit, table)
                yield unit
    finally:
        for left in processes:
            if left is not None:
                left.shutdown(cancel_futures=True)


def _started(process: ProcessPoolExecutor | None, threads: int, *job: Any) -> tuple[ProcessPoolExecutor, Future[Any]]:
    """Start a job in a process, or in a new one where there is none or it died while it was idle."""
    if process is not None:
        with contextlib.suppress(BrokenProcessPool):
            return process, process.submit(_embed, *job)
    context = multiprocessing.get_context(START)
    process = ProcessPoolExecutor(1, mp_context=context, initializer=_begin, initargs=(threads,))
    return process, process.submit(_embed, *job)


def _begin(threads: int) -> None:
    """Prepare a process that works here, and end it when this one is killed, as it would wait for work for ever."""
    torch.set_num_threads(threads)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _after_death(unit: Unit, deaths: Counter[str]) -> list[Unit]:
    """Return what to try after a death during a unit: the same, or its halves from the second time on."""
    if deaths[unit.id] < 2 or len(unit.networks) == 1:
        return [unit]
    middle = len(unit.networks) // 2
    halves = [Unit(unit.networks[:middle]), Unit(unit.networks[middle:])]
    deaths.update({half.id: 1 for half in halves})
    return halves


def _embed(model: str, device: str, options: dict[str, Any], unit: Unit) -> Any:
    """Encode a unit in a process of its own, which loads the encoder once."""
    if model not in _loaded:
        _loaded[model] = load_encoder(model, device=device)
    return embed_unit(_loaded[model], unit, **options)


def _died(dataset: EmbeddingDataset, unit: Unit) -> Any:
    import pyarrow as pa

    error = f"the process that encoded it died {DEATHS} times, perhaps for lack of memory"
    run = {} if unit.layers is None else {"first_layer": unit.layers[0], "num_layers": unit.layers[2]}
    rows = [{**vars(network), "error": error, "seconds": 0.0, **run} for network in unit.networks]
    return pa.Table.from_pylist(rows, schema=schema(dataset.encoder))

"""Units done one after another, or by several processes on this machine."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch

from ..free_memory import available_bytes
from ..nn.encoder import SNE
from ..nn.predictor import Predictor
from ..nn.pretrained import read_config, saved_class
from .dataset import MODEL, EmbeddingDataset
from .units import Unit, embed_unit, schema

__all__ = ["embed_units"]

DEATHS = 3
"""Times that a unit may be at work when a process dies, before it counts as failed."""

_loaded: dict[str, SNE | Predictor] = {}


def embed_units(
    dataset: EmbeddingDataset,
    units: Sequence[Unit],
    *,
    workers: int = 1,
    device: str = "cpu",
    max_memory: float | None = None,
) -> Iterator[Unit]:
    """Encode units and write each to the dataset; units that are done already are left out.

    Args:
        dataset: where results go.
        units: of `plan`.
        workers: processes, each with its share of the threads; 1 works in this process.
        device: of the encoder.
        max_memory: bytes that a network may take in each process; None is what is free.

    Yields:
        Each unit, as soon as its file is written. Where processes die three times during a unit, its networks are
        recorded as failed.
    """
    waiting = dataset.missing(units)
    if workers == 1:
        for unit in waiting:
            found = embed_unit(dataset.encoder.to(device), unit, max_memory=max_memory, **dataset.options)
            dataset.write(unit, found)
            yield unit
        return
    if max_memory is None:
        max_memory = available_bytes() / workers
    deaths: dict[str, int] = {}
    threads = max(1, torch.get_num_threads() // workers)
    while waiting:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(
            workers, mp_context=context, initializer=torch.set_num_threads, initargs=(threads,)
        ) as pool:
            running: dict[Future[Any], Unit] = {}
            queue = list(waiting)
            try:
                while queue or running:
                    while queue and len(running) < workers:  # no more, so that a death names few units
                        unit = queue.pop(0)
                        job = (str(dataset.path / MODEL), device, unit, {**dataset.options, "max_memory": max_memory})
                        running[pool.submit(_embed, *job)] = unit
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        unit = running[future]
                        table = future.result()
                        del running[future]
                        waiting.remove(unit)
                        dataset.write(unit, table)
                        yield unit
            except BrokenProcessPool:
                for unit in running.values():
                    deaths[unit.id] = deaths.get(unit.id, 0) + 1
        for unit in [unit for unit in waiting if deaths.get(unit.id, 0) >= DEATHS]:
            waiting.remove(unit)
            dataset.write(unit, _died(dataset, unit))
            yield unit


def _embed(model: str, device: str, unit: Unit, options: dict[str, Any]) -> Any:
    """Encode a unit in a process of its own, which loads the encoder once."""
    if model not in _loaded:
        kind = Predictor if saved_class(read_config(Path(model))) == "Predictor" else SNE
        _loaded[model] = kind.from_pretrained(model, device=device)
    return embed_unit(_loaded[model], unit, **options)


def _died(dataset: EmbeddingDataset, unit: Unit) -> Any:
    import pyarrow as pa

    encoder = dataset.encoder
    width = encoder.out_features if isinstance(encoder, SNE) else encoder.in_features
    error = f"the process that encoded it died {DEATHS} times, perhaps for lack of memory"
    rows = [{**vars(network), "error": error} for network in unit.networks]
    return pa.Table.from_pylist(rows, schema=schema(width, encoder))

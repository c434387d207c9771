"""Workers that die while they encode; other processes import them from here."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

from sne_fast.embedding import Unit, cluster, processes
from sne_fast.embedding.cluster import _encode as encode_on_cluster
from sne_fast.embedding.workers import Job, encode

LARGE = 5000
"""Weights of a unit at which a worker dies."""


def dies_on_the_first_call(job: Job, unit: Unit) -> Any:
    """Die if the file that `DIES_ONCE` names is not there yet, and make it."""
    try:
        os.close(os.open(os.environ["DIES_ONCE"], os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return encode(job, unit)
    os._exit(9)


def tells_its_id_and_sleeps(job: Job, unit: str) -> None:
    Path(f"{unit}.new").write_text(str(os.getpid()))
    os.replace(f"{unit}.new", unit)
    time.sleep(60)


def starts_a_worker_and_is_killed(file: str) -> None:
    processes.encode = tells_its_id_and_sleeps  # type: ignore[assignment]
    processes.START = "fork"
    processes._started(Job("", {}, {}, "cpu"), 1).pipe.send(file)
    while not os.path.exists(file):
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)


def dies_on_large_networks(job: Job, unit: Unit) -> Any:
    if unit.weights > LARGE:
        os._exit(9)
    return encode(job, unit)


def dies_on_the_cluster(job: Job, unit: Unit) -> Any:
    """Die with every unit that holds kills.safetensors."""
    if any(Path(network.uri).name == "kills.safetensors" for network in unit.networks):
        os._exit(9)
    return encode(job, unit)


def has_little_memory(job: Job, unit: Unit) -> Any:
    """Encode in a worker whose limit is little more than what it has taken."""
    from distributed import get_worker

    worker = get_worker()
    before = worker.memory_manager.memory_limit
    worker.memory_manager.memory_limit = int(worker.monitor.proc.memory_info().rss / cluster.MEMORY) + 2**20
    try:
        return encode_on_cluster(job, unit)
    finally:
        worker.memory_manager.memory_limit = before


def slow_down() -> None:
    """Let every unit of forked workers take a while."""

    def slowly(job: Job, unit: Unit) -> Any:
        time.sleep(0.03)
        return encode(job, unit)

    processes.encode = slowly

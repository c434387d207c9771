"""Workers that die while they encode; other processes import them from here."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

from sne_fast.embedding import Unit, processes
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

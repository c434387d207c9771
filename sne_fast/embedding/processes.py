"""Processes on this machine that encode units."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from ..free_memory import available_bytes
from .dataset import EmbeddingDataset
from .units import Unit
from .workers import Job, encode, job_of

__all__ = ["Processes"]

BEGUN, DIED = "begun", "died"
"""What a process says when it is there, and what is said of one that is not."""
START = "spawn"
"""How processes start; a fork of a process with threads may hang."""


@dataclass
class Worker:
    """A process, this end of the pipe to it, and whether it has said that it is there."""

    process: BaseProcess
    pipe: Connection
    begun: bool = False

    def receive(self) -> Any:
        """Return what the process has sent, or `DIED`; call it when there is something or the process has ended."""
        with contextlib.suppress(EOFError, OSError):
            if self.pipe.poll():
                return self.pipe.recv()
        self.process.kill()
        self.process.join()
        return DIED


class Processes:
    """Several processes, each with its share of the threads and of the memory, and one unit at a time.

    Args:
        dataset: whose units are encoded.
        count: of the processes.
        device: of the encoder.
        max_memory: bytes that a network may take in each process; None is what is free.
    """

    def __init__(self, dataset: EmbeddingDataset, count: int, device: str, max_memory: float | None) -> None:
        self.count = count
        self._job = job_of(dataset, device, available_bytes() / count if max_memory is None else max_memory)
        self._idle: list[Worker] = []
        self._busy: list[tuple[Worker, Unit]] = []

    def free(self) -> int:
        """Return the number of units that may be started."""
        return self.count - len(self._busy)

    def start(self, unit: Unit) -> None:
        """Start a unit in an idle process, or in a new one where there is none or it died."""
        while self._idle:
            worker = self._idle.pop()
            with contextlib.suppress(OSError):
                if worker.process.is_alive():
                    worker.pipe.send(unit)
                    break
        else:
            worker = _started(self._job, max(1, torch.get_num_threads() // self.count))
            self._busy.append((worker, unit))
            with contextlib.suppress(OSError):  # of one that ended at once, which `finished` says
                worker.pipe.send(unit)
            return
        self._busy.append((worker, unit))

    def finished(self) -> Iterator[tuple[Unit, Any, int]]:
        """Wait for units; yield each with its table, or with None and the number of processes that died with it.

        Raises:
            ChildProcessError: a process ended before it came to its unit.
        """
        ready = wait([end for worker, _ in self._busy for end in (worker.pipe, worker.process.sentinel)])
        for worker, unit in list(self._busy):
            if worker.pipe not in ready and worker.process.sentinel not in ready:
                continue
            found = worker.receive()
            if found == BEGUN:
                worker.begun = True
                continue
            self._busy.remove((worker, unit))
            if found == DIED:
                if not worker.begun:
                    raise ChildProcessError(
                        f"a process that was to encode ended with exit code {worker.process.exitcode} before it began; "
                        "a script must call embed_units under `if __name__ == '__main__':`"
                    )
                yield unit, None, 1
                continue
            self._idle.append(worker)
            if isinstance(found, Exception):
                raise found
            yield unit, found, 0

    def close(self) -> None:
        """End the processes at once; what they have not finished is lost."""
        workers = [*self._idle, *(worker for worker, _ in self._busy)]
        for worker in workers:
            worker.process.kill()
        for worker in workers:
            worker.process.join()
            worker.pipe.close()


def _started(job: Job, threads: int) -> Worker:
    context: Any = multiprocessing.get_context(START)
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs, job, threads), daemon=True)
    # Ctrl-C reaches all processes of a terminal: this one alone acts on it, and ends the others.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    theirs.close()
    return Worker(process, ours)


def serve(pipe: Connection, job: Job, threads: int) -> None:
    """Encode the units that come through a pipe until it is closed; end when the process at its other end is killed."""
    torch.set_num_threads(threads)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:  # a unit may take minutes
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    pipe.send(BEGUN)
    while True:
        try:
            unit = pipe.recv()
        except EOFError:
            return
        try:
            found = encode(job, unit)
        except Exception as error:
            found = error
        pipe.send(found)

"""The checkpoint of a training that is under way: its lock, what it resumes from, and when it is written."""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from ..atomic_files import remove_leftovers
from ..file_locks import holding
from .distributed import World
from .fingerprint import Fingerprint, as_recorded, in_use
from .progress import Progress, restore
from .steps import Trainer


class Checkpoint:
    """The file from which a training resumes; without a path it does nothing.

    Args:
        path: of the file, or None.
        fingerprint: of the training; only that of the first process is used.
        augment: the augmentation of the training, whose values may change in use.
        seconds: between two writes within an epoch.
        world: the processes, of which the first one writes.
    """

    def __init__(self, path: Path | None, fingerprint: Fingerprint, augment: Any, seconds: float, world: World) -> None:
        self.path, self.fingerprint, self.augment, self.seconds = path, fingerprint, augment, seconds
        self.world = world
        self.states: dict[str, Any] | None = None
        self._written = time.monotonic()

    def open(self, stack: ExitStack, epochs: int, device: torch.device) -> Progress:
        """Hold the file until the stack ends, and return where the training stands.

        Raises:
            ValueError: a file that is damaged, no checkpoint, or of another training.
            BlockingIOError: another training is writing it.
            OSError: it cannot be written, or not every process can read it.
        """
        if self.path is None:
            return Progress()
        self.world.share_error(_hold(self.path, stack) if self.world.first else None)
        if not self.world.of_first(self.path.exists()):
            return Progress()
        state, error = Progress(), None
        if self.world.first:
            try:
                state, self.states = Progress.load(self.path, self.fingerprint, epochs, device)
            except ValueError as found:
                error = found
        self.world.share_error(error)
        if not self.world.first:
            if not self.path.exists():
                raise FileNotFoundError(
                    f"fit: checkpoint {str(self.path)!r} is there for the first process and not for process "
                    f"{self.world.rank}; give a path that all machines share"
                )
            state, self.states = Progress.load(self.path, None, epochs, device)
        return state

    @property
    def holds_state(self) -> bool:
        """Whether `restore` will restore parameters."""
        return self.states is not None

    def restore(self, trainer: Trainer) -> None:
        """Restore the parameters and the states that the file holds, if there is one.

        Raises:
            ValueError: they are those of others.
        """
        if self.path is not None and self.states is not None:
            restore(self.path, self.states, trainer.module, trainer.optimiser, trainer.scaler)
            if self.world.first:
                self.fingerprint = as_recorded(self.fingerprint, self.states["fingerprint"])
            self.states = None

    def save(self, state: Progress, trainer: Trainer) -> None:
        """Write the file.

        Raises:
            OSError: it cannot be written.
        """
        if self.path is None or not self.world.first:
            return
        self.fingerprint = in_use(self.fingerprint, self.augment)
        state.save(self.path, self.fingerprint, trainer.module, trainer.optimiser, trainer.scaler)
        self._written = time.monotonic()

    def save_in_time(self, state: Progress, trainer: Trainer) -> None:
        """Write the file within an epoch, if it has not been written for some time.

        Raises:
            ValueError: the state is not finite.
            OSError: it cannot be written.
        """
        if self.path is None or not self.world.first or time.monotonic() - self._written < self.seconds:
            return
        trainer.settle(state)
        trainer.check_finite(state.epoch)
        self.save(state, trainer)


def _hold(path: Path, stack: ExitStack) -> Exception | None:
    """Lock a checkpoint until the stack ends, or return why it cannot be written."""
    try:
        lock = path.with_name(f".{path.name}.lock")
        stack.enter_context(holding(lock, f"fit: checkpoint {str(path)!r}", "give another path"))
    except OSError as error:
        return error
    remove_leftovers(path.parent)
    return None

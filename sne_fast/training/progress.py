"""Files of a training: the checkpoint from which it resumes, and the log of its epochs."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..atomic_files import replacing
from ..data.pickles import load_plain
from ..extras import require
from .settings import FitSettings, History

FORMAT = 1


class Log(Protocol):
    """A log of a training, for instance :class:`CsvLog`."""

    def resume(self, epochs: int) -> None:
        """Prepare for the epoch after the first `epochs`, and drop rows of later ones: an interrupted run left them."""

    def __call__(self, epoch: int, row: Mapping[str, float]) -> None:
        """Take the numbers of an epoch, by name."""


class CsvLog:
    """A log with one row per epoch in a CSV file; a resumed training continues it where its checkpoint stands.

    Args:
        path: the file; missing folders are made.

    Example:
        >>> log = CsvLog("log.csv")
        >>> log.resume(0)
        >>> log(0, {"train_loss": 0.5})
        >>> print(log.path.read_text().strip())
        epoch,train_loss
        0,0.5
    """

    def __init__(self, path: str | PathLike[str]) -> None:
        self.path = Path(path)

    def resume(self, epochs: int) -> None:
        """Keep the rows of the first `epochs` epochs and drop all others."""
        kept = []
        if epochs and self.path.exists():
            with open(self.path, newline="", encoding="utf-8") as file:
                kept = [row for row in csv.DictReader(file) if int(row["epoch"]) < epochs]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "w", newline="", encoding="utf-8") as file:
            if kept:
                writer = csv.DictWriter(file, list(kept[0]))
                writer.writeheader()
                writer.writerows(kept)

    def __call__(self, epoch: int, row: Mapping[str, float]) -> None:
        """Append the row of an epoch; the first one decides the columns."""
        empty = self.path.stat().st_size == 0
        with open(self.path, "a", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            if empty:
                writer.writerow(["epoch", *row])
            writer.writerow([epoch, *row.values()])


class TensorBoardLog:
    """A log with one row per epoch for TensorBoard, which the extra `tensorboard` installs.

    Args:
        folder: the folder to give to `tensorboard --logdir`.

    Raises:
        ModuleNotFoundError: TensorBoard is not installed.
    """

    def __init__(self, folder: str | PathLike[str]) -> None:
        require("tensorboard", extra="tensorboard", why="TensorBoardLog")
        from torch.utils.tensorboard import SummaryWriter

        self._make = lambda purge: SummaryWriter(str(folder), purge_step=purge)
        self._writer: Any = None

    def resume(self, epochs: int) -> None:
        """Open the log, and hide the rows after the first `epochs` epochs."""
        self._writer = self._make(epochs or None)

    def __call__(self, epoch: int, row: Mapping[str, float]) -> None:
        """Add the numbers of an epoch as scalars."""
        for name, value in row.items():
            self._writer.add_scalar(name, value, epoch)
        self._writer.flush()


@dataclass
class Progress:
    """State of a training after `epoch` epochs: with it, training resumes bit for bit."""

    settings: FitSettings
    epoch: int
    step: int
    history: History
    lowest: int
    best: dict[str, Tensor] | None

    def save(self, path: Path, predictor: nn.Module, optimiser: torch.optim.Optimizer, scaler: Any) -> None:
        """Write it to one file, with the states of predictor, optimiser and scaler, whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        state = {
            "format": FORMAT, "settings": dataclasses.asdict(self.settings), "epoch": self.epoch, "step": self.step,
            "history": dataclasses.asdict(self.history), "lowest": self.lowest, "best": self.best,
            "predictor": predictor.state_dict(), "optimiser": optimiser.state_dict(), "scaler": scaler.state_dict(),
        }  # fmt: skip
        with replacing(path) as temporary, open(temporary, "wb") as file:
            torch.save(state, file)

    @classmethod
    def load(
        cls, path: Path, settings: FitSettings, predictor: nn.Module, optimiser: torch.optim.Optimizer, scaler: Any
    ) -> Progress:
        """Read it from a file, and load the states of predictor, optimiser and scaler.

        Raises:
            ValueError: the file is no checkpoint of `fit`, or of a training with other settings or another predictor.
        """
        device = next(predictor.parameters()).device
        state = load_plain(path, device=device)
        if not isinstance(state, dict) or state.get("format") != FORMAT:
            raise ValueError(f"fit: checkpoint {str(path)!r} is not one of fit's; give another path or remove it")
        now, then = dataclasses.asdict(settings), state["settings"]
        changed = [f"{k} {then.get(k)!r} then, {v!r} now" for k, v in now.items() if then.get(k) != v]
        if changed:
            raise ValueError(
                f"fit: checkpoint {str(path)!r} is of a training with other settings ({'; '.join(changed)}); train "
                "with the same, or give another path"
            )
        try:
            predictor.load_state_dict(state["predictor"])
            optimiser.load_state_dict(state["optimiser"])
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"fit: checkpoint {str(path)!r} is of another predictor: {error}") from error
        scaler.load_state_dict(state["scaler"])
        return cls(settings, state["epoch"], state["step"], History(**state["history"]), state["lowest"], state["best"])

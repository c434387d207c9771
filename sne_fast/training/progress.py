"""Files of a training: the checkpoint from which it resumes, and the log of its epochs."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..atomic_files import replacing
from ..data.checkpoints import CheckpointError
from ..data.pickles import load_plain
from ..extras import require
from ..regular_files import FileError, open_regular
from .fingerprint import Fingerprint, as_recorded, differences
from .settings import History

FORMAT = 3
_FOREIGN = "fit: checkpoint {} is damaged or is not one of fit's; give another path or remove it"


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
        """Keep the rows of the first `epochs` epochs and drop all others.

        Raises:
            ValueError: there is something else than a CSV file.
        """
        kept = []
        if epochs and self.path.exists():
            try:
                with open_regular(self.path, "r", newline="") as file:
                    kept = [row for row in csv.DictReader(file) if self._epoch(row) < epochs]
            except (csv.Error, UnicodeDecodeError) as error:
                raise ValueError(f"CsvLog: {str(self.path)!r} is no log of a training: {error}") from error
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self.path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
            if kept:
                writer = csv.DictWriter(file, list(kept[0]), extrasaction="ignore")
                writer.writeheader()
                writer.writerows(kept)

    def _epoch(self, row: Mapping[str, str | None]) -> float:
        try:
            return int(row["epoch"] or "")
        except (KeyError, ValueError):  # a line of which a killed run wrote half
            return math.inf

    def __call__(self, epoch: int, row: Mapping[str, float]) -> None:
        """Append the row of an epoch; the first one decides the columns.

        Raises:
            OSError: the file cannot be written; the error names it.
        """
        try:
            with open(self.path, "a", newline="", encoding="utf-8") as file:
                writer = csv.writer(file)
                if file.tell() == 0:
                    writer.writerow(["epoch", *row])
                writer.writerow([epoch, *row.values()])
        except OSError as error:
            error.filename = str(self.path)  # which a full disk does not tell
            raise


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
    """State of a training after `epoch` epochs and `taken` steps of the next: with it, training resumes bit for bit.

    `total` is the summed loss of the networks of those steps.
    """

    epoch: int = 0
    step: int = 0
    taken: int = 0
    total: float = 0.0
    history: History = field(default_factory=History)
    lowest: int = 0
    best: dict[str, Tensor] | None = None

    def save(
        self,
        path: Path,
        fingerprint: Fingerprint,
        predictor: nn.Module,
        optimiser: torch.optim.Optimizer,
        scaler: Any,
    ) -> None:
        """Write it to one file, with the fingerprint of the training and all states, whole or not at all.

        Raises:
            OSError: the file cannot be written; the message names it.
        """
        state = {
            "format": FORMAT, "fingerprint": fingerprint, "epoch": self.epoch, "step": self.step,
            "taken": self.taken, "total": self.total,
            "history": dataclasses.asdict(self.history), "lowest": self.lowest, "best": self.best,
            "predictor": predictor.state_dict(), "optimiser": optimiser.state_dict(), "scaler": scaler.state_dict(),
        }  # fmt: skip
        content = io.BytesIO()  # torch's own writer turns a full disk into a RuntimeError about its archive
        torch.save(state, content)
        try:
            with replacing(path) as temporary, open(temporary, "wb") as file:
                file.write(content.getbuffer())
        except OSError as error:
            why = error.strerror or str(error)
            failed = OSError(f"fit: checkpoint {str(path)!r} cannot be written: {why}; the last one is as it was")
            failed.errno = error.errno
            raise failed from error

    @classmethod
    def load(
        cls,
        path: Path,
        fingerprint: Fingerprint | None,
        epochs: int,
        device: torch.device,
    ) -> tuple[Progress, dict[str, Any]]:
        """Read it from a file, with the states for `restore`.

        Args:
            path: the file.
            fingerprint: of the training that is asked for; None if another process has compared it.
            epochs: how many epochs are asked for.
            device: where tensors go.

        Raises:
            ValueError: the file is no checkpoint of `fit`, is damaged, or is of another training; the message says
                which, and what differs.
        """
        name = f"fit: checkpoint {str(path)!r}"
        foreign = _FOREIGN.format(repr(str(path)))
        try:
            open_regular(path).close()
        except FileError as error:
            raise ValueError(f"fit: checkpoint {error}") from error
        try:
            state = load_plain(path, device=device)
        except CheckpointError as error:
            raise ValueError(foreign) from error
        if not isinstance(state, dict) or type(state.get("format")) is not int:
            raise ValueError(foreign)
        if state["format"] != FORMAT:
            raise ValueError(
                f"{name} has format {state['format']}, this version reads {FORMAT} only, which says what a training "
                "was made of; finish it with the version that began it, or remove it to train anew"
            )
        try:
            then = state["fingerprint"]
            changed = [] if fingerprint is None else differences(then, as_recorded(fingerprint, then))
            place = {key: state[key] for key in ("epoch", "step", "taken", "total", "lowest", "best")}
            found = cls(**place, history=History(**state["history"]))
            complete = all(type(n) is int and n >= 0 for n in (found.epoch, found.step, found.taken, found.lowest))
            complete &= type(found.total) is float
            losses = (found.history.train_loss, found.history.validation_loss)
            complete &= all(type(one) is list and all(type(loss) is float for loss in one) for one in losses)
            states = {key: state[key] for key in ("predictor", "optimiser", "scaler", "best", "fingerprint")}
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(foreign) from error
        if not complete:
            raise ValueError(foreign)
        if changed:
            raise ValueError(
                f"{name} is of another training: {'; '.join(changed)}; train with the same, or give another path"
            )
        if found.epoch > epochs:
            raise ValueError(
                f"{name} has done {found.epoch} epochs, more than the {epochs} asked for; ask for as many, or give "
                "another path"
            )
        spoilt = not_finite(states)
        if spoilt is not None:
            raise ValueError(f"{name} holds values that are not finite, in {spoilt}; remove it to train anew")
        return found, states


def restore(
    path: Path, states: Mapping[str, Any], predictor: nn.Module, optimiser: torch.optim.Optimizer, scaler: Any
) -> None:
    """Load the states that `Progress.load` read.

    Raises:
        ValueError: they are those of others, which only a damaged file holds beside its fingerprint.
    """
    try:
        predictor.load_state_dict(states["predictor"])
        optimiser.load_state_dict(states["optimiser"])
        scaler.load_state_dict(states["scaler"])
    except Exception as error:
        raise ValueError(_FOREIGN.format(repr(str(path)))) from error


def not_finite(state: Any, name: str = "") -> str | None:
    """Return the name of the first tensor or number in nested states that is not finite; None if all are."""
    if isinstance(state, Mapping):
        items: Iterable[tuple[Any, Any]] = state.items()
    elif isinstance(state, list | tuple):
        items = enumerate(state)
    else:
        if isinstance(state, Tensor):
            finite = not state.is_floating_point() or bool(state.isfinite().all())
        else:
            finite = not isinstance(state, float) or math.isfinite(state)
        return None if finite else name
    found = (not_finite(value, f"{name}.{key}" if name else str(key)) for key, value in items)
    return next((one for one in found if one is not None), None)

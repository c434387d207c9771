"""The folder of a job: where the demo, a training or a task keeps its files, and what a task's runs have left there."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..atomic_files import TEMPORARY, remove_leftovers, replacing, write_json
from ..file_locks import holding
from ..regular_files import FileError, open_regular, read_json
from ..training.fingerprint import differences
from ..training.recipes import OLDER_VALUES
from .definitions import Experiment

LOCK = ".lock"
"""The file in a folder that says which process writes there."""


@dataclass(frozen=True)
class Run:
    """One run of a task: an experiment, a row of its table, a seed, and the share of the training networks."""

    experiment: Experiment
    method: str
    seed: int
    share: float = 1.0

    @property
    def name(self) -> str:
        """Its place below `runs/`, without a suffix; the share stands in thousandths."""
        return f"{slug(self.experiment.name)}/{slug(self.method)}-seed{self.seed}{_suffix(self.share)}"


def _suffix(share: float) -> str:
    return "" if share == 1 else f"-share{1000 * share:.0f}"


class RunFolder:
    """Paths of everything that a job writes into its folder.

    The demo and `train` are one run each and write

        predictor/ metrics.json predictions.csv         and the demo zoo/ scatter.png embedding.png
                                                        and train fit.pt recipe.json learning-curve.png
                                                        scatter.png, and log.csv or tensorboard/

    A task makes many runs, each with files of its own, and reports all of them:

        zoos/ runs/EXPERIMENT/METHOD-seedS[-shareT]{.json,.npz,.encodings.npz,.pt,/} results.json results.md *.png

    Tables need the settings and measures (.json) and the predictions of the test networks (.npz), which are small.
    Without the encodings of all networks and the predictor (a folder) the plot of the encodings is left as it is.

    What a run is made of is written when it begins and is part of its result, so that no other run takes either for its
    own: see `begin` and `read_result`.

    Methods that take a `run` return the path of that run of a task, and without one that of the only run.

    Args:
        path: the folder; it need not exist.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    def __str__(self) -> str:
        return str(self.path)

    def result(self, run: Run | None = None) -> Path:
        """Return the path of the JSON file of a run's settings and measures."""
        return self.path / "metrics.json" if run is None else self._of(run, ".json")

    def checkpoint(self, run: Run | None = None) -> Path:
        """Return the path of the state of a training, from which it resumes."""
        return self.path / "fit.pt" if run is None else self._of(run, ".pt")

    def predictor(self, run: Run | None = None) -> Path:
        """Return the path of the folder of the trained predictor, which `Predictor.from_pretrained` reads."""
        return self.path / "predictor" if run is None else self._of(run, "")

    def predicted(self, run: Run) -> Path:
        """Return the path of a run's predictions of its test networks."""
        return self._of(run, ".npz")

    def ceiling(self, experiment: Experiment, seed: int) -> Path:
        """Return the path of the JSON file of the tau that a perfect predictor would reach on a seed's test set."""
        return self._of(Run(experiment, "ceiling", seed), ".json")

    def encodings(self, run: Run) -> Path:
        """Return the path of the encodings of all networks by a run's predictor."""
        return self._of(run, ".encodings.npz")

    @property
    def predictions(self) -> Path:
        """The CSV file of predictions of held-out networks."""
        return self.path / "predictions.csv"

    @property
    def recipe(self) -> Path:
        """The JSON file of the recipe of a training."""
        return self.path / "recipe.json"

    @property
    def log(self) -> Path:
        """The CSV file with one line per epoch."""
        return self.path / "log.csv"

    @property
    def tensorboard(self) -> Path:
        """The folder of TensorBoard's log."""
        return self.path / "tensorboard"

    @property
    def zoo(self) -> Path:
        """The folder of the demo's zoo."""
        return self.path / "zoo"

    @property
    def unfinished(self) -> Path:
        """The JSON file with the settings of a demo, which is there until the demo ends."""
        return self.path / "unfinished.json"

    @property
    def zoos(self) -> Path:
        """The folder of a task's zoos."""
        return self.path / "zoos"

    @property
    def results(self) -> Path:
        """The JSON file of a task's results."""
        return self.path / "results.json"

    @property
    def report(self) -> Path:
        """The Markdown file of a task's tables."""
        return self.path / "results.md"

    def plot(self, kind: str, experiment: Experiment | None = None) -> Path:
        """Return the path of a plot, such as `scatter.png`, or of an experiment's, such as `scatter-sines.png`."""
        return self.path / (f"{kind}.png" if experiment is None else f"{kind}-{slug(experiment.name)}.png")

    def begun(self, run: Run | None = None) -> Path:
        """Return the path of the JSON file that says what an unfinished run is made of."""
        return self.path / "unfinished.json" if run is None else self._of(run, ".begun")

    def in_use(self) -> bool:
        """Return True if the path is a file, or a folder with something in it besides an unfinished run."""
        if not self.path.is_dir():
            return self.path.exists()
        names = {name for name in os.listdir(self.path) if name != LOCK and not TEMPORARY.fullmatch(name)}
        return bool(names) and self.begun().name not in names

    def held(self, command: str) -> AbstractContextManager[None]:
        """Return a context manager that makes the folder and keeps other processes out of it.

        Args:
            command: whose folder it is, as messages name it.

        Raises:
            BlockingIOError: by the context manager, where another process holds it; the message names the process.
            OSError: the folder cannot be written.
        """
        return holding(self.path / LOCK, f"{command}: the folder {str(self)!r}", "choose another --out")

    def check_outputs(self, command: str) -> None:
        """Check, before any work, that nothing stands in the place of the files of a training.

        Args:
            command: whose folder it is, as messages name it.

        Raises:
            OSError: something there is of another kind than what is written; the message names it.
        """
        for path in (self.result(), self.predictions, self.log, self.recipe):
            if path.exists() and not path.is_file():
                raise OSError(
                    f"{command}: {str(path)!r} is no regular file and cannot be replaced; choose another --out"
                )
        if self.predictor().exists() and not self.predictor().is_dir():
            raise OSError(f"{command}: {str(self.predictor())!r} is no folder; choose another --out or remove it")

    def begin(self, made_of: Mapping[str, Any], command: str, run: Run | None = None) -> None:
        """Write what a run is made of, before its first file.

        Args:
            made_of: a fingerprint, see :mod:`sne_fast.training.fingerprint`.
            command: whose run it is, as messages name it.
            run: as of the other methods.

        Raises:
            ValueError: an unfinished run that is made of something else has left files to resume from.
        """
        path = self.begun(run)
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path.parent)
        if path.exists() and (run is None or self.checkpoint(run).exists()):
            changed = differences(read_json(path, dict), made_of)
            if changed:
                raise ValueError(
                    f"{command}: {path} is of an unfinished run with other settings or data ({'; '.join(changed)}); "
                    "finish that one, choose another --out, or remove it"
                )
        write_json(path, made_of)

    def read_result(self, run: Run, made_of: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
        """Read the settings and measures of a run; None if there are none.

        Args:
            made_of: what the run must have been made of, by the names in its result.

        Raises:
            ValueError: it was made of something else, or the file is damaged.
        """
        path = self.result(run)
        if not path.exists():
            return None
        found = _read_result(path)
        if made_of is not None:
            changed = differences({key: found[key] for key in made_of if key in found}, made_of)
            if changed:
                raise ValueError(
                    f"task: {path} holds a run with other settings or data ({'; '.join(changed)}); choose another "
                    "--out or remove it"
                )
        return found

    def write_result(
        self,
        run: Run,
        result: Mapping[str, Any],
        predicted: np.ndarray | None = None,
        encodings: np.ndarray | None = None,
    ) -> None:
        """Write predictions of the test networks and encodings, if there are any, then the result of a run.

        The result comes last: where it says what was measured, the arrays are there too. The checkpoint is removed.
        """
        self.result(run).parent.mkdir(parents=True, exist_ok=True)
        for name, array, path in (
            ("encodings", encodings, self.encodings(run)),
            ("predicted", predicted, self.predicted(run)),
        ):
            if array is not None:
                with replacing(path) as temporary, open(temporary, "wb") as stream:
                    np.savez(stream, **{name: array})  # type: ignore[arg-type]
        write_json(self.result(run), result)
        self.end(run)

    def end(self, run: Run | None = None) -> None:
        """Remove what only an unfinished run needs."""
        self.checkpoint(run).unlink(missing_ok=True)
        self.begun(run).unlink(missing_ok=True)

    def results_of(self, experiment: Experiment, method: str, share: float = 1.0) -> list[dict[str, Any]]:
        """Read the results of a row of a table on a share of the training networks, by seed."""
        stem = self.result(Run(experiment, method, 0)).name.removesuffix("0.json")
        folder, suffix = self.result(Run(experiment, method, 0)).parent, _suffix(share)
        files = [file for file in folder.glob(f"{stem}*{suffix}.json") if suffix or "-share" not in file.stem]
        return sorted((_read_result(file) for file in files), key=lambda result: int(result["seed"]))

    def shares_of(self, experiment: Experiment, method: str) -> list[float]:
        """Return the shares of the training networks that a row of a table has runs of, in order, the whole last."""
        stem = self.result(Run(experiment, method, 0)).name.removesuffix("0.json")
        folder = self.result(Run(experiment, method, 0)).parent
        found = [re.fullmatch(r"\d+(?:-share(\d+))?", file.stem[len(stem) :]) for file in folder.glob(f"{stem}*.json")]
        return sorted({1.0 if match[1] is None else int(match[1]) / 1000 for match in found if match is not None})

    def _of(self, run: Run, suffix: str) -> Path:
        return self.path / "runs" / f"{run.name}{suffix}"


def _read_result(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = read_json(path, dict)
    if isinstance(found.get("settings"), dict):
        found["settings"] = {**OLDER_VALUES, **found["settings"]}
    counts = found.get("networks")
    if type(found.get("seed")) is not int or not isinstance(counts, dict) or type(counts.get("train")) is not int:
        raise FileError(f"{path}: is damaged or no result of a run, remove it to make the run anew")
    return found


def read_array(path: Path, name: str) -> np.ndarray:
    """Read the array of a name that a run has written.

    Raises:
        FileError: the file is damaged, or none that a run has written.
    """
    try:
        with open_regular(path) as stream, np.load(stream, allow_pickle=False) as arrays:
            return np.asarray(arrays[name])
    except FileError:
        raise
    except Exception as error:  # zip files and numpy's headers fail in many ways
        raise FileError(f"{path}: is damaged or no .npz file: {error}; remove it to make the run again") from error


def slug(text: str) -> str:
    """Return a name in lower case, with "-" for everything but letters and digits, as part of a file's name.

    Example:
        >>> slug("SNE, no order codes")
        'sne-no-order-codes'
    """
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")

"""Runs a job in children that are killed at random moments, and looks at what they leave: see `test_kills.py`.

    python kill_rounds.py JOB FOLDER ROUNDS SEED

A job is done once undisturbed. Then, in each round, it is begun in a new folder, killed, begun again and killed again,
and at last finished. After every kill a child looks at the files that are there; in the end they must be the bytes of
the undisturbed job. This process computes nothing, so that its children may.
"""

from __future__ import annotations

import faulthandler
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from helpers.small_trainings import goals, make, networks, packed
from sne_fast import SNE, Predictor
from sne_fast.cli.commands import app
from sne_fast.data.checkpoints import save_state_dict
from sne_fast.tasks.settings import TrainSettings
from sne_fast.tasks.train import train
from sne_fast.training import CsvLog, FitSettings, fit
from sne_fast.zoo import Zoo, make_sine_zoo

LIMIT = 240.0
"""Seconds that no job may take: one that hangs fails."""
KILLS = 3  # in each round


class Job:
    """A job that can be begun again: `run` does it, `check` looks at what a killed one left, `shown` is its result."""

    results: tuple[str, ...] = ("*",)

    def prepare(self, folder: Path) -> None:
        """Make what the job reads."""

    def run(self, folder: Path) -> None:
        """Do the job, or what is left of it."""
        raise NotImplementedError

    def check(self, folder: Path) -> None:
        """Raise if a file under a final name is not whole."""

    def result(self, folder: Path) -> dict[str, bytes]:
        """Return the content of the files that do not depend on the time."""
        files = sorted({file for pattern in self.results for file in folder.glob(pattern) if file.is_file()})
        return {str(file.relative_to(folder)): file.read_bytes() for file in files}


class Fit(Job):
    """`fit` with a checkpoint and a log."""

    results = ("predictor/*",)

    def run(self, folder: Path) -> None:
        settings = FitSettings(epochs=8, batch_weights=80)
        batch, predictor = packed(), make()
        fit(
            predictor, batch, goals(), settings, validation=(batch[:3], goals()[:3]), checkpoint=folder / "fit.pt",
            log=CsvLog(folder / "log.csv"),
        )  # fmt: skip
        assert len((folder / "log.csv").read_text().split()) == 9
        predictor.save_pretrained(folder / "predictor")

    def check(self, folder: Path) -> None:
        if (folder / "fit.pt").exists():
            assert 1 <= torch.load(folder / "fit.pt", weights_only=True)["epoch"] <= 8
        if (folder / "predictor").exists():
            Predictor.from_pretrained(folder / "predictor")


class Train(Job):
    """`sne-fast train`."""

    results = ("run/predictor/*", "run/predictions.csv")

    def prepare(self, folder: Path) -> None:
        make_sine_zoo(folder / "zoo", 20, seed=0, steps=3)

    def run(self, folder: Path) -> None:
        from rich.console import Console

        settings = TrainSettings(
            folder.parent / "prepared" / "zoo", folder / "run", targets=("a",), hidden_dim=32, epochs=4, head=(8,),
            units="permuted", chunks=True, batch_weights=6000,
        )  # fmt: skip
        train(settings, Console(quiet=True))

    def check(self, folder: Path) -> None:
        if (folder / "run" / "fit.pt").exists():
            assert 1 <= torch.load(folder / "run" / "fit.pt", weights_only=True)["epoch"] <= 4
        if (folder / "run" / "predictor").exists():
            Predictor.from_pretrained(folder / "run" / "predictor")


class MakeZoo(Job):
    """The making of a zoo in two groups."""

    results = ("zoo/**/*",)

    def run(self, folder: Path) -> None:
        if not (folder / "zoo" / "index.parquet").exists():
            make_sine_zoo(folder / "zoo", 300, seed=0, steps=20)

    def check(self, folder: Path) -> None:
        if (folder / "zoo" / "index.parquet").exists():
            zoo = Zoo.open(folder / "zoo")
            assert len(zoo) == 300 and all(zoo.state_dict(i) for i in range(300))


class Save(Job):
    """`save_pretrained` of two models over each other."""

    results = ("model/*",)

    @staticmethod
    def models() -> list[SNE]:
        torch.manual_seed(0)
        return [SNE(hidden_dim=32, num_heads=heads) for heads in (2, 4, 4)]

    def run(self, folder: Path) -> None:
        models = self.models()
        for k in range(13):
            models[k % 3].save_pretrained(folder / "model")

    def check(self, folder: Path) -> None:
        if (folder / "model" / "config.json").exists():
            try:
                found = SNE.from_pretrained(folder / "model").state_dict()
            except ValueError as error:  # killed between the moves of the two files
                assert "weights_sha256" in str(error), error
                return
            whole = [all(torch.equal(t, model.state_dict()[k]) for k, t in found.items()) for model in self.models()]
            assert sum(whole) == 1, "files of two models were loaded together"


class Encode(Job):
    """`sne-fast encode` of files into one table."""

    results = ("z.npz",)

    def prepare(self, folder: Path) -> None:
        for k, network in enumerate(networks(30)):
            save_state_dict(network, folder / f"net{k:02d}.safetensors")
        torch.manual_seed(0)
        SNE(hidden_dim=32).save_pretrained(folder / "model")

    def run(self, folder: Path) -> None:
        prepared = folder.parent / "prepared"
        files = [str(file) for file in sorted(prepared.glob("*.safetensors"))]
        code = app(
            ["encode", "--model", str(prepared / "model"), *files, "-o", str(folder / "z.npz")], standalone_mode=False
        )
        assert not code

    def check(self, folder: Path) -> None:
        if (folder / "z.npz").exists():
            assert np.load(folder / "z.npz")["vector"].shape == (30, 32)


JOBS: dict[str, Job] = {"fit": Fit(), "train": Train(), "zoo": MakeZoo(), "save": Save(), "encode": Encode()}


def child(call: Callable[[], None]) -> int:
    """Run a call in a child, and return the child's id."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            call()
            code = 0
        except KeyboardInterrupt:
            code = 130
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    return pid


def wait(pid: int, seconds: float) -> int | None:
    """Return the exit code of a child, negative for a signal; None if it is alive after so many seconds."""
    end = time.monotonic() + seconds
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= end:
            return None
        time.sleep(0.002)


def complete(call: Callable[[], None], what: str) -> None:
    """Run a call in a child to its end."""
    pid = child(call)
    code = wait(pid, LIMIT)
    if code is None:
        os.kill(pid, signal.SIGABRT)  # at which faulthandler says where it hangs
        os.waitpid(pid, 0)
    assert code == 0, f"{what} {'hangs' if code is None else f'ended with {code}'}"


def main(name: str, folder: Path, rounds: int, seed: int) -> None:
    """Do all rounds of a job."""
    job, chance = JOBS[name], random.Random(seed)
    for part in ("prepared", "whole"):
        (folder / part).mkdir()
    complete(lambda: job.prepare(folder / "prepared"), "the preparation")
    start = time.monotonic()
    complete(lambda: job.run(folder / "whole"), "the undisturbed job")
    duration = time.monotonic() - start
    expected = job.result(folder / "whole")
    assert expected
    killed = 0
    for k in range(rounds):
        cut = folder / f"cut{k}"
        cut.mkdir()
        for _ in range(KILLS):
            delay = chance.uniform(0, duration)
            how = signal.SIGINT if chance.random() < 0.3 else signal.SIGKILL
            pid = child(lambda cut=cut: job.run(cut))  # type: ignore[misc]
            code = wait(pid, delay)
            if code is None:
                os.kill(pid, how)
                code = wait(pid, LIMIT)
                assert code is not None, f"the job hangs after {how.name}"
                assert how == signal.SIGINT or code in (-how, 0), f"after {how.name} the job gave {code}"
                killed += code != 0
            else:
                assert code == 0, f"the job begun again ended with {code}"
            complete(lambda cut=cut: job.check(cut), f"what was left after {delay:.3f} s")  # type: ignore[misc]
        complete(lambda cut=cut: job.run(cut), "the job begun again")  # type: ignore[misc]
        found = job.result(cut)
        differ = [file for file in {*found, *expected} if found.get(file) != expected.get(file)]
        assert not differ, f"{differ} differ from the undisturbed job"
        left = [str(path) for path in cut.rglob("*") if path.name.endswith((".tmp", ".lock", ".part"))]
        assert not left, f"{left} are left over"
    print(f"{killed} kills")


if __name__ == "__main__":
    faulthandler.enable()
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))

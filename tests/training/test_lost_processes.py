"""A process that dies or stops in a training of several is named by the others, which do not wait for ever."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.paths import environment_of_tests
from sne_fast.file_locks import holding
from sne_fast.training.distributed import TIMEOUT_VARIABLE, processes, timeout

LOOPBACK = "lo" if sys.platform.startswith("linux") else "lo0"
WORKER = """
import os, signal, sys
from helpers.small_trainings import goals, make, packed
from sne_fast.training import FitSettings, fit
from sne_fast.training.distributed import processes

how, where, checkpoint = sys.argv[1:]

def fall(epoch, history):
    if epoch == 1 and os.environ["RANK"] == where:
        os.kill(os.getpid(), getattr(signal, how))

try:
    with processes():
        fit(make(), packed(), goals(), FitSettings(epochs=50, batch_weights=80), checkpoint=checkpoint, on_epoch=fall)
except (ConnectionError, BlockingIOError) as error:
    print(error)
"""


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def start(tmp_path: Path, how: str, where: int) -> list[subprocess.Popen[str]]:
    environment = environment_of_tests(
        OMP_NUM_THREADS="1", WORLD_SIZE="2", GLOO_SOCKET_IFNAME=LOOPBACK, MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(free_port()), **{TIMEOUT_VARIABLE: "6"},
    )  # fmt: skip
    command = [sys.executable, "-c", WORKER, how, str(where), str(tmp_path / "fit.pt")]
    return [
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**environment, "RANK": str(rank)},
            cwd=tmp_path,
        )
        for rank in range(2)
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("how", "where"), [("SIGKILL", 1), ("SIGSTOP", 1), ("SIGKILL", 0)])
def test_the_others_name_the_process_that_is_lost(how: str, where: int, tmp_path: Path) -> None:
    started = start(tmp_path, how, where)
    try:
        output, errors = started[1 - where].communicate(timeout=100)
    finally:
        for process in started:
            process.send_signal(signal.SIGKILL)
            process.wait()
    expected = rf"process {1 - where} of 2 waited \d+ s for process {where}, which ended, was stopped"
    assert re.match(expected, output), errors
    if where == 1:
        assert [file.name for file in tmp_path.iterdir()] == ["fit.pt"], "the first process let go of its lock"


@pytest.mark.slow
def test_all_processes_end_where_the_first_may_not_write(tmp_path: Path) -> None:
    with holding(tmp_path / ".fit.pt.lock", "it", "wait"):
        outputs = [process.communicate(timeout=100) for process in start(tmp_path, "SIGKILL", 0)]
    assert re.match(rf"fit: checkpoint '.*fit.pt' is in use by process {os.getpid()} on", outputs[0][0]), outputs
    assert re.match(r"process 1 of 2 ends as the first one does: fit: checkpoint '.*' is in use", outputs[1][0]), (
        outputs
    )


@pytest.mark.parametrize(("text", "seconds"), [("", 600.0), ("2.5", 2.5), (" 30 ", 30.0)])
def test_the_time_out_is_a_number_of_seconds(text: str, seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TIMEOUT_VARIABLE, text)
    assert timeout().total_seconds() == seconds


@pytest.mark.parametrize("text", ["soon", "0", "-1", "nan", "inf"])
def test_another_time_out_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TIMEOUT_VARIABLE, text)
    monkeypatch.setenv("WORLD_SIZE", "2")
    expected = f"{TIMEOUT_VARIABLE} must be a number of seconds above 0, got '{text}'"
    with pytest.raises(ValueError, match=expected), processes():
        pass


def test_a_process_that_never_comes_is_not_waited_for_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "0"), ("MASTER_ADDR", "127.0.0.1"), (TIMEOUT_VARIABLE, "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    with pytest.raises(ConnectionError, match=r"process 0 of 2 could not join the others within 1 s"), processes():
        pass

"""Runs that are killed or interrupted, and resumed: every network once, with the bits of an undisturbed run."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from helpers import dying_workers
from helpers.command_line import call
from helpers.many_networks import network
from sne_fast.embedding import collect

pq = pytest.importorskip("pyarrow.parquet")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="runs are forked, to be fast")
NETWORKS = 60


@pytest.fixture
def networks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> Path:
    """Sixty networks of which five are damaged, each in another way; packs of about four, and a unit for each."""
    monkeypatch.setattr("sne_fast.embedding.units.PACKED_WEIGHTS", 700)
    monkeypatch.setattr("sne_fast.embedding.units.LEAST", 700)
    monkeypatch.setattr("sne_fast.embedding.processes.START", "fork")
    folder = tmp_path / "networks"
    folder.mkdir()
    for i in range(NETWORKS):
        save_file(network(i, depth=2 + i % 2), folder / f"net{i:02}.safetensors")
    cut, empty, text, header = (folder / f"net{i}.safetensors" for i in (13, 24, 35, 46))
    cut.write_bytes(cut.read_bytes()[:-8])
    empty.write_bytes(b"")
    text.write_text("this is no checkpoint")
    header.write_bytes(b"\xff" * 8 + header.read_bytes()[8:])
    save_file({"layers.0.weight": torch.full((8, 8), float("nan"))}, folder / "net57.safetensors")
    return folder


def parts(out: Path) -> list[Path]:
    return list(out.glob("encoder=*/part-*.parquet"))


def begin(folder: Path, out: Path, said: Path, until: Callable[[], bool]) -> Any:
    """Start a run with two workers in a process group of its own, and wait until something holds."""

    def run() -> None:
        os.setsid()
        dying_workers.slow_down()
        result = call("encode", folder, "-o", out, "--workers", 2)
        said.write_text(f"{result.exit_code}\n{result.output}")

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    while not until():
        assert process.is_alive(), said.read_text()
        time.sleep(0.002)
    return process


def workers_of(process: Any) -> list[int]:
    return [int(task) for task in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def test_a_run_that_is_killed_twice_and_resumed_is_as_if_undisturbed(networks: Path, tmp_path: Path) -> None:
    whole, out, said = tmp_path / "whole", tmp_path / "out", tmp_path / "said"
    assert call("encode", networks, "-o", whole, "--workers", 2).exit_code == 1
    draw = random.Random()
    for _ in range(2):
        target = len(parts(out)) + draw.randrange(1, 5)
        process = begin(networks, out, said, lambda target=target: len(parts(out)) >= target)
        os.killpg(process.pid, signal.SIGKILL)
        process.join()
    assert len(parts(out)) < len(parts(whole))
    last = call("encode", networks, "-o", out)
    assert last.exit_code == 1 and "5 of 60 networks failed" in last.stderr
    want, found = collect(whole), collect(out)
    assert found.num_rows == NETWORKS and found["error"].null_count == NETWORKS - 5
    for column in ("uri", "vector", "error"):
        assert found[column].equals(want[column])
    written = Counter(uri for file in parts(out) for uri in pq.read_table(file)["uri"].to_pylist())
    assert len(written) == NETWORKS and set(written.values()) == {1}


def test_an_interrupted_run_ends_its_workers_and_says_what_is_done(networks: Path, tmp_path: Path) -> None:
    out, said = tmp_path / "out", tmp_path / "said"
    process = begin(networks, out, said, lambda: len(parts(out)) > 1)
    workers = workers_of(process)
    os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C does
    process.join()
    assert len(workers) == 2 and not any(Path(f"/proc/{worker}").exists() for worker in workers)
    text = said.read_text()
    assert text.startswith("130\n") and "networks left; the same command goes on" in text and "by this call" in text
    assert "Traceback" not in text
    assert call("encode", networks, "-o", out).exit_code == 1
    assert collect(out)["error"].null_count == NETWORKS - 5


def test_two_runs_at_once_do_not_harm_each_other(networks: Path, tmp_path: Path) -> None:
    out, said = tmp_path / "out", tmp_path / "said"
    process = begin(networks, out, said, lambda: bool(parts(out)))
    assert call("encode", networks, "-o", out).exit_code == 1
    process.join()
    assert said.read_text().startswith("1\n") and "5 of 60 networks failed" in said.read_text()
    found = collect(out)
    assert found.num_rows == NETWORKS and found["error"].null_count == NETWORKS - 5

"""Locks say who holds them, end with their process, and leave no file."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sne_fast.file_locks import holding, release, take

HOLDER = """
import sys, time
from pathlib import Path
from sne_fast.file_locks import holding
with holding(Path(sys.argv[1]), "it", "give another"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_lock_that_is_held_names_its_holder(tmp_path: Path) -> None:
    lock = tmp_path / ".lock"
    with holding(lock, "the run", "give another folder"):
        expected = (
            rf"^the run is in use by process {os.getpid()} on '.+' since \d{{4}}-.* UTC; wait until that ends, or give"
        )
        with pytest.raises(BlockingIOError, match=expected), holding(lock, "the run", "give another folder"):
            pass
        assert lock.exists()
    assert not lock.exists()
    with holding(lock, "the run", "give another folder"):
        pass


def test_the_lock_of_a_process_that_was_killed_is_free(tmp_path: Path) -> None:
    lock = tmp_path / ".lock"
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, lock], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    with pytest.raises(BlockingIOError, match=rf"in use by process {holder.pid} on "), holding(lock, "it", "wait"):
        pass
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    assert lock.exists()
    with holding(lock, "it", "wait"):
        assert re.search(str(os.getpid()), lock.read_text())
    assert not lock.exists()


def test_a_child_does_not_keep_the_lock_of_its_parent(tmp_path: Path) -> None:
    lock = tmp_path / ".lock"
    held = take(lock)
    assert held is not None
    child = os.fork()
    if child == 0:
        release(lock, held)  # not its own
        time.sleep(60)
        os._exit(0)
    try:
        assert lock.exists() and take(lock) is None
        release(lock, held)
        again = take(lock)
        assert again is not None
        release(lock, again)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_lock_file_of_other_content_is_no_error(tmp_path: Path) -> None:
    lock = tmp_path / ".lock"
    lock.write_text("[" * 3000)
    held = take(lock)
    assert held is not None
    with pytest.raises(BlockingIOError, match="in use by another process"), holding(lock, "it", "wait"):
        pass
    release(lock, held)

"""Description of the machine in reports."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from sne_fast.reports import machine


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_the_commit_is_that_of_the_checkout_imported_from(tmp_path: Path, monkeypatch) -> None:
    def git(*arguments: str) -> str:
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        return subprocess.run(
            ["git", "-C", tmp_path, *who, *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    file = tmp_path / "sne_fast" / "reports" / "machine.py"
    file.parent.mkdir(parents=True)
    file.write_text("one")
    monkeypatch.setattr(machine, "__file__", str(file))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert machine.commit() is None, "no checkout"
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "one")
    head = git("rev-parse", "HEAD")
    assert machine.commit() == head
    file.write_text("two")
    assert machine.commit() == f"{head}-dirty"
    monkeypatch.setattr(machine, "__file__", str(tmp_path / "venv" / "sne_fast" / "reports" / "machine.py"))
    (tmp_path / "venv" / "sne_fast" / "reports").mkdir(parents=True)
    assert machine.commit() is None, "installed below another project's checkout"
    monkeypatch.setattr(machine, "__file__", str(file))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine.commit() is None, "no git"

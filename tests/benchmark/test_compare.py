"""`bench/compare.py` compares a commit with itself, and refuses what it cannot compare."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import compare
import pytest

from helpers.cpu_cases import NEEDS_BACKEND
from helpers.paths import ROOT
from sne_fast.backends.cpu import library

needs_git = pytest.mark.skipif(
    subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True).returncode != 0,
    reason="needs a git checkout",
)


@needs_git
@pytest.mark.slow
@pytest.mark.skipif(bool(library.reasons()), reason=NEEDS_BACKEND)
def test_a_commit_equals_itself(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    # No compiler runs: both sides get the library of the package that is tested, wherever it is installed.
    monkeypatch.setattr(compare, "built_here", lambda commit: True)
    monkeypatch.setattr(compare, "LIBRARY_HERE", library.LIBRARY_FILE)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    file = tmp_path / "compared.json"
    options = ["HEAD", "--cases", "single", "--size", "tiny", "--rounds", "2", "--json", str(file)]
    rows = compare.compare(compare.parsed([*options, "--dtypes", "float32", "bfloat16"]))
    assert [(row["mode"], row["dtype"]) for row in rows] == [
        (mode, dtype) for mode in ("forward", "training") for dtype in ("float32", "bfloat16")
    ]
    for row in rows:
        low, high = row["ratio_tenths"]
        assert row["difference"] == 0 and row["weights"] > 0 and 0 < low <= row["ratio"] <= high
    stored = json.loads(file.read_text())
    assert stored["rows"] == rows and stored["base"] == stored["head"] == compare.git("rev-parse", "HEAD")
    assert capsys.readouterr().out.count("single") == 4
    assert str(tmp_path) not in compare.git("worktree", "list")


@needs_git
def test_an_unknown_commit_is_refused() -> None:
    with pytest.raises(SystemExit, match="compare: git rev-parse --verify no-such-commit"):
        compare.compare(compare.parsed(["no-such-commit"]))


def test_vectors_that_differ_are_not_timed() -> None:
    class Answers:
        def __init__(self, value: float) -> None:
            self.value = value

        def ask(self, do: str, **request: str) -> object:
            assert do == "prepare"
            return {"weights": 3, "z": [[1.0, self.value]]}

    with pytest.raises(SystemExit, match=r"zoo forward float32: the vectors of the two commits differ by 0\.71"):
        compare.measure(Answers(1.0), Answers(2.0), "zoo", "forward", "float32", "tiny", 1)  # type: ignore[arg-type]

"""The counts of docs/reliability.md are those of the committed run, and are read off pytest's own report."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from pathlib import Path

import reliability


def report(folder: Path, *texts: str) -> Path:
    cases = "".join(
        f'<testcase name="t{i}"><properties><property name="hypothesis-statistics-tests/a.py::t{i}" '
        f'value="{base64.b64encode(text.encode()).decode()}"/></properties></testcase>'
        for i, text in enumerate(texts)
    )
    file = folder / "junit.xml"
    file.write_text(f'<testsuites><testsuite>{cases}<testcase name="plain"/></testsuite></testsuites>')
    return file


def test_counts_add_up_the_phases_of_every_test(tmp_path: Path) -> None:
    one = (
        "a:\n  - during reuse phase\n    - 1 passing, 0 failing, and 0 invalid test cases\n  - during generate phase\n"
    )
    file = report(tmp_path, one + "    - 25 passing, 2 failing, and 3 invalid test cases\n", "b: nothing was generated")
    assert reliability.counts(file) == {"tests/a.py": {"tests": 2, "passed": 26, "failed": 2}}


def test_the_form_of_the_statistics_is_known(tmp_path: Path) -> None:
    """A change of hypothesis's text would make every count 0."""
    (tmp_path / "test_it.py").write_text(
        "from hypothesis import given, settings, strategies as st\n"
        "@settings(max_examples=7, database=None)\n@given(st.integers())\ndef test_x(x): pass\n"
    )
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_XDIST")}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--junitxml=found.xml", "test_it.py"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout
    (row,) = reliability.counts(tmp_path / "found.xml").values()
    assert row == {"tests": 1, "passed": 7, "failed": 0}


def test_the_page_shows_the_committed_counts() -> None:
    result = json.loads(reliability.JSON.read_text(encoding="utf-8"))
    assert reliability.table(result) in reliability.PAGE.read_text(encoding="utf-8")
    numerics = json.loads(reliability.NUMERICS_JSON.read_text(encoding="utf-8"))
    assert reliability.numerics_table(numerics) in reliability.PAGE.read_text(encoding="utf-8")
    assert all(row["failed"] == 0 and row["passed"] > 0 for row in result["suites"].values())

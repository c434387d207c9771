"""Text on the terminal is shown as it is, tables for other programs are lines with tabs, progress is on stderr."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from rich.console import Console

import sne_fast
from sne_fast.reports import terminal
from sne_fast.reports.terminal import printable, progress, say, show_table

NAMES = ["net[v2].pt", "[/b].pt", "[bold]x[/bold]", 'pip install "sne_fast[tasks]"', ":smile:.pt", "\\[a]", "a" * 200]


def screen(width: int = 80) -> tuple[Console, io.StringIO]:
    stream = io.StringIO()
    return Console(file=stream, width=width, force_terminal=True, color_system=None), stream


@pytest.mark.parametrize("name", NAMES)
def test_names_are_shown_as_they_are(name):
    console, stream = screen()
    say(console, name)
    assert stream.getvalue() == f"{name}\n"
    console, stream = screen(width=300)
    show_table(console, [name, "n"], [[name, "1"]], title=name)
    assert [line.split("  ")[0].rstrip() for line in stream.getvalue().splitlines()] == [name] * 3
    for bar in (False, True):
        console, stream = screen(width=300)
        with progress(console, name, bar=bar, stays=True) as update:
            update(0.5, name)
            if not bar:
                update(note=name)
        assert name in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())


def test_control_characters_and_lone_bytes_are_escapes():
    assert printable("a\x1b[2J\n\t\x07b") == r"a\x1b[2J\n\t\x07b"
    assert printable("caf\u00e9 \udcff \u202e") == "caf\u00e9 \\udcff \\u202e"


def test_a_table_for_another_program_has_tabs_and_whole_cells():
    stream = io.StringIO()
    show_table(Console(file=stream, width=20), ["name", "x"], [["a\tb" * 20, "0.125"], ["", "1"]])
    assert stream.getvalue() == "name\tx\n" + r"a\tb" * 20 + "\t0.125\n\t1\n"


def test_progress_without_a_terminal_is_a_line_now_and_then(monkeypatch, capsys):
    clock = iter(range(0, 1000, 4))
    monkeypatch.setattr(terminal.time, "monotonic", lambda: next(clock))
    with progress(Console(), "working") as update:
        for k in range(8):
            update(k / 8, f"step {k}")
    found = capsys.readouterr()
    assert found.out == ""
    assert found.err.splitlines() == ["working: 25%, step 2", "working: 62%, step 5"]


def test_lines_of_long_work_tell_the_remaining_time_and_come_with_progress_or_each_minute(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now[0])
    with progress(Console(), "working", bar=True) as update:
        for seconds, share in ((9, 0.09), (20, 0.1), (45, 0.12), (79, 0.13), (80, 0.14), (90, 0.2), (900, 0.9)):
            now[0] = seconds
            update(share, "steps")
    assert capsys.readouterr().err.splitlines() == [
        "working: 10%, steps, 3 min left",
        "working: 14%, steps, 8 min left",
        "working: 20%, steps, 6 min left",
        "working: 90%, steps, 2 min left",
    ]


def test_progress_that_stays_is_announced_and_quiet_ones_are_not(capsys):
    with progress(Console(), "1. Training", bar=True, stays=True) as update:
        update(0.5)
    with progress(Console(quiet=True), "2. Training", bar=True, stays=True) as update:
        update(0.5)
    assert capsys.readouterr().err == "1. Training\n"


def test_only_this_module_writes_through_rich():
    """Whoever prints through rich elsewhere would have to think of markup in names again."""
    root = Path(sne_fast.__file__).parent
    calls = re.compile(r"rich\.(table|progress|panel|text|live|status)\b|[cC]onsole\.(print|status|log|rule)\(")
    found = {file.relative_to(root).as_posix() for file in root.rglob("*.py") if calls.search(file.read_text("utf-8"))}
    assert found == {"reports/terminal.py"}

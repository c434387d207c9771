"""Text, tables and progress on the terminal: everything that this package shows through rich.

Names of files and networks are shown as they are: rich reads no markup and no emoji in them, and what would move the
cursor or cannot be printed is written as an escape. Results go to stdout, as lines with tabs where it is no terminal;
progress goes to stderr, as a line now and then where that is none.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

LINE_SECONDS = 10.0
"""Least seconds between two lines of progress where there is no terminal."""
QUIET_SECONDS = 60.0
"""Seconds after which there is a line although less than `LINE_SHARE` more is done."""
LINE_SHARE = 0.05

Update = Callable[..., None]
"""Takes the share that is done, in [0, 1] or None, and a note."""


def printable(text: str) -> str:
    r"""Return text with escapes for control characters and for bytes that are no character.

    Example:
        >>> from sne_fast.reports.terminal import printable
        >>> print(printable("a\x1b[2Jb"))
        a\x1b[2Jb
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def say(console: Console, *lines: str) -> None:
    """Print lines as they are, without wrapping them."""
    for line in lines:
        console.out(printable(line), highlight=False)


def show_table(
    console: Console, columns: Sequence[str], rows: Sequence[Sequence[str]], *, title: str = "", text_columns: int = 1
) -> None:
    """Print a table; where there is no terminal its cells are separated by tabs, a line per row.

    Args:
        console: where it goes.
        columns: their names.
        rows: the cells.
        title: a line above it.
        text_columns: the first columns, which hold text; the others hold numbers and stand to the right.
    """
    if title:
        say(console, title)
    if not console.is_terminal:
        lines = ["\t".join(printable(cell) for cell in row) for row in (columns, *rows)]
        if not console.quiet:
            console.file.write("\n".join(lines) + "\n")  # rich would write spaces for tabs
        return
    shown = Table(box=None, pad_edge=False, header_style="bold")
    for k, column in enumerate(columns):
        is_text = k < text_columns
        shown.add_column(
            Text(printable(column)), justify="left" if is_text else "right", overflow="fold", no_wrap=not is_text
        )
    for row in rows:
        shown.add_row(*(Text(printable(cell)) for cell in row))
    console.print(shown)


def for_progress(console: Console) -> Console:
    """Return the console on which progress is shown: stderr, where `console` is stdout."""
    if console.file is not sys.stdout:
        return console
    return Console(stderr=True, quiet=console.quiet)


@contextmanager
def progress(console: Console, label: str, *, bar: bool = False, stays: bool = False) -> Iterator[Update]:
    """Show what is being done while the block runs, and how far it is.

    Args:
        console: of the results; progress is shown beside it, on stderr.
        label: what is being done.
        bar: show a bar (where there is a terminal) and the remaining time, for work that tells the share that is done.
        stays: leave the last state in view.

    Yields:
        A function of the share that is done (None if it is not known) and a note, to be called as often as one likes.
    """
    where, label = for_progress(console), printable(label)
    if not where.is_terminal:
        yield _lines(where, label, stays, bar)
    elif bar:
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[note]}", markup=False),
        )
        with Progress(*columns, console=where, transient=not stays) as shown:
            task = shown.add_task(label, total=1.0, note="")
            yield lambda share=None, note="": shown.update(task, completed=share, note=printable(note))
    else:
        with where.status(Text(label)) as status:
            yield lambda share=None, note="": status.update(Text(_sentence(label, share, note)))


def _lines(console: Console, label: str, at_once: bool, remaining: bool) -> Update:
    start = last = time.monotonic()
    last_share = 0.0
    if at_once:
        say(console, label)

    def update(share: float | None = None, note: str = "") -> None:
        nonlocal last, last_share
        now = time.monotonic()
        more = LINE_SHARE if share is None else share - last_share
        if now - last < (LINE_SECONDS if more >= LINE_SHARE else QUIET_SECONDS):
            return
        last, last_share = now, share or 0.0
        if remaining and share:
            note = ", ".join([*([note] if note else []), f"{duration((now - start) * (1 - share) / share)} left"])
        say(console, _sentence(label, share, note))

    return update


def duration(seconds: float) -> str:
    """Return a time as a person would say it.

    Example:
        >>> from sne_fast.reports.terminal import duration
        >>> duration(44.6), duration(200), duration(20000), duration(200000)
        ('45 s', '3 min', '5 h 33 min', '2 d 7 h')
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes // 1440} d {minutes % 1440 // 60} h"


def _sentence(label: str, share: float | None, note: str) -> str:
    parts = [part for part in ("" if share is None else f"{share:.0%}", printable(note)) if part]
    return f"{label}: {', '.join(parts)}" if parts else label

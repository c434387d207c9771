"""Lines of the kernels' sources that machine code belongs to."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path

from .machine_code import Frame

PACKAGE = Path(__file__).resolve().parents[2]
CSRC = PACKAGE.parent / "csrc"
_FOLDERS = {"/csrc/": CSRC, "/sne_fast/": PACKAGE}
"""Folders of the kernels' sources, by what stands before a file's name within them."""


def is_source(file: str) -> bool:
    """Return whether a file is a source of kernels, not one of a library that they call."""
    return any(part in file for part in _FOLDERS)


@cache
def _lines(file: str) -> list[str]:
    path = Path(file)
    for part, folder in _FOLDERS.items():  # these sources, also of machine code that was compiled in another place
        here = folder / file.rpartition(part)[2]
        if part in file and here.exists():
            path = here
    if not path.exists():
        raise RuntimeError(f"{file} is not here: instructions are counted beside the sources of the kernels")
    return path.read_text(encoding="utf-8").splitlines()


def source_of(frame: Frame) -> str:
    """Return the text of a line of source."""
    file, line = frame
    lines = _lines(file)
    return lines[line - 1].strip() if line <= len(lines) else ""


@cache
def lines_of(file: str, text: str) -> tuple[frozenset[int], frozenset[int]]:
    """Return the lines of all statements that begin with ``text``, and the first lines alone."""
    lines = _lines(file)
    found: set[int] = set()
    starts: set[int] = set()
    for first, line in enumerate(lines):
        if line.strip().startswith(text):
            starts.add(first + 1)
            found.update(_indented(lines, first) if file.endswith(".py") else _in_braces(lines, first))
    return frozenset(found), frozenset(starts)


def _in_braces(lines: list[str], first: int) -> Iterator[int]:
    depth = 0
    for at in range(first, len(lines)):
        line = lines[at].strip()
        if depth == 1 and line.startswith("} else"):
            return
        depth += sum(line.count(c) for c in "({") - sum(line.count(c) for c in ")}")
        yield at + 1
        if depth <= 0 and line.endswith((";", "}")):
            return


def _indented(lines: list[str], first: int) -> Iterator[int]:
    depth = len(lines[first]) - len(lines[first].lstrip())
    yield first + 1
    for at in range(first + 1, len(lines)):
        line = lines[at].lstrip()
        if line and len(lines[at]) - len(line) <= depth:
            return
        yield at + 1


def is_inside(frames: tuple[Frame, ...], text: str) -> bool:
    """Return whether code belongs to a statement that begins with ``text``, and not to its condition."""
    file, line = frames[0]
    if line in lines_of(file, text)[1]:
        return False
    return any(line in lines_of(file, text)[0] for file, line in frames)


def is_ahead(frames: tuple[Frame, ...], text: str) -> bool:
    """Return whether code is of the condition that chooses a statement which begins with ``text``, or its other way."""
    return any(
        source_of((file, line)).startswith("if ") and any(line < start <= line + 3 for start in lines_of(file, text)[1])
        for file, line in frames
    )

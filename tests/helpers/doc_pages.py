"""Reading the code blocks of the repository's Markdown files."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from helpers.paths import ROOT

PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "examples").glob("*.md"))]

_BLOCK = re.compile(r"^```(?P<language>\w+)[^\n]*\n(?P<shown>.*?)^```$|^<!-- python\n(?P<hidden>.*?)^-->$", re.M | re.S)


@dataclass(frozen=True)
class Block:
    """A block of code: its language, its text, and the line of the page on which the text starts."""

    language: str
    text: str
    line: int


def blocks(page: Path) -> list[Block]:
    """Return the fenced blocks of a page, and the Python that HTML comments `<!-- python ... -->` hold."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in _BLOCK.finditer(text):
        group = "shown" if match["hidden"] is None else "hidden"
        language = match["language"] or "python"
        found.append(Block(language, match[group], text.count("\n", 0, match.start(group)) + 1))
    return found


def name(page: Path) -> str:
    """Return the path of a page inside the repository."""
    return page.relative_to(ROOT).as_posix()

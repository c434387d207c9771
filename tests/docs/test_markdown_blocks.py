"""Every Python block of README and docs runs; the blocks of a page share their names, in order."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from helpers.doc_pages import PAGES, blocks, name

RUNNABLE = [page for page in PAGES if any(block.language == "python" for block in blocks(page))]


@pytest.mark.parametrize("page", RUNNABLE, ids=name)
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict[str, object] = {"__name__": "__docs__"}
    for block in blocks(page):
        if block.language == "python":
            # Empty lines in front, so that a traceback shows the line of the page.
            exec(compile("\n" * (block.line - 1) + block.text, str(page), "exec"), names)


def test_pages_are_found() -> None:
    assert {"README.md", "docs/method.md", "docs/training.md", "docs/symmetry.md"} <= {name(page) for page in RUNNABLE}

"""README and docs: sizes, links, commands, and tables that are those of the committed results."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from helpers.doc_pages import PAGES, blocks, name
from helpers.paths import ROOT

README = ROOT / "README.md"
LINK = re.compile(r"!?\[[^\]]*\]\((?P<target>[^)\s]+)\)")


def test_readme_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 150


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    for match in LINK.finditer(page.read_text(encoding="utf-8")):
        target, _, anchor = match["target"].partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        file = (page.parent / target).resolve() if target else page
        assert file.exists(), f"{name(page)} links to {target}"
        if anchor and file.suffix == ".md":
            assert anchor in anchors(file), f"{name(page)} links to #{anchor} of {name(file)}"


def anchors(page: Path) -> set[str]:
    """Return the anchors of the headings of a page, as GitHub and mkdocs make them."""
    found = set()
    for heading in re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.M):
        words = re.sub(r"[^\w\s-]", "", heading.lower()).strip()
        found.add(re.sub(r"[\s]+", "-", words))
    return found


def method_sections() -> dict[str, str]:
    """Return the title of every numbered heading of docs/method.md, by number."""
    text = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
    return dict(re.findall(r"^#+ (\d(?:\.\d)?)\.? (.*)$", text, re.M))


def test_sections_of_the_method_that_code_cites_exist() -> None:
    sections = method_sections()
    titles = "|".join(map(re.escape, sorted(sections.values(), key=len, reverse=True)))
    cited = 0
    for folder, pattern in (("sne_fast", "*.py"), ("csrc", "*"), ("tests", "*.py"), ("bench", "*.py")):
        for file in (ROOT / folder).rglob(pattern):
            if file.suffix not in (".py", ".h", ".cpp", ".cu", ".md") or file.parent == Path(__file__).parent:
                continue
            words = " ".join(re.sub(r"^[\s#/*]+", "", line) for line in file.read_text(encoding="utf-8").splitlines())
            for match in re.finditer(r"docs/method\.md", words):
                around = words[max(0, match.start() - 80) : match.end() + 80]
                number = re.match(r"(?:, section)? (\d(?:\.\d)?)", words[match.end() :])
                assert (number and number[1] in sections) or re.search(titles, around), f"{name(file)}: {around}"
                cited += 1
    assert cited


def sne_fast_commands(page: Path) -> list[list[str]]:
    """Return the words of every `sne-fast COMMAND ...` in the shell blocks of a page."""
    lines = [line for block in blocks(page) if block.language == "bash" for line in block.text.splitlines()]
    commands = [shlex.split(line.partition("sne-fast ")[2], comments=True) for line in lines if "sne-fast " in line]
    return [words for words in commands if words]


@pytest.mark.parametrize("page", [page for page in PAGES if sne_fast_commands(page)], ids=name)
def test_commands_exist_with_their_options(page: Path) -> None:
    import typer

    from sne_fast.cli.commands import app

    known: Any = typer.main.get_command(app)
    for command, *words in sne_fast_commands(page):
        assert command in known.commands, f"{name(page)}: sne-fast {command}"
        options = {option for parameter in known.commands[command].params for option in parameter.opts}
        for word in words:
            assert not word.startswith("-") or word in options, f"{name(page)}: sne-fast {command} {word}"


# ------------------------------------------------------------------------------------------------------------- tables


@pytest.fixture
def reports(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """Import the modules `report` and `task_report` of bench/."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import report
    import task_report

    return report, task_report


def between(page: Path, begin: str, end: str) -> str:
    return page.read_text(encoding="utf-8").partition(f"{begin}\n")[2].partition(end)[0]


def test_tables_of_speed_are_those_of_the_results(reports: tuple[Any, Any]) -> None:
    report, _ = reports
    results = report.load([report.RESULTS / f"{file}.json" for file in ("cpu", "cpu_scaling", "cpu_memory")], True)
    charts = [report.FIGURES / f"cpu-{chart}.png" for chart in ("throughput", "scaling")]
    assert between(report.PAGE, report.BEGIN, report.END) == report.section(results, charts, report.PAGE.parent, False)
    assert between(README, *report.SPEED_MARKERS) == "\n".join([*report.summary_table(results), ""])


def test_tables_of_experiments_are_those_of_the_results(reports: tuple[Any, Any]) -> None:
    report, task_report = reports
    assert between(task_report.PAGE, *task_report.MARKERS) == task_report.section(report.RESULTS)
    assert between(task_report.PAGE, *task_report.DEMO_MARKERS) == task_report.demo(report.RESULTS)
    assert between(README, *task_report.RESULTS_MARKERS) == task_report.summary(report.RESULTS)


def test_the_figure_is_that_of_its_script() -> None:
    sys.path.insert(0, str(ROOT / "docs" / "figures"))
    try:
        import overview
    finally:
        sys.path.pop(0)
    assert (ROOT / "docs" / "figures" / "overview.svg").read_text(encoding="utf-8") == overview.draw()


@pytest.mark.slow
def test_mkdocs_builds_without_a_warning(tmp_path: Path) -> None:
    for package in ("mkdocs", "material", "mkdocstrings"):
        pytest.importorskip(package, reason=f"{package} is not installed: pip install '.[docs]'")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    fetched = [
        f"{page.name}: {url}"
        for page in (tmp_path / "site").rglob("*.html")
        for url in re.findall(r'(?:src|href)="(https?://[^"]+\.(?:js|css|woff2?))"', page.read_text(encoding="utf-8"))
    ]
    assert not fetched

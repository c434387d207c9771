"""`sne-fast lineage`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..tasks.settings import option
from .known import within
from .options import options_of
from .running import KEY, check_output, list_failures, stdout
from .vectors import NETWORKS, networks_of, read_sketches

if TYPE_CHECKING:
    from ..similarity import Lineage


@dataclass(frozen=True)
class LineageSettings:
    """Options of `sne-fast lineage`."""

    paths: tuple[Path, ...] = option(help=NETWORKS, argument=True, metavar="PATH")
    out: Path | None = option(
        None,
        help="Also write to .csv, to .dot for Graphviz, or to .html, a page to fold and search.",
        flags=("--out", "-o"),
    )
    unrelated: float = option(0.9, help="Relative distance from which networks are unrelated, up to 1.4.")
    key: str | None = option(None, help=KEY, shown="the only one")


@options_of(LineageSettings)
def lineage(settings: LineageSettings) -> None:
    """Find which networks were made of which others, by their weights.

    Shows a row for each step from a parent to a child: how it was made, the relative distance of the weights, and how
    much speaks for the direction, from 0 (a guess) to 1. Means of two networks have two rows.
    """
    import typer

    from ..atomic_files import write_text
    from ..reports.terminal import say, show_table
    from ..similarity import lineage as find

    if settings.out is not None:
        check_output(settings.out, (".csv", ".dot", ".html"))
    console = stdout()
    networks = networks_of(settings.paths, settings.key)
    sketches, failures = read_sketches(networks, console, settings.key)
    found = find(sketches, unrelated=settings.unrelated)
    rows = [
        [edge.child, edge.parent, edge.relation, f"{edge.distance:.4f}", f"{edge.evidence:.2f}"] for edge in found.edges
    ]
    if rows:
        show_table(console, ["child", "parent", "relation", "distance", "evidence"], rows, text_columns=3)
    alone = len(sketches) - sum(map(len, found.families))
    say(console, f"{len(found.families)} families of {len(sketches) - alone} networks, {alone} without relatives")
    if settings.out is not None:
        written = {".csv": found.table, ".dot": found.dot, ".html": lambda: _page(found)}
        write_text(settings.out, written[settings.out.suffix]())
    list_failures(failures)
    if failures:
        raise typer.Exit(1)


def _page(found: Lineage) -> str:
    """Return the page of some trees, whose networks are called by their paths in the folder that all are in."""
    folder, names = within(found.names)
    short = dict(zip(found.names, names, strict=True))
    edges = tuple(replace(edge, parent=short[edge.parent], child=short[edge.child]) for edge in found.edges)
    title = f"Lineage of {len(names):,} networks" + (f" in {folder}" if folder else "")
    return replace(found, names=tuple(names), edges=edges).html(title)

"""`sne-fast duplicates`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..tasks.settings import option
from .options import options_of
from .running import KEY, check_output, list_failures, stdout
from .vectors import NETWORKS, networks_of, read_sketches


@dataclass(frozen=True)
class DuplicatesSettings:
    """Options of `sne-fast duplicates`."""

    paths: tuple[Path, ...] = option(help=NETWORKS, argument=True, metavar="PATH")
    tolerance: float = option(0.02, help="Largest relative distance of near copies; 0 shows exact ones alone.", min=0)
    out: Path | None = option(None, help="Also write to .csv.", flags=("--out", "-o"))
    key: str | None = option(None, help=KEY, shown="the only one")


@options_of(DuplicatesSettings)
def duplicates(settings: DuplicatesSettings) -> None:
    """Find networks that are copies of each other.

    Exact copies have the same values, whatever their files' formats; reordered ones the same values in another order,
    as after a permutation of hidden units or under other names; near ones differ by little.
    """
    import typer

    from ..reports.files import write_csv
    from ..reports.terminal import say, show_table
    from ..similarity import find_duplicates

    if settings.out is not None:
        check_output(settings.out, (".csv",))
    console = stdout()
    networks = networks_of(settings.paths, settings.key)
    sketches, failures = read_sketches(networks, console, settings.key)
    rows = []
    found = find_duplicates(sketches, tolerance=settings.tolerance)
    for k, group in enumerate(found, 1):
        apart = "" if group.distance != group.distance else f"{group.distance:.4f}"
        rows += [[str(k), group.kind, apart, sketches[member].name] for member in group.members]
    columns = ["group", "kind", "distance", "network"]
    if rows:
        show_table(console, columns, rows)
    copies = sum(len(group.members) - 1 for group in found)
    say(console, f"{copies} of {len(sketches)} networks are copies of others, in {len(found)} groups")
    if settings.out is not None:
        write_csv(settings.out, columns, rows)
    list_failures(failures)
    if failures:
        raise typer.Exit(1)

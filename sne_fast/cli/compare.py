"""`sne-fast compare`."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

from ..tasks.settings import option
from .options import options_of
from .running import KEY, expand, stdout


@dataclass(frozen=True)
class CompareSettings:
    """Options of `sne-fast compare`."""

    a: Path = option(help="Network, or FOLDER/NAME of a zoo.", argument=True, metavar="A")
    b: Path = option(help="The other network.", argument=True, metavar="B")
    all: bool = option(False, help="Show layers that are the same too.")
    json: bool = option(False, help="Print JSON instead of a table.")
    key: str | None = option(None, help=KEY, shown="the only one")


@options_of(CompareSettings)
def compare(settings: CompareSettings) -> None:
    """Compare two networks layer by layer: which layers changed from A to B, and how much.

    The distance of a layer is relative to its size, 1.41 for weights that have nothing to do with each other.
    """
    import typer

    from ..atomic_files import to_json
    from ..reports.terminal import say, show_table
    from ..similarity import compare as changes_of

    networks = []
    for path in (settings.a, settings.b):
        found = expand([path], settings.key)
        if len(found) != 1:
            raise ValueError(f"{path} holds {len(found)} networks; name one")
        networks.append(found[0][1])
    changes = changes_of(*networks, key=settings.key)
    if settings.json:
        typer.echo(to_json([asdict(change) for change in changes]))
        return

    def shown(value: float | None, form: str = ".4f") -> str:
        return "" if value is None else format(value, form)

    rows = [
        [change.layer, change.status, f"{change.weights:,}", shown(change.distance), shown(change.cosine),
         shown(change.norm_ratio), " to ".join(shown(zeros, ".0%") for zeros in change.zeros if zeros is not None)]
        for change in changes if settings.all or change.status != "same"
    ]  # fmt: skip
    console = stdout()
    if rows:
        columns = ["layer", "status", "weights", "distance", "cosine", "norm ratio", "zeros"]
        show_table(console, columns, rows, text_columns=2)
    counts = Counter(change.status for change in changes)
    say(console, f"{len(changes)} layers: " + ", ".join(f"{count} {status}" for status, count in counts.items()))

"""`sne-fast map`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..tasks.settings import option
from .known import TABLE_KEYS, Known, known_in_table, known_in_zoos, within
from .options import options_of
from .running import check_output, stdout
from .vectors import read_vectors

if TYPE_CHECKING:
    import numpy as np

NEIGHBOURS = 5


@dataclass(frozen=True)
class MapSettings:
    """Options of `sne-fast map`."""

    vectors: Path = option(help="Folder that sne-fast encode -o FOLDER wrote.", argument=True, metavar="VECTORS")
    out: Path = option(
        Path("map.html"),
        help="Page to write, .html; a picture of the same name, .png, is written beside it.",
        flags=("--out", "-o"),
    )
    table: Path | None = option(
        None,
        help="Table of what is known of the networks, .csv or .csv.gz, one of whose columns names them: "
        f"{', '.join(TABLE_KEYS)}.",
    )
    colour: str | None = option(
        None, help="Column that colours the picture, and the page at first.", shown="the first one"
    )
    seed: int = option(0, help="Seed of the map.", min=0, max=2**32 - 1)
    perplexity: float = option(30.0, help="About the number of neighbours that each network is held near to.")


@options_of(MapSettings)
def map(settings: MapSettings) -> None:
    """Draw a map of the networks of a folder of vectors, on which similar ones are near each other.

    Writes an interactive page, one file that needs no network, and a picture. Columns are those of --table and of the
    zoos that networks are from, their folders, and their weights. The map is a t-SNE: it tells who is near whom, and
    little of how far others are.
    """
    from ..atomic_files import write_text
    from ..extras import require
    from ..reports.plots import column_map
    from ..reports.terminal import progress, say
    from ..similarity import layout, map_page, nearest

    picture = settings.out.with_suffix(".png")
    check_output(settings.out, (".html",))
    check_output(picture, (".png",))
    require("sklearn", "matplotlib", extra="demo", why="a map")
    vectors, console = read_vectors(settings.vectors), stdout()
    count = len(vectors.names)
    known = Known({}, 0) if settings.table is None else known_in_table(settings.table, vectors.names)
    folder, names = within(vectors.names)
    folders = [name.rpartition("/")[0] for name in names]
    columns: dict[str, list[Any]] = {}
    own = {"folder": folders} if len(set(folders)) > 1 else {}
    for source in (known.columns, known_in_zoos(vectors.names), own, {"weights": vectors.weights}):
        for name, values in source.items():
            columns.setdefault(name, values)
    colour = settings.colour if settings.colour is not None else next(iter(columns))
    if colour not in columns:
        raise ValueError(f"--colour must be a column, one of {', '.join(columns)}; got {colour!r}")
    with progress(console, f"Placing {count:,} networks"):
        places = layout(vectors.values, settings.seed, perplexity=settings.perplexity)
        near = nearest(vectors.values, k=NEIGHBOURS)[1]
    title = f"Map of {count:,} networks" + (f" in {folder}" if folder else "")
    write_text(settings.out, map_page(places, names, columns, title=title, colour=colour, neighbours=near))
    column_map(picture, places, _drawn(columns[colour]), colour)
    say(console, f"{count:,} networks are on {settings.out} and {picture}, coloured by {colour}")
    if vectors.failed:
        without = f"{vectors.failed} networks of {settings.vectors} have no vector of finite numbers"
        say(console, f"{without} and are not on it")
    if known.missing:
        say(console, f"{known.missing} networks are not in {settings.table}")


def _drawn(values: list[Any]) -> np.ndarray | list[str]:
    """Return a column as the picture takes it, numbers or names of groups."""
    import numpy as np

    from ..similarity.pages import plain_column

    plain = plain_column(values)
    if any(isinstance(value, str) for value in plain):
        return ["not known" if value is None else value for value in plain]
    return np.array([np.nan if value is None else value for value in plain], np.float64)

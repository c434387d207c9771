"""`sne-fast search`."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..tasks.settings import check_choices, option
from .options import options_of
from .running import KEY, about, list_failures, stdout
from .vectors import read_vectors


@dataclass(frozen=True)
class SearchSettings:
    """Options of `sne-fast search`."""

    vectors: Path = option(help="Folder that sne-fast encode -o FOLDER wrote.", argument=True, metavar="VECTORS")
    queries: tuple[Path, ...] = option(
        help="Networks to search for, of those in the folder or any others.", argument=True, metavar="PATH"
    )
    k: int = option(10, help="Number of networks to show for each query.", flags=("-k",), min=1)
    metric: Literal["cosine", "euclidean"] = option("cosine", help="Distance of whitened vectors.")
    approximate: bool = option(
        False, help="Compare with likely neighbours alone, for millions of vectors and many queries; needs faiss."
    )
    json: bool = option(False, help="Print JSON instead of a table.")
    device: str = option("cpu", help="Device to encode queries on, such as cpu or cuda.")
    key: str | None = option(None, help=KEY, shown="the only one")

    def __post_init__(self) -> None:
        check_choices(self, "search")


@options_of(SearchSettings)
def search(settings: SearchSettings) -> None:
    """Find the networks of a folder of vectors that are nearest to others.

    Queries that are not in the folder are encoded by the encoder whose vectors it holds. A query that is in it is not
    among its own results.
    """
    import numpy as np
    import typer

    from ..atomic_files import to_json
    from ..data.devices import usable_device
    from ..embedding import dataset_folder, dataset_options, embed_unit, manifest, plan
    from ..nn.predictor import load_encoder
    from ..reports.terminal import say, show_table
    from ..similarity import nearest

    vectors, console = read_vectors(settings.vectors), stdout()
    place = {os.path.abspath(name): k for k, name in enumerate(vectors.names)}
    asked = manifest(settings.queries, key=settings.key)
    rows: dict[str, Any] = {}
    for name in asked["uri"].to_pylist():
        known = place.get(os.path.abspath(name))
        rows[name] = None if known is None else vectors.values[known]
    failures: list[str] = []
    new = [vector is None for vector in rows.values()]
    if any(new):
        folder = dataset_folder(settings.vectors)
        encoder = load_encoder(folder / "model", device=usable_device(settings.device)).eval()
        for unit in plan(asked.filter(new), split=False):
            for row in embed_unit(encoder, unit, **{"key": settings.key, **dataset_options(folder)}).to_pylist():
                error = row["error"]
                if error is None and not np.isfinite(row["vector"]).all():
                    error = "its vector is not finite"
                rows[row["uri"]] = None if error is not None else row["vector"]
                failures += [about(row["uri"], error)] if error is not None else []
    names = [name for name, vector in rows.items() if vector is not None]
    if not names:
        raise ValueError(failures[0])
    queries = np.array([rows[name] for name in names], np.float32)
    distances, found = nearest(
        vectors.values, queries, settings.k + 1, metric=settings.metric, approximate=settings.approximate
    )
    answers: dict[str, list[dict[str, Any]]] = {}
    for name, apart, at in zip(names, distances.tolist(), found.tolist(), strict=True):
        own = place.get(os.path.abspath(name))
        pairs = [(vectors.names[k], d) for k, d in zip(at, apart, strict=True) if k != own]
        answers[name] = [{"name": other, "distance": d} for other, d in pairs[: settings.k]]
    if settings.json:
        typer.echo(to_json(answers))
    else:
        for name, answer in answers.items():
            lines = [[str(k), f"{one['distance']:.4f}", one["name"]] for k, one in enumerate(answer, 1)]
            show_table(console, ["", "distance", "network"], lines, title=f"nearest to {name}")
        if vectors.failed:
            without = f"{vectors.failed} networks of {settings.vectors} have no vector of finite numbers"
            say(console, f"{without} and were not searched")
    list_failures(failures)
    if failures:
        raise typer.Exit(1)

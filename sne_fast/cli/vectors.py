"""Networks of the commands that search among many: those of a folder of vectors, or of paths."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..failures import is_expected, sentence
from .running import about

if TYPE_CHECKING:
    import numpy as np
    from rich.console import Console

    from ..similarity import NetworkSketch

NETWORKS = (
    "Folders that encode wrote, which stand for all their networks; checkpoints, trees of folders of them, zoos, "
    "FOLDER/NAME for one network of a zoo, or @FILE with a path in each line."
)


class Vectors(NamedTuple):
    """The vectors of a folder that `sne-fast encode -o FOLDER` wrote.

    Args:
        names: paths of the networks.
        values: `(n, h)` float32.
        failed: number of networks that have no vector, or one that is not finite.
        weights: number of weights of each network, None where it is not known.
    """

    names: list[str]
    values: np.ndarray
    failed: int
    weights: list[int | None]


def is_vectors(path: Path) -> bool:
    """Return True for a folder of vectors, of one encoder or around it."""
    return path.is_dir() and (path.name.startswith("encoder=") or any(path.glob("encoder=*")))


def read_vectors(folder: Path) -> Vectors:
    """Read the vectors of a folder that are finite.

    Raises:
        FileNotFoundError: it holds none.
        ValueError: it holds those of several encoders, or a damaged file.
    """
    import numpy as np

    table = _read_table(folder)
    kept = table.filter(table["vector"].is_valid())
    values = np.array(kept["vector"].to_pylist(), np.float32)
    finite = np.flatnonzero(np.isfinite(values).all(-1)) if kept.num_rows else np.zeros(0, np.int64)
    if not len(finite):
        raise FileNotFoundError(f"{folder}: none of its {table.num_rows} networks has a vector of finite numbers")
    kept, failed = kept.take(finite), table.num_rows - len(finite)
    return Vectors(kept["uri"].to_pylist(), values[finite], failed, kept["weights"].to_pylist())


def _read_table(folder: Path) -> Any:
    """Read a folder of vectors as a table of `pyarrow`, with a row for every network."""
    from ..embedding import collect

    if not folder.exists():
        raise FileNotFoundError(f"no such folder: {str(folder)!r}")
    if not is_vectors(folder):
        raise FileNotFoundError(f"{folder} holds no vectors; write them with sne-fast encode NETWORKS -o FOLDER")
    return collect(folder)


def networks_of(paths: Sequence[Path], key: str | None) -> list[str]:
    """Return the paths of the networks at paths, each once.

    Raises:
        FileNotFoundError: a path that is not there.
        ValueError: there are no networks.
    """
    from ..embedding.manifests import find_networks

    found: list[str] = []
    for path in paths:
        found += _read_table(path)["uri"].to_pylist() if is_vectors(path) else find_networks([path], key)
    if not found:
        raise ValueError(f"there are no networks at {', '.join(map(str, paths))}")
    return list(dict.fromkeys(found))


def read_sketches(networks: Sequence[str], console: Console, key: str | None) -> tuple[list[NetworkSketch], list[str]]:
    """Return the sketches of the networks that can be read, and a sentence for each of the others.

    Raises:
        ValueError: none of them can be read.
    """
    from ..embedding.manifests import network_at
    from ..reports.terminal import progress
    from ..similarity import sketch

    found, failures = [], []
    with progress(console, "Reading", bar=True) as update:
        for k, name in enumerate(networks):
            try:
                network = network_at(name)
                found.append(sketch(network, name=name, key=key if isinstance(network, str | Path) else None))
            except Exception as error:
                if not is_expected(error):
                    raise
                failures.append(about(name, sentence(error)))
            update((k + 1) / len(networks))
    if not found:
        raise ValueError(failures[0])
    return found, failures

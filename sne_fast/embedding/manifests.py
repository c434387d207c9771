"""Manifests: what networks there are, how large they are, and whether they have changed, from headers alone."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..data.layer_stream import LayerStream
from ..data.readers import adapter_configs, quantisation_configs
from ..data.readers.distributed_folders import distributed_folder
from ..data.readers.errors import CheckpointError
from ..data.readers.folders import (
    METADATA,
    EmptyFolder,
    array_files,
    chosen_file,
    component_folders,
    independent_files,
    is_model_folder,
    sentence_transformer_parts,
)
from ..data.readers.shards import counts_itself, index_beside
from ..extras import require
from ..failures import any_sentence
from ..regular_files import read_text
from ..zoo.index import ABOUT, INDEX
from ..zoo.table import Zoo, networks_at

__all__ = ["find_networks", "manifest", "network_at"]

BESIDE = (*quantisation_configs.FILES, adapter_configs.CONFIG)
"""Files beside a checkpoint that say how its tensors are read."""
COLUMNS = ("uri", "name", "etag", "weights", "layer_weights", "error")


def manifest(
    sources: Iterable[str | os.PathLike[str]], *, key: str | None = None, progress: Callable[[int], None] | None = None
) -> Any:
    """Return a table of the networks at some sources, from the headers of their files.

    Args:
        sources: paths, each of a checkpoint, of a folder of one or of several, of a tree of such folders, of a zoo
            (all its networks), or `FOLDER/NAME` for one network of a zoo; `@FILE` stands for the paths in a text file,
            one in each line; a `.parquet` file is a manifest that was written before.
        key: the place of the weights in pickled files that have several.
        progress: function that is called with the number of networks looked at.

    Returns:
        A `pyarrow.Table` with a row per network, also where paths name it twice. `uri` (string) is its path and `name`
        (string) what it is called in results; `etag` (string) changes when its files do, by their sizes and times;
        `weights` (int64) and `layer_weights` (list of int64) are those of the network and of each of its layers, of
        quantised ones an upper bound, null for a network that cannot be read; `error` (string) says why it cannot, null
        for all others.

    Raises:
        FileNotFoundError: a source that is not there.
        ModuleNotFoundError: pyarrow is missing.
    """
    arrow = _arrow()
    rows: dict[str, list[Any]] = {name: [] for name in COLUMNS}
    tables = []
    seen = set[str]()
    for source in sources:
        if str(source).endswith(".parquet") and Path(source).is_file():
            tables.append(_read_manifest(Path(source)))
            continue
        for uri in find_networks([source], key):
            if uri in seen:
                continue
            seen.add(uri)
            for name, value in _row(uri, key).items():
                rows[name].append(value)
            if progress is not None:
                progress(len(rows["uri"]))
    made = arrow.table(rows, schema=schema())
    return arrow.concat_tables([*tables, made]) if tables else made


def schema() -> Any:
    """Return the pyarrow schema of manifests."""
    arrow = _arrow()
    types = (arrow.string(), arrow.string(), arrow.string(), arrow.int64(), arrow.list_(arrow.int64()), arrow.string())
    return arrow.schema(list(zip(COLUMNS, types, strict=True)))


def find_networks(sources: Iterable[str | os.PathLike[str]], key: str | None = None) -> Iterator[str]:
    """Yield the paths of all networks at some sources, see `manifest`; a network of a zoo is `FOLDER/NAME`.

    The folder of a pipeline of which `key` names a network stands for that network.

    Raises:
        FileNotFoundError: a source that is not there.
    """
    for source in sources:
        text = os.fsdecode(source)
        if text.startswith("@"):
            lines = read_text(Path(text[1:])).splitlines()
            yield from find_networks([line.strip() for line in lines if line.strip()], key)
            continue
        path = Path(text)
        in_zoo = networks_at(path)
        if in_zoo is not None:
            yield from map(str, in_zoo)
        elif not path.exists():
            raise FileNotFoundError(f"no such file or folder: {text!r}")
        elif path.is_dir():
            found = list(_in_tree(path, key)) or ([path] if array_files(path) else [])
            if not found:
                chosen_file(path)  # says what is there instead
            yield from map(str, found)
        else:
            yield str(path)


def _in_tree(folder: Path, key: str | None) -> Iterator[Path]:
    """Yield the checkpoints of a folder and of the folders inside it, in order of their names.

    A folder whose files cannot be told apart is yielded itself: reading it says why.
    """
    try:
        if distributed_folder(folder) is not None or sentence_transformer_parts(folder) is not None:
            yield folder
            return
        components = component_folders(folder)
        if components is not None:
            named = key is not None and key.partition(".")[0] in (component.name for component in components)
            yield from [folder] if named or len(components) < 2 else components
            return
        file, _ = chosen_file(folder)
        if is_model_folder(folder, file):
            yield folder
            return
        yield file
    except EmptyFolder:
        pass
    except CheckpointError:
        yield from independent_files(folder) or [folder]
    try:
        entries = sorted(folder.iterdir())
    except OSError:  # which reading it says
        return
    for entry in entries:
        if entry.is_dir() and not entry.is_symlink() and not entry.name.startswith("."):
            in_zoo = networks_at(entry)
            yield from _in_tree(entry, key) if in_zoo is None else map(Path, map(str, in_zoo))


def network_at(uri: str) -> Any:
    """Return what `pack` takes for a row of a manifest: a path, or the network of a zoo."""
    path = Path(uri)
    index = path.parent / INDEX
    if path.exists() or not index.is_file():
        return path
    zoo = _opened(path.parent, index.stat().st_mtime_ns)
    return zoo[zoo.find(path.name)]


@lru_cache(maxsize=16)
def _opened(folder: Path, changed: int) -> Zoo:
    """Return the zoo of a folder, opened once as long as it does not change."""
    return Zoo.open(folder)


def etag_of(uri: str) -> str:
    """Return a text that changes when the files of a network do, by their sizes and times of change.

    Raises:
        OSError: there is no such file.
    """
    path = Path(uri)
    if path.is_dir():
        files = [entry for entry in path.rglob("*") if entry.is_file()]
    elif not path.exists() and (path.parent / INDEX).is_file():  # a network of a zoo
        files = [path.parent / ABOUT, path.parent / INDEX]
    elif path.suffix in (".json", ".distcp") or path.name == METADATA or counts_itself(path.name) or index_beside(path):
        # one part of several
        files = [entry for entry in path.parent.iterdir() if entry.is_file()]
    else:  # with values that ONNX keeps in another file
        beside = [path.parent / name for name in (*BESIDE, f"{path.name}.data", f"{path.name}_data")]
        files = [path, *filter(Path.is_file, beside)]
    said = hashlib.sha256()
    for file in sorted(files):
        stat = file.stat()
        said.update(f"{file.name}\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode("utf-8", "surrogateescape"))
    return said.hexdigest()[:24]


def _row(uri: str, key: str | None) -> dict[str, Any]:
    row: dict[str, Any] = {"uri": uri, "name": uri, "etag": "", "weights": None, "layer_weights": None, "error": None}
    try:
        row["etag"] = etag_of(uri)
        sizes = [sum(layer) for layer in LayerStream(network_at(uri), key=key).tensor_sizes()]
    except Exception as error:
        row["error"] = any_sentence(error)
    else:
        row["weights"], row["layer_weights"] = sum(sizes), sizes
    return row


def _read_manifest(file: Path) -> Any:
    import pyarrow.parquet as pq

    table = pq.read_table(file)
    missing = [name for name in COLUMNS if name not in table.column_names]
    if missing:
        raise ValueError(f"manifest: {file} lacks the column(s) {', '.join(missing)}")
    return table.select(list(COLUMNS)).cast(schema())


def _arrow() -> Any:
    require("pyarrow.parquet", extra="parquet", why="a manifest of networks")
    import pyarrow

    return pyarrow

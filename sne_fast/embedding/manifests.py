"""Manifests: what networks there are, how large they are, and whether they have changed, from headers alone."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..atomic_files import replacing
from ..data.layer_stream import LayerStream
from ..data.readers import adapter_configs, quantisation_configs
from ..data.readers.beside import beside, folders_in
from ..data.readers.distributed_folders import distributed_folder
from ..data.readers.errors import CheckpointError, Unreachable
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
from ..data.readers.shards import counts_itself, index_beside, shards_named, sibling_shards
from ..data.remote.failures import scrubbed
from ..data.remote.paths import RemotePath, forget, is_remote, place
from ..extras import require
from ..failures import any_sentence
from ..regular_files import read_text
from ..zoo.index import ABOUT, INDEX
from ..zoo.table import Zoo, ZooNetwork, networks_at
from .in_order import in_order

__all__ = ["find_networks", "listed", "manifest", "manifest_beside", "network_at"]

BESIDE = (*quantisation_configs.FILES, adapter_configs.CONFIG)
"""Files beside a checkpoint that say how its tensors are read."""
WHOLE = (
    ".safetensors", ".pt", ".pth", ".ckpt", ".bin", ".gguf", ".npz", ".npy", ".h5", ".keras", ".msgpack", ".tflite",
)  # fmt: skip
"""Endings of files that have all their values in them, as those of ONNX may not."""
KEPT = "_manifest.parquet"
"""Manifest beside results; readers of parquet datasets leave out names that begin so."""
COLUMNS = ("uri", "name", "etag", "weights", "layer_weights", "error")


def manifest(
    sources: Iterable[str | os.PathLike[str]],
    *,
    key: str | None = None,
    before: Any = None,
    progress: Callable[[int], None] | None = None,
) -> Any:
    """Return a table of the networks at some sources, from the headers of their files.

    Args:
        sources: paths, each of a checkpoint, of a folder of one or of several, of a tree of such folders, of a zoo
            (all its networks), or `FOLDER/NAME` for one network of a zoo; `@FILE` stands for the paths in a text file,
            one in each line; a `.parquet` file is a manifest that was written before. Also URLs of files and folders,
            `hf://user/name@revision` of the Hugging Face Hub or those of stores that fsspec knows (extra `remote`).
        key: the place of the weights in pickled files that have several.
        before: a manifest that was made before with the same key: the headers of networks that have not changed since,
            by their `etag`, are not read again.
        progress: function that is called with the number of networks looked at.

    Returns:
        A `pyarrow.Table` with a row per network, also where paths name it twice. `uri` (string) is its path or URL, of
        a repository at the commit that its revision meant, and `name` (string) what it is called in results; `etag`
        (string) changes when its files do, by their sizes and times, or what their store says of versions; `weights`
        (int64) and `layer_weights` (list of int64) are those of the network and of each of its layers, of quantised
        ones an upper bound, null for a network that cannot be read; `error` (string) says why it cannot, null for all
        others.

    Raises:
        FileNotFoundError: a source on this machine that is not there; a URL at which nothing can be read is a row with
            its error.
        ModuleNotFoundError: pyarrow is missing, or a package that a URL needs.
    """
    arrow = _arrow()
    forget()
    rows: dict[str, list[Any]] = {name: [] for name in COLUMNS}
    tables = []
    others = []
    for source in sources:
        if str(source).endswith(".parquet") and not is_remote(source) and Path(source).is_file():
            tables.append(_read_manifest(Path(source)))
        else:
            others.append(os.fsdecode(source))
    for row in _rows(others, key, _known(before)):
        for name, value in row.items():
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


def manifest_beside(
    folder: Path,
    sources: Iterable[str | os.PathLike[str]],
    *,
    key: str | None = None,
    progress: Callable[[int], None] | None = None,
) -> Any:
    """Return `manifest` of some sources, and keep it in a folder, so that the next call reads the headers of changes.

    Args:
        folder: of results by one key.
        sources: as all that follow, see `manifest`.
    """
    _arrow()
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = folder / KEPT
    before = None
    with contextlib.suppress(OSError, ValueError, pa.ArrowException):  # without it all headers are read
        before = _read_manifest(file)
    table = manifest(sources, key=key, before=before, progress=progress)
    if before is None or not table.equals(before):
        with replacing(file) as temporary:
            pq.write_table(table, temporary)
    return table


Known = dict[tuple[str, str], dict[str, Any]]
"""What the headers of networks say, by uri and etag."""


def _known(before: Any) -> Known:
    rows = [] if before is None else before.to_pylist()
    return {
        (row["uri"], row["etag"]): {"weights": row["weights"], "layer_weights": row["layer_weights"]}
        for row in rows
        if row["error"] is None
    }


def _rows(sources: Iterable[str], key: str | None, known: Known) -> Iterator[dict[str, Any]]:
    """Yield a row for each network at some sources; those elsewhere are looked at by threads."""
    found = in_order(lambda source: _networks_or_failure(source, key), listed(sources), is_remote)
    seen = set[str]()

    def each_once() -> Iterator[dict[str, Any]]:
        for row in itertools.chain.from_iterable(found):
            if row["uri"] not in seen:
                seen.add(row["uri"])
                yield row

    yield from in_order(lambda row: _described(row, key, known), each_once(), lambda row: is_remote(row["uri"]))


def _networks_or_failure(source: str, key: str | None) -> list[dict[str, Any]]:
    """Return rows of the networks at a source without what their headers say; one with its error for a failed URL."""
    if not is_remote(source):
        return [_row(uri) for uri in find_networks([source], key)]
    try:
        return [_row(uri) for uri in find_networks([source], key)]
    except ModuleNotFoundError:
        raise
    except Exception as error:
        return [_row(scrubbed(source), error=any_sentence(error))]


def find_networks(sources: Iterable[str | os.PathLike[str]], key: str | None = None) -> Iterator[str]:
    """Yield the paths of all networks at some sources, see `manifest`; a network of a zoo is `FOLDER/NAME`.

    The folder of a pipeline of which `key` names a network stands for that network.

    Raises:
        FileNotFoundError: a source that is not there.
    """
    for text in listed(map(os.fsdecode, sources)):
        path = place(text)
        in_zoo = _zoo_at(path)
        if in_zoo is not None:
            yield from map(str, in_zoo)
        elif not path.exists():
            if isinstance(path, RemotePath):
                path.stat()  # says why
            raise FileNotFoundError(f"no such file or folder: {text!r}")
        elif path.is_dir():
            if isinstance(path, RemotePath):
                path.list_tree()
            found = list(_in_tree(path, key)) or ([path] if array_files(path) else [])
            if not found:
                chosen_file(path)  # says what is there instead
            yield from map(str, found)
        else:
            yield str(path)


def listed(sources: Iterable[str]) -> Iterator[str]:
    """Yield sources, those in the lines of a text file for `@FILE`."""
    for source in sources:
        if source.startswith("@"):
            lines = read_text(Path(source[1:])).splitlines()
            yield from listed(line.strip() for line in lines if line.strip())
        else:
            yield source


def _zoo_at(path: Path) -> list[ZooNetwork] | None:
    """Return the networks at a path of a zoo on this machine, None for other paths."""
    return None if isinstance(path, RemotePath) else networks_at(path)


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
    except Unreachable:
        raise
    except CheckpointError:
        yield from independent_files(folder) or [folder]
    try:
        entries = folders_in(folder)
    except OSError:  # which reading it says
        return
    for entry in entries:
        in_zoo = _zoo_at(entry)
        yield from _in_tree(entry, key) if in_zoo is None else map(Path, map(str, in_zoo))


def network_at(uri: str) -> Any:
    """Return what `pack` takes for a row of a manifest: a path or URL, or the network of a zoo."""
    if is_remote(uri):
        return uri
    path = place(uri)
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
    """Return a text that changes when the files of a network do.

    That is by their sizes and times of change, or in a store elsewhere by what it says of versions.

    Raises:
        OSError: there is no such file.
        StoreError: a store elsewhere cannot be asked.
    """
    path = place(uri)
    if path.is_dir():
        files = [entry for entry in path.rglob("*") if entry.is_file()]
    elif not path.exists() and (path.parent / INDEX).is_file():  # a network of a zoo
        files = [path.parent / ABOUT, path.parent / INDEX]
    elif path.suffix in (".json", ".distcp") or path.name == METADATA or counts_itself(path.name) or index_beside(path):
        files = _files_of_parts(path)
    else:
        values = () if path.suffix in WHOLE else (f"{path.name}.data", f"{path.name}_data")
        files = [path, *beside(path, (*BESIDE, *values))]
    said = hashlib.sha256()
    for file in sorted(files):
        stat = file.stat()
        size, version = stat.st_size, file.etag() if isinstance(file, RemotePath) else stat.st_mtime_ns
        said.update(f"{file.name}\0{size}\0{version}\0".encode("utf-8", "surrogateescape"))
    return said.hexdigest()[:24]


def _files_of_parts(path: Path) -> list[Path]:
    """Return the files of a checkpoint of which a path is one part: all in its folder, where that can be listed."""
    if not isinstance(path, RemotePath) or path.store.lists:
        return [entry for entry in path.parent.iterdir() if entry.is_file()]
    index = path if path.suffix == ".json" else index_beside(path)
    if index is None:
        return [*(sibling_shards(path) or [path]), *beside(path, BESIDE)]
    return [index, *(index.parent / shard for shard in shards_named(index)), *beside(path, BESIDE)]


def _row(uri: str, error: str | None = None) -> dict[str, Any]:
    return {"uri": uri, "name": uri, "etag": "", "weights": None, "layer_weights": None, "error": error}


def _described(row: dict[str, Any], key: str | None, known: Known) -> dict[str, Any]:
    """Fill in what the headers of a network say, or said before if it has not changed; return the row."""
    if row["error"] is not None:
        return row
    uri = row["uri"]
    try:
        row["etag"] = etag_of(uri)
        if (uri, row["etag"]) in known:
            return row | known[uri, row["etag"]]
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

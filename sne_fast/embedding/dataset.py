"""A dataset of vectors on disk: one parquet file per unit, and the encoder that made them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..atomic_files import replacing, write_json
from ..extras import require
from ..nn.encoder import SNE
from ..nn.layer_encodings import LayerEncodings
from ..nn.predictor import Predictor
from ..nn.pretrained import CONFIG_NAME, DIGEST, described, saved_class
from ..regular_files import read_json
from ..version import __version__
from .units import Network, Unit

__all__ = ["EmbeddingDataset", "collect", "read_results"]

MODEL = "model"
ABOUT = "embedding.json"


def provenance(config: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Return what files of vectors say of what made them.

    Args:
        config: of the model, as `described` returns it.
        options: that the vectors depend on.
    """
    return {
        "model": saved_class(config), DIGEST: config.get(DIGEST),
        "options": {name: options[name] for name in sorted(options)},
        "preparation": config.get("preparation"), "sne_fast_version": __version__,
    }  # fmt: skip


class EmbeddingDataset:
    """The vectors that one encoder gives, with its options, in a folder `encoder=<hash>` of their own.

    Files are `part-<unit>.parquet`, each written whole or not at all: those that exist are what is done. Beside them
    are the encoder, which other processes load from there, and `embedding.json`, which says what made the vectors.

    Args:
        folder: of all datasets; made if it is not there.
        encoder: the encoder or predictor.
        options: those of `embed_unit` that change its results.

    Attributes:
        path: the folder `encoder=<hash>`; the hash depends on the configuration, weights and options.
    """

    def __init__(self, folder: str | os.PathLike[str], encoder: SNE | Predictor, **options: Any) -> None:
        root = Path(folder)
        root.mkdir(parents=True, exist_ok=True)
        self.encoder, self.options = encoder, options
        config = described(encoder)
        about = {"config": config, "options": {name: options[name] for name in sorted(options)}}
        self.hash = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()[:16]
        self.path = root / f"encoder={self.hash}"
        self.path.mkdir(exist_ok=True)
        if not (self.path / MODEL).exists():
            try:
                encoder.save_pretrained(self.path / MODEL)  # appears whole
            except OSError:
                if not (self.path / MODEL / CONFIG_NAME).is_file():  # that another process has made meanwhile
                    raise
        self._about = provenance(config, options)
        if not (self.path / ABOUT).exists():
            write_json(self.path / ABOUT, self._about)

    def part(self, unit: Unit) -> Path:
        """Return the file of a unit."""
        return self.path / f"part-{unit.id}.parquet"

    def missing(self, units: Sequence[Unit], *, retry: bool = False) -> list[Unit]:
        """Return the units that are not done, in order, without the networks that other units have done.

        Args:
            units: of `plan`.
            retry: whether what failed before is to be done again.
        """
        if not retry and all(self.part(unit).exists() for unit in units):
            return []
        results = read_results(_parts(self.path))

        def done(network: Network) -> bool:
            held = results.get((network.uri, network.etag))
            return held is not None and held.whole is not None and not (retry and held.whole["error"] is not None)

        found = []
        for unit in units:
            if unit.layers is None:
                packs = (tuple(network for network in pack if not done(network)) for pack in unit.packs)
                left = tuple(pack for pack in packs if pack)
                if left:
                    found.append(unit if left == unit.packs else Unit(left))
            elif not done(unit.networks[0]):
                held = results.get((unit.networks[0].uri, unit.networks[0].etag))
                run = None if held is None else held.runs.get(unit.layers[0])
                if not self.part(unit).exists() or (retry and run is not None and run["error"] is not None):
                    found.append(unit)
        return found

    def failures(self, units: Sequence[Unit]) -> dict[str, str]:
        """Return why networks of the units failed, by their paths."""
        results = read_results(_parts(self.path))
        found: dict[str, str] = {}
        for network in dict.fromkeys(network for unit in units for network in unit.networks):
            rows = results[network.uri, network.etag].rows if (network.uri, network.etag) in results else []
            errors = [row["error"] for row in rows if row["error"] is not None]
            if errors:
                found[network.uri] = errors[0]
        return found

    def failures_of(self, unit: Unit) -> dict[str, str]:
        """Return why networks failed when this unit was done, by their paths, from its file alone."""
        rows = _read(self.part(unit), ["uri", "error"]).to_pylist()
        return {row["uri"]: row["error"] for row in rows if row["error"] is not None}

    def write(self, unit: Unit, table: Any) -> None:
        """Write the results of a unit, all or nothing, with what made them as `sne_fast` in the file's metadata."""
        import pyarrow.parquet as pq

        table = table.replace_schema_metadata({"sne_fast": json.dumps(self._about)})
        with replacing(self.part(unit)) as temporary:
            pq.write_table(table, temporary)


@dataclass
class Results:
    """The rows of one network with one etag: as a whole, or of runs of its layers by the first of each."""

    whole: dict[str, Any] | None = None
    runs: dict[int, dict[str, Any]] = field(default_factory=dict)
    newest: int = 0
    """Place of the newest file with rows of it, among all files by their age."""

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The rows that count: one that succeeded as a whole, else those of runs, else one that failed."""
        if self.whole is not None and (self.whole["error"] is None or not self.runs):
            return [self.whole]
        return [self.runs[first] for first in sorted(self.runs)]

    def add(self, row: dict[str, Any], place: int) -> None:
        """Add the row of a newer file; a failure does not take the place of a success."""
        first, self.newest = row["first_layer"], place
        before = self.whole if first is None else self.runs.get(first)
        if before is not None and before["error"] is None and row["error"] is not None:
            return
        if first is None:
            self.whole = row
        else:
            self.runs[first] = row


def read_results(files: Sequence[Path]) -> dict[tuple[str, str], Results]:
    """Return what is known of the results in files, the oldest first, by uri and etag.

    Rows have `uri`, `etag`, `first_layer`, `error`, and `at`: the places of the file and of the row in it.

    Raises:
        ValueError: a file that is damaged; the message names it.
    """
    found: dict[tuple[str, str], Results] = {}
    for place, file in enumerate(files):
        for i, row in enumerate(_read(file, ["uri", "etag", "first_layer", "error"]).to_pylist()):
            found.setdefault((row["uri"], row["etag"]), Results()).add({**row, "at": (place, i)}, place)
    return found


def _read(file: Path, columns: list[str] | None = None) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_table(file, columns=columns)
    except pa.ArrowInvalid as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{file}: is damaged ({reason}); remove it and encode its networks again") from error


def _parts(path: Path) -> list[Path]:
    """Return the files of results, the oldest first."""
    return sorted(path.glob("part-*.parquet"), key=lambda file: (file.stat().st_mtime_ns, file.name))


def collect(folder: str | os.PathLike[str], *, table: Any = None, encoder: SNE | None = None) -> Any:
    """Return the results of a dataset as one table, the layers of split networks joined.

    Args:
        folder: of one encoder, `encoder=<hash>`, or the folder around it if there is one encoder alone.
        table: a manifest, whose networks are returned as they are in it; None returns all networks, each as its file
            was when it was encoded last.
        encoder: joins the layers; None is the one beside the results.

    Returns:
        A `pyarrow.Table` with a row per network that has results, in order of `uri`. A success counts before a failure
        of the same file, the newest before others. A split network of which layers are missing is a row with an
        `error`.

    Raises:
        FileNotFoundError: there are no results.
        ValueError: the folder has results of several encoders, or a damaged file.
    """
    require("pyarrow.parquet", extra="parquet", why="collecting vectors")
    import pyarrow as pa

    path = dataset_folder(Path(folder))
    files = _parts(path)
    if not files:
        raise FileNotFoundError(f"collect: {path} holds no results")
    wanted = None if table is None else set(zip(table["uri"].to_pylist(), table["etag"].to_pylist(), strict=True))
    chosen: dict[str, Results] = {}
    for (uri, etag), results in read_results(files).items():
        if (wanted is None or (uri, etag) in wanted) and (uri not in chosen or results.newest > chosen[uri].newest):
            chosen[uri] = results
    keep = bool(read_json(path / ABOUT, dict)["options"].get("layers"))
    taken: dict[int, list[int]] = {}  # rows of whole networks, which stay columns
    joined = []
    for held in (results.rows for results in chosen.values()):
        if held[0]["first_layer"] is None:
            place, i = held[0]["at"]
            taken.setdefault(place, []).append(i)
            continue
        rows = [_read(files[place]).slice(i, 1).to_pylist()[0] for place, i in (row["at"] for row in held)]
        encoder = encoder or SNE.from_pretrained(path / MODEL)
        joined.append(_joined(encoder, rows, keep))
    tables = [_read(files[place]).take(rows) for place, rows in taken.items()]
    schema = _read(files[0]).schema
    return pa.concat_tables([*tables, pa.Table.from_pylist(joined, schema=schema)]).sort_by("uri")


def dataset_options(folder: Path) -> dict[str, Any]:
    """Return the options of `embed_unit` that the vectors in a folder `encoder=<hash>` were made with."""
    return dict(read_json(folder / ABOUT, dict)["options"])


def dataset_folder(folder: Path) -> Path:
    """Return the folder of one encoder, `encoder=<hash>`, of itself or of the folder around it.

    Raises:
        FileNotFoundError: there is none.
        ValueError: there are several.
    """
    if folder.name.startswith("encoder="):
        return folder
    inside = sorted(folder.glob("encoder=*"))
    if not inside:
        raise FileNotFoundError(f"collect: {folder} holds no folder encoder=...")
    if len(inside) > 1:
        names = ", ".join(path.name for path in inside)
        raise ValueError(f"collect: {folder} holds the results of several encoders, {names}; give one of these folders")
    return inside[0]


def _joined(encoder: SNE, rows: list[dict[str, Any]], keep: bool) -> dict[str, Any]:
    """Return the row of a network from those of runs of its layers, with the vectors of layers if they are kept."""
    layers = {row["first_layer"] + i: layer for row in rows for i, layer in enumerate(row["layers"] or ())}
    row = {
        **rows[0], "seconds": sum(part["seconds"] for part in rows), "layers": None, "first_layer": None,
        "num_layers": None,
    }  # fmt: skip
    total = rows[0]["num_layers"]
    if sorted(layers) != list(range(total)):
        errors = [part["error"] for part in rows if part["error"] is not None]
        return {**row, "error": errors[0] if errors else f"{len(layers)} of its {total} layers are done"}
    held = [layers[i] for i in range(total)]
    sampled = [layer["halves"] is not None for layer in held]
    vectors = torch.tensor([layer["vector"] for layer in held])
    halves = [layer["halves"] or 2 * layer["vector"] for layer in held]
    encodings = LayerEncodings(
        vectors,
        torch.tensor([layer["level"] for layer in held]),
        torch.tensor([layer["tensors"] for layer in held]),
        None if held[0]["pooled"] is None else torch.tensor([layer["pooled"] for layer in held]),
        torch.tensor(halves).unflatten(1, (2, -1)).transpose(0, 1) if any(sampled) else None,
    )
    weight = encoder.sample_parameter
    with torch.no_grad():
        encodings = encodings.to(weight.device, weight.dtype)
        row["vector"] = encoder.join(encodings)[0].float().tolist()
        row["spread"] = float(encoder.spread(encodings)) if encodings.estimated else None
    return {**row, "error": None, **({"layers": held, "num_layers": total} if keep else {})}

"""A dataset of vectors on disk: one parquet file per unit, and the encoder that made them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..atomic_files import replacing, write_json
from ..extras import require
from ..nn.encoder import SNE
from ..nn.layer_encodings import LayerEncodings
from ..nn.predictor import Predictor
from ..nn.pretrained import DIGEST, read_config, saved_class
from ..version import __version__
from .units import Unit

__all__ = ["EmbeddingDataset", "collect"]

MODEL = "model"
ABOUT = "embedding.json"


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
        made = root / f".model-{os.getpid()}"
        encoder.save_pretrained(made)
        config = read_config(made)
        about = {"config": config, "options": {name: options[name] for name in sorted(options)}}
        self.hash = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()[:16]
        self.path = root / f"encoder={self.hash}"
        self.path.mkdir(exist_ok=True)
        if (self.path / MODEL).exists():
            for file in made.iterdir():
                file.unlink()
            made.rmdir()
        else:
            made.rename(self.path / MODEL)
        if not (self.path / ABOUT).exists():
            said = {
                "model": saved_class(config), DIGEST: config.get(DIGEST), "options": about["options"],
                "sne_fast_version": __version__,
            }  # fmt: skip
            write_json(self.path / ABOUT, said)

    def part(self, unit: Unit) -> Path:
        """Return the file of a unit."""
        return self.path / f"part-{unit.id}.parquet"

    def missing(self, units: Sequence[Unit]) -> list[Unit]:
        """Return the units that are not done, in order."""
        return [unit for unit in units if not self.part(unit).exists()]

    def failures(self, units: Sequence[Unit]) -> list[str]:
        """Return a sentence for each network of the units that failed, which begins with its path."""
        import pyarrow.parquet as pq

        found = []
        for part in map(self.part, units):
            rows = pq.read_table(part, columns=["uri", "error"]).to_pylist() if part.exists() else []
            found += [f"{row['uri']}: {row['error']}" for row in rows if row["error"] is not None]
        return found

    def write(self, unit: Unit, table: Any) -> None:
        """Write the results of a unit, all or nothing."""
        import pyarrow.parquet as pq

        with replacing(self.part(unit)) as temporary:
            pq.write_table(table, temporary)


def collect(folder: str | os.PathLike[str], *, encoder: SNE | None = None) -> Any:
    """Return the results of a dataset as one table, the layers of split networks joined.

    Args:
        folder: of one encoder, `encoder=<hash>`, or the folder around it if there is one encoder alone.
        encoder: joins the layers; None is the one beside the results.

    Returns:
        A `pyarrow.Table` with a row per network, in order of `uri`. Of several rows for one network the one whose
        file is newest counts. A split network of which layers are missing is a row with an `error`.

    Raises:
        FileNotFoundError: there are no results.
        ValueError: the folder has results of several encoders.
    """
    require("pyarrow.parquet", extra="parquet", why="collecting vectors")
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = _dataset_in(Path(folder))
    files = sorted(path.glob("part-*.parquet"), key=lambda file: (file.stat().st_mtime_ns, file.name))
    if not files:
        raise FileNotFoundError(f"collect: {path} holds no results")
    whole: dict[str, dict[str, Any]] = {}
    parts: dict[tuple[str, str], list[dict[str, Any]]] = {}
    table = pq.read_table(files[0])
    for file in files:
        for row in pq.read_table(file).to_pylist():
            if row["first_layer"] is not None and row["vector"] is None:
                parts.setdefault((row["uri"], row["etag"]), []).append(row)
            else:
                whole[row["uri"]] = row
    if parts:
        joiner = encoder or SNE.from_pretrained(path / MODEL)
        for (uri, _), rows in parts.items():
            whole[uri] = _joined(joiner, rows)
    return pa.Table.from_pylist([whole[uri] for uri in sorted(whole)], schema=table.schema)


def _dataset_in(folder: Path) -> Path:
    if folder.name.startswith("encoder="):
        return folder
    inside = sorted(folder.glob("encoder=*"))
    if not inside:
        raise FileNotFoundError(f"collect: {folder} holds no folder encoder=...")
    if len(inside) > 1:
        names = ", ".join(path.name for path in inside)
        raise ValueError(f"collect: {folder} holds the results of several encoders, {names}; give one of these folders")
    return inside[0]


def _joined(encoder: SNE, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the row of a network from those of its layers."""
    rows = sorted(rows, key=lambda row: row["first_layer"])
    layers = {row["first_layer"] + i: layer for row in rows for i, layer in enumerate(row["layers"])}
    row = {**rows[0], "seconds": sum(part["seconds"] for part in rows), "layers": None, "first_layer": None}
    total = rows[0]["num_layers"]
    if sorted(layers) != list(range(total)):
        return {**row, "error": f"{len(layers)} of its {total} layers are done"}
    held = [layers[i] for i in range(total)]
    pooled = None if held[0]["pooled"] is None else torch.tensor([layer["pooled"] for layer in held])
    encodings = LayerEncodings(
        torch.tensor([layer["vector"] for layer in held]),
        torch.tensor([layer["level"] for layer in held]),
        torch.tensor([layer["tensors"] for layer in held]),
        pooled,
    )
    with torch.no_grad():
        return {**row, "vector": encoder.join(encodings)[0].tolist()}

"""`sne-fast encode`."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import typer

from ..atomic_files import replacing, to_json
from ..data.choices import NonFinite
from ..data.remote.paths import RemotePath, place
from ..free_memory import parse_bytes
from ..tasks.settings import check_choices, option
from .options import options_of
from .running import (
    KEY,
    NONFINITE,
    PATHS,
    REBUILD,
    Encoding,
    about,
    check_output,
    expand,
    given_network,
    list_failures,
    report,
    run_in_batches,
    stdout,
)

if TYPE_CHECKING:
    from torch import Tensor

    from ..data.batch import WeightBatch
    from ..embedding.running import Work
    from ..nn.encoder import SNE
    from ..nn.predictor import Predictor


OnError = Literal["record", "stop"]
SUFFIXES = (".npz", ".parquet")
DEFAULT = "sne-small"


@dataclass(frozen=True)
class EncodeSettings:
    """Options of `sne-fast encode`."""

    paths: tuple[str, ...] = option(
        help=f"{PATHS} With a folder as --out also trees of folders and manifests (.parquet).",
        argument=True,
        metavar="PATH",
    )
    out: Path = option(
        help="Output, .npz or .parquet, with columns name and vector, and what made them as sne_fast; or a folder, for "
        "many networks: what is done stays done, and the same command goes on with the rest.",
        flags=("--out", "-o"),
    )
    model: str | None = option(
        None,
        help="Encoder or predictor: a folder, a model that comes with the package, or a repository of the Hub.",
        shown=f"{DEFAULT} of the package",
    )
    max_chunks: int | None = option(
        None, help="Encode a sample of so many chunks of each larger tensor, and write its error.", shown="all", min=2
    )
    seed: int = option(0, help="Seed of the sample of --max-chunks.")
    max_memory: str | None = option(
        None, help="Memory that one network may take, such as 8G or 500M.", shown="what is free"
    )
    device: str = option("cpu", help="Device to run on, such as cpu or cuda.")
    key: str | None = option(None, help=KEY, shown="the only one")
    nonfinite: NonFinite | None = option(None, help=NONFINITE, shown="raise, or as the model was trained")
    rebuild: bool = option(False, help=REBUILD)
    layers: bool = option(False, help="Write the vectors of layers too, to a folder.")
    workers: int = option(1, help="Processes that encode, to a folder.", min=1)
    scheduler: str | None = option(
        None, help="Scheduler of a Dask cluster that encodes, to a folder, such as tcp://host:8786.", shown="none"
    )
    shard: str | None = option(
        None, help="Share of this process among several that write to one folder, such as 0/8.", shown="all"
    )
    retry: bool = option(False, help="Encode again what failed before, to a folder.")
    on_error: OnError = option(
        "record", help="Record networks that fail and encode the others, or (to a folder) stop at the first."
    )

    def __post_init__(self) -> None:
        check_choices(self, "encode")
        if self.shard is not None:
            parse_shard(self.shard)
        many = {
            "--layers": self.layers, "--workers": self.workers > 1, "--scheduler": self.scheduler is not None,
            "--shard": self.shard is not None, "--retry": self.retry, "--on-error stop": self.on_error == "stop",
        }  # fmt: skip
        for name in (name for name, given in many.items() if given and self.out.suffix in SUFFIXES):
            raise ValueError(f"{name} needs a folder as --out, got {str(self.out)!r}")
        if self.scheduler is not None and self.workers > 1:
            raise ValueError("--workers are processes of this machine; a cluster of --scheduler has its own")
        if self.rebuild and self.out.suffix not in SUFFIXES:
            raise ValueError(f"--rebuild needs an .npz or .parquet file as --out, got {str(self.out)!r}")
        if self.seed and self.max_chunks is None:
            raise ValueError(f"--seed {self.seed} is of the sample of --max-chunks, which is not given")
        if self.max_memory is not None:
            parse_bytes(self.max_memory)


def parse_shard(text: str) -> tuple[int, int]:
    """Return share and number of shares of a text such as 0/8.

    Raises:
        ValueError: another text, or a share outside 0..n-1.
    """
    found = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text)
    if found is None or int(found[1]) >= int(found[2]):
        raise ValueError(f"--shard must be i/n with i from 0 to n - 1, such as 0/8, got {text!r}")
    return int(found[1]), int(found[2])


@options_of(EncodeSettings)
def encode(settings: EncodeSettings) -> None:
    """Write one vector per network.

    Without --model they are those of sne-small, an encoder for finding networks that are alike. Networks that cannot be
    read are named at the end, with exit code 1; the vectors of all others are written.
    """
    import numpy as np

    from ..nn.pretrained import described
    from ..reports.terminal import say

    out = settings.out
    if out.suffix not in SUFFIXES:
        _encode_to_folder(settings)
        return
    check_output(out, SUFFIXES)
    networks = expand(settings.paths, settings.key)
    from ..embedding.dataset import provenance

    model = _model(settings)
    encode, pack, alone = _functions(model, settings)
    results = run_in_batches(
        encode,
        networks,
        pack,
        stdout(),
        key=settings.key,
        nonfinite=settings.nonfinite,
        rebuild=settings.rebuild,
        alone=alone,
    )
    names, vectors = results.names, results.values
    spread: dict[str, Any] = {}
    if settings.max_chunks is not None:
        spread["spread"] = np.array(results.spreads, np.float32)
    made_by = to_json(provenance(described(model), _given(settings)))
    with replacing(out) as temporary:
        if out.suffix == ".npz":
            with open(temporary, "wb") as stream:
                np.savez(stream, name=np.array(names), vector=vectors, **spread, sne_fast=np.array(made_by))
        else:
            import pyarrow as pa
            import pyarrow.parquet as pq

            flat = pa.array(vectors.ravel())
            column = pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1])
            table = pa.table({"name": pa.array(names), "vector": column, **spread})
            pq.write_table(table.replace_schema_metadata({"sne_fast": made_by}), temporary)
    say(stdout(), f"{len(names)} vectors of {vectors.shape[1]} numbers written to {out}")
    if any(results.spreads):
        say(
            stdout(),
            f"estimates from at most {settings.max_chunks} chunks per tensor; relative standard error up to "
            f"{max(results.spreads):.2g}",
        )
    report(results, f"written to {out}")


def _encode_to_folder(settings: EncodeSettings) -> None:
    """Encode what is not done yet, unit by unit, and say which networks failed."""
    import torch

    from ..embedding import EmbeddingDataset, cut_for, embed_units, plan
    from ..embedding.manifests import manifest_beside
    from ..nn.encoder import SNE
    from ..reports.terminal import progress, say

    out, console = settings.out, stdout()
    if out.suffix:
        raise ValueError(f"the output must end in .npz or .parquet, or be a folder without a suffix, got {str(out)!r}")
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f"the output {str(out)!r} is a file; give a folder")
    encoder = _model(settings)
    whole = not isinstance(encoder, SNE)
    if whole and (settings.layers or settings.max_chunks is not None):
        raise ValueError("--layers and --max-chunks are for encoders; a predictor takes networks whole")
    limit = None if settings.max_memory is None else parse_bytes(settings.max_memory)
    dataset = EmbeddingDataset(out, encoder, **_given(settings))
    with progress(console, "Reading headers") as update:
        table = manifest_beside(
            dataset.path, settings.paths, key=settings.key, progress=lambda n: update(None, f"{n:,} networks")
        )

    def stop_at(failures: dict[str, str]) -> None:
        for uri, error in failures.items() if settings.on_error == "stop" else ():
            raise ValueError(about(uri, error))

    stop_at({row["uri"]: row["error"] for row in table.to_pylist() if row["error"] is not None})
    share, shares = (0, 1) if settings.shard is None else parse_shard(settings.shard)
    units = cut_for(plan(table, split=not whole), shares)[share::shares]
    work = embed_units(
        dataset, units, workers=settings.workers, scheduler=settings.scheduler, device=settings.device,
        max_memory=limit, retry=settings.retry,
    )  # fmt: skip
    interrupted = False
    try:
        with torch.no_grad(), progress(console, "Encoding", bar=True) as update:
            for unit in work:
                if settings.on_error == "stop":
                    stop_at(dataset.failures_of(unit))
                update(work.share, _note(work))
    except KeyboardInterrupt:
        interrupted = True
    failures = dataset.failures(units)
    own = {network.uri for unit in units if unit.layers is None or unit.layers[0] == 0 for network in unit.networks}
    ready, by_this_call = (len(uris - failures.keys()) for uris in (own - work.left.keys(), work.done))
    say(console, f"{ready:,} networks are done in {dataset.path}, {by_this_call:,} of them by this call")
    if interrupted:
        typer.echo(f"sne-fast: interrupted with {len(work.left):,} networks left; the same command goes on", err=True)
        raise typer.Exit(130)
    list_failures([about(uri, error) for uri, error in failures.items()])
    if failures:
        of_all = len(own | failures.keys())
        typer.echo(f"sne-fast: {len(failures)} of {of_all} networks failed; the others are done", err=True)
        raise typer.Exit(1)


def _given(settings: EncodeSettings) -> dict[str, Any]:
    """Return the options that were given and that vectors depend on."""
    given = {
        "key": settings.key, "nonfinite": settings.nonfinite, "layers": settings.layers or None,
        "max_chunks": settings.max_chunks, "seed": settings.seed if settings.max_chunks is not None else None,
        "rebuild": settings.rebuild or None,
    }  # fmt: skip
    return {name: value for name, value in given.items() if value is not None}


def _note(work: Work) -> str:
    """Return how many networks are done, and how fast."""
    done, seconds = len(work.done), max(work.seconds, 1e-9)
    rates = f"{done / seconds:,.3g} networks/s, {_short(work.weights / seconds)} weights/s"
    return f"{done:,} of {done + len(work.left):,} networks, {rates}"


def _short(number: float) -> str:
    for size, letter in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.3g}"


LARGE = 2**22
"""Bytes of a file from which a network is encoded layer by layer."""


def _layer_by_layer(encoder: SNE, settings: EncodeSettings) -> Callable[..., Encoding | None]:
    """Return the function that encodes a large network by itself, or any where chunks are sampled."""
    from ..data.layer_stream import LayerStream

    limit = None if settings.max_memory is None else parse_bytes(settings.max_memory)
    order, nonfinite = encoder.config["order"], settings.nonfinite or "raise"

    def alone(file: Any, progress: Callable[[float], None]) -> Encoding | None:
        if settings.max_chunks is None and not (isinstance(file, (str, Path)) and _bytes_of(place(file)) > LARGE):
            return None
        if settings.rebuild:
            file = given_network(file, settings.key, True)
        key = settings.key if isinstance(file, (str, Path)) else None
        stream = LayerStream(file, key=key, order=order, nonfinite=nonfinite)
        encoder.check_stream(stream, max_chunks=settings.max_chunks, max_memory=limit)
        layers = encoder.encode_layers(stream, max_chunks=settings.max_chunks, seed=settings.seed, progress=progress)
        spread = float(encoder.spread(layers)) if layers.estimated else 0.0
        return Encoding(encoder.join(layers)[0].float().cpu().numpy(), tuple(stream.network.skipped), spread)

    return alone


def _bytes_of(path: Path) -> int:
    """Return the bytes of a file, or of all in a folder; of folders and indices elsewhere more than `LARGE`."""
    if isinstance(path, RemotePath) and (path.suffix == ".json" or path.is_dir()):
        return LARGE + 1
    folder = path.parent if path.suffix == ".json" else path
    if not folder.is_dir():
        return folder.stat().st_size
    return sum(entry.stat().st_size for entry in folder.iterdir() if entry.is_file())


Functions = tuple[Callable[["WeightBatch"], "Tensor"], Callable[[Any], "WeightBatch"], Callable[..., Any] | None]


def _functions(model: SNE | Predictor, settings: EncodeSettings) -> Functions:
    """Return the functions that encode a batch, that pack networks for it, and that encode a large network by itself.

    Those of a predictor do all that it does to networks, so that vectors are those that its head takes.
    """
    from ..nn.encoder import SNE

    if isinstance(model, SNE):
        return model, model.pack, _layer_by_layer(model, settings)
    if settings.max_chunks is not None:
        raise ValueError("--max-chunks is for encoders; a predictor was trained on all chunks")
    return model.encode, model.pack, None


def _model(settings: EncodeSettings) -> SNE | Predictor:
    """Return the encoder or predictor, on its device."""
    from ..data.devices import usable_device
    from ..nn.predictor import load_encoder
    from ..nn.pretrained import SHIPPED

    device = usable_device("cpu" if settings.scheduler is not None else settings.device)  # workers have their own
    # By its folder in the package, as one of that name may lie here, such as the output of this command.
    return load_encoder(SHIPPED / DEFAULT if settings.model is None else settings.model, device=device)

"""`sne-fast encode`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ..atomic_files import replacing
from ..data.choices import NonFinite
from ..nn.choices import SetAttention
from ..tasks.settings import check_choices, option
from .options import options_of
from .running import (
    KEY,
    NONFINITE,
    PATHS,
    check_output,
    expand,
    report,
    run_in_batches,
    stdout,
)

if TYPE_CHECKING:
    from torch import Tensor

    from ..data.batch import WeightBatch


@dataclass(frozen=True)
class EncodeSettings:
    """Options of `sne-fast encode`."""

    paths: tuple[Path, ...] = option(help=PATHS, argument=True, metavar="PATH")
    out: Path = option(help="Output, .npz or .parquet, with columns name and vector.", flags=("--out", "-o"))
    model: str | None = option(
        None, help="Folder (or Hub repository) of a trained encoder or predictor.", shown="untrained"
    )
    seed: int = option(0, help="Seed of the untrained encoder's parameters.")
    set_attention: SetAttention = option(
        "sab", help="Attention of the untrained encoder; isab is for tensors of a million weights and more."
    )
    device: str = option("cpu", help="Device to run on, such as cpu or cuda.")
    key: str | None = option(None, help=KEY, shown="the only one")
    nonfinite: NonFinite | None = option(None, help=NONFINITE, shown="raise, or as the model was trained")

    def __post_init__(self) -> None:
        check_choices(self, "encode")


@options_of(EncodeSettings)
def encode(settings: EncodeSettings) -> None:
    """Write one vector per network.

    Without --model the encoder is untrained: its vectors depend on all weights and on --seed. Networks that cannot be
    read are named at the end, with exit code 1; the vectors of all others are written.
    """
    import numpy as np

    from ..reports.terminal import say

    out = settings.out
    check_output(out, (".npz", ".parquet"))
    networks = expand(settings.paths)
    encode, pack = _encoder(settings)
    results = run_in_batches(encode, networks, pack, stdout(), key=settings.key, nonfinite=settings.nonfinite)
    names, vectors = results.names, results.values
    with replacing(out) as temporary:
        if out.suffix == ".npz":
            with open(temporary, "wb") as stream:
                np.savez(stream, name=np.array(names), vector=vectors)
        else:
            import pyarrow as pa
            import pyarrow.parquet as pq

            flat = pa.array(vectors.ravel())
            column = pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1])
            pq.write_table(pa.table({"name": pa.array(names), "vector": column}), temporary)
    say(stdout(), f"{len(names)} vectors of {vectors.shape[1]} numbers written to {out}")
    report(results, f"written to {out}")


def _encoder(settings: EncodeSettings) -> tuple[Callable[[WeightBatch], Tensor], Callable[[Any], WeightBatch]]:
    """Return the functions that encode a batch and that pack networks for it.

    Those of a predictor do all that it does to networks, so that vectors are those that its head takes.
    """
    import torch

    from ..data.devices import usable_device
    from ..nn.encoder import SNE
    from ..nn.predictor import Predictor
    from ..nn.pretrained import read_config, saved_class

    device = usable_device(settings.device)
    if settings.model is None:
        typer.echo(
            "sne-fast: no --model given: encoding with a freshly initialised, untrained encoder "
            f"(seed {settings.seed})",
            err=True,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            encoder = SNE(set_attention=settings.set_attention).to(device).eval()
    elif saved_class(read_config(settings.model)) == "Predictor":
        predictor = Predictor.from_pretrained(settings.model, device=device)
        return predictor.encode, predictor.pack
    else:
        encoder = SNE.from_pretrained(settings.model, device=device)
    return encoder, encoder.pack

"""What the commands of `sne-fast` share: checks of outputs, lists of networks, encoding in batches, tables."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ..extras import require

if TYPE_CHECKING:
    import numpy as np

    from ..nn.encoder import SNE

BATCH_WEIGHTS = 200_000


def check_output(out: Path, suffixes: Sequence[str]) -> None:
    """Everything that can be known to go wrong with the output, before any work is done."""
    if out.suffix not in suffixes:
        raise ValueError(f"the output must end in {' or '.join(suffixes)}, got {str(out)!r}")
    if out.is_dir():
        raise IsADirectoryError(f"the output {str(out)!r} is a folder")
    if not out.absolute().parent.is_dir():
        raise FileNotFoundError(f"the folder of the output {str(out)!r} does not exist")
    if out.suffix == ".parquet":
        require("pyarrow.parquet", extra="parquet", why="writing .parquet", otherwise=", or write .npz")


@contextmanager
def whole_file(out: Path) -> Iterator[Path]:
    """A path to write to that becomes `out` when the block ends, and is removed when it raises."""
    partial = out.with_name(f".{out.name}.partial-{uuid.uuid4().hex[:8]}")
    try:
        yield partial
        os.replace(partial, out)
    finally:
        partial.unlink(missing_ok=True)


def expand(paths: Sequence[Path]) -> tuple[list[str], list[Any]]:
    """Names of the networks, and their files or the networks themselves; a zoo folder stands for all of its own."""
    from ..zoo import networks_at

    files: list[Any] = []
    for path in paths:
        found = networks_at(path)
        if found is not None:
            files += found
        elif path.exists():
            files.append(path)
        else:
            raise FileNotFoundError(f"no such file or folder: {str(path)!r}")
    if not files:
        raise ValueError("the zoo holds no networks")
    return [str(file) for file in files], files


def usable_device(name: str) -> Any:
    import torch

    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from error
    return device


def load_encoder(model: str | None, seed: int, set_attention: str, device: str) -> SNE:
    import torch

    from ..nn.encoder import SNE
    from ..nn.predictor import Predictor
    from ..nn.pretrained import read_config, saved_class

    where = usable_device(device)
    if model is None:
        typer.echo(
            f"sne-fast: no --model given: encoding with a freshly initialised, untrained encoder (seed {seed})",
            err=True,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return SNE(set_attention=set_attention).to(where).eval()
    if saved_class(read_config(model)) == "Predictor":
        return Predictor.from_pretrained(model, device=where).encoder
    return SNE.from_pretrained(model, device=where)


def run_in_batches(module: Callable[[Any], Any], files: Sequence[Any], encoder: SNE) -> np.ndarray:
    """`module` on every file, `(len(files), d)`; networks share a batch up to a budget of weights."""
    import numpy as np
    import torch
    from rich.console import Console
    from rich.progress import track

    from ..data.batch import WeightBatch

    outputs: list[np.ndarray] = []
    held: list[WeightBatch] = []

    def flush() -> None:
        if held:
            out = module(WeightBatch.cat(held)).cpu()
            outputs.append((out if out.dtype == torch.float64 else out.float()).numpy())
            held.clear()

    console = Console(stderr=True)
    quiet = len(files) < 2 or not console.is_terminal
    with torch.no_grad():
        for file in track(files, "Encoding", console=console, transient=True, disable=quiet):
            batch = encoder.pack([file])
            if held and sum(b.num_weights for b in held) + batch.num_weights > BATCH_WEIGHTS:
                flush()
            held.append(batch)
        flush()
    return np.concatenate(outputs)


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", overflow="fold", no_wrap=i > 0)
    for row in rows:
        table.add_row(*row)
    Console().print(table)

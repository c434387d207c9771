"""Parts that commands share: checks of outputs and devices, lists of networks, networks in batches, tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..extras import require

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor

    from ..data.batch import WeightBatch

BATCH_WEIGHTS = 200_000
PATHS = (
    "Checkpoints (.safetensors, a sharded index, .pt, .pth, .bin, .ckpt), folders holding one, folders of a zoo, which "
    "stand for all its networks, or FOLDER/NAME for one network of a zoo."
)


def check_output(out: Path, suffixes: Sequence[str]) -> None:
    """Check that the output can be written, before any work is done.

    Raises:
        ValueError: its suffix is none of `suffixes`.
        OSError: it is a folder, or its own folder is not there.
        ModuleNotFoundError: its format needs a package that is not installed.
    """
    if out.suffix not in suffixes:
        raise ValueError(f"the output must end in {' or '.join(suffixes)}, got {str(out)!r}")
    if out.is_dir():
        raise IsADirectoryError(f"the output {str(out)!r} is a folder")
    if not out.absolute().parent.is_dir():
        raise FileNotFoundError(f"the folder of the output {str(out)!r} does not exist")
    if out.suffix == ".parquet":
        require("pyarrow.parquet", extra="parquet", why="writing .parquet", otherwise=", or write .npz")


def expand(paths: Sequence[Path]) -> tuple[list[str], list[Any]]:
    """Return the names of the networks at `paths`, and their files or the networks themselves.

    The folder of a zoo stands for all its networks.

    Raises:
        FileNotFoundError: a path that is not there.
        ValueError: there are no networks.
    """
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


def usable_device(name: str) -> torch.device:
    """Return the device of that name.

    Raises:
        ValueError: torch knows no such device, or cannot use it.
    """
    import torch

    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from error
    return device


def run_in_batches(
    module: Callable[[WeightBatch], Tensor], files: Sequence[Any], pack: Callable[[Any], WeightBatch]
) -> np.ndarray:
    """Return the outputs of `module` for all files, `(len(files), d)`; networks share batches of bounded weights."""
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
            batch = pack([file])
            if held and sum(b.num_weights for b in held) + batch.num_weights > BATCH_WEIGHTS:
                flush()
            held.append(batch)
        flush()
    return np.concatenate(outputs)


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table on stdout; the first column holds text, the others numbers."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", overflow="fold", no_wrap=i > 0)
    for row in rows:
        table.add_row(*row)
    Console().print(table)

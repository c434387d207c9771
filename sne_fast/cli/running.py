"""Parts that commands share: checks of outputs and devices, lists of networks, and networks in batches."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..extras import require
from ..failures import EXPECTED, is_expected, is_out_of_memory, of_one, sentence, utf8

if TYPE_CHECKING:
    import numpy as np
    from rich.console import Console
    from torch import Tensor

    from ..data.batch import WeightBatch

BATCH_WEIGHTS = 200_000
PATHS = (
    "Checkpoints (.safetensors, a sharded index, .pt, .pth, .bin, .ckpt), folders holding one, folders of a zoo or of "
    "several checkpoints, which stand for all their networks, or FOLDER/NAME for one network of a zoo; also URLs of "
    "these, such as hf://USER/NAME@REVISION or s3://BUCKET/FOLDER, and @FILE with one of these in each line."
)
KEY = "Place of the weights in files that hold several, names joined by dots, such as generator or model.encoder."
NONFINITE = "Treatment of NaN and infinities among the weights: refuse the network, read them as 0, or keep them."
REBUILD = (
    "Rebuild folders of transformers as modules: names, order, ties and kinds are those of the class that config.json "
    "names. Needs transformers."
)


def stdout() -> Console:
    """Return the console of a command's results."""
    from rich.console import Console

    return Console()


def check_output(out: Path, suffixes: Sequence[str]) -> None:
    """Check that the output can be written, before any work is done.

    Raises:
        ValueError: its suffix is none of `suffixes`.
        OSError: it is there and no regular file, or its folder is missing or cannot be written.
        ModuleNotFoundError: its format needs a package that is not installed.
    """
    if out.suffix not in suffixes:
        raise ValueError(f"the output must end in {' or '.join(suffixes)}, got {str(out)!r}")
    if out.is_dir():
        raise IsADirectoryError(f"the output {str(out)!r} is a folder")
    folder = out.absolute().parent
    if not folder.is_dir():
        raise FileNotFoundError(f"the folder of the output {str(out)!r} does not exist")
    if out.exists() and not out.is_file():
        raise OSError(f"the output {str(out)!r} is no regular file")
    with contextlib.suppress(FileNotFoundError):
        out.lstat()  # a name that the file system refuses
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        reason = error.strerror or str(error)
        raise OSError(f"the folder of the output {str(out)!r} cannot be written: {reason}") from error
    if out.suffix == ".parquet":
        require("pyarrow.parquet", extra="parquet", why="writing .parquet", otherwise=", or write .npz")


def expand(paths: Sequence[str | Path], key: str | None = None) -> list[tuple[str, Any]]:
    """Return the names of the networks at `paths`, each with its file or the network itself.

    The folder of a zoo stands for all its networks, and so does a folder of checkpoints each of which is a network of
    its own. A URL that cannot be read is a network, whose error reading it says. Bytes of a path that are no character
    are escapes in its name.

    Args:
        paths: as the user gave them; `@FILE` stands for those in the lines of a text file.
        key: place of the weights in files that hold several; of the folder of a pipeline it names one network.

    Raises:
        FileNotFoundError: a path that is not there.
        ModuleNotFoundError: a package is missing that a URL needs.
        ValueError: there are no networks.
    """
    from ..data.readers.folders import component_folders, independent_files
    from ..data.remote.paths import is_remote, place
    from ..embedding.manifests import find_networks, listed
    from ..zoo import networks_at

    files: list[Any] = []
    for given in listed(map(str, paths)):
        if is_remote(given):
            try:
                files += list(find_networks([given], key))
            except ModuleNotFoundError:
                raise
            except EXPECTED:
                files.append(given)
            continue
        path = place(given)
        found = networks_at(path)
        if found is not None:
            files += found
        elif path.exists():
            one = not path.is_dir() or (key is not None and component_folders(path) is not None)
            files += [path] if one else independent_files(path) or [path]
        else:
            raise FileNotFoundError(f"no such file or folder: {given!r}")
    if not files:
        raise ValueError("the zoo holds no networks")
    return [(utf8(str(file)), file) for file in files]


class Encoding(NamedTuple):
    """What was made of a network that was run alone: its row of output, what was left out of it, and its error.

    `spread` is the relative standard error of a row that was estimated from a sample of the chunks.
    """

    row: np.ndarray
    skipped: tuple[tuple[str, str], ...]
    spread: float = 0.0


@dataclass
class Results:
    """Outputs of networks that could be read and run, and what became of the others."""

    names: list[str]
    values: np.ndarray
    """Outputs `(len(names), d)`."""
    failures: list[str] = field(default_factory=list)
    """A sentence for each network that is missing, which begins with its name."""
    left_out: str = ""
    """A line on what was left out of the networks that are there; "" for nothing."""
    spreads: list[float] = field(default_factory=list)
    """Relative standard error of each output, 0 for those that are no estimates."""


def run_in_batches(
    module: Callable[[WeightBatch], Tensor],
    networks: Sequence[tuple[str, Any]],
    pack: Callable[..., WeightBatch],
    console: Console,
    *,
    key: str | None = None,
    nonfinite: str | None = None,
    rebuild: bool = False,
    alone: Callable[[Any, Callable[[float], None]], Encoding | None] | None = None,
) -> Results:
    """Run a module on all networks, in batches of bounded weights; one that fails does not take others with it.

    Args:
        module: the encoder or predictor.
        networks: names and files, or networks.
        pack: packs a list of networks for `module`.
        console: of the results; progress is shown beside it.
        key: place of the weights in files that hold several, as in
            :func:`sne_fast.data.checkpoints.load_state_dict`.
        nonfinite: as in :func:`sne_fast.pack`; None is what `pack` does by itself.
        rebuild: whether folders of transformers are rebuilt as modules.
        alone: runs a network that is too large for a batch, and says how far it is; returns None for others.

    Raises:
        ValueError: all networks failed.
    """
    import numpy as np
    import torch

    from ..data.batch import WeightBatch
    from ..data.batch_summary import summary_of
    from ..data.remote.ahead import fetched_ahead
    from ..data.remote.failures import interruptible
    from ..reports.terminal import progress

    outputs: dict[int, np.ndarray] = {}
    failures: dict[int, str] = {}
    skipped: dict[int, tuple[tuple[str, str], ...]] = {}
    spreads: dict[int, float] = {}

    def run(held: Sequence[tuple[int, WeightBatch]]) -> None:
        try:
            out = module(WeightBatch.cat([batch for _, batch in held])).cpu()
        except Exception as error:
            if not is_out_of_memory(error) and not isinstance(error, EXPECTED):
                raise
            reason = None if len(held) > 1 else sentence(error, f"{held[0][1].num_weights:,} weights")
        else:
            rows = (out if out.dtype == torch.float64 else out.float()).numpy()
            outputs.update(zip((i for i, _ in held), rows, strict=True))
            return
        if reason is not None:  # outside of the except block, which keeps what the failed call had in memory
            failures[held[0][0]] = about(networks[held[0][0]][0], reason)
        else:
            for one in held:
                run([one])

    options = {} if nonfinite is None else {"nonfinite": nonfinite}

    def packed(i: int, progress: Callable[[float], None]) -> WeightBatch | None:
        name, file = networks[i]
        try:
            found = None if alone is None else alone(file, progress)
            if found is not None:
                outputs[i], skipped[i], spreads[i] = found
                return None
            return pack([given_network(file, key, rebuild)], **options)
        except Exception as error:
            if not is_expected(error):
                raise
            failures[i] = about(name, sentence(error))
            return None

    with torch.no_grad(), interruptible(), progress(console, "Encoding", bar=True) as update:
        held: list[tuple[int, WeightBatch]] = []
        for i in fetched_ahead(
            range(len(networks)), lambda i: [file] if isinstance(file := networks[i][1], str) else []
        ):
            batch = packed(i, lambda done, i=i: update((i + done) / len(networks)))  # type: ignore[misc]
            if batch is not None:
                if held and sum(b.num_weights for _, b in held) + batch.num_weights > BATCH_WEIGHTS:
                    run(held)
                    held = []
                held.append((i, batch))
                skipped[i] = sum(batch.skipped, ())
            update((i + 1) / len(networks), f"{i + 1} of {len(networks)} networks")
        if held:
            run(held)
    sentences = [failures[i] for i in sorted(failures)]
    if not outputs:
        if len(sentences) == 1:
            raise ValueError(sentences[0])
        list_failures(sentences)
        raise ValueError(f"none of the {len(networks)} networks could be used")
    done = sorted(outputs)
    left_out = summary_of(tuple(skipped[i] for i in done))
    found = [spreads.get(i, 0.0) for i in done]
    return Results([networks[i][0] for i in done], np.stack([outputs[i] for i in done]), sentences, left_out, found)


def given_network(file: Any, key: str | None, rebuild: bool) -> Any:
    """Return what `pack` takes for a file or a network of a zoo: itself, or the checkpoint that was read from it.

    Args:
        file: a path, a URL, or a network of a zoo.
        key: place of the weights in a file that holds several.
        rebuild: whether a folder with a `config.json` is rebuilt as a module of transformers.

    Raises:
        CheckpointError: the checkpoint cannot be read or rebuilt; `key` for a network of a zoo.
    """
    from ..data.checkpoints import CheckpointError, read_checkpoint
    from ..data.transformers_folders import read_transformers_folder

    if rebuild and isinstance(file, str):
        raise CheckpointError("cannot be rebuilt from elsewhere; download its folder")
    if rebuild and isinstance(file, Path) and (file / "config.json").is_file():
        return read_transformers_folder(file)
    if key is None:
        return file
    if not isinstance(file, (str, Path)):
        raise CheckpointError("key= is for files of torch, not for a network of a zoo")
    return read_checkpoint(file, key)


def about(name: str, reason: str) -> str:
    """Return a sentence about the network of a name, for which it is not "network 0" of a call."""
    reason = of_one(reason)
    return reason if reason.startswith(name) else f"{name}: {reason}"


def list_failures(sentences: Sequence[str]) -> None:
    """Write a line on stderr for each sentence."""
    import typer

    from ..reports.terminal import printable

    for line in sentences:
        typer.echo(f"sne-fast: {printable(line)}", err=True)


def report(results: Results, written: str) -> None:
    """Say on stderr what was left out and which networks failed, and end the command with exit code 1 if any did.

    Args:
        results: of all networks.
        written: where those of the others are, such as "written to z.npz".

    Raises:
        typer.Exit: some networks failed.
    """
    import typer

    list_failures([*([results.left_out] if results.left_out else []), *results.failures])
    if not results.failures:
        return
    count, all_networks = len(results.failures), len(results.failures) + len(results.names)
    typer.echo(f"sne-fast: {count} of {all_networks} networks failed; those of the others are {written}", err=True)
    raise typer.Exit(1)

"""The command line: `sne-fast demo | train | encode | predict | bench | info`.

Heavy libraries are imported by the commands that need them, and every expected error becomes one sentence and exit
code 2 in one place, `_Commands`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from .running import check_output, expand, load_encoder, print_table, run_in_batches, usable_device, whole_file

EXPECTED = (ValueError, TypeError, OSError, KeyError, ModuleNotFoundError, MemoryError)


class _Commands(TyperGroup):
    """Turns errors that have a message for the user into one sentence on stderr and exit code 2."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except Exception as error:
            if ctx.params.get("debug") or not isinstance(error, (*EXPECTED, *_own_errors())):
                raise
            typer.echo(f"sne-fast: {_sentence(error)}", err=True)
            raise typer.Exit(2) from error


def _sentence(error: Exception) -> str:
    text: object = error
    if isinstance(error, KeyError) and error.args:
        text = error.args[0]  # str() would put it in quotes
    elif isinstance(error, OSError) and error.strerror:
        text = error.strerror if error.filename is None else f"{error.strerror}: {str(error.filename)!r}"
    return " ".join(str(text).split())


def _own_errors() -> tuple[type[BaseException], ...]:
    """Errors of this package that are RuntimeErrors, from the modules that a command has loaded."""
    own = (("sne_fast.ops.dispatch", "BackendError"), ("sne_fast.benchmark.checks", "CheckFailed"))
    return tuple(getattr(sys.modules[module], name) for module, name in own if module in sys.modules)


app = typer.Typer(
    cls=_Commands,
    add_completion=False,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Encode the weights of neural networks into vectors, and predict properties of networks from them.",
)


def _show_version(wanted: bool) -> None:
    if wanted:
        from .. import __version__

        typer.echo(f"sne_fast {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the full traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


Paths = Annotated[
    list[Path],
    typer.Argument(
        metavar="PATH",
        help="Checkpoints (.safetensors, a sharded index, .pt, .pth, .bin, .ckpt), folders holding one, folders of "
        "a zoo, which stand for all its networks, or FOLDER/NAME for one network of a zoo.",
        show_default=False,
    ),
]
Device = Annotated[str, typer.Option(help="Where to run, such as cpu or cuda.")]


@app.command()
def demo(
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder for everything it makes; must be new or empty.")
    ] = Path("sne-demo"),
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Decides the zoo, the split and the training.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="A small run to see it work, in under a minute.")] = False,
    networks: Annotated[
        int | None, typer.Option(help="How many networks to train.", show_default="1440, quick 180")
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Epochs of the predictor.", show_default="20, quick 24")] = None,
    hidden_dim: Annotated[int | None, typer.Option(help="Width of the encoder.", show_default="32")] = None,
) -> None:
    """Train a zoo of digit classifiers, then a predictor of their accuracy from their weights.

    Writes the zoo (safetensors and a parquet index), the predictor, metrics.json, predictions.csv and two plots.
    """
    from ..tasks.demo import Demo, run

    chosen = {"networks": networks, "epochs": epochs, "hidden_dim": hidden_dim}
    settings = Demo.quick(seed) if quick else Demo(seed=seed)
    run(out, settings.replace(**{key: value for key, value in chosen.items() if value is not None}))


@app.command()
def train(
    zoo: Annotated[Path, typer.Argument(help="Folder of a zoo (see sne_fast.zoo).", show_default=False)],
    out: Annotated[
        Path,
        typer.Option("--out", "-o", help="Folder for the predictor; the same command resumes.", show_default=False),
    ],
    target: Annotated[list[str] | None, typer.Option(help="Column to predict; repeat for several.")] = None,
    loss: Annotated[str, typer.Option(help="mse, bce (targets in [0, 1]) or cross_entropy (classes).")] = "mse",
    transform: Annotated[str, typer.Option(help="Of mse targets: identity, or logit in [0, 1].")] = "identity",
    split: Annotated[
        str | None,
        typer.Option(help="Column saying train, validation or test.", show_default="80/10/10 by architecture"),
    ] = None,
    permute: Annotated[
        bool, typer.Option("--permute", help="Permute hidden units anew for every batch; needs known symmetries.")
    ] = False,
    invariance: Annotated[float, typer.Option(help="Weight of the logit-invariance loss; needs --permute.")] = 0.0,
    hidden_dim: Annotated[int, typer.Option(help="Width of the encoder.")] = 64,
    num_heads: Annotated[int, typer.Option(help="Its attention heads.")] = 4,
    chunk_size: Annotated[int, typer.Option(help="The most weights of a chunk.")] = 32,
    chunking: Annotated[str, typer.Option(help="flat, neuron or kernel.")] = "flat",
    set_attention: Annotated[str, typer.Option(help="sab, or isab for tensors of a million weights and more.")] = "sab",
    input_scale: Annotated[
        str,
        typer.Option(
            help="Divide weights by their tensor's size, its like's in the zoo, what its fan-in says, or not: "
            "tensor, zoo, fan_in, none."
        ),
    ] = "tensor",
    code_gain: Annotated[float | None, typer.Option(help="Initial gain of the codes.", show_default="0.1")] = None,
    epochs: Annotated[int, typer.Option(help="Passes over the training networks.")] = 40,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 1e-3,
    batch_weights: Annotated[int, typer.Option(help="The most weights of a batch.")] = 20_000,
    weight_decay: Annotated[float, typer.Option(help="Of matrices.")] = 1e-2,
    patience: Annotated[int | None, typer.Option(help="Epochs without improvement before it ends.")] = None,
    amp: Annotated[str | None, typer.Option(help="Train in bfloat16 or float16.")] = None,
    log: Annotated[str, typer.Option(help="csv or tensorboard.")] = "csv",
    seed: Annotated[int, typer.Option(help="Initial parameters, split, order and permutations.")] = 0,
    device: Device = "cpu",
) -> None:
    """Train a predictor of a zoo's columns from the networks' weights; run by torchrun it uses several processes."""
    from rich.console import Console

    from ..tasks.settings import TrainSettings
    from ..tasks.train import train as run

    usable_device(device)
    chosen: dict[str, Any] = {
        "loss": loss, "transform": transform, "split": split, "permute": permute, "invariance": invariance,
        "hidden_dim": hidden_dim, "num_heads": num_heads, "chunk_size": chunk_size, "chunking": chunking,
        "set_attention": set_attention, "input_scale": input_scale, "code_gain": code_gain, "epochs": epochs, "lr": lr,
        "batch_weights": batch_weights, "weight_decay": weight_decay, "patience": patience, "amp": amp, "log": log,
        "seed": seed, "device": device,
    }  # fmt: skip
    settings = TrainSettings(zoo, out, tuple(target or ()), **chosen)
    test = run(settings, Console())["test"]
    if int(os.environ.get("RANK", "0")):
        return
    if "accuracy" in test and not isinstance(test["accuracy"], dict):
        typer.echo(f"accuracy on held-out networks {test['accuracy']:.3f}")
    else:
        numbers = ("tau", "r2", "mae", "rmse")
        cells = [[name, *("-" if m[k] is None else f"{m[k]:.4g}" for k in numbers)] for name, m in test.items()]
        print_table(["held-out networks", *numbers], cells)
    typer.echo(f"Written to {out}: predictor/, metrics.json, predictions.csv, {log} log")


@app.command()
def task(
    name: Annotated[
        str,
        typer.Argument(help="inr, accuracy, cross-dataset, cross-architecture or transformers.", show_default=False),
    ],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder for zoos, runs and report; resumes.", show_default=False)
    ],
    seed: Annotated[list[int] | None, typer.Option(help="Repeat for several.", show_default="0, 1 and 2")] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="Row of the table: SNE or one of its ablations by its name, mean, statistics, deepsets, mlp, nfn, or "
            "across architectures statistics_fan_in; repeat for several.",
            show_default="all",
        ),
    ] = None,
    networks: Annotated[int | None, typer.Option(help="Networks of all zoos.", show_default="the task's")] = None,
    epochs: Annotated[int | None, typer.Option(help="Epochs of SNE.", show_default="the task's")] = None,
) -> None:
    """Run an experiment of the paper: zoos, SNE, ablations and baselines over several seeds, a table and plots.

    What is already in the folder is not done again; calls with other seeds or methods add to it.
    """
    from rich.console import Console

    from ..tasks import run_task
    from ..tasks.settings import SEEDS

    run_task(name, out, Console(), seeds=seed or SEEDS, methods=method or (), networks=networks, epochs=epochs)
    typer.echo(f"Written to {out}: results.json, results.md, plots, runs/ (predictions and predictors), zoos/")


@app.command()
def encode(
    paths: Paths,
    out: Annotated[
        Path,
        typer.Option("--out", "-o", help="Output, .npz or .parquet, with columns name and vector.", show_default=False),
    ],
    model: Annotated[
        str | None,
        typer.Option(help="Folder (or Hub repository) of a trained encoder or predictor.", show_default="untrained"),
    ] = None,
    seed: Annotated[int, typer.Option(help="Initial parameters of the untrained encoder.")] = 0,
    set_attention: Annotated[
        str, typer.Option(help="Of the untrained encoder: sab, or isab for tensors of a million weights and more.")
    ] = "sab",
    device: Device = "cpu",
) -> None:
    """Write one vector per network.

    Without --model the encoder is untrained: its vectors depend on all weights and on --seed.
    """
    import numpy as np

    check_output(out, (".npz", ".parquet"))
    names, files = expand(paths)
    encoder = load_encoder(model, seed, set_attention, device)
    vectors = run_in_batches(encoder, files, encoder)
    with whole_file(out) as partial:
        if out.suffix == ".npz":
            with open(partial, "wb") as stream:
                np.savez(stream, name=np.array(names), vector=vectors)
        else:
            import pyarrow as pa
            import pyarrow.parquet as pq

            flat = pa.array(vectors.ravel())
            column = pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1])
            pq.write_table(pa.table({"name": pa.array(names), "vector": column}), partial)
    typer.echo(f"{len(names)} vectors of {vectors.shape[1]} numbers written to {out}")


@app.command()
def predict(
    paths: Paths,
    model: Annotated[str, typer.Option(help="Folder (or Hub repository) of a trained predictor.", show_default=False)],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Also write to .csv or .json.", show_default=False)
    ] = None,
    device: Device = "cpu",
) -> None:
    """Predict properties of networks with a trained predictor."""
    import csv
    import json

    from ..nn.predictor import Predictor

    if out is not None:
        check_output(out, (".csv", ".json"))
    names, files = expand(paths)
    predictor = Predictor.from_pretrained(model, device=usable_device(device))
    values = run_in_batches(predictor, files, predictor.encoder)
    rows = [
        {"name": name, **{t: float(v) for t, v in zip(predictor.target_names, row, strict=True)}}
        for name, row in zip(names, values, strict=True)
    ]
    if out is not None:
        with whole_file(out) as partial, open(partial, "w", newline="", encoding="utf-8") as stream:
            if out.suffix == ".csv":
                writer = csv.DictWriter(stream, fieldnames=list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)
            else:
                json.dump(rows, stream, indent=2)
                stream.write("\n")
    print_table(
        ["name", *predictor.target_names],
        [[name, *(f"{float(v):.4g}" for v in row)] for name, row in zip(names, values, strict=True)],
    )


@app.command()
def bench(
    case: Annotated[
        list[str] | None,
        typer.Option(help="Case to run; repeat for several.", show_default="zoo, inr and mixed"),
    ] = None,
    rounds: Annotated[int, typer.Option(help="Interleaved rounds at most; medians are shown.")] = 3,
    backend: Annotated[str, typer.Option(help="Backend under test, such as cpu or reference.")] = "auto",
    threads: Annotated[int | None, typer.Option(help="Threads.", show_default="all cores")] = None,
) -> None:
    """Measure encoding and training against plain PyTorch on this machine, in about a minute.

    Every case is checked against the float64 reference first; wrong numbers are not timed.
    """
    from ..benchmark.short import SHORT, run_short

    run_short(case or SHORT, rounds=rounds, backend=backend, threads=threads)


@app.command()
def info() -> None:
    """Show versions, devices, and of the backends: what was built, where it has run, and why one is not used here."""
    from .info import text

    typer.echo(text())


def main() -> None:
    """The console script: starts Python anew with OpenMP's waiting threads asleep, then runs the command.

    OpenMP reads the policy when torch is loaded, which importing this package did. With one other process on a machine
    of two cores, a training step took 6 to 16 times longer with threads that spin while they wait.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "passive"
        # As it was started: with `-m`, a folder sne_fast in the working directory would take the place of what is
        # installed, and a checkout has no C++ backend.
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    app(prog_name="sne-fast")


if __name__ == "__main__":
    main()

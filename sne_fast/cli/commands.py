"""The program `sne-fast`: its commands, how it reports errors, and how it starts.

Each command stands in a file of its name. What it needs of torch and other heavy libraries is imported when it runs,
so that help appears at once. Every expected error becomes one sentence and exit code 2 in one place, `_Commands`.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from ..version import __version__
from .bench import bench
from .demo import demo
from .encode import encode
from .info import info
from .predict import predict
from .task import task
from .train import train

EXPECTED = (ValueError, TypeError, OSError, KeyError, ModuleNotFoundError, MemoryError)


class _Commands(TyperGroup):
    """The group of commands, which turns errors that have a message for the user into one sentence and exit code 2."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
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
    """Return the errors of this package that are RuntimeErrors, from the modules that a command has loaded."""
    own = (("sne_fast.ops.dispatch", "BackendError"), ("sne_fast.benchmark.checks", "CheckFailed"))
    return tuple(getattr(sys.modules[module], name) for module, name in own if module in sys.modules)


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Encode the weights of neural networks into vectors, and predict properties of networks from them.",
)


def _show_version(wanted: bool) -> None:
    if wanted:
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


for _command in (demo, train, task, encode, predict, bench, info):
    app.command()(_command)


def main() -> None:
    """Run the command line, with OpenMP threads that sleep while they wait.

    OpenMP reads the policy when torch is loaded, which no command has done yet. With one other process on a machine of
    two cores, a training step took 6 to 16 times longer with threads that spin while they wait.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    app(prog_name="sne-fast")

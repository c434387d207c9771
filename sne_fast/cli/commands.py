"""The program `sne-fast`: its commands, how it reports errors, and how it starts.

Each command stands in a file of its name. What it needs of torch and other heavy libraries is imported when it runs,
so that help appears at once. Every expected error becomes one sentence and exit code 2 in one place, `_Commands`.
"""

from __future__ import annotations

import io
import os
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from ..failures import is_expected, sentence
from ..version import __version__
from .bench import bench
from .compare import compare
from .demo import demo
from .duplicates import duplicates
from .encode import encode
from .info import info
from .lineage import lineage
from .map import map
from .predict import predict
from .search import search
from .task import task
from .train import train


class _Commands(TyperGroup):
    """The group of commands, which turns errors that have a message for the user into one sentence and exit code 2."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except Exception as error:
            if ctx.params.get("debug") or not is_expected(error):
                raise
            from ..reports.terminal import printable

            typer.echo(f"sne-fast: {printable(sentence(error))}", err=True)
            raise typer.Exit(2) from error


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


for _command in (demo, train, task, encode, predict, search, duplicates, lineage, compare, map, bench, info):
    app.command()(_command)


def main() -> None:
    """Run the command line, with OpenMP threads that sleep while they wait.

    OpenMP reads the policy when torch is loaded, which no command has done yet. With one other process on a machine of
    two cores, a training step took 6 to 16 times longer with threads that spin while they wait.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # an encoding that lacks a character ends no command
    app(prog_name="sne-fast")

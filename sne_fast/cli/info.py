"""`sne-fast info`."""

from __future__ import annotations

import typer


def info() -> None:
    """Show versions, devices and backends: what each was built for, where it has run, and why it is not used here."""
    from .installation import text

    typer.echo(text())

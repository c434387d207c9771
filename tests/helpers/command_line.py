"""Commands of `sne-fast`, run in this process."""

from __future__ import annotations

from typing import Any

from typer.testing import CliRunner

from sne_fast.cli.commands import app

runner = CliRunner()


def call(*arguments: Any) -> Any:
    """Run a command and return its result."""
    return runner.invoke(app, [str(a) for a in arguments])


def fails(*arguments: Any) -> str:
    """Run a command that must fail as a user should see it; return its stderr."""
    result = call(*arguments)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if not line.startswith("sne-fast: no --model given")]
    assert len(lines) == 1 and lines[0].startswith("sne-fast: "), result.stderr
    return lines[0]

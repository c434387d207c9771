"""Optional packages that the demo and the tasks need for their zoos, measures and plots."""

from __future__ import annotations

from ..extras import require


def check_extra(why: str) -> None:
    """Check that the packages of the extra `demo` are installed, before any work is done.

    Args:
        why: what needs them, such as "the demo".

    Raises:
        ModuleNotFoundError: some are missing; the message names them and the command that installs them.
    """
    require("sklearn", "scipy", "matplotlib", "pyarrow", extra="demo", why=why)

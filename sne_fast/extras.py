"""Optional packages: which are installed, and how to install the others."""

from __future__ import annotations

import importlib.util

DISTRIBUTIONS = {"sklearn": "scikit-learn", "faiss": "faiss-cpu"}  # where pip knows a module by another name


def install_command(extra: str) -> str:
    """Return the command that installs an extra of this package."""
    return f'pip install "sne_fast[{extra}]"'


def installed(module: str) -> bool:
    """Return True if a module can be found; only the packages that hold it are imported."""
    parts = module.split(".")
    names = (".".join(parts[:end]) for end in range(1, len(parts) + 1))
    try:
        return all(importlib.util.find_spec(name) is not None for name in names)
    except ValueError:  # imported already, by something that is no ordinary import
        return True


def require(*modules: str, extra: str, why: str, otherwise: str = "") -> None:
    """Check that optional modules are installed, before work is done that needs them.

    Args:
        modules: their names, such as "pyarrow.parquet".
        extra: the extra of this package that installs them.
        why: the subject of the error's sentence, such as "writing .parquet".
        otherwise: the end of the sentence, such as ", or write .npz".

    Raises:
        ModuleNotFoundError: some are missing; the message names them and the command that installs them.
    """
    missing = [module for module in modules if not installed(module)]
    if missing:
        roots = [module.partition(".")[0] for module in missing]
        packages = ", ".join(DISTRIBUTIONS.get(root, root) for root in roots)
        raise ModuleNotFoundError(f"{why} needs {packages}: {install_command(extra)}{otherwise}", name=missing[0])

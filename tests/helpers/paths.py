"""Where the repository stands, and how a Python of its own finds the package that is tested and not the checkout."""

import os
import tempfile
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ELSEWHERE = tempfile.gettempdir()
"""A working directory from which `python -c` and `python -m` find no checkout."""


def environment_of_tests(**variables: str) -> dict[str, str]:
    """Return the environment of a Python that imports the package that this one would, and `helpers`."""
    found = find_spec("sne_fast")
    assert found is not None and found.origin is not None
    package = Path(found.origin).parents[1]
    paths = os.pathsep.join([str(package), str(ROOT / "tests")])
    return {**os.environ, "PYTHONPATH": paths, **variables}

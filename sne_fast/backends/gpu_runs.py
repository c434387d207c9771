"""Runs of the backends on GPUs: a summary of the committed results of ``bench/gpu_suite.py``.

The command that writes it::

    python -m sne_fast.backends.gpu_runs bench/results/gpu_*.json

A backend that no result names has only been emulated and compiled, and ``sne-fast info`` says so.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..atomic_files import write_json
from ..regular_files import read_json

FILE = Path(__file__).with_name("gpu_runs.json")


@dataclass(frozen=True)
class Run:
    """One backend on one GPU: the ops that agreed with the reference there, and what else ``failed`` in that result."""

    backend: str
    device: str
    capability: str
    ops: tuple[str, ...]
    failed: tuple[str, ...]
    commit: str
    result: str

    def __str__(self) -> str:
        text = f"{', '.join(self.ops)} on {self.device} (compute {self.capability}, {self.result})"
        return text + (f", where failed: {', '.join(self.failed)}" if self.failed else "")


def runs_of(result: Mapping[str, Any], name: str) -> list[Run]:
    """Return one run per backend from a result of ``bench/gpu_suite.py``; none if it was not made on a GPU."""
    environment = result["parts"]["environment"]
    if "capability" not in environment:
        return []
    ops: dict[str, dict[str, None]] = {}
    for row in result["parts"].get("ops", []):
        if "backend" in row and "forward_seconds" in row:
            ops.setdefault(row["backend"], {})[row["op"]] = None
    failed = tuple(result["errors"])
    return [
        Run(
            backend, environment["device"], "{}.{}".format(*environment["capability"]), tuple(found), failed,
            str(environment["commit"])[:10], name,
        )
        for backend, found in ops.items()
    ]  # fmt: skip


def is_result(content: Any) -> bool:
    """Return whether the content of a JSON file is a result of ``bench/gpu_suite.py``."""
    return isinstance(content, dict) and "environment" in content.get("parts", {}) and "part_seconds" in content


def read(file: Path = FILE) -> tuple[Run, ...]:
    """Read the runs of a summary."""
    found = read_json(file, dict)["runs"]
    return tuple(Run(**{**run, "ops": tuple(run["ops"]), "failed": tuple(run["failed"])}) for run in found)


def write(runs: Sequence[Run], file: Path = FILE) -> None:
    """Write a summary of runs."""
    write_json(file, {"runs": [asdict(run) for run in runs]})


def sentence(backend: str, otherwise: str) -> str:
    """Return which ops of a backend have run on which GPUs, or what it has been verified by ``otherwise``."""
    found = [run for run in read() if run.backend == backend]
    return f"has run {'; '.join(map(str, found))}" if found else f"has not run on a GPU yet: {otherwise} only"


def main() -> None:
    """Write the runs of the results named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path, help="results of bench/gpu_suite.py; other files are skipped")
    contents = {file.name: read_json(file) for file in parser.parse_args().results}
    write([run for name, content in contents.items() if is_result(content) for run in runs_of(content, name)])
    print(*read(), sep="\n")


if __name__ == "__main__":
    main()

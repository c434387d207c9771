"""What has run on a GPU: a summary, in this package, of the committed results of ``bench/gpu_suite.py``.

    python -m sne_fast.backends.gpu_runs bench/results/gpu_*.json

writes it. A backend that no result names has only been emulated and compiled, and ``sne-fast info`` says so.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("gpu_runs.json")
NOT_YET = "has not run on a GPU yet"


@dataclass(frozen=True)
class Run:
    """One backend on one GPU. ``ops``: those that agreed with the reference there; ``failed``: what else went wrong."""

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
    """What a result of ``bench/gpu_suite.py`` on a GPU says of each backend."""
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
    """Whether a JSON file is one of ``bench/gpu_suite.py``."""
    return isinstance(content, dict) and "environment" in content.get("parts", {}) and "part_seconds" in content


def read(file: Path = FILE) -> tuple[Run, ...]:
    found = json.loads(file.read_text(encoding="utf-8"))["runs"]
    return tuple(Run(**{**run, "ops": tuple(run["ops"]), "failed": tuple(run["failed"])}) for run in found)


def write(runs: Sequence[Run], file: Path = FILE) -> None:
    file.write_text(json.dumps({"runs": [asdict(run) for run in runs]}, indent=1) + "\n", encoding="utf-8")


def sentence(backend: str) -> str:
    """Where a backend has run; for ``sne-fast info``."""
    return (
        "has run " + "; ".join(map(str, found)) if (found := [r for r in read() if r.backend == backend]) else NOT_YET
    )


if __name__ == "__main__":
    results = [(Path(name).name, json.loads(Path(name).read_text(encoding="utf-8"))) for name in sys.argv[1:]]
    write([run for name, content in results if is_result(content) for run in runs_of(content, name)])
    print(*read(), sep="\n")

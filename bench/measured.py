"""Committed results of the benchmark suite, read and refused where they may not be reported."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MIN_ROUNDS = 5
MODES = ("forward", "training", "backward")


class Refused(SystemExit):
    """These results may not be reported; the message says why."""


class Results:
    """One JSON file of pytest-benchmark: the entries by (case, mode)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.later: list[str] = []
        content = json.loads(path.read_text(encoding="utf-8"))
        try:
            self.machine: dict[str, Any] = content["machine_info"]["sne_fast"]
            self.when: str = content["datetime"]
            self.entries = {
                (e["extra_info"]["case"], e["extra_info"]["mode"]): e["extra_info"] for e in content["benchmarks"]
            }
        except (KeyError, TypeError) as error:
            raise Refused(f"{path}: not written by `pytest bench --benchmark-json`: {error} is missing") from error
        self.all_info: list[dict[str, Any]] = [e["extra_info"] for e in content["benchmarks"]]

    def replaced_by(self, later: Results) -> None:
        """Replace entries by those of a later, partial run on the same machine."""
        for mine, theirs in ((self.machine[k], later.machine[k]) for k in ("device", "threads", "instruction_set")):
            if mine != theirs:
                raise Refused(f"{later.path}: taken on another machine than {self.path}: {theirs!r}, not {mine!r}")
        self.entries.update(later.entries)
        what = sorted({mode for _, mode in later.entries})
        self.later.append(f"{', '.join(what)} at commit {(later.machine['commit'] or 'unknown')[:10]}")

    def require_check(self) -> None:
        for info in self.all_info:
            if not info.get("check", {}).get("passed"):
                raise Refused(
                    f"{self.path}: {info['case']} {info['mode']} has no passed correctness check; not reported"
                )

    def require_full(self) -> None:
        if self.machine["size"] != "full" or self.machine["rounds"] < MIN_ROUNDS:
            raise Refused(
                f"{self.path}: size {self.machine['size']!r} with {self.machine['rounds']} rounds; reports need size "
                f"'full' with at least {MIN_ROUNDS}, or --preview"
            )

    def require_committed(self) -> None:
        where = {"cwd": self.path.resolve().parent, "capture_output": True, "text": True}
        name = self.path.name
        tracked = subprocess.run(["git", "ls-files", "--error-unmatch", name], **where).returncode == 0  # type: ignore[call-overload]
        same = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", name], **where).returncode == 0  # type: ignore[call-overload]
        if not tracked or not same:
            raise Refused(f"{self.path}: is not committed as it is; commit it, or --preview")

    @property
    def cases(self) -> list[str]:
        """Cases with a speed, in the order of the file."""
        return list(dict.fromkeys(case for case, mode in self.entries if mode in MODES))

    @property
    def scaling(self) -> list[dict[str, Any]]:
        """Entries of the scaling measurements."""
        return [info for (_, mode), info in self.entries.items() if mode.startswith("scaling")]


def load(paths: Sequence[Path], preview: bool = False) -> Results:
    """Read results, refuse what may not be reported, and replace entries of the first file by those of later ones."""
    results, *later = (Results(path) for path in paths)
    for part in (results, *later):
        part.require_check()
        if not preview:
            part.require_full()
            part.require_committed()
    for part in later:
        results.replaced_by(part)
    return results

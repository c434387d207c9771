"""Count the random inputs that the test suites try, and write the tables of docs/reliability.md.

    python bench/reliability.py run [--examples 1000]   # run the suites, and write bench/results/reliability.json
    python bench/reliability.py table                   # write the tables from the committed JSON

`run` runs every test of the marker `fuzz` with that many examples for each, and counts what hypothesis generated: test
cases that passed, and those that failed. It fails where a test fails.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from report import RESULTS, ROOT, insert

from sne_fast.reports.machine import commit, machine

PAGE = ROOT / "docs" / "reliability.md"
MARKERS = "<!-- counts:begin -->", "<!-- counts:end -->"
JSON = RESULTS / "reliability.json"
NUMERICS_MARKERS = "<!-- numerics:begin -->", "<!-- numerics:end -->"
NUMERICS_JSON = RESULTS / "cpu_numerics.json"  # of bench/numerics.py
PREFIX = "hypothesis-statistics-"
CASES = re.compile(r"(\d+) passing, (\d+) failing, and (\d+) invalid test cases")


def counts(junit: Path) -> dict[str, dict[str, int]]:
    """Return by file the numbers of tests, of generated cases that passed and that failed, from a JUnit report."""
    found: dict[str, dict[str, int]] = {}
    for item in ET.parse(junit).getroot().iter("property"):
        name = item.get("name", "")
        if not name.startswith(PREFIX):
            continue
        text = base64.b64decode(item.get("value", "")).decode()
        row = found.setdefault(name.removeprefix(PREFIX).partition("::")[0], {"tests": 0, "passed": 0, "failed": 0})
        row["tests"] += 1
        for passed, failed, _ in CASES.findall(text):
            row["passed"] += int(passed)
            row["failed"] += int(failed)
    return found


def run(examples: int, selected: list[str]) -> int:
    """Run the suites; return pytest's exit status."""
    with tempfile.TemporaryDirectory() as folder:
        junit = Path(folder) / "junit.xml"
        start = time.perf_counter()
        # One process, so that every test reports its own numbers; a database of its own, so that nothing is repeated.
        command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-m", "fuzz", f"--junitxml={junit}", *selected]
        environment = {**os.environ, "SNE_FAST_FUZZ": str(examples), "HYPOTHESIS_STORAGE_DIRECTORY": folder}
        status = subprocess.run(command, cwd=ROOT, env=environment).returncode
        seconds = time.perf_counter() - start
        suites = counts(junit)
    result: dict[str, Any] = {
        "examples": examples,
        "seconds": round(seconds),
        "suites": dict(sorted(suites.items())),
        "commit": commit(),
        "machine": machine(),
    }
    JSON.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    total = sum(row["passed"] + row["failed"] for row in suites.values())
    print(f"{total} inputs in {len(suites)} suites, {seconds:.0f} s: {JSON}")
    return status


def table(result: dict[str, Any]) -> str:
    """Return the table of the page: a row per suite, and the sum."""
    lines = ["| suite | tests | inputs tried | failed |", "|---|---:|---:|---:|"]
    for file, row in result["suites"].items():
        lines.append(f"| `{file}` | {row['tests']} | {row['passed'] + row['failed']:,} | {row['failed']:,} |")
    sums = [sum(row[key] for row in result["suites"].values()) for key in ("tests", "passed", "failed")]
    lines.append(f"| all | {sums[0]} | {sums[1] + sums[2]:,} | {sums[2]:,} |")
    return "\n".join(["", *lines, "", ""])


def numerics_table(result: dict[str, Any]) -> str:
    """Return the table of errors: a row per dtype."""
    head = ["dtype", "bounds of z and gradients", "encoders", "within", "ill-conditioned", "beyond"]
    shown = ["median of z", "99 % of z", "median of gradients", "99 % of gradients"]
    lines = [f"| {' | '.join([*head, *shown])} |", f"|---|---{'|---:' * (len(head) + len(shown) - 2)}|"]
    for name, row in result["summary"].items():
        counts = [
            row[key] for key in ("configurations", "within_bounds", "ill_conditioned_within_twice_eager", "beyond")
        ]
        errors = [row[of][level] for of in ("z", "gradients") for level in ("median", "0.99")]
        numbers = [*(f"{count:,}" for count in counts), *(e if isinstance(e, str) else f"{e:.1e}" for e in errors)]
        lines.append(f"| {name} | {' and '.join(f'{bound:.2g}' for bound in row['bounds'])} | {' | '.join(numbers)} |")
    return "\n".join(["", *lines, "", ""])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["run", "table"])
    parser.add_argument("--examples", type=int, default=1000, help="inputs of each test")
    parser.add_argument("files", nargs="*", help="test files; all by default")
    arguments = parser.parse_intermixed_args()
    status = run(arguments.examples, arguments.files) if arguments.action == "run" else 0
    if not arguments.files:
        insert(PAGE, table(json.loads(JSON.read_text(encoding="utf-8"))), *MARKERS)
        insert(PAGE, numerics_table(json.loads(NUMERICS_JSON.read_text(encoding="utf-8"))), *NUMERICS_MARKERS)
    return status


if __name__ == "__main__":
    sys.exit(main())

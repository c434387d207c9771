"""Calls for which ``auto`` asks the CUDA backend before Triton's, by rules that were measured on a GPU.

The command that writes them to winners.json, from results of ``bench/gpu_suite.py`` with both backends::

    python -m sne_fast.backends.cuda.winners bench/results/gpu_h200.json ...

A rule stands for one measurement: an op (forward or backward), the compute capability, dtype and float32 matmul
precision, width, heads, mean length of the sets and number of rows. It holds for calls that agree in these, with a mean
length within a factor of two of the measured one and at least a sixteenth of its rows.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...atomic_files import write_json
from ...ops import devices
from ...ops import selftest_cases as cases
from ...ops.backend import Arguments
from ...ops.precision import product_precision
from ...ops.schema import named
from ...regular_files import read_json

FILE = Path(__file__).with_name("winners.json")
MIN_GAIN = 1.03  # two measurements of the same code may differ by less
LENGTH_FACTOR, ROWS_FACTOR = 2.0, 16


@dataclass(frozen=True)
class Call:
    """The properties of a call, or of a measured row, that a rule compares."""

    op: str
    capability: str  # of the GPU, such as "9.0"
    dtype: str
    products: str  # float32 matmul precision, "ieee" or "tf32"; "ieee" for half types
    width: int  # 0 for gather_chunks, as are heads and length
    heads: int  # 0 for feed_forward, as is length
    length: float  # mean rows of a set
    rows: int


@dataclass(frozen=True)
class Rule:
    """One measurement: ``gain`` is Triton's time over that of CUDA, ``measured`` the file of the result."""

    when: Call
    gain: float
    measured: str

    def holds(self, call: Call) -> bool:
        """Return whether a call is like the measured one."""
        when = self.when
        same = ("op", "capability", "dtype", "products", "width", "heads")
        return (
            all(getattr(when, name) == getattr(call, name) for name in same)
            and when.length / LENGTH_FACTOR <= call.length <= when.length * LENGTH_FACTOR
            and ROWS_FACTOR * call.rows >= when.rows
        )


def read(file: Path = FILE) -> tuple[Rule, ...]:
    """Read the rules of a file."""
    rules = read_json(file, dict)["rules"]
    return tuple(Rule(Call(**rule["when"]), rule["gain"], rule["measured"]) for rule in rules)


def write(rules: Iterable[Rule], file: Path = FILE) -> None:
    """Write rules to a file."""
    write_json(file, {"rules": [asdict(rule) for rule in rules]})


# ------------------------------------------------------------------------------------------------------- the dispatch

rules = functools.cache(read)


def call_of(op: str, args: Arguments) -> Call:
    """Return the properties of a call on a GPU."""
    variant, given = cases.variant(op, args), named(op, args)
    sets = 0
    if variant.op == "gather_chunks":
        values = given.get("values")
        rows = sum(t.numel() for t in given["tensors"]) if values is None else values.numel()
        device = given["scale"].device
    else:
        counted = {
            "chunk_encode": "values", "set_attention": "k", "segment_pool": "x", "feed_forward": "q", "set_block": "q",
        }  # fmt: skip
        operand = given[counted[variant.op]]
        rows, device = operand.shape[0], operand.device
        if variant.op != "feed_forward":
            pointer = {
                "chunk_encode": "chunk_ptr", "set_attention": "k_ptr_host", "segment_pool": "ptr_host",
                "set_block": "q_ptr_host",
            }  # fmt: skip
            sets = given[pointer[variant.op]].shape[0] - 1
    return Call(
        op, "{}.{}".format(*devices.capability(device)), str(variant.dtype).removeprefix("torch."),
        product_precision(variant.dtype), variant.width, variant.heads, rows / sets if sets else 0.0, rows,
    )  # fmt: skip


def preferred(op: str, args: Arguments) -> bool:
    """Return whether a rule holds for a call."""
    if not any(rule.when.op == op for rule in rules()):
        return False
    if op.startswith("set_block") and named(op, args)["k"] is not None:
        return False  # what is measured are rows that attend to each other
    call = call_of(op, args)
    return any(rule.holds(call) for rule in rules())


# ----------------------------------------------------------------------------------------------------- from a result


def rules_from(result: Mapping[str, Any], measured: str) -> list[Rule]:
    """Return a rule for every row of part "ops" of a result of ``bench/gpu_suite.py`` in which CUDA was faster.

    Raises:
        ValueError: for a result with errors, or one measured with uncommitted changes.
    """
    if result["errors"]:
        raise ValueError(f"{measured}: a result with errors decides nothing: {', '.join(result['errors'])}")
    environment = result["parts"]["environment"]
    if environment["dirty"]:
        raise ValueError(f"{measured}: was measured with changes that are not committed")
    capability = "{}.{}".format(*environment["capability"])
    seconds: dict[Call, dict[str, float]] = {}
    for row in result["parts"].get("ops", []):
        if row.get("backend") not in ("cuda", "triton") or row.get("skipped"):
            continue
        shape = (capability, row["dtype"].removeprefix("torch."), row["products"], row["width"], row["heads"],
                 row["length"], row["rows"])  # fmt: skip
        times = {row["op"]: row["forward_seconds"]}
        if "step_seconds" in row:
            times[f"{row['op']}_backward"] = row["step_seconds"] - row["forward_seconds"]
        for op, time in times.items():
            seconds.setdefault(Call(op, *shape), {})[row["backend"]] = time
    found = []
    for call, by in seconds.items():
        if len(by) == 2 and min(by.values()) > 0 and (gain := by["triton"] / by["cuda"]) >= MIN_GAIN:
            found.append(Rule(call, round(gain, 3), measured))
    return found


def main() -> None:
    """Write the rules of the results named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path, help="results of bench/gpu_suite.py")
    files = parser.parse_args().results
    found = [rule for file in files for rule in rules_from(read_json(file, dict), file.name)]
    write(found)
    print(f"{FILE}: {len(found)} rules")


if __name__ == "__main__":
    main()

"""Calls for which ``auto`` asks this backend before Triton's: those that winners.json names, as measured on a GPU.

    python -m sne_fast.backends.cuda.winners bench/results/gpu_h200.json ...

writes the table from results of ``bench/gpu_suite.py`` in which both backends were measured; without such a result it
names nothing. A rule stands for one measurement: an op (forward or backward), the compute capability, dtype and kind of
float32 products, width, heads, mean length of the sets and number of rows. It holds for calls of the same, with sets
whose mean length is within a factor of two of the measured one and with at least a sixteenth of its rows.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ...ops import selftest_cases as cases
from ...ops.precision import product_precision

FILE = Path(__file__).with_name("winners.json")
LEAST_GAIN = 1.03  # below that, two measurements of the same code may differ as much
LENGTH_FACTOR, ROWS_FACTOR = 2.0, 16


@dataclass(frozen=True)
class Call:
    """What of a call, or of a measured row, a rule looks at."""

    op: str
    capability: str  # of the GPU, such as "9.0"
    dtype: str
    products: str  # of float32: "ieee" or "tf32"; "ieee" for half types
    width: int  # 0 for gather_chunks, as are heads and length
    heads: int  # 0 for feed_forward, as is length
    length: float  # mean rows of a set
    rows: int


@dataclass(frozen=True)
class Rule:
    """``gain``: Triton's time over this backend's; ``measured``: file of the result."""

    when: Call
    gain: float
    measured: str

    def holds(self, call: Call) -> bool:
        when = self.when
        same = ("op", "capability", "dtype", "products", "width", "heads")
        return (
            all(getattr(when, name) == getattr(call, name) for name in same)
            and when.length / LENGTH_FACTOR <= call.length <= when.length * LENGTH_FACTOR
            and ROWS_FACTOR * call.rows >= when.rows
        )


def read(file: Path = FILE) -> tuple[Rule, ...]:
    rules = json.loads(file.read_text(encoding="utf-8"))["rules"]
    return tuple(Rule(Call(**rule["when"]), rule["gain"], rule["measured"]) for rule in rules)


def write(rules: Iterable[Rule], file: Path = FILE) -> None:
    file.write_text(json.dumps({"rules": [asdict(rule) for rule in rules]}, indent=1) + "\n", encoding="utf-8")


# ------------------------------------------------------------------------------------------------------- the dispatch

rules = functools.cache(read)


@functools.cache
def _capability(index: int) -> str:
    return "{}.{}".format(*torch.cuda.get_device_capability(index))


def call_of(op: str, args: tuple[Any, ...]) -> Call:
    """Of the schema's arguments, on a GPU."""
    variant = cases.variant(op, args)
    own = args[1:] if op.endswith("_backward") else args  # behind the gradient
    if op == "gather_chunks":
        device, rows, sets = own[1].device, sum(t.numel() for t in own[0]), 0
    elif op == "gather_chunks_backward":
        device, rows, sets = own[0].device, own[0].numel(), 0
    else:
        device, rows = own[0].device, own[1].shape[0] if variant.op == "set_attention" else own[0].shape[0]
        pointer = {"chunk_encode": 1, "set_attention": -2, "segment_pool": -1}.get(variant.op)
        sets = 0 if pointer is None else own[pointer].shape[0] - 1
    return Call(
        op, _capability(torch.cuda.current_device() if device.index is None else device.index),
        str(variant.dtype).removeprefix("torch."), product_precision(variant.dtype), variant.width, variant.heads,
        rows / sets if sets else 0.0, rows,
    )  # fmt: skip


def preferred(op: str, args: tuple[Any, ...]) -> bool:
    """Whether a rule names this call."""
    if not any(rule.when.op == op for rule in rules()):
        return False
    call = call_of(op, args)
    return any(rule.holds(call) for rule in rules())


# ----------------------------------------------------------------------------------------------------- from a result


def rules_from(result: Mapping[str, Any], measured: str) -> list[Rule]:
    """The rules that a result of ``bench/gpu_suite.py`` stands for: rows of part "ops" where this backend was faster.

    Raises:
        ValueError: for a result with errors, or one whose commit had changes that nobody else has.
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
        if len(by) == 2 and min(by.values()) > 0 and (gain := by["triton"] / by["cuda"]) >= LEAST_GAIN:
            found.append(Rule(call, round(gain, 3), measured))
    return found


def main() -> None:
    found = [rule for name in sys.argv[1:] for rule in rules_from(json.loads(Path(name).read_text()), Path(name).name)]
    if not sys.argv[1:]:
        sys.exit(__doc__)
    write(found)
    print(f"{FILE}: {len(found)} rules")


if __name__ == "__main__":
    main()

"""Measure launch sizes on this GPU and write them into the tables: ``python -m sne_fast.backends.triton.tune``.

For every case, the table's own choice is checked against the reference, then each candidate against that choice, and
those that agree are timed; the fastest becomes a rule for this architecture, in front of the others.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from pathlib import Path

import torch
from torch import Tensor
from triton.testing import do_bench

from ...atomic_files import write_text
from ...ops import selftest, selftest_cases
from ...regular_files import read_json
from .backend import BACKEND
from .launches import TABLES, architecture, table, trial
from .tune_cases import TUNED, Case, Inputs, Rule

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def _agrees(got: tuple[Tensor, ...], want: tuple[Tensor, ...], dtype: torch.dtype) -> bool:
    tolerance = 4 * max(selftest.TOLERANCES[dtype], selftest.TF32_TOLERANCE if dtype == torch.float32 else 0)
    for a, b in zip(got, want, strict=True):
        finite = b.isfinite()
        if not torch.equal(a.isfinite(), finite):
            return False
        a, b = a[finite].double(), b[finite].double()
        if float((a - b).norm()) > tolerance * float(b.norm()) + 1e-6:
            return False
    return True


def tune(case: Case, dtype: torch.dtype, arch: int) -> Rule | None:
    """Return the fastest candidate as a rule, or None if it beats the table's own choice by less than two per cent."""
    want = case.run()
    usual = best = do_bench(case.run, return_mode="median")
    found = None
    when = {**case.when, "dtype": str(dtype).removeprefix("torch."), "arch": arch}
    for candidate in case.candidates:
        rule = {"when": when, **candidate}
        with trial(case.table, rule):
            try:
                if not _agrees(case.run(), want, dtype):
                    print(f"  wrong results, skipped: {candidate}")
                    continue
                time = do_bench(case.run, return_mode="median")
            except Exception as error:  # too much shared memory, a shape the compiler refuses
                print(f"  {type(error).__name__}, skipped: {candidate}")
                continue
        if time < 0.98 * usual and time < best:
            best, found = time, rule
    print(f"{case.table} {when}: {usual:.3f} ms -> {best:.3f} ms", flush=True)
    return found


def merged(rules: list[Rule], new: list[Rule]) -> list[Rule]:
    """Put new rules in front, in place of older rules for the same case."""
    replaced = [rule["when"] for rule in new]
    return [*new, *(rule for rule in rules if rule.get("when", {}) not in replaced)]


def write(path: Path, rules: list[Rule]) -> None:
    """Write a table, one rule a line."""
    write_text(path, "[\n" + ",\n".join("  " + json.dumps(rule) for rule in rules) + "\n]\n")


def tune_tables(name: str, inputs: Inputs, out: Path) -> None:
    """Measure the cases of a name of `TUNED`, if its op is right; each rule that wins is written at once."""
    variant = selftest_cases.Variant(TUNED[name].op, inputs.dtype, inputs.h, inputs.heads, True)
    wrong = selftest.check(BACKEND, variant, inputs.device)
    if wrong:
        print(f"{name} {inputs.dtype} h={inputs.h} is not tuned, its results are wrong: {'; '.join(wrong)}")
        return
    for case in TUNED[name].cases(inputs):
        rule = tune(case, inputs.dtype, architecture(inputs.device))
        if rule:
            path = out / f"{case.table}.json"
            before = read_json(path, list) if path.exists() else list(table(case.table))
            write(path, merged(before, [rule]))


def main(arguments: list[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog="python -m sne_fast.backends.triton.tune", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--op", choices=TUNED, action="append", help="one op (may be repeated); all by default")
    parser.add_argument("--width", type=int, action="append", help="h; 64 by default")
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="bfloat16 and float32 by default")
    parser.add_argument("--share", type=float, default=1.0,
                        help="of the sets of a few million weights, less than 1 for small batches")  # fmt: skip
    parser.add_argument("--out", type=Path, help="folder of the tables; those of the package by default")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("sne_fast.backends.triton.tune: needs a CUDA GPU, and torch finds none here", file=sys.stderr)
        return 2
    out, widths = options.out or TABLES, options.width or [64]
    out.mkdir(parents=True, exist_ok=True)
    for name, dtype in itertools.product(options.op or TUNED, options.dtype or ["bfloat16", "float32"]):
        for h in widths if TUNED[name].by_width else widths[:1]:
            tune_tables(name, Inputs(h, options.heads, DTYPES[dtype], torch.device("cuda"), options.share), out)
    return 0


if __name__ == "__main__":
    sys.exit(main())

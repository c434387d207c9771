"""Compare the speed of two commits on the CPU: python bench/compare.py BASE [HEAD].

python bench/compare.py main                                   # HEAD against main, every case in at most 1e5 weights
python bench/compare.py main HEAD --cases zoo mixed --size full --dtypes float32 bfloat16 --json compared.json

Each commit is checked out into a temporary worktree and its CPU library is built there; the library beside this script
is taken where it was built from the same sources. One process per commit runs the cases in turn: BASE, HEAD, BASE.
A row is printed only after both have computed the same vectors, up to rounding. Times are CPU time of the process, so
that other processes count little. A ratio is BASE's time by HEAD's of the same round: above 1, HEAD is faster. A commit
compared with itself shows what noise does on the machine.

bfloat16 is float32 parameters under autocast. A training step is a forward, a backward and a step of Adam.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median, quantiles
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = Path("sne_fast/backends/cpu/libsne_fast_cpu.so")
LIBRARY_HERE = ROOT / LIBRARY
MODES = ("forward", "training")
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}
"""How far the vectors of two commits may be apart, relative to their size."""


# ------------------------------------------------------------------------------------------- the process of one commit


def work() -> None:
    """Answer requests, one line of JSON each, with the package that PYTHONPATH names."""
    import torch

    from sne_fast.benchmark import CASES

    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "list":
            answer: Any = [[name, case.trains] for name, case in CASES.items()]
        elif request["do"] == "prepare":
            case = CASES[request["case"]]
            encoder = case.encoder()
            batch = case.batch(encoder, request["size"])
            optimizer = torch.optim.Adam(encoder.parameters(), lr=0.0)
            autocast = request["dtype"] == "bfloat16"
            training = request["mode"] == "training"
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                answer = {"weights": batch.num_weights, "z": encoder(batch).float().tolist()}
        else:
            start = time.process_time()
            with torch.set_grad_enabled(training), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                z = encoder(batch)
            if training:
                optimizer.zero_grad()
                z.square().mean().backward()
                optimizer.step()
            answer = time.process_time() - start
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


class Worker:
    """The process of one commit."""

    def __init__(self, place: Path, threads: int) -> None:
        environment = {**os.environ, "PYTHONPATH": str(place), "OMP_NUM_THREADS": str(threads)}
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--work"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=place,
        )

    def ask(self, do: str, **request: str) -> Any:
        """Send a request and return its answer.

        Raises:
            SystemExit: the process has ended; what it printed stands above.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **request}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise SystemExit(f"compare: the process of a commit has ended at {do} {request}; see its error above")
        return json.loads(line)

    def close(self) -> None:
        """End the process."""
        self._process.terminate()
        self._process.communicate()


# ------------------------------------------------------------------------------------------------------------ commits


def git(*args: str) -> str:
    """Run git in this repository and return what it printed.

    Raises:
        SystemExit: git refused; the message says why.
    """
    done = subprocess.run(["git", "-C", str(ROOT), *args], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"compare: git {' '.join(args)}: {done.stderr.strip()}")
    return done.stdout.strip()


def built_here(commit: str) -> bool:
    """Return whether the library beside this script was built from the sources of a commit."""
    library = LIBRARY_HERE
    if not library.exists() or git("status", "--porcelain", "--", "csrc"):
        return False
    if git("rev-parse", f"{commit}:csrc") != git("rev-parse", "HEAD:csrc"):
        return False
    sources = [file for file in (ROOT / "csrc").rglob("*") if file.is_file() and "__pycache__" not in file.parts]
    return library.stat().st_mtime >= max(file.stat().st_mtime for file in sources)


@contextmanager
def checked_out(commit: str, folder: Path) -> Iterator[Path]:
    """Check a commit out into ``folder`` with its CPU library, and remove it at the end."""
    git("worktree", "add", "--detach", str(folder), commit)
    try:
        if built_here(commit):
            shutil.copy(LIBRARY_HERE, folder / LIBRARY)
        else:
            print(f"building {commit[:10]} ...", file=sys.stderr)
            build = [sys.executable, str(folder / "csrc" / "cpu_build.py"), str(folder / LIBRARY)]
            if subprocess.run(build, cwd=folder, stdout=sys.stderr).returncode:
                raise SystemExit(f"compare: the library of {commit[:10]} does not build; see the compiler above")
        yield folder
    finally:
        git("worktree", "remove", "--force", str(folder))


# -------------------------------------------------------------------------------------------------------- measurements


def difference(base: Sequence[Sequence[float]], head: Sequence[Sequence[float]]) -> float:
    """Return ||head - base|| / ||base||."""
    pairs = [(a, b) for x, y in zip(base, head, strict=True) for a, b in zip(x, y, strict=True)]
    size = sum(a * a for a, _ in pairs)
    return (sum((a - b) ** 2 for a, b in pairs) / size) ** 0.5 if size else 0.0


def measure(base: Worker, head: Worker, case: str, mode: str, dtype: str, size: str, rounds: int) -> dict[str, Any]:
    """Compare one case: check the vectors, warm up, then time both in turn.

    Raises:
        SystemExit: the vectors differ by more than rounding.
    """
    request = {"case": case, "mode": mode, "dtype": dtype, "size": size}
    first, second = base.ask("prepare", **request), head.ask("prepare", **request)
    apart = difference(first["z"], second["z"])
    if not apart <= TOLERANCE[dtype]:
        raise SystemExit(
            f"compare: {case} {mode} {dtype}: the vectors of the two commits differ by {apart:.2g} of their size, more "
            f"than {TOLERANCE[dtype]:g}; not timed"
        )
    base.ask("run"), head.ask("run")
    times = [(base.ask("run"), head.ask("run")) for _ in range(rounds)]
    ratios = [a / b for a, b in times]
    tenths = quantiles(ratios, n=10) if rounds > 1 else ratios * 9
    return {
        "case": case, "mode": mode, "dtype": dtype, "weights": first["weights"], "rounds": rounds, "difference": apart,
        "base_seconds": median(a for a, _ in times), "head_seconds": median(b for _, b in times),
        "ratio": median(ratios), "ratio_tenths": [max(min(ratios), tenths[0]), min(max(ratios), tenths[-1])],
    }  # fmt: skip


def compare(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Build both commits, measure every case and print a row of each."""
    commits = [git("rev-parse", "--verify", f"{name}^{{commit}}") for name in (options.base, options.head)]
    rows = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="compare")))
        places = [
            stack.enter_context(checked_out(c, folder / n)) for c, n in zip(commits, ("base", "head"), strict=True)
        ]
        base, head = (Worker(place, options.threads) for place in places)
        for worker in (base, head):
            stack.callback(worker.close)
        known = dict(head.ask("list"))
        for name in options.cases or known:
            if name not in known:
                raise SystemExit(f"compare: --cases: {name!r} is not one of {', '.join(known)}")
        print(f"{'case':<10} {'mode':<9} {'dtype':<9} {'base ms':>9} {'head ms':>9} {'ratio':>7}  10 % to 90 %")
        for name in options.cases or known:
            for mode in options.modes:
                for dtype in options.dtypes if mode != "training" or known[name] else ():
                    row = measure(base, head, name, mode, dtype, options.size, options.rounds)
                    rows.append(row)
                    low, high = row["ratio_tenths"]
                    print(
                        f"{name:<10} {mode:<9} {dtype:<9} {row['base_seconds'] * 1e3:9.2f} "
                        f"{row['head_seconds'] * 1e3:9.2f} {row['ratio']:7.3f}  {low:.3f} to {high:.3f}",
                        flush=True,
                    )
    if options.json:
        from sne_fast.reports.machine import processor, versions

        content = {
            "base": commits[0], "head": commits[1], "device": processor(), "threads": options.threads,
            "size": options.size, "versions": versions("torch"), "rows": rows,
        }  # fmt: skip
        Path(options.json).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return rows


def parsed(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="commit to compare with")
    parser.add_argument("head", nargs="?", default="HEAD", help="commit under test, by default HEAD")
    parser.add_argument("--cases", nargs="+", help="by default all cases of the benchmark")
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES)
    parser.add_argument("--dtypes", nargs="+", default=["float32"], choices=list(TOLERANCE))
    parser.add_argument("--size", default="check", choices=["full", "check", "tiny"], help="size of the cases")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", help="file for the rows, the commits and the machine")
    options = parser.parse_args(arguments)
    if options.rounds < 1 or options.threads < 1:
        parser.error("--rounds and --threads must be at least 1")
    return options


if __name__ == "__main__":
    if sys.argv[1:] == ["--work"]:
        work()
    else:
        compare(parsed())

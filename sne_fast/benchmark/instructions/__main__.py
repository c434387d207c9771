"""Command ``python -m sne_fast.benchmark.instructions``: see the package's docstring and docs/benchmarks.md."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console

from ...backends.cuda import library
from ...reports.terminal import show_table
from .counting import CHIP_OF, CHIPS, CLASSES, INTEGER, Chip, Count, as_row, bounds, count_library
from .kernels import Config, training_kernels
from .source_lines import CSRC
from .triton_kernels import count_triton


def compile_kernels(target: Path, architecture: str, files: Collection[str]) -> None:
    """Build a library of some files of this source tree for one architecture."""
    script = CSRC / "cuda_build.py"
    if not script.exists():
        raise RuntimeError("--compile needs the source tree of sne_fast")
    environment = {**os.environ, "SNE_FAST_CUDA_ARCHS": architecture}
    subprocess.run([sys.executable, str(script), str(target), *files], check=True, env=environment)


def show(counts: list[Count], title: str) -> None:
    """Print a table of counts."""
    kinds = [kind for kind in (*CLASSES, INTEGER) if any(c.classes.get(kind) for c in counts)]
    columns = ("kernel", "launches", "instructions", *kinds, "registers", "spills", "warps")
    rows = []
    for c in counts:
        numbers = [c.instructions, *(c.classes.get(kind, 0) for kind in kinds)]
        ends = (str(c.registers), str(c.spills), str(c.warps_per_multiprocessor))
        rows.append((c.kernel, str(c.launches), *(f"{n:,.0f}" for n in numbers), *ends))
    show_table(Console(), columns, rows, title=title)


def main(arguments: list[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m sne_fast.benchmark.instructions", description=__doc__)
    parser.add_argument("library", nargs="?", type=Path, default=library.LIBRARY_FILE, help="library or object file")
    parser.add_argument("--compile", action="store_true", help="build the kernels of this source tree first")
    parser.add_argument(
        "--backend", default="cuda", choices=["cuda", "triton"], help="triton compiles its kernels here"
    )
    parser.add_argument("--architecture", default="90a", help="such as 80, 90a, 100")
    parser.add_argument("--chip", choices=sorted(CHIPS), help="by default a data centre's of that architecture")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32", "tf32"])
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--chunk-size", type=int, default=32)
    parser.add_argument("--only", nargs="*", default=[], help="titles of kernels")
    parser.add_argument("--json", type=Path, help="where to write the counts, beside those of others")
    options = parser.parse_args(arguments)
    number = int(options.architecture.rstrip("a"))
    if not options.chip and number not in CHIP_OF:
        parser.error(f"--chip: which one has sm_{options.architecture}? One of {', '.join(sorted(CHIPS))}")
    config, chip = Config(options.hidden, options.heads, options.chunk_size), CHIPS[options.chip or CHIP_OF[number]]
    if options.backend == "triton":
        options.architecture = str(number)
        counts = count_triton(config, options.dtype, number, chip, options.only)
    else:
        counts = count_cuda(options, config, chip)
    report(counts, options, config, chip)


def count_cuda(options: argparse.Namespace, config: Config, chip: Chip) -> list[Count]:
    """Count the kernels of a library, which is built first with `--compile`."""
    with TemporaryDirectory() as folder:
        binary: Path = options.library
        if options.compile:
            binary = Path(folder) / "libsne_fast_cuda.so"
            kernels = training_kernels(config, options.dtype, options.architecture)
            compile_kernels(binary, options.architecture, sorted({kernel.file for kernel in kernels}))
        if not binary.exists():
            raise RuntimeError(f"{binary} does not exist: build it with SNE_FAST_BUILD=cuda, or pass --compile")
        return count_library(binary, options.architecture, config, options.dtype, chip, options.only)


def report(counts: list[Count], options: argparse.Namespace, config: Config, chip: Chip) -> None:
    """Print counts and what they allow a chip, and write them to `--json`."""
    show(counts, f"warp instructions per 32 weights, sm_{options.architecture}, {options.dtype}, {config}")
    step = [c for c in counts if c.kernel != "forward"]
    limits = {
        "forward": bounds([c for c in counts if c.kernel == "forward"], chip),
        "training step": bounds(counts, chip),
    }
    for name, found in limits.items():
        print(f"{name}, 1e9 weights/s that {chip.name} allows: " + ", ".join(f"{k} {v:.2f}" for k, v in found.items()))
    print(f"training step: {sum(c.launches * c.instructions for c in counts):,.0f} instructions, "
          f"{sum(c.launches * c.instructions for c in step):,.0f} of them in the backward")  # fmt: skip
    if options.json:
        row = {"dtype": options.dtype, "hidden": config.hidden, "heads": config.heads, "chunk_size": config.chunk_size,
               "chip": chip.name,
               "bounds": {name: {k: round(v, 2) for k, v in found.items()} for name, found in limits.items()},
               "kernels": [as_row(c) for c in counts]}  # fmt: skip
        put(options.json, options.backend, options.architecture, row)


def put(file: Path, backend: str, architecture: str, row: dict[str, Any]) -> None:
    """Write the row of a backend and an architecture into a file, which keeps its other rows."""
    rows = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    rows[backend] = dict(sorted((rows.get(backend, {}) | {f"sm_{architecture}": row}).items(), key=_by_number))
    file.write_text(json.dumps(dict(sorted(rows.items())), indent=1) + "\n", encoding="utf-8")


def _by_number(item: tuple[str, Any]) -> int:
    return int(item[0].removeprefix("sm_").rstrip("a"))


if __name__ == "__main__":
    try:
        main()
    except RuntimeError as error:
        sys.exit(f"instructions: {error}")

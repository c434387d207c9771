"""Check and measure everything on a machine with a GPU, in one command, under nine minutes, without network.

    python bench/gpu_suite.py --out gpu.json

The CUDA backend is built where there is nvcc. Environment; tests marked `gpu`; compute-sanitizer on small shapes; the
device's ceilings; the ops against them, by every backend for a GPU that runs here; the cases of `bench/` and ResNet-50
by the same, against eager padded and torch.compile. After every part the JSON is written anew, so a run that is cut off
loses one part. A part that fails is recorded with its error and does not stop the others; the exit status is 1 then.
`--size tiny --device cpu` runs the same code on a CPU, to try it.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "csrc"), str(ROOT / "bench")]
if importlib.util.find_spec("sne_fast") is None:  # on a lent machine nothing is installed: the checkout as it lies
    sys.path.insert(0, str(ROOT))

import cuda_build  # noqa: E402
import gpu_tables  # noqa: E402
import torch  # noqa: E402
from rich.console import Console  # noqa: E402

import sne_fast  # noqa: E402
from sne_fast.backends.cuda import library as cuda_library  # noqa: E402
from sne_fast.benchmark import (  # noqa: E402
    GPU_CASES,
    Contender,
    DoesNotFit,
    check_agreement,
    contender,
    gpu_limits,
    gpu_ops,
    run_check,
)
from sne_fast.ops.found_backends import FUSIONS  # noqa: E402
from sne_fast.ops.schema import OPTIONAL_OPS, REQUIRED_OPS  # noqa: E402
from sne_fast.reports.machine import gpu, nvidia_smi, revision, versions  # noqa: E402

Json = dict[str, Any]
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": None}
BASELINES = ("eager", "compile")
BACKENDS = ("cuda", "triton")  # those for a GPU; the first that runs is the one that baselines are compared with
# racecheck and synccheck find missing and wrong barriers, which Triton places by itself.
SANITIZERS = {"cuda": ("memcheck", "racecheck", "synccheck"), "other": ("memcheck", "racecheck")}
CASE_ORDER = ("zoo", "mixed", "resnet", "resnet50", "single", "inr", "gpt2")
SIZES: dict[str, Json] = {
    "full": {
        "cases": "full", "weights": 1 << 25, "rows": 1 << 20, "longest": (32, 512), "pool_rows": 1 << 24, "copies": 8,
        "copied": 1 << 31, "product": 8192, "elements": 1 << 26,
    },
    "tiny": {
        "cases": "tiny", "weights": 5000, "rows": 512, "longest": (32,), "pool_rows": 1024, "copies": 0,
        "copied": 1 << 20, "product": 256, "elements": 1 << 12,
    },
}  # fmt: skip


class OutOfTime(RuntimeError):
    """The command's time is spent."""


class Suite:
    """The parts, the time they may take together, and the JSON they fill."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.device = options, torch.device(options.device)
        self.size = SIZES[options.size]
        self.start = time.monotonic()
        self.results: Json = {"parts": {}, "errors": {}, "skipped": {}}
        self.console = Console(width=140)

    def left(self) -> float:
        return self.options.seconds - (time.monotonic() - self.start)

    def need(self, seconds: float) -> None:
        """Raise OutOfTime unless that much is left."""
        if self.left() < seconds:
            raise OutOfTime(f"{self.left():.0f} s left, {seconds:.0f} s needed")

    def write(self) -> None:
        self.results["seconds"] = time.monotonic() - self.start
        part = Path(f"{self.options.out}.part")
        part.write_text(json.dumps(self.results, indent=1, default=str) + "\n", encoding="utf-8")
        part.replace(self.options.out)

    def fail(self, name: str, error: Exception) -> None:
        self.results["errors"][name] = "".join(traceback.format_exception(error))[-4000:]

    def part(self, name: str, run: Callable[[], Any]) -> None:
        if self.options.only and name not in self.options.only:
            return
        begin = time.monotonic()
        try:
            found = run()
            # Rows of a part that was cut off count as far as they came.
            self.results["parts"][name] = self._collect(name, found) if isinstance(found, Iterator) else found
        except OutOfTime as late:
            self.results["skipped"][name] = f"out of time: {late}"
        except Exception as error:
            self.fail(name, error)
        self.results.setdefault("part_seconds", {})[name] = time.monotonic() - begin
        self.write()
        state = "failed" if name in self.results["errors"] else self.results["skipped"].get(name, "done")
        self.console.print(f"{name}: {state} ({time.monotonic() - begin:.0f} s)", highlight=False)

    def _collect(self, name: str, rows: Iterator[Json]) -> list[Json]:
        kept: list[Json] = []
        self.results["parts"][name] = kept
        while True:
            try:
                kept.append(next(rows))
            except StopIteration:
                return kept
            except OutOfTime as late:
                self.results["skipped"][name] = f"out of time after {len(kept)} rows: {late}"
                return kept

    def backends(self, op: str = "") -> list[str]:
        """Return the backends asked for, else those for a GPU that run this op here, else what auto chooses."""
        if self.options.backend:
            without = {name for name, ops in FUSIONS.items() if op in OPTIONAL_OPS and op not in ops}
            return [name for name in self.options.backend if name not in without]
        reports = sne_fast.explain(self.device) if self.device.type == "cuda" else ()
        asked = (op,) if op else REQUIRED_OPS
        refused = {report.backend for report in reports if report.reasons and report.op in asked}
        return [name for name in BACKENDS if reports and name not in refused] or ["auto"]

    # ---------------------------------------------------------------------------------------------------------- parts

    def build(self) -> Json:
        """Build the CUDA library into the checkout."""
        if self.device.type != "cuda" or cuda_library.EMULATED:
            return {"skipped": "not on a GPU"}
        if cuda_build.find_nvcc() is None:
            return {"skipped": f"there is no nvcc; a library was here before: {cuda_library.LIBRARY_FILE.exists()}"}
        begin = time.monotonic()
        names = cuda_build.build(cuda_library.LIBRARY_FILE)
        return {"architectures": names, "seconds": time.monotonic() - begin}

    def environment(self) -> Json:
        measured = revision(ROOT, excluding=("bench/results",), untracked=True)
        found: Json = {
            **versions("torch", "triton"), "cuda": torch.version.cuda,
            "commit": self.options.commit or (measured and measured.commit),
            "dirty": bool(measured and measured.changes),
            "float32_products": torch.get_float32_matmul_precision(), "nvidia_smi": nvidia_smi(),
        }  # fmt: skip
        if self.device.type == "cuda":
            found |= gpu(self.device)
        found["backends"] = str(sne_fast.explain(self.device))
        found["cuda_backend"] = cuda_library.reasons() or cuda_library.architectures()
        return found

    def tests(self) -> Json:
        self.need(60)
        limit = min(self.left() - 30, 0.35 * self.options.seconds)
        return self._pytest(["-m", "gpu"], limit, [sys.executable])

    def sanitizer(self) -> Json:
        tool = shutil.which("compute-sanitizer")
        if tool is None:
            return {"skipped": "compute-sanitizer is not on the PATH"}
        found: Json = {}
        until = self.left() - 0.4 * self.options.seconds
        for backend in self.backends():
            for check in SANITIZERS.get(backend, SANITIZERS["other"]):
                self.need(60)
                if (limit := min(self.left() - until, 0.15 * self.options.seconds)) < 15:
                    raise OutOfTime(f"{check} of {backend} and what follows; --only sanitizer has more")
                command = [tool, "--tool", check, "--error-exitcode", "9", sys.executable, __file__, "--exercise",
                           "--device", self.options.device, "--backend", backend]  # fmt: skip
                name = f"{backend} {check}"
                self.results["parts"]["sanitizer"] = found
                found[name] = _finished(command, limit)
                if found[name]["status"]:
                    self.results["errors"][f"sanitizer {name}"] = found[name]["tail"]
        return found

    def _pytest(self, arguments: list[str], limit: float, python: list[str]) -> Json:
        command = [*python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-rsx", *arguments, str(ROOT / "tests")]
        found = _finished(command, limit)
        if found["status"]:
            raise RuntimeError(f"pytest ended with {found['status']}:\n{found['tail']}")
        return found

    def ceilings(self) -> Json:
        """Measure the device's limits; one that cannot be measured is recorded as an error, and None."""
        self.need(20)
        measures = {
            "copy_bytes_per_second": lambda: gpu_limits.copy_bandwidth(self.device, self.size["copied"]),
            "products_per_second": lambda: gpu_limits.product_rates(self.device, self.size["product"]),
        }
        if self.device.type == "cuda":
            elements = self.size["elements"]
            measures["exponentials_per_second"] = lambda: gpu_limits.exponential_rate(self.device, elements)
        found: Json = {}
        for name, measure in measures.items():
            try:
                found[name] = measure()
            except Exception as error:
                found[name] = None
                self.fail(f"ceilings {name}", error)
        return found

    def ops(self) -> Iterator[Json]:
        ceilings = self.results["parts"].get("ceilings") or self.ceilings()
        bandwidth, products = ceilings["copy_bytes_per_second"], ceilings["products_per_second"] or {}
        failed: list[Exception] = []

        def attempt(seconds: float, measure: Callable[..., Iterator[Json]], *args: Any) -> Iterator[Json]:
            """Yield the rows of a measurement, and note its failure, so that the others still get their rows."""
            self.need(seconds)
            try:
                yield from measure(self.device, *args)
            except Exception as error:
                failed.append(error)

        for name in ("bfloat16", "float16", "float32"):
            dtype = getattr(torch, name)
            kind = name
            if name == "float32" and torch.get_float32_matmul_precision() != "highest":
                kind = "tf32"
            rate = products.get(kind)
            size = self.size
            for backend in self.backends("chunk_encode"):
                yield from attempt(15, gpu_ops.chunk_encode, dtype, size["weights"], rate, backend)
            if name == "float16":
                continue
            for longest in size["longest"]:
                for heads in (4, 2, 1):  # d = 16, 32, 64
                    for place, backend in enumerate(self.backends("set_attention")):
                        yield from attempt(
                            20, gpu_ops.set_attention, dtype, size["rows"], longest, heads, rate, backend, place == 0
                        )
            for length in (32, 4096):
                for backend in self.backends("segment_pool"):
                    yield from attempt(10, gpu_ops.segment_pool, dtype, size["pool_rows"], length, bandwidth, backend)
            for place, backend in enumerate(self.backends("feed_forward")):
                yield from attempt(
                    15, gpu_ops.feed_forward, dtype, size["pool_rows"] // 4, bandwidth, backend, place == 0
                )
            for backend in self.backends("gather_chunks"):
                yield from attempt(10, gpu_ops.gather_chunks, dtype, size["copies"], bandwidth, backend)
        if failed:
            texts = dict.fromkeys(f"{type(error).__name__}: {error}"[:400] for error in failed)
            raise RuntimeError("\n".join(texts)) from failed[0]

    def cases(self) -> Iterator[Json]:
        for name in self.options.cases:
            for kind, autocast in DTYPES.items():
                if kind == "float16" or (name in ("single", "gpt2", "inr") and kind != "bfloat16"):
                    continue
                self.need(20)
                yield self._case(name, kind, autocast)

    def _case(self, name: str, kind: str, autocast: torch.dtype | None) -> Json:
        case, backends = GPU_CASES[name], self.backends()
        size = "tiny" if self.size["cases"] == "tiny" else "check"
        # Every backend is checked before any is measured.
        check, *others = [run_check(case, e, size, device=self.device, autocast=autocast) for e in backends]
        encoder = case.encoder().to(self.device)
        batch = case.batch(encoder, self.size["cases"]).to(self.device)
        row: Json = {"case": name, "dtype": kind, "weights": batch.num_weights, "networks": len(batch),
                     "backend": backends[0], "check": vars(check), "skipped": {},
                     "checks": {e: vars(c) for e, c in zip(backends[1:], others, strict=True)}}  # fmt: skip
        z = None
        for who in ("sne_fast", *backends[1:], *self.options.baselines):
            for mode in ("forward", "training") if case.trains else ("forward",):
                try:
                    self.need(15)
                    backend = backends[0] if who == "sne_fast" else who
                    entrant = contender(
                        "sne_fast" if who in backends else who, encoder, batch, backend=backend,
                        training=mode == "training", memory_limit=self._free_bytes(), autocast=autocast,
                    )  # fmt: skip
                    if z is None:
                        z = entrant.output()
                    elif mode == "forward":
                        check_agreement(case, who, z, entrant.output(), 2 * check.output_allowed)
                    row[f"{who} {mode}"] = self._timed(entrant, mode)
                except (DoesNotFit, OutOfTime, torch.OutOfMemoryError) as reason:
                    row["skipped"][f"{who} {mode}"] = f"{type(reason).__name__}: {str(reason)[:200]}"
        for mode in ("forward", "training"):
            if (backend := row.get(f"sne_fast {mode}")) is None:
                continue
            row[f"ratios {mode}"] = {
                who: row[f"{who} {mode}"]["seconds"] / backend["seconds"]
                for who in (*backends[1:], *self.options.baselines)
                if f"{who} {mode}" in row
            }
        return row

    def _timed(self, entrant: Contender, mode: str) -> Json:
        """Return the median seconds of a run, and the most memory it held above what was there before."""
        run = entrant.step if mode == "training" else entrant.forward
        run()
        found: Json = {}
        if self.device.type == "cuda":
            before = torch.cuda.memory_allocated(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            run()
            found["peak_bytes"] = torch.cuda.max_memory_allocated(self.device) - before
        found["seconds"] = gpu_limits.median_seconds(run, self.device, 1.5)
        return found

    def _free_bytes(self) -> float:
        if self.device.type != "cuda":
            return float(2**31)
        return 0.9 * torch.cuda.mem_get_info(self.device)[0]


def _finished(command: list[str], limit: float) -> Json:
    """Run a command, and return its status and the end of its output; 124 where it ran past its limit."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=max(1.0, limit), env=environment)
    except subprocess.TimeoutExpired as late:
        text = late.stdout.decode() if isinstance(late.stdout, bytes) else (late.stdout or "")
        return {"status": 124, "tail": f"{text[-3000:]}\nran past {limit:.0f} s"}
    return {"status": done.returncode, "tail": (done.stdout + done.stderr)[-3000:]}


def exercise(device: torch.device, backend: str) -> None:
    """Run every op once, forward and backward, on small ragged shapes, for compute-sanitizer to watch."""
    for name, dtype in DTYPES.items():
        case = GPU_CASES["mixed"]
        encoder = case.encoder().to(device)
        batch = case.batch(encoder, "tiny").to(device)
        batch.values.requires_grad_()
        with sne_fast.use_backend(backend):
            if dtype is None:
                z = encoder(batch)
            else:
                with torch.autocast(device.type, dtype=dtype):
                    z = encoder(batch)
            z.float().square().sum().backward()
        assert torch.isfinite(batch.values.grad).all(), name
    tensors = [torch.randn(5, 7, 3, device=device), torch.randn(11, device=device).half()]
    plan = torch.tensor([[35, 3], [11, 1]])
    with sne_fast.use_backend(backend):
        sne_fast.functional.gather_chunks(tensors, torch.ones(2, device=device), plan, torch.float32)
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="gpu_suite.json", help="the JSON, written after every part")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--backend", nargs="*", help="backends under test, as sne_fast.use_backend takes them",
                        default=[])  # fmt: skip
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--seconds", type=float, default=530, help="what all parts may take together")
    parser.add_argument("--only", nargs="*", help="parts: build environment tests sanitizer ceilings ops cases")
    parser.add_argument("--cases", nargs="*", choices=GPU_CASES, default=CASE_ORDER)
    parser.add_argument("--baselines", nargs="*", choices=BASELINES, default=BASELINES)
    parser.add_argument("--commit", help="commit to record where the checkout has no git")
    parser.add_argument("--exercise", action="store_true", help="run every op once, for compute-sanitizer, and stop")
    return parser


def main() -> int:
    options = parser().parse_args()
    if torch.device(options.device).type == "cuda" and not torch.cuda.is_available():
        print("gpu_suite: torch sees no GPU here; --device cpu --size tiny tries the suite itself", file=sys.stderr)
        return 2
    if options.exercise:
        for backend in options.backend or ["auto"]:
            exercise(torch.device(options.device), backend)
        return 0
    suite = Suite(options)
    for name in ("build", "environment", "tests", "sanitizer", "ceilings", "ops", "cases"):
        suite.part(name, getattr(suite, name))
    gpu_tables.show(suite.results, BACKENDS, BASELINES, suite.console)
    return 1 if suite.results["errors"] else 0


if __name__ == "__main__":
    sys.exit(main())

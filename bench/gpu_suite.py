"""Check and measure everything on a machine with a GPU, in one command, under nine minutes, without network.

    python bench/gpu_suite.py --out gpu.json

The CUDA backend is built where there is nvcc. Environment; the device's ceilings; tests marked `gpu`; the cases of
`bench/` and ResNet-50 by every backend for a GPU that runs here, against eager padded, and training steps captured as
CUDA graphs against others; the ops by the same, against the ceilings, and what rivals them; compute-sanitizer on small
shapes. The time is shared by the parts that are asked for: what one does not need, those after it have. After every row
the JSON is written anew, so a run that is cut off loses one row. What fails is recorded with its error and does not
stop the rest; the exit status is 1 then. `--size tiny --device cpu` runs the same code on a CPU, to try it.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import shutil
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
import gpu_captured  # noqa: E402
import gpu_cases  # noqa: E402
import gpu_commands  # noqa: E402
import gpu_tables  # noqa: E402
import torch  # noqa: E402
from gpu_cases import OutOfTime  # noqa: E402
from rich.console import Console  # noqa: E402

import sne_fast  # noqa: E402
from sne_fast.atomic_files import to_json, write_text  # noqa: E402
from sne_fast.backends.cuda import library as cuda_library  # noqa: E402
from sne_fast.benchmark import GPU_CASES, gpu_limits, gpu_ops  # noqa: E402
from sne_fast.ops.found_backends import FUSIONS  # noqa: E402
from sne_fast.ops.schema import OPTIONAL_OPS, REQUIRED_OPS  # noqa: E402
from sne_fast.reports.machine import gpu, nvidia_smi, revision, versions  # noqa: E402

Json = dict[str, Any]
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": None}
BASELINES = ("eager", "compile")
BACKENDS = ("cuda", "triton")  # those for a GPU; the first that runs is the one that baselines are compared with
PARTS = ("build", "environment", "ceilings", "tests", "cases", "ops", "sanitizer")  # in the order in which they run
SHARES = {"tests": 4, "cases": 2, "ops": 3, "sanitizer": 3}  # of the time; the others take what they need
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


class Suite:
    """The parts, the time they may take together, and the JSON they fill."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.device = options, torch.device(options.device)
        self.size = SIZES[options.size]
        self.start = time.monotonic()
        self.end = self.deadline = self.start + options.seconds
        self.results: Json = {"parts": {}, "errors": {}, "skipped": {}}
        self.console = Console(width=140)

    def left(self) -> float:
        """Return the seconds that the running part may still take."""
        return self.deadline - time.monotonic()

    def need(self, seconds: float) -> None:
        """Raise OutOfTime unless that much is left."""
        if self.left() < seconds:
            raise OutOfTime(f"{self.left():.0f} s left, {seconds:.0f} s needed")

    def write(self) -> None:
        self.results["seconds"] = time.monotonic() - self.start
        write_text(Path(self.options.out), to_json(self.results, indent=1, default=str) + "\n")

    def fail(self, name: str, error: Exception) -> None:
        self.results["errors"][name] = "".join(traceback.format_exception(error))[-4000:]
        self.write()

    def run(self) -> None:
        """Run the parts that are asked for, each in its share of the time that those before it have left."""
        chosen = [name for name in PARTS if not self.options.only or name in self.options.only]
        for place, name in enumerate(chosen):
            now, to_come = time.monotonic(), sum(SHARES.get(other, 0) for other in chosen[place:])
            share = SHARES[name] / to_come if name in SHARES else 1.0
            self.deadline = now + share * max(0.0, self.end - now)
            self.part(name, getattr(self, name))

    def part(self, name: str, run: Callable[[], Any]) -> None:
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
                self.write()
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
        if self.options.trial:  # sizes that no committed table holds
            found |= {"trial": self.options.trial, "dirty": True}
        found["backends"] = str(sne_fast.explain(self.device))
        found["cuda_backend"] = cuda_library.reasons() or cuda_library.architectures()
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

    def tests(self) -> Json:
        found: Json = {}
        for run in gpu_commands.TEST_RUNS:
            self.need(30)
            self._command("tests", run.name, found, run.command(), run.share * self.left())
        return found

    def ops(self) -> Iterator[Json]:
        ceilings = self.results["parts"].get("ceilings") or self.ceilings()
        bandwidth, products = ceilings["copy_bytes_per_second"], ceilings["products_per_second"] or {}
        chosen, size = self.options.ops, self.size

        def attempt(seconds: float, op: str, *args: Any) -> Iterator[Json]:
            """Yield the rows of a measurement, and note its failure, so that the others still get their rows."""
            if op not in chosen:
                return
            self.need(seconds)
            try:
                yield from getattr(gpu_ops, op)(self.device, *args)
            except Exception as error:
                line = f"{type(error).__name__}: {error}"[:400]
                before = self.results["errors"].get("ops", "")
                if line not in before:
                    self.results["errors"]["ops"] = f"{before}{line}\n"
                    self.write()

        def rate_of(dtype: torch.dtype) -> float | None:
            name = str(dtype).removeprefix("torch.")
            tf32 = name == "float32" and torch.get_float32_matmul_precision() != "highest"
            return products.get("tf32" if tf32 else name)

        def attention(dtype: torch.dtype, backend: str, rivals: bool) -> Iterator[Json]:
            for longest in size["longest"]:
                for heads in (4, 2, 1):  # d = 16, 32, 64
                    yield from attempt(20, "set_attention", dtype, size["rows"], longest, heads, rate_of(dtype),
                                       backend, rivals)  # fmt: skip

        def feed_forward(dtype: torch.dtype, backend: str, rivals: bool) -> Iterator[Json]:
            yield from attempt(15, "feed_forward", dtype, size["pool_rows"] // 4, bandwidth, backend, rivals)

        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            for backend in self.backends("chunk_encode"):
                yield from attempt(15, "chunk_encode", dtype, size["weights"], rate_of(dtype), backend)
        for dtype in (torch.bfloat16, torch.float32):
            for backend in self.backends("set_attention"):
                yield from attention(dtype, backend, False)
            for longest in size["longest"]:
                for backend in self.backends("set_block"):
                    yield from attempt(15, "set_block", dtype, size["rows"] // 4, longest, 4, rate_of(dtype), backend)
            for length in (32, 4096):
                for backend in self.backends("segment_pool"):
                    yield from attempt(10, "segment_pool", dtype, size["pool_rows"], length, bandwidth, backend)
            for backend in self.backends("feed_forward"):
                yield from feed_forward(dtype, backend, False)
            for backend in self.backends("gather_chunks"):
                yield from attempt(10, "gather_chunks", dtype, size["copies"], bandwidth, backend)
        if not self.options.rivals:
            return
        for dtype in (torch.bfloat16, torch.float32):  # last: FlexAttention is compiled for every shape
            for backend in self.backends("feed_forward")[:1]:
                yield from feed_forward(dtype, backend, True)
            for backend in self.backends("set_attention")[:1]:
                yield from attention(dtype, backend, True)

    def cases(self) -> Iterator[Json]:
        return gpu_cases.measure(self)

    def sanitizer(self) -> Json:
        tool = shutil.which("compute-sanitizer")
        if tool is None:
            return {"skipped": "compute-sanitizer is not on the PATH"}
        sanitizers, found = gpu_commands.SANITIZERS, {}
        runs = [(name, check) for name in self.backends() for check in sanitizers.get(name, sanitizers["other"])]
        for place, (backend, check) in enumerate(runs):
            self.need(15)
            self._command(
                "sanitizer", f"{backend} {check}", found,
                gpu_commands.sanitizer_command(tool, check, backend, self.options.device),
                self.left() / (len(runs) - place), **gpu_commands.SANITIZER_ENVIRONMENT.get(check, {}),
            )  # fmt: skip
        return found

    def _command(self, part: str, name: str, into: Json, command: list[str], limit: float, **environment: str) -> None:
        """Run one command of a part; what it found is written before the next begins."""
        self.results["parts"][part] = into
        found = into[name] = gpu_commands.finished(command, limit, **environment)
        if gpu_commands.only_late(found):
            self.results["skipped"][f"{part} {name}"] = f"out of time: ran past {limit:.0f} s"
        elif found["status"]:
            self.results["errors"][f"{part} {name}"] = found["tail"]
        self.write()


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


@contextlib.contextmanager
def trials(rules: list[list[str]]) -> Iterator[None]:
    """Put rules before those of the Triton backend's launch tables, in this process; the first given comes first."""
    if not rules:
        yield
        return
    from sne_fast.backends.triton import launches

    with contextlib.ExitStack() as stack:
        for table, rule in reversed(rules):
            launches.table(table)  # raises for a name that is none
            stack.enter_context(launches.trial(table, json.loads(rule)))
        yield


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="gpu_suite.json", help="the JSON, written after every row")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--backend", nargs="*", help="backends under test, as sne_fast.use_backend takes them",
                        default=[])  # fmt: skip
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--seconds", type=float, default=530, help="what all parts may take together")
    parser.add_argument("--only", nargs="*", choices=PARTS, metavar="PART", help=f"of {' '.join(PARTS)}")
    parser.add_argument("--ops", nargs="*", choices=gpu_ops.MEASURED_OPS, default=gpu_ops.MEASURED_OPS, metavar="OP",
                        help=f"ops to measure, of {' '.join(gpu_ops.MEASURED_OPS)}")  # fmt: skip
    parser.add_argument("--no-rivals", dest="rivals", action="store_false",
                        help="leave out PyTorch's own forms of the ops, which take minutes to compile")  # fmt: skip
    parser.add_argument("--trial", nargs=2, action="append", default=[], metavar=("TABLE", "RULE"),
                        help="a rule, in JSON, to put before those of a launch table of Triton kernels")  # fmt: skip
    parser.add_argument("--cases", nargs="*", choices=GPU_CASES, default=CASE_ORDER)
    parser.add_argument("--baselines", nargs="*", choices=BASELINES, default=("eager",),
                        help="what cases are compared with; compile takes more than a minute per case")  # fmt: skip
    parser.add_argument("--commit", help="commit to record where the checkout has no git")
    parser.add_argument("--captured", choices=gpu_cases.CAPTURED, metavar="CASE",
                        help="measure captured training steps of a case by one backend, and stop")  # fmt: skip
    parser.add_argument("--exercise", action="store_true", help="run every op once, for compute-sanitizer, and stop")
    return parser


def main() -> int:
    options = parser().parse_args()
    if torch.device(options.device).type == "cuda" and not torch.cuda.is_available():
        print("gpu_suite: torch sees no GPU here; --device cpu --size tiny tries the suite itself", file=sys.stderr)
        return 2
    if options.exercise:
        with trials(options.trial):
            for backend in options.backend or ["auto"]:
                exercise(torch.device(options.device), backend)
        return 0
    suite = Suite(options)
    with trials(options.trial):
        if options.captured:
            suite.part("captured", lambda: gpu_captured.measure(suite))
        else:
            suite.run()
    gpu_tables.show(suite.results, BACKENDS, options.baselines, suite.console)
    return 1 if suite.results["errors"] else 0


if __name__ == "__main__":
    sys.exit(main())

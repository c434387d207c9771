"""Part `cases` of `bench/gpu_suite.py`: whole encoders by every backend, against the baselines."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import gpu_commands
import torch

from sne_fast.benchmark import (
    GPU_CASES,
    Check,
    CheckFailed,
    Contender,
    DoesNotFit,
    check_agreement,
    contender,
    gpu_limits,
    run_check,
)

if TYPE_CHECKING:
    from gpu_suite import Suite

Json = dict[str, Any]
DTYPES = {"bfloat16": torch.bfloat16, "float32": None}
ONLY_HALF = ("single", "gpt2", "inr")
CAPTURED = ("zoo", "mixed", "inr")  # those of several training steps
CAPTURED_SECONDS = 60.0  # for a case, of which its process takes a third to begin
MEASURED_SECONDS = 1.5


class OutOfTime(RuntimeError):
    """The time of a part, or of all, is spent."""


def kinds(name: str) -> tuple[str, ...]:
    """Return the dtypes of a case by name."""
    return ("bfloat16",) if name in ONLY_HALF else tuple(DTYPES)


def measure(suite: Suite) -> Iterator[Json]:
    """Yield a row per case and dtype, then those of captured steps; what fails is recorded and stops nothing else."""
    backends = {}
    for name in suite.options.cases:
        for kind in kinds(name):
            suite.need(20)
            try:
                row = _row(suite, name, kind, DTYPES[kind])
            except OutOfTime:
                raise
            except Exception as error:
                suite.fail(f"cases {name} {kind}", error)
            else:
                if row is not None:
                    backends[name] = row["backend"]
                    yield row
    for name, backend in backends.items():
        if name in CAPTURED:
            yield from captured(suite, name, backend)


def captured(suite: Suite, name: str, backend: str) -> Iterator[Json]:
    """Yield the rows of captured steps, measured by a process of its own: graphs that hang or break cost no others."""
    if suite.device.type != "cuda":
        suite.results["skipped"][f"cases {name} captured"] = f"CUDA graphs are not for {suite.device}"
        return
    limit = min(CAPTURED_SECONDS, suite.left())
    suite.need(CAPTURED_SECONDS / 2)
    with TemporaryDirectory() as folder:
        out = Path(folder) / "captured.json"
        done = gpu_commands.finished(gpu_commands.captured_command(suite.options, name, backend, limit, out), limit)
        found = json.loads(out.read_text()) if out.exists() else {}
    for kind in ("errors", "skipped"):
        suite.results[kind].update({f"cases {name} {what}": text for what, text in found.get(kind, {}).items()})
    if gpu_commands.only_late(done):
        suite.results["skipped"][f"cases {name} captured"] = f"out of time: ran past {limit:.0f} s"
    elif done["status"] and not found.get("errors"):
        suite.results["errors"][f"cases {name} captured"] = done["tail"]
    suite.write()
    yield from found.get("parts", {}).get("captured", [])


def _checks(suite: Suite, name: str, kind: str, autocast: torch.dtype | None) -> dict[str, Check]:
    """Check every backend before any is measured; one that is wrong is recorded and left out."""
    size = "tiny" if suite.size["cases"] == "tiny" else "check"
    checks = {}
    for backend in suite.backends():
        try:
            checks[backend] = run_check(GPU_CASES[name], backend, size, device=suite.device, autocast=autocast)
        except Exception as error:
            suite.fail(f"cases {name} {kind} {backend}", error)
    return checks


def _row(suite: Suite, name: str, kind: str, autocast: torch.dtype | None) -> Json | None:
    """Return the times of a case, None where no backend passed the check.

    Raises:
        CheckFailed: two contenders differ on the full case, so that no time of it counts.
    """
    checks = _checks(suite, name, kind, autocast)
    if not checks:
        return None
    case = GPU_CASES[name]
    first, *others = checks
    encoder = case.encoder().to(suite.device)
    batch = case.batch(encoder, suite.size["cases"]).to(suite.device)
    row: Json = {"case": name, "dtype": kind, "weights": batch.num_weights, "networks": len(batch), "backend": first,
                 "check": vars(checks[first]), "skipped": {},
                 "checks": {other: vars(checks[other]) for other in others}}  # fmt: skip
    z = None
    for who in ("sne_fast", *others, *suite.options.baselines):
        for mode in ("forward", "training") if case.trains else ("forward",):
            try:
                suite.need(15)
                entrant = contender(
                    "sne_fast" if who in others else who, encoder, batch, backend=who if who in others else first,
                    training=mode == "training", memory_limit=_free_bytes(suite.device), autocast=autocast,
                )  # fmt: skip
                if z is None:
                    z = entrant.output()
                elif mode == "forward":
                    check_agreement(case, who, z, entrant.output(), 2 * checks[first].output_allowed)
                row[f"{who} {mode}"] = _timed(entrant, mode, suite.device)
            except (DoesNotFit, OutOfTime, torch.OutOfMemoryError) as reason:
                row["skipped"][f"{who} {mode}"] = f"{type(reason).__name__}: {str(reason)[:200]}"
            except CheckFailed:
                raise
            except Exception as error:
                suite.fail(f"cases {name} {kind} {who} {mode}", error)
    for mode in ("forward", "training"):
        if (own := row.get(f"sne_fast {mode}")) is None:
            continue
        row[f"ratios {mode}"] = {
            who: row[f"{who} {mode}"]["seconds"] / own["seconds"]
            for who in (*others, *suite.options.baselines)
            if f"{who} {mode}" in row
        }
    return row


def _timed(entrant: Contender, mode: str, device: torch.device) -> Json:
    """Return the median seconds of a run, and the most memory it held above what was there before."""
    run = entrant.step if mode == "training" else entrant.forward
    run()
    found: Json = {}
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        found["peak_bytes"] = torch.cuda.max_memory_allocated(device) - before
    found["seconds"] = gpu_limits.median_seconds(run, device, MEASURED_SECONDS)
    return found


def _free_bytes(device: torch.device) -> float:
    return 0.9 * torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else float(2**31)

"""The measurements behind `sne-fast bench`: small versions of three cases against eager padded, in one table."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence

import torch
from rich.console import Console

from ..backends.cpu import library
from ..ops.dispatch import use_backend
from ..reports.terminal import Update, progress, say, show_table
from ..training.threads import torch_threads
from .cases import CASES
from .checks import check_agreement, run_check
from .contenders import DoesNotFit, contender
from .limits import FORWARDS_PER_STEP, chunk_operations, product_rate
from .padded_memory import default_memory_limit
from .pairs import Pairs

SHORT = ("zoo", "inr", "mixed")
SIZE = "check"
ROUNDS = 3
COLUMNS = ("case", "mode", "weights", "M weights/s", "vs eager padded", "of limit", "rounds")
BUDGET = 7.0
"""Seconds after which a measurement begins no further round: the whole stays near a minute on a slow machine too."""


def run_short(
    cases: Sequence[str] = SHORT,
    *,
    rounds: int = ROUNDS,
    backend: str = "auto",
    threads: int | None = None,
    size: str = SIZE,
    console: Console | None = None,
) -> list[dict[str, float | str]]:
    """Check, measure and print `cases` in versions of at most 1e5 weights; under a minute on two cores.

    Args:
        cases: names from :data:`sne_fast.benchmark.CASES`.
        rounds: interleaved rounds at most; each measurement ends early after 7 s. Medians are printed.
        backend: backend under test, as :func:`sne_fast.use_backend` takes it.
        threads: of torch and the backend; all cores by default.
        size: of the cases, see :data:`sne_fast.benchmark.cases.SIZES`.
        console: where the table goes.

    Returns:
        A row per case and mode: case, mode, weights, rounds, weights_per_second, fraction_of_limit, and vs_eager where
        that fits.

    Raises:
        ValueError: an unknown case, or rounds below 1.
        CheckFailed: the backend's numbers are wrong; nothing is printed then.
        BackendError: the backend cannot run here.
    """
    for name in cases:
        if name not in CASES:
            raise ValueError(f"bench: unknown case {name!r}; there are {', '.join(CASES)}")
    for name, count in (("rounds", rounds), ("threads", threads)):
        if count is not None and count < 1:
            raise ValueError(f"bench: {name} must be at least 1, got {count}")
    console = console or Console()
    rows: list[dict[str, float | str]] = []
    start = time.perf_counter()
    with torch_threads(threads if threads is not None else os.cpu_count() or 1), use_backend(backend):
        for name in cases:
            with progress(console, name) as update:
                rows += _measure(name, rounds, backend, size, update)
        rate = product_rate(0.2)
        show_table(console, COLUMNS, [_cells(row) for row in rows], text_columns=2)
        isa = "not built" if library.reasons() else library.isa()
        say(
            console,
            f"{torch.get_num_threads()} threads, C++ library {isa}, backend {backend}; best product "
            f"{rate / 1e9:.0f} GFLOP/s; medians of interleaved rounds; {time.perf_counter() - start:.0f} s in all.",
            "The full suite: pytest bench (in the repository).",
        )
    return rows


def _measure(name: str, rounds: int, backend: str, size: str, update: Update) -> Iterator[dict[str, float | str]]:
    case = CASES[name]
    update(note="checking against float64")
    run_check(case, backend, "tiny")
    encoder = case.encoder()
    batch = case.batch(encoder, size)
    operations = chunk_operations(batch, encoder.hidden_dim)
    for mode in ("forward", "training") if case.trains else ("forward",):
        update(note=mode)
        training = mode == "training"
        limit = default_memory_limit()
        own = contender("sne_fast", encoder, batch, backend=backend, training=training, memory_limit=limit)
        z, others = own.output(), {}
        try:
            eager = contender("eager", encoder, batch, training=training, memory_limit=limit)
        except DoesNotFit:
            pass
        else:
            check_agreement(case, "eager", z, eager.output())
            others["eager"] = eager.step if training else eager.forward
        if training:
            own.step()
        counted = operations * (FORWARDS_PER_STEP if training else 1)
        pairs = Pairs(own.step if training else own.forward, others, counted)
        end = time.perf_counter() + BUDGET
        while pairs.rounds < rounds and (not pairs.rounds or time.perf_counter() < end):
            pairs.run(1)
        yield {
            "case": name,
            "mode": mode,
            "weights": batch.num_weights,
            "rounds": pairs.rounds,
            "weights_per_second": batch.num_weights / pairs.seconds()["sne_fast"],
            "fraction_of_limit": pairs.fraction(),
            **{f"vs_{other}": ratio for other, ratio in pairs.ratios().items()},
        }


def _cells(row: dict[str, float | str]) -> list[str]:
    ratio = row.get("vs_eager")
    return [
        str(row["case"]),
        str(row["mode"]),
        f"{row['weights']:,}",
        f"{float(row['weights_per_second']) / 1e6:.3f}",
        "does not fit" if ratio is None else f"{float(ratio):.1f}x",
        f"{100 * float(row['fraction_of_limit']):.0f} %",
        str(row["rounds"]),
    ]

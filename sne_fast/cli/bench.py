"""`sne-fast bench`."""

from __future__ import annotations

from dataclasses import dataclass

from ..tasks.settings import option
from .options import options_of


@dataclass(frozen=True)
class BenchSettings:
    """Options of `sne-fast bench`; see :func:`sne_fast.benchmark.short.run_short`."""

    cases: tuple[str, ...] = option(
        ("zoo", "inr", "mixed"), help="Case to run; repeat for several.", flags=("--case",), shown="zoo, inr and mixed"
    )
    rounds: int = option(3, help="Largest number of interleaved rounds; medians are shown.")
    backend: str = option("auto", help="Backend under test, such as cpu or reference.")
    threads: int | None = option(None, help="Number of threads.", shown="all cores")


@options_of(BenchSettings)
def bench(settings: BenchSettings) -> None:
    """Measure encoding and training against plain PyTorch on this machine, in about a minute.

    Every case is checked against the float64 reference first; wrong numbers are not timed.
    """
    from ..benchmark.short import run_short

    run_short(settings.cases, rounds=settings.rounds, backend=settings.backend, threads=settings.threads)

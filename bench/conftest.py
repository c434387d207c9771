"""Options, machine facts and shared state of the benchmark: `pytest bench --benchmark-json=bench/results/NAME.json`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from suite import Suite

from sne_fast.backends.cpu import library
from sne_fast.benchmark import BASELINES, CASES, default_memory_limit, product_rate
from sne_fast.ops.dispatch import use_backend
from sne_fast.reports.machine import processor, revision, versions

ROOT = Path(__file__).resolve().parent.parent


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("sne_fast benchmark")
    group.addoption("--rounds", type=int, default=5, help="repetitions of every measurement; reports need at least 5")
    group.addoption("--size", default="full", choices=["full", "check", "tiny"], help="smaller cases, to try the suite")
    group.addoption("--backend", default="auto", help="backend under test, as sne_fast.use_backend takes it")
    group.addoption("--threads", type=int, default=os.cpu_count(), help="threads of torch and backend; all cores")
    group.addoption("--memory-limit", type=float, default=None, help="GiB a baseline may use; 80 %% of what is free")
    group.addoption("--baselines", default=",".join(BASELINES), help=f"which of {','.join(BASELINES)} to run")
    group.addoption("--all-training", action="store_true", help="also train torch.compile and the loop (takes longer)")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order tests case by case, so that one batch is held at a time, with backward after the training that it uses."""
    order = ["chunk_encode", "forward", "training", "backward", "memory", "scaling"]

    def place(item: pytest.Item) -> tuple[int, int]:
        case = getattr(item, "callspec", None) and item.callspec.params.get("case")
        name = item.originalname.removeprefix("test_")  # type: ignore[attr-defined]
        last = name == "scaling"
        return (list(CASES).index(case.name) if case else len(CASES) if last else -1, order.index(name))

    items.sort(key=place)


@pytest.fixture(scope="session")
def suite(pytestconfig: pytest.Config) -> Iterator[Suite]:
    option = pytestconfig.getoption
    torch.set_num_threads(option("--threads"))
    limit = option("--memory-limit")
    wanted = [name for name in option("--baselines").split(",") if name]
    for name in wanted:
        if name not in BASELINES:
            raise pytest.UsageError(f"--baselines: {name!r} is not one of {', '.join(BASELINES)}")
    with use_backend(option("--backend")):
        yield Suite(
            rounds=option("--rounds"),
            size=option("--size"),
            backend=option("--backend"),
            threads=option("--threads"),
            memory_limit=default_memory_limit() if limit is None else limit * 2**30,
            baselines=tuple(wanted),
            training_baselines=tuple(name for name in wanted if name == "eager" or option("--all-training")),
        )


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    threads = config.getoption("--threads")
    torch.set_num_threads(threads)
    # The suite's own results are not part of what was measured.
    measured = revision(ROOT, excluding=("bench/results", "README.md", "docs"), untracked=True)
    machine_info["sne_fast"] = {
        "device": processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "instruction_set": None if library.reasons() else library.isa(),
        "native_library": library.reasons() or "loaded",
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "backend": config.getoption("--backend"),
        "size": config.getoption("--size"),
        "rounds": config.getoption("--rounds"),
        "load_average_at_end": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "product_rate_at_end": product_rate(0.5),
        "commit": None if measured is None else measured.commit,
        "dirty": None if measured is None else bool(measured.changes),
        "changed_files": [] if measured is None else list(measured.changes[:20]),
        "versions": versions("torch", "triton", "numpy", "pytest-benchmark"),
    }

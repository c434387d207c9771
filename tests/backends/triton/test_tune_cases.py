"""Every case of the tuner, made small on the CPU: kernels are recorded instead of run, and times are made up."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from triton.runtime.jit import JITFunction

from sne_fast.backends.triton import launches, tune
from sne_fast.backends.triton.launches import TABLES
from sne_fast.backends.triton.tune_cases import TUNED, Case, Inputs
from sne_fast.ops import selftest

pytestmark = pytest.mark.usefixtures("poisoned_outputs")
CPU, BRAIN, SINGLE = torch.device("cpu"), torch.bfloat16, torch.float32
WHOLE = ("set_block", "pool_block", "add_codes", "partial_sums")
MARK = 31
"""Warps of a rule, by which its launches are known."""


def small(h: int = 64, dtype: torch.dtype = BRAIN) -> Inputs:
    return Inputs(h, 4, dtype, CPU, share=1e-4)


@pytest.fixture(autouse=True)
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Record what launches are given by name, in place of running kernels."""
    found: list[dict[str, Any]] = []
    monkeypatch.setattr(JITFunction, "run", lambda self, *args, **kwargs: found.append(kwargs))
    return found


@pytest.fixture(autouse=True)
def tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Let launches read tables of a test's own, which are those of the package at first."""
    for path in TABLES.glob("*.json"):
        (tmp_path / path.name).write_text(path.read_text())
    monkeypatch.setattr(launches, "TABLES", tmp_path)
    forget()
    yield tmp_path
    forget()


def forget() -> None:
    launches.table.cache_clear()
    launches.launch.cache_clear()


def full_rule(case: Case, inputs: Inputs, candidate: dict[str, Any]) -> dict[str, Any]:
    return {"when": {**case.when, "dtype": launches.DTYPE_NAMES[inputs.dtype], "arch": 0}, **candidate}


@pytest.mark.parametrize("dtype", [BRAIN, SINGLE], ids=str)
@pytest.mark.parametrize("h", [32, 64])
@pytest.mark.parametrize("name", TUNED)
def test_launches_read_the_rules_of_every_case(
    name: str, h: int, dtype: torch.dtype, recorded: list[dict[str, Any]]
) -> None:
    cases = 0
    for case in TUNED[name].cases(small(h, dtype)):
        cases += 1
        assert len({json.dumps(candidate, sort_keys=True) for candidate in case.candidates}) == len(case.candidates)
        for candidate in (case.candidates[0], case.candidates[-1]):
            if candidate["blocks"].get("ROWS") == 0:  # the staged form of feed_forward, whose kernels have own sizes
                continue
            with launches.trial(case.table, full_rule(case, small(h, dtype), candidate | {"num_warps": MARK})):
                recorded.clear()
                case.run()
            of_rule = [launch for launch in recorded if launch["num_warps"] == MARK]
            assert of_rule, f"no launch of {case.table} reads a rule for {dict(case.when)}"
            assert all(launch["num_stages"] == candidate["num_stages"] for launch in of_rule)
            if case.table in WHOLE:
                [launch] = of_rule
                tiles = {key: value for key, value in candidate["blocks"].items() if key != "PROGRAMS"}
                assert tiles == {key: launch[key] for key in tiles}
    assert cases


def test_all_kernels_and_lengths_of_whole_blocks_are_tuned() -> None:
    lengths = {"8", "16", "32", "64", "128"}
    for name, kernels in (
        ("set_block", ["forward", "query_backward", "key_backward"]),
        ("pool_block", ["forward", "backward"]),
    ):
        for dtype, before in ((BRAIN, ""), (SINGLE, "ieee")):
            found = [(case.when["kernel"], case.when["length"]) for case in TUNED[name].cases(small(64, dtype))]
            wanted = lengths | ({"pooled"} if name == "pool_block" else set())
            assert sorted(found) == sorted((kernel, before + length) for kernel in kernels for length in wanted)


def test_whole_blocks_of_other_widths_have_no_kernels_to_tune() -> None:
    assert not [case for name in ("set_block", "pool_block") for case in TUNED[name].cases(small(128))]


@pytest.mark.parametrize("name", TUNED)
def test_a_rule_that_wins_is_what_launches_read(
    name: str, tables: Path, recorded: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs, checked, times = small(32), [], (0.9**n for n in itertools.count())

    def bench(run: Callable[[], Any], return_mode: str) -> float:
        """Run, and make up a time shorter than all before, so that the last candidate wins."""
        assert return_mode == "median"
        run()
        return next(times)

    monkeypatch.setattr(tune, "do_bench", bench)
    monkeypatch.setattr(selftest, "check", lambda backend, variant, device: checked.append(variant) or [])
    before = {path.stem: json.loads(path.read_text()) for path in tables.glob("*.json")}
    tune.tune_tables(name, inputs, tables)
    assert [(one.op, one.dtype, one.width) for one in checked] == [(TUNED[name].op, BRAIN, 32)]
    forget()
    cases = list(TUNED[name].cases(inputs))
    written = {case.table: json.loads((tables / f"{case.table}.json").read_text()) for case in cases}
    for case in reversed(cases):  # the last one's rule comes first
        rule = written[case.table].pop(0)
        assert rule == full_rule(case, inputs, case.candidates[-1])
        recorded.clear()
        case.run()
        sizes = {(launch["num_warps"], launch.get("num_stages")) for launch in recorded}
        assert (rule["num_warps"], rule["num_stages"]) in sizes
    assert cases and all(rules == before[table] for table, rules in written.items()), "the others stay, behind"


def test_an_op_that_is_wrong_is_not_tuned(
    tables: Path, recorded: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_text() for path in tables.glob("*.json")}
    monkeypatch.setattr(selftest, "check", lambda *_: ["gradient 3 is off by 1.0 of its size"])
    for name in TUNED:
        tune.tune_tables(name, small(), tables)
        assert f"{name} torch.bfloat16 h=64 is not tuned, its results are wrong: gradient 3" in capsys.readouterr().out
    assert not recorded and before == {path: path.read_text() for path in tables.glob("*.json")}


def test_the_command_tunes_what_it_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tune, "tune_tables", lambda *args: asked.append(args))
    ops = ["--op", "set_block", "--op", "partial_sums", "--width", "32", "--width", "64", "--heads", "8"]
    out = tmp_path / "new" / "tables"
    assert tune.main([*ops, "--dtype", "float16", "--share", "0.5", "--out", str(out)]) == 0
    cuda = torch.device("cuda")
    assert asked == [
        ("set_block", Inputs(32, 8, torch.float16, cuda, 0.5), out),
        ("set_block", Inputs(64, 8, torch.float16, cuda, 0.5), out),
        ("partial_sums", Inputs(32, 8, torch.float16, cuda, 0.5), out),
    ]
    assert out.is_dir()
    asked.clear()
    assert tune.main(["--out", str(out)]) == 0
    assert [(name, inputs.dtype) for name, inputs, _ in asked] == [(n, d) for n in TUNED for d in (BRAIN, SINGLE)]


def test_candidates_that_fail_or_are_wrong_are_skipped(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run() -> tuple[torch.Tensor, ...]:
        warps = launches.launch("partial_sums", dtype=SINGLE, arch=0).num_warps
        if warps == 16:
            raise RuntimeError("out of resources: shared memory")
        value = {2: torch.nan, 8: 3.0}.get(warps, 1.0)
        return (torch.full((3,), value), torch.tensor([torch.nan]))

    monkeypatch.setattr(tune, "do_bench", lambda run, return_mode: 1 / launches.launch(
        "partial_sums", dtype=SINGLE, arch=0).num_warps)  # fmt: skip
    candidates = tuple({"num_warps": w, "num_stages": 1, "blocks": {}} for w in (1, 2, 6, 8, 16, 5))
    rule = tune.tune(Case("partial_sums", {}, run, candidates), SINGLE, 0)
    assert rule == {"when": {"dtype": "float32", "arch": 0}, **candidates[2]}
    said = capsys.readouterr().out
    assert said.count("wrong results, skipped") == 2 and said.count("RuntimeError, skipped") == 1

"""The benchmark suite: its cases, what it refuses to report, its report, its short form."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from helpers.paths import ROOT
from sne_fast.backends.reference.backend import BACKEND as REFERENCE
from sne_fast.benchmark import (
    CASES,
    CheckFailed,
    DoesNotFit,
    Pairs,
    check_agreement,
    chunk_operations,
    contender,
    find_case,
    padded_bytes,
    probe,
    run_check,
)
from sne_fast.benchmark import short as short_form
from sne_fast.benchmark.networks import gpt2_state_dict, small_lenet

SMALL = Path(__file__).with_name("bench_small.json")


def load_report() -> Any:
    spec = importlib.util.spec_from_file_location("bench_report", ROOT / "bench" / "report.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


report = load_report()


# -------------------------------------------------------------------------------------------------------------- cases


def test_cases_have_the_sizes_that_reports_claim() -> None:
    sizes = {name: [sum(p.numel() for p in n.parameters()) for n in CASES[name].networks("full")] for name in
             ("inr", "zoo", "mixed", "resnet")}  # fmt: skip
    assert sizes["inr"] == [1153] * 256
    assert sizes["zoo"] == [4970] * 64
    assert sizes["mixed"][:36] == [1153] * 16 + [4970] * 16 + [22262] * 4 and len(sizes["mixed"]) == 38
    assert sizes["mixed"][36] == sizes["mixed"][37] > 200_000
    assert 11e6 < sizes["resnet"][0] < 11.5e6
    assert max(sum(p.numel() for p in layer.parameters()) for layer in small_lenet()) == 15420
    one_layer = sum(t.numel() for t in gpt2_state_dict(1).values())
    assert one_layer + 11 * (12 * 768**2 + 13 * 768) == 124_439_808


@pytest.mark.parametrize("name", CASES)
def test_small_versions_keep_to_their_size_and_hold_no_zeros(name: str) -> None:
    case = CASES[name]
    encoder = case.encoder()
    assert all(p.count_nonzero() == p.numel() for p in encoder.parameters())
    for size in ("check", "tiny"):
        batch = case.batch(encoder, size)
        assert batch.num_weights <= 100_000 and batch.values.count_nonzero() == batch.num_weights
        assert not batch.values.requires_grad


@pytest.mark.parametrize("name", ["networks@50000", "network@50000", "networks@2000000"])
def test_scaling_cases_come_close_to_the_weights_asked_for(name: str) -> None:
    case = find_case(name)
    assert abs(case.batch(case.encoder()).num_weights / int(name.partition("@")[2]) - 1) < 0.03


@pytest.mark.parametrize("name", ["nothing", "network@", "network@x", "cases@5", "networks@0"])
def test_unknown_case_lists_the_known_ones(name: str) -> None:
    with pytest.raises(ValueError, match=r"no benchmark case .*; there are single, inr, zoo"):
        find_case(name)


def test_operations_are_those_of_the_specification() -> None:
    case = find_case("network@3072")  # three 32 x 32 matrices: full chunks, and three biases of one chunk
    batch = case.batch(case.encoder())
    assert chunk_operations(batch, 64) == batch.num_weights * 122_880


# ----------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(("op", "place"), [("segment_pool", "output"), ("segment_pool_backward", "gradient")])
def test_a_wrong_backend_is_not_measured(op: str, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = REFERENCE.kernels[op]

    def wrong_in_float32(*args: Any) -> Any:
        first, *rest = right(*args)
        return (first * 1.001 if first.dtype == torch.float32 else first, *rest)

    run_check(CASES["inr"], "reference", "tiny")
    monkeypatch.setitem(REFERENCE.kernels, op, wrong_in_float32)
    with pytest.raises(CheckFailed, match=f"{place} .*speed is not reported") as caught:
        run_check(CASES["inr"], "reference", "tiny")
    assert "inr: backend 'reference' is off" in str(caught.value)


def test_disagreement_at_full_size_is_refused() -> None:
    z = torch.ones(2, 3)
    assert check_agreement(CASES["zoo"], "eager", z, z) == 0
    for other in (z + 1e-3, z * torch.nan):
        with pytest.raises(CheckFailed, match="zoo: backend and eager differ by"):
            check_agreement(CASES["zoo"], "eager", other, z)


def test_a_baseline_that_does_not_fit_is_refused_before_it_runs() -> None:
    case = CASES["resnet"]
    encoder = case.encoder()
    batch = case.batch(encoder)
    assert padded_bytes(encoder, batch, training=False) > 24 * 2**30
    for name in ("eager", "compile", "loop"):
        with pytest.raises(DoesNotFit, match=r"does not fit: padded .* GiB, 24 GiB may be used"):
            contender(name, encoder, batch, training=False, memory_limit=24 * 2**30)
    contender("sne_fast", encoder, batch, training=True, memory_limit=0)
    with pytest.raises(ValueError, match="contender: name must be sne_fast or one of eager, compile, loop, got 'x'"):
        contender("x", encoder, batch, training=False, memory_limit=0)


@pytest.mark.slow
@pytest.mark.parametrize("training", [False, True])
def test_predicted_memory_is_near_the_measured(training: bool) -> None:
    case = CASES["mixed"]
    encoder = case.encoder()
    mode = "training" if training else "forward"
    found = probe("mixed", mode, "eager", size="tiny", threads=1, limit=4e9)
    predicted = padded_bytes(encoder, case.batch(encoder, "tiny"), training)
    assert 0.5 < found["peak_bytes"] / predicted < 2


# ------------------------------------------------------------------------------------------------------------- memory


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="Linux only")
def test_probe_does_not_inherit_the_peak_of_its_parent() -> None:
    ballast = torch.ones(250_000_000)  # 1 GB, four times what a fresh process holds
    found = probe("inr", "forward", "sne_fast", size="tiny", threads=1, limit=0)
    assert found["loaded_bytes"] < 4 * ballast.numel() and found["weights"] == 2 * 1153
    assert 0 < found["peak_bytes"] < 2e8 and found["seconds"] > 0
    assert "does not fit" in probe("inr", "forward", "eager", size="check", threads=1, limit=1e8)["skipped"]
    with pytest.raises(RuntimeError, match="memory probe of nothing forward sne_fast failed"):
        probe("nothing", "forward", "sne_fast", threads=1, limit=0)


# -------------------------------------------------------------------------------------------------------------- pairs


def test_ratios_are_medians_of_neighbours() -> None:
    backend = iter([1.0, 10.0, 1.0])  # the machine was ten times slower in the second round
    eager = iter([4.0, 50.0, 6.0])
    pairs = Pairs(lambda: {"total": next(backend)}, {"eager": lambda: {"total": next(eager)}}, 1e6)
    pairs.run(3)
    assert pairs.ratios() == {"eager": 5.0}
    assert pairs.seconds() == {"sne_fast": 1.0, "eager": 6.0}
    assert pairs.rounds == 3 and len(pairs.rates) == 3
    slowest_round = 1e6 / 10 / pairs.rates[1]
    assert pairs.fraction() > slowest_round


# ------------------------------------------------------------------------------------------------------------- report


@pytest.fixture
def readme(tmp_path: Path) -> Path:
    path = tmp_path / "README.md"
    path.write_text(f"# Title\n\n{report.BEGIN}\nold\n{report.END}\n\nrest\n", encoding="utf-8")
    return path


def changed(tmp_path: Path, change: Any) -> Path:
    content = json.loads(SMALL.read_text(encoding="utf-8"))
    change(content)
    path = tmp_path / "changed.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def test_report_writes_table_and_plots_between_the_markers(readme: Path) -> None:
    report.write(SMALL, readme, readme.parent / "plots", preview=True)
    text = readme.read_text(encoding="utf-8")
    assert (
        text.startswith(f"# Title\n\n{report.BEGIN}\n")
        and text.endswith(f"{report.END}\n\nrest\n")
        and "old" not in text
    )
    content = json.loads(SMALL.read_text(encoding="utf-8"))
    info = next(e["extra_info"] for e in content["benchmarks"] if e["name"] == "test_forward[zoo]")
    row = next(line for line in text.splitlines() if line.startswith("| `zoo` forward"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[2] == f"{info['weights'] / info['seconds']['sne_fast'] / 1e6:.3g}"
    assert cells[3] == f"{info['ratios']['eager']:.3g}x" and cells[4] == f"{info['ratios']['compile']:.3g}x"
    assert cells[6] == f"{100 * info['fraction_of_limit']:.0f} %"
    assert "| `gpt2` forward | 4.0k | 0.129 | (1) | (1) | (1) |" in text and "(1) does not fit: padded" in text
    assert "`chunk_encode` training, `zoo`" in text and "as one network grows (ISAB)" in text
    for plot in ("throughput", "scaling"):
        assert f"![bench_small-{plot}](plots/bench_small-{plot}.png)" in text
        assert (readme.parent / "plots" / f"bench_small-{plot}.png").read_bytes().startswith(b"\x89PNG")
    before = text
    report.write(SMALL, readme, readme.parent / "plots", preview=True)
    assert readme.read_text(encoding="utf-8") == before


def test_report_refuses_what_was_not_checked(tmp_path: Path, readme: Path) -> None:
    def fail(content: dict[str, Any]) -> None:
        content["benchmarks"][0]["extra_info"]["check"]["passed"] = False

    def drop(content: dict[str, Any]) -> None:
        del content["benchmarks"][0]["extra_info"]["check"]

    for change in (fail, drop):
        with pytest.raises(SystemExit, match="no passed correctness check; not reported"):
            report.write(changed(tmp_path, change), readme, tmp_path, preview=True)


def test_report_refuses_reduced_and_uncommitted_runs(tmp_path: Path, readme: Path) -> None:
    def full(rounds: int) -> Any:
        return lambda content: content["machine_info"]["sne_fast"].update(size="full", rounds=rounds)

    before = readme.read_text(encoding="utf-8")
    with pytest.raises(SystemExit, match="size 'tiny' with 2 rounds; reports need size 'full' with at least 5"):
        report.write(SMALL, readme, tmp_path)
    with pytest.raises(SystemExit, match="size 'full' with 4 rounds"):
        report.write(changed(tmp_path, full(4)), readme, tmp_path)
    path = changed(tmp_path, full(5))
    with pytest.raises(SystemExit, match="is not committed as it is"):
        report.write(path, readme, tmp_path)
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@t"]
    for command in (["init", "-q"], ["add", path.name], ["commit", "-q", "-m", "results"]):
        subprocess.run([*git, *command], cwd=tmp_path, check=True)
    assert readme.read_text(encoding="utf-8") == before
    report.write(path, readme, tmp_path)
    assert "Preview" not in readme.read_text(encoding="utf-8")
    path.write_text(path.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    with pytest.raises(SystemExit, match="is not committed as it is"):
        report.write(path, readme, tmp_path)


def test_a_later_partial_run_takes_the_place_of_its_entries(tmp_path: Path, readme: Path) -> None:
    def only_scaling(content: dict[str, Any]) -> None:
        content["machine_info"]["sne_fast"]["commit"] = "f" * 40
        content["benchmarks"] = [b for b in content["benchmarks"] if b["extra_info"]["mode"].startswith("scaling")]
        for b in content["benchmarks"]:
            b["extra_info"]["time_per_weight_over_first"] = {"1000": 1.0, "2000": 3.5}

    later = changed(tmp_path, only_scaling)
    text = report.write(SMALL, readme, tmp_path, preview=True, later=[later])
    assert "at commit ffffffffff)" in text and "at most 250% off" in text
    assert "`zoo`" in text  # what the later run did not measure stays

    def elsewhere(content: dict[str, Any]) -> None:
        content["machine_info"]["sne_fast"]["device"] = "another"

    with pytest.raises(SystemExit, match="taken on another machine than"):
        report.write(SMALL, readme, tmp_path, preview=True, later=[changed(tmp_path, elsewhere)])


def test_report_refuses_a_readme_without_markers_and_foreign_files(tmp_path: Path, readme: Path) -> None:
    readme.write_text("# Title\n", encoding="utf-8")
    with pytest.raises(SystemExit, match="must hold the lines <!-- benchmark:begin -->"):
        report.write(SMALL, readme, tmp_path, preview=True)
    with pytest.raises(SystemExit, match="not written by `pytest bench --benchmark-json`: 'machine_info'"):
        report.write(changed(tmp_path, lambda content: content.clear()), readme, tmp_path)
    with pytest.raises(SystemExit, match="no results; run `pytest bench"):
        report.newest(tmp_path / "none")


# ---------------------------------------------------------------------------------------------------------- the suite


@pytest.mark.slow
def test_suite_runs_and_its_json_is_reported(tmp_path: Path, readme: Path) -> None:
    pytest.importorskip("pytest_benchmark")
    out = tmp_path / "out.json"
    # pytest-benchmark writes no JSON in a worker of xdist, which this session would take itself for.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    done = subprocess.run(
        [
            sys.executable, "-m", "pytest", "bench", "-q", "-p", "no:cacheprovider", f"--benchmark-json={out}",
            "--size", "tiny", "--rounds", "2", "--threads", "1", "--memory-limit", "2", "--baselines", "eager,loop",
            "-k", "zoo or networks",
        ],
        cwd=ROOT, capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    content = json.loads(out.read_text(encoding="utf-8"))
    modes = {e["extra_info"]["mode"] for e in content["benchmarks"]}
    assert modes == {"chunk_encode forward", "chunk_encode training", "forward", "training", "backward",
                     "memory of training", "scaling by networks"}  # fmt: skip
    machine = content["machine_info"]["sne_fast"]
    assert (
        machine["threads"] == 1
        and machine["versions"]["torch"]
        and machine["commit"]
        and machine["dirty"] in (True, False)
    )
    for entry in content["benchmarks"]:
        info = entry["extra_info"]
        assert info["check"]["passed"] and info["check"]["output_error"] <= 2e-5
        if info["mode"] == "forward":
            assert set(info["ratios"]) == {"eager", "loop"} and 0 < info["fraction_of_limit"] < 2
            assert entry["stats"]["rounds"] == info["rounds"] == 2
    assert "| `zoo` training |" in report.write(out, readme, tmp_path, preview=True)


# ----------------------------------------------------------------------------------------------------------- short form


def test_short_form_prints_a_row_per_mode() -> None:
    stream = io.StringIO()
    before = torch.get_num_threads()
    rows = short_form.run_short(("inr",), rounds=1, threads=1, size="tiny", console=Console(file=stream, width=100))
    assert torch.get_num_threads() == before
    assert [(row["case"], row["mode"]) for row in rows] == [("inr", "forward"), ("inr", "training")]
    assert all(row["weights_per_second"] > 0 and row["vs_eager"] > 0 and row["fraction_of_limit"] > 0 for row in rows)
    lines = stream.getvalue().splitlines()
    assert any(line.split()[:3] == ["inr", "training", "2,306"] for line in lines)
    assert "1 threads" in stream.getvalue()


def test_short_form_refuses_what_it_does_not_know() -> None:
    with pytest.raises(ValueError, match="bench: unknown case 'zebra'; there are single, inr, zoo, mixed"):
        short_form.run_short(("zebra",))
    with pytest.raises(ValueError, match="bench: rounds must be at least 1, got 0"):
        short_form.run_short(rounds=0)


def test_command_line_has_the_short_form() -> None:
    from sne_fast.cli.commands import app

    found = CliRunner().invoke(app, ["bench", "--case", "zebra"])
    assert found.exit_code == 2 and "unknown case 'zebra'" in found.output

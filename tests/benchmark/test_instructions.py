"""Executed instructions counted from machine code, here from short listings as ``nvdisasm`` prints them."""

from __future__ import annotations

from pathlib import Path

import pytest

from sne_fast.benchmark.instructions import CHIPS, Count, Flow, Function, Loop, bounds, parse
from sne_fast.benchmark.instructions.counting import class_of, float_atomics, matrix_operations, shared_bytes

SOURCE = """\
void kernel() {
  for (int step = 0; step < n; ++step) {
    for (int i = 0; i < 8; ++i) {
      work(i);
    }
    if (rare) {
      more();
    }
    end();
  }
}
"""


def listing(file: Path, rows: list[tuple[int, str]]) -> str:
    """Return what nvdisasm prints for rows of a line of source and an instruction, or of 0 and a label."""
    lines = ['\t.section\t.text.kernel,"ax",@progbits', ".text.kernel:"]
    for number, (line, text) in enumerate(rows):
        if not line:
            lines.append(f"{text}:")
        else:
            lines += [f'\t//## File "{file}", line {line}', f"        /*{16 * number:04x}*/  {text} ;"]
    return "\n".join(lines)


@pytest.fixture
def function(tmp_path: Path) -> Function:
    file = tmp_path / "csrc" / "kernel.cu"
    file.parent.mkdir()
    file.write_text(SOURCE)
    rows = [
        (1, "LDC R1, c[0x0][0x28]"),
        (0, ".L_x_1"), (2, "MOV R2, RZ"),
        (0, ".L_x_2"), (4, "FADD R3, R3, R2"), (4, "LDS.128 R4, [R2]"), (3, "@P0 BRA `(.L_x_2)"),
        (6, "@!P1 BRA `(.L_x_3)"),
        (7, "MUFU.EX2 R3, R3"),
        (0, ".L_x_3"), (9, "HMMA.16816.F32.BF16 R4, R8, R12, R4"), (2, "@P2 BRA `(.L_x_1)"),
        (11, "EXIT"),
    ]  # fmt: skip
    (parsed,) = parse(listing(file, rows))
    return parsed


STEP = "for (int step = 0; step < n; ++step) {"
LOOPS = {STEP: Loop(5), "for (int i = 0; i < 8; ++i) {": Loop(8)}


@pytest.mark.parametrize(("share", "expected"), [(0.0, 0.0), (0.25, 0.25), (1.0, 1.0)])
def test_instructions_run_as_often_as_the_loops_around_them(function: Function, share: float, expected: float) -> None:
    runs = Flow(function, LOOPS, {"if (rare) {": share}).per_run_of(STEP)
    by_name = {function.instructions[at].opcode: times for at, times in runs.items()}
    assert by_name["FADD"] == by_name["LDS.128"] == pytest.approx(8)
    assert by_name["HMMA.16816.F32.BF16"] == by_name["MOV"] == pytest.approx(1)
    assert by_name.get("MUFU.EX2", 0.0) == pytest.approx(expected)
    assert "EXIT" not in by_name and "LDC" not in by_name, "once for a thread block"


def test_an_unrolled_loop_runs_less_often(function: Function) -> None:
    loops = {**LOOPS, "for (int i = 0; i < 8; ++i) {": Loop(8, 4)}
    runs = Flow(function, loops, {}).per_run_of(STEP)
    assert {function.instructions[at].opcode: times for at, times in runs.items()}["FADD"] == pytest.approx(2)


def test_a_loop_may_end_with_the_kernel(tmp_path: Path) -> None:
    file = tmp_path / "csrc" / "kernel.cu"
    file.parent.mkdir()
    file.write_text(SOURCE)
    rows = [(1, "MOV R1, RZ"), (0, ".L_x_1"), (2, "MOV R2, RZ"), (2, "@P0 EXIT"), (9, "FADD R3, R3, R2"),
            (2, "BRA `(.L_x_1)")]  # fmt: skip
    (function,) = parse(listing(file, rows))
    runs = Flow(function, LOOPS, {}).per_run_of("")
    assert {function.instructions[at].opcode: times for at, times in runs.items()}["MOV"] == pytest.approx(5)


def test_a_loop_that_is_not_in_the_table_is_an_error(function: Function) -> None:
    with pytest.raises(
        RuntimeError, match=r"kernel: the table of loops has no trip count for kernel.cu:3 `for \(int i"
    ):
        Flow(function, {STEP: Loop(5)}, {})
    with pytest.raises(RuntimeError, match="the loop `for another` is not in its machine code"):
        Flow(function, LOOPS, {}).per_run_of("for another")


def test_instructions_cannot_be_counted_without_the_sources(function: Function) -> None:
    Path(function.instructions[0].frames[0][0]).unlink()
    from sne_fast.benchmark.instructions import flow

    flow._lines.cache_clear()
    with pytest.raises(RuntimeError, match="instructions are counted beside the sources"):
        Flow(function, LOOPS, {})


def test_classes_and_sizes_of_instructions(tmp_path: Path) -> None:
    rows = ["HGMMA.64x48x16.F32.BF16 R24, R4, gdesc[UR4], R24",
            "HMMA.16816.F32.BF16 R4, R8, R12, R4", "MUFU.EX2 R3, R3",
            "F2FP.BF16.F32.PACK_AB R1, R2, R3", "LDSM.16.M88.4 R4, [R2]", "LDS.64 R4, [R2]", "IMAD.WIDE R2, R3, R4, R6",
            "RED.E.ADD.F32.FTZ.RN.STRONG.GPU [R2.64], R3", "RED.E.ADD.STRONG.GPU [R2.64], R3"]  # fmt: skip
    (made,) = parse(listing(tmp_path / "a.cu", [(1, row) for row in rows]))
    assert [class_of(i) for i in made.instructions] == [
        "matrix", "matrix", "exponential", "conversion", "shared memory", "shared memory", "integer",
        "global memory", "global memory"]  # fmt: skip
    assert [matrix_operations(i) for i in made.instructions[:3]] == [2 * 64 * 48 * 16 / 4, 2 * 16 * 8 * 16, 0]
    assert [shared_bytes(i) for i in made.instructions[4:7]] == [512, 256, 0]
    assert shared_bytes(made.instructions[0]) == 48 * 16 * 2 / 4
    assert float_atomics(made) == 1


def test_bounds() -> None:
    found = Count("forward", 2, 1000, {"exponential": 50}, 0, 0, 128, 0, 0, 0, 16, 0)
    chip = CHIPS["h100"]
    assert bounds([found], chip) == {
        "issue": pytest.approx(32 * 132 * 1.755 * 4 / 2000),
        "exponential": pytest.approx(32 * 132 * 1.755 / 2 / 100),
    }

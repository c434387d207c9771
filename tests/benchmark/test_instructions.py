"""Executed instructions counted from machine code, here from short listings as ``nvdisasm`` prints them."""

from __future__ import annotations

from pathlib import Path

import pytest

from sne_fast.benchmark.instructions import CHIPS, Count, Flow, Function, Loop, bounds, parse
from sne_fast.benchmark.instructions.counting import (
    class_of,
    float_atomics,
    matrix_operations,
    shared_bytes,
    tensor_memory_product,
)

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


def times_by_opcode(
    tmp_path: Path,
    rows: list[tuple[int, str]],
    branches: dict[str, float] | None = None,
    warps: int = 1,
    source: str = SOURCE,
) -> dict[str, float]:
    """Return how often the instructions of a listing run, each of which has an opcode of its own, in one run of it."""
    file = tmp_path / "csrc" / "kernel.cu"
    file.parent.mkdir()
    file.write_text(source)
    (function,) = parse(listing(file, rows))
    runs = Flow(function, LOOPS, branches or {}, warps).per_run_of("")
    return {function.instructions[at].opcode: times for at, times in runs.items()}


def test_a_loop_may_end_with_the_kernel(tmp_path: Path) -> None:
    rows = [(1, "MOV R1, RZ"), (0, ".L_x_1"), (2, "IADD3 R2, R2, 0x1, RZ"), (2, "@P0 EXIT"), (9, "FADD R3, R3, R2"),
            (2, "BRA `(.L_x_1)")]  # fmt: skip
    times = times_by_opcode(tmp_path, rows)
    assert times["MOV"] == pytest.approx(1)
    assert times["IADD3"] == pytest.approx(6), "once more than what stands behind the test"
    assert times["FADD"] == pytest.approx(5)


def test_a_loop_may_be_left_by_a_call_of_what_is_behind_it(tmp_path: Path) -> None:
    rows = [(0, ".L_x_1"), (9, "FADD R3, R3, R2"), (2, "@P0 CALL.REL.NOINC `(.L_x_2)"), (2, "BRA `(.L_x_1)"),
            (0, ".L_x_2"), (11, "EXIT")]  # fmt: skip
    times = times_by_opcode(tmp_path, rows)
    assert times["FADD"] == pytest.approx(5) and times["BRA"] == pytest.approx(4)


@pytest.mark.parametrize("where", ["ahead of the test", "behind the test"])
def test_a_statement_runs_as_often_on_either_side_of_the_test(tmp_path: Path, where: str) -> None:
    test, statement = (2, "@P0 BRA `(.L_x_9)"), [(6, "@P1 BRA `(.L_x_2)"), (7, "MUFU.EX2 R3, R3"), (0, ".L_x_2")]
    inside = [*statement, test] if where == "ahead of the test" else [test, *statement]
    rows = [(0, ".L_x_1"), (2, "MOV R1, RZ"), *inside, (9, "FADD R3, R3, R2"), (2, "BRA `(.L_x_1)"), (0, ".L_x_9"),
            (11, "EXIT")]  # fmt: skip
    times = times_by_opcode(tmp_path, rows, {"if (rare) {": 1 / 5})
    assert times["MOV"] == pytest.approx(6) and times["FADD"] == pytest.approx(5)
    assert times["MUFU.EX2"] == pytest.approx(1)


ISSUE = [(9, "UMOV UR5, 0x4110490"), (9, "UTCHMMA gdesc[UR6], gdesc[UR8], tmem[UR4], tmem[UR4], idesc[UR5], UPT")]
"""A product of 64 x 64 x 16, with operands in bfloat16."""


def entered_in_its_middle(second_test: bool) -> list[tuple[int, str]]:
    """Return a loop whose code for one warp, at its end, is entered by that warp first of all, too."""
    return [
        (1, "MOV R1, RZ"), (9, "@!P2 BRA `(.L_x_3)"), (1, "FADD R3, R3, R2"),
        (0, ".L_x_1"), (9, "FMUL R3, R3, R2"),
        (0, ".L_x_2"), (9, "FFMA R3, R3, R2"), *([] if second_test else [(2, "@P0 BRA `(.L_x_9)")]),
        (9, "MUFU.EX2 R3, R3"), (2, "@P2 BRA `(.L_x_2)"),
        (0, ".L_x_3"), *ISSUE, (9, "FMNMX R3, R3, R2"), *([(2, "@P0 BRA `(.L_x_9)")] if second_test else []),
        (2, "BRA `(.L_x_1)"),
        (0, ".L_x_9"), (11, "EXIT"),
    ]  # fmt: skip


def test_a_loop_with_two_entries_runs_as_often_as_the_test_that_all_its_ways_pass(tmp_path: Path) -> None:
    """One of four warps comes by its own code each time, the others by none of it but once."""
    times = times_by_opcode(tmp_path, entered_in_its_middle(second_test=False), warps=4)
    assert times["FFMA"] == pytest.approx(6) and times["MUFU.EX2"] == pytest.approx(5)
    assert times["UTCHMMA"] == times["FMNMX"] == pytest.approx(6 / 4), "ahead of the loop, and in each of its runs"
    assert times["FADD"] == pytest.approx(3 / 4), "by the other warps, ahead of the loop"
    assert times["FMUL"] == pytest.approx(1 + 5 / 4), "once by each warp, and again by the one"


def test_a_loop_with_two_entries_and_ways_round_without_a_test_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="kernel: a loop has several entries, and ways round without a test"):
        times_by_opcode(tmp_path, entered_in_its_middle(second_test=True), warps=4)


def test_branches_of_diverged_warps_are_not_taken(tmp_path: Path) -> None:
    rows = [(1, "MOV R1, RZ"), (1, "BRA.DIV ~URZ, `(.L_x_2)"), (1, "FADD R3, R3, R2"), (0, ".L_x_1"), (11, "EXIT"),
            (0, ".L_x_2"), (1, "FMUL R3, R3, R2"), (1, "BRA `(.L_x_1)")]  # fmt: skip
    times = times_by_opcode(tmp_path, rows)
    assert times["FADD"] == 1 and "FMUL" not in times


def test_the_ways_of_a_branch_are_known_by_their_statement_even_where_they_begin_with_other_code(
    tmp_path: Path,
) -> None:
    rows = [(1, "MOV R1, RZ"), (1, "@P0 BRA `(.L_x_2)"), (9, "FADD R3, R3, R2"), (1, "BRA `(.L_x_3)"),
            (0, ".L_x_2"), (1, "S2R R1, SR_TID.X"), (1, "IADD3 R1, R1, 0x1, RZ"), (7, "@P1 BRA `(.L_x_3)"),
            (7, "MUFU.EX2 R3, R3"), (7, "FMUL R3, R3, R2"), (7, "FFMA R3, R3, R2"), (0, ".L_x_3"),
            (11, "EXIT")]  # fmt: skip
    times = times_by_opcode(tmp_path, rows, {"if (rare) {": 0})
    assert times["FADD"] == 1 and not times.get("S2R")


def test_the_way_past_a_statement_may_have_its_line(tmp_path: Path) -> None:
    """Where code of both ways is shared, it has the line of one of them: the shorter way is the one past it."""
    rows = [(1, "MOV R1, RZ"), (6, "@P0 BRA `(.L_x_2)"), (7, "FADD R3, R3, R2"), (7, "BRA `(.L_x_3)"),
            (0, ".L_x_2"), (7, "FMUL R3, R3, R2"), (7, "MUFU.EX2 R3, R3"), (7, "FFMA R3, R3, R2"),
            (0, ".L_x_3"), (11, "EXIT")]  # fmt: skip
    times = times_by_opcode(tmp_path, rows, {"if (rare) {": 0})
    assert times["FADD"] == 1 and not times.get("MUFU.EX2")


def test_ways_that_begin_with_moved_code_are_known_by_the_condition_ahead(tmp_path: Path) -> None:
    source = "void kernel() {\n  if (saved)\n    save(x);\n  else\n    pool(\n        x);\n  end();\n}\n"
    rows = [(1, "MOV R1, RZ"), (2, "@P0 BRA `(.L_x_2)"), (3, "FADD R3, R3, R2"), (3, "BRA `(.L_x_3)"),
            (0, ".L_x_2"), (1, "S2R R1, SR_TID.X"), (7, "@P1 BRA `(.L_x_3)"), (6, "MUFU.EX2 R3, R3"),
            (6, "FFMA R3, R3, R2"), (0, ".L_x_3"), (7, "EXIT")]  # fmt: skip
    times = times_by_opcode(tmp_path, rows, {"pool(": 0}, source=source)
    assert times["FADD"] == 1 and not times.get("S2R")


def test_a_loop_that_is_not_in_the_table_is_an_error(function: Function) -> None:
    with pytest.raises(
        RuntimeError, match=r"kernel: the table of loops has no trip count for kernel.cu:3 `for \(int i"
    ):
        Flow(function, {STEP: Loop(5)}, {})
    with pytest.raises(RuntimeError, match="the loop `for another` is not in its machine code"):
        Flow(function, LOOPS, {}).per_run_of("for another")


def test_instructions_cannot_be_counted_without_the_sources(function: Function) -> None:
    Path(function.instructions[0].frames[0][0]).unlink()
    from sne_fast.benchmark.instructions import source_lines

    source_lines._lines.cache_clear()
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
    assert [matrix_operations(made, at) for at in range(3)] == [2 * 64 * 48 * 16 / 4, 2 * 16 * 8 * 16, 0]
    assert [shared_bytes(made, at) for at in range(4, 7)] == [512, 256, 0]
    assert shared_bytes(made, 0) == 48 * 16 * 2 / 4
    assert float_atomics(made) == 1


def test_sizes_of_products_on_tensor_memory(tmp_path: Path) -> None:
    rows = [*ISSUE, (9, "UMOV UR5, 0x4040910"),
            (9, "UTCHMMA tmem[UR6], gdesc[UR8], tmem[UR4], tmem[UR4], idesc[UR5], UPT")]  # fmt: skip
    (made,) = parse(listing(tmp_path / "a.cu", rows))
    assert tensor_memory_product(made, 1) == (64, 64, 16) and tensor_memory_product(made, 3) == (64, 16, 8)
    assert matrix_operations(made, 1) == 2 * 64 * 64 * 16 and matrix_operations(made, 3) == 2 * 64 * 16 * 8
    assert [shared_bytes(made, at) for at in (1, 3)] == [(64 + 64) * 32, 16 * 32]
    (unknown,) = parse(listing(tmp_path / "a.cu", [(9, "R2UR UR5, R4"), ISSUE[1]]))
    with pytest.raises(RuntimeError, match="the shape of a product is not in its machine code"):
        matrix_operations(unknown, 1)


def test_bounds() -> None:
    found = Count("forward", 2, 1000, {"exponential": 50}, 0, 0, 128, 0, 0, 0, 16, 0)
    chip = CHIPS["h100"]
    assert bounds([found], chip) == {
        "issue": pytest.approx(32 * 132 * 1.755 * 4 / 2000),
        "exponential": pytest.approx(32 * 132 * 1.755 / 2 / 100),
    }

"""How often each instruction of a kernel runs: the flow of control through its machine code.

Trip counts are not in machine code. They come from a table by the loop's line of source: the branch
that ends a loop carries that line. A loop that the table does not have is an error. Any other branch goes on to the
next instruction, or into the longer one of two ways, unless the table of branches says how often the statement behind
it runs.

The code for what an unrolled loop leaves over counts once, so counts are rather too high where loops are unrolled.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from .machine_code import Frame, Function

PACKAGE = Path(__file__).resolve().parents[2]
CSRC = PACKAGE.parent / "csrc"
_FOLDERS = {"/csrc/": CSRC, "/sne_fast/": PACKAGE}
"""Folders of the kernels' sources, by what stands before a file's name within them."""


@dataclass(frozen=True)
class Loop:
    """Runs of a loop in the source, of which the compiler puts ``unrolled`` into one of the machine code."""

    runs: float
    unrolled: int = 1


def is_source(file: str) -> bool:
    """Return whether a file is a source of kernels, not one of a library that they call."""
    return any(part in file for part in _FOLDERS)


@cache
def _lines(file: str) -> list[str]:
    path = Path(file)
    for part, folder in _FOLDERS.items():  # these sources, also of machine code that was compiled in another place
        here = folder / file.rpartition(part)[2]
        if part in file and here.exists():
            path = here
    if not path.exists():
        raise RuntimeError(f"{file} is not here: instructions are counted beside the sources of the kernels")
    return path.read_text(encoding="utf-8").splitlines()


def source_of(frame: Frame) -> str:
    """Return the text of a line of source."""
    file, line = frame
    lines = _lines(file)
    return lines[line - 1].strip() if line <= len(lines) else ""


@cache
def _lines_of(file: str, text: str) -> tuple[frozenset[int], frozenset[int]]:
    """Return the lines of all statements that begin with ``text``, and the first lines alone."""
    lines = _lines(file)
    found: set[int] = set()
    starts: set[int] = set()
    for first, line in enumerate(lines):
        if line.strip().startswith(text):
            starts.add(first + 1)
            found.update(_indented(lines, first) if file.endswith(".py") else _in_braces(lines, first))
    return frozenset(found), frozenset(starts)


def _in_braces(lines: list[str], first: int) -> Iterator[int]:
    depth = 0
    for at in range(first, len(lines)):
        line = lines[at].strip()
        if depth == 1 and line.startswith("} else"):
            return
        depth += sum(line.count(c) for c in "({") - sum(line.count(c) for c in ")}")
        yield at + 1
        if depth <= 0 and line.endswith((";", "}")):
            return


def _indented(lines: list[str], first: int) -> Iterator[int]:
    depth = len(lines[first]) - len(lines[first].lstrip())
    yield first + 1
    for at in range(first + 1, len(lines)):
        line = lines[at].lstrip()
        if line and len(lines[at]) - len(line) <= depth:
            return
        yield at + 1


def _is_inside(frames: tuple[Frame, ...], text: str) -> bool:
    """Return whether code belongs to a statement that begins with ``text``, and not to its condition."""
    file, line = frames[0]
    if line in _lines_of(file, text)[1]:
        return False
    return any(line in _lines_of(file, text)[0] for file, line in frames)


class Flow:
    """The basic blocks of a kernel with how often each runs, when the kernel is entered once."""

    def __init__(self, function: Function, loops: Mapping[str, Loop], branches: Mapping[str, float]) -> None:
        self.function, self.loops, self.branches = function, loops, branches
        self.blocks = function.blocks
        starts = {first: number for number, (first, _) in enumerate(self.blocks)}
        self.after: list[list[tuple[int, str]]] = []
        for number, (_, end) in enumerate(self.blocks):
            last = function.instructions[end - 1]
            following = [(number + 1, "next")] if number + 1 < len(self.blocks) else []
            if function.jumps(end - 1):
                target = function.target(end - 1)
                if target is None:
                    raise RuntimeError(f"{function.name}: a branch to nowhere: {last}")
                conditional = bool(last.guard) or last.operands.startswith(("P", "!P", "UP", "!UP", "UR"))
                self.after.append([(starts[target], "taken"), *(following if conditional else [])])
            elif last.name in ("EXIT", "RET"):
                self.after.append(following if last.guard else [])
            elif last.name in ("BRX", "JMP", "JMX"):
                raise RuntimeError(f"{function.name}: {last.opcode} is not understood")
            else:
                self.after.append(following)
        self.chance = [self._chance(number) for number in range(len(self.blocks))]
        self.bodies: dict[tuple[int, int], frozenset[int]] = {}  # of each loop, by its last block and its first
        self.share = self._shares()

    def _frames(self, at: int) -> tuple[Frame, ...]:
        return tuple(frame for frame in self.function.instructions[at].frames if is_source(frame[0]))

    def _chance(self, number: int) -> float:
        """Return how often a block runs when the code around it runs once, loops aside."""
        first, end = self.blocks[number]
        function = self.function
        calls = [at for at in range(first, end) if function.instructions[at].name == "CALL" and not function.jumps(at)]
        if not all("$__" in function.instructions[at].operands for at in calls):
            raise RuntimeError(f"{self.function.name} calls a function that is not inlined")
        if calls:
            return 0.0  # a division whose operands are not ordinary
        waits = any(one.name == "NANOSLEEP" or "TRYWAIT" in one.opcode for one in function.instructions[first:end])
        if waits and number in (to for to, _ in self.after[number]):
            return 0.0  # asks once more, where tensor memory or a barrier was not ready
        joins = ("BSYNC", "BAR", "NOP")  # belong to what follows
        known = [frames for at in range(first, end) if (frames := self._frames(at))
                 and self.function.instructions[at].name not in joins]  # fmt: skip
        for text, chance in self.branches.items():
            inside = sum(_is_inside(frames, text) for frames in known)
            if inside and 2 * inside >= len(known):
                return chance
        return 1.0

    def _back_edges(self) -> list[tuple[int, int]]:
        return [(number, to) for number, after in enumerate(self.after) for to, _ in after
                if to <= number and not (to == number and len(after) == 1)]  # fmt: skip

    def _body(self, last: int, first: int) -> frozenset[int]:
        before = defaultdict(list)
        for number, after in enumerate(self.after):
            for to, _ in after:
                before[to].append(number)
        body, left = {first, last}, [last] if last != first else []
        while left:
            for number in before[left.pop()]:
                if number not in body:
                    body.add(number)
                    left.append(number)
        return frozenset(body)

    def _shares(self) -> list[dict[int, float]]:
        """Return, for each block, which share of its runs goes on to which other one."""
        shares = [self._share_of_branch(number) for number in range(len(self.blocks))]
        groups = defaultdict(list)
        for edge in self._back_edges():
            self.bodies[edge] = self._body(*edge)
            groups[self._frames(self.blocks[edge[0]][1] - 1)].append(edge)
        reached = self._reached([self._ways(number, share) for number, share in enumerate(shares)])
        for frames, edges in groups.items():
            idle = [edge for edge in edges if edge[0] not in reached or not self.chance[edge[0]]]
            for edge in idle:
                if edge[0] in reached or len(self.after[edge[0]]) > 1:
                    self._set_runs(shares, edge, 1.0)
            edges = [edge for edge in edges if edge not in idle]
            if not edges:
                continue
            if any(0 in self.bodies[edge] and edge[1] for edge in edges):
                raise RuntimeError(f"{self.function.name}: a loop has two entries, of which runs cannot be told")
            loop = self._find(frames)
            longest = max(edges, key=lambda edge: len(self.instructions_of(self.bodies[edge])))
            for edge in edges:
                runs = loop.runs / loop.unrolled if edge == longest or loop.unrolled == 1 else 1
                self._set_runs(shares, edge, max(1.0, runs))
        return shares

    def _ways(self, number: int, share: dict[int, float]) -> dict[int, float]:
        """Return the share of a block's branch, or both of its ways where it ends a loop."""
        after = [to for to, _ in self.after[number]]
        return {to: self.chance[to] for to in after} if any(self._leads_back(number, to) for to in after) else share

    def _leads_back(self, number: int, to: int) -> bool:
        """Return whether a way on from a block goes back, at once or by a block that does nothing else."""
        return to <= number or (len(self.after[to]) == 1 and self.after[to][0][0] <= number and self._is_branch(to))

    def _is_branch(self, number: int) -> bool:
        first, end = self.blocks[number]
        return end == first + 1

    def _text_of(self, frames: tuple[Frame, ...]) -> str | None:
        """Return the loop of the table that a branch ends, by its line, or that of the statement around it in Python.

        For sm_100 the branch carries the line of what stands before it.
        """
        for frame in frames:
            for text in self.loops:
                if source_of(frame).startswith(text):
                    return text
        for file, line in frames:
            around = [(max(at for at in starts if at < line), text)
                      for text in self.loops if file.endswith(".py")
                      for inside, starts in [_lines_of(file, text)] if line in inside]  # fmt: skip
            if around:
                return max(around)[1]
        return None

    def _find(self, frames: tuple[Frame, ...]) -> Loop:
        text = self._text_of(frames)
        if text is not None:
            return self.loops[text]
        where = " from ".join(f"{Path(file).name}:{line} `{source_of((file, line))}`" for file, line in frames)
        raise RuntimeError(f"{self.function.name}: the table of loops has no trip count for {where or 'a loop'}")

    def _set_runs(self, shares: list[dict[int, float]], edge: tuple[int, int], runs: float) -> None:
        last, first = edge
        body, back = self.bodies[edge], 1 - 1 / runs
        others = [to for to, _ in self.after[last] if to != first]
        if others:
            shares[last] = {first: back, others[0]: 1 - back}
            return
        for number in sorted(body):  # a loop that tests at its beginning
            leaving = [to for to, _ in self.after[number] if to not in body]
            staying = [to for to, _ in self.after[number] if to in body]
            if leaving and staying and self.chance[leaving[0]]:
                shares[number] = {staying[0]: back, leaving[0]: 1 - back}
                return
        for number in sorted(body):  # a loop that a kernel ends in
            if self.function.instructions[self.blocks[number][1] - 1].name == "EXIT" and self.after[number]:
                shares[number] = {self.after[number][0][0]: back}
                return
        raise RuntimeError(f"{self.function.name}: a loop without an end")

    def _share_of_branch(self, number: int) -> dict[int, float]:
        after = [to for to, _ in self.after[number]]
        if len(after) < 2:
            return dict.fromkeys(after, 1.0)
        taken, onward = after
        if taken == onward:
            return {taken: 1.0}
        if ".DIV" in self.function.instructions[self.blocks[number][1] - 1].opcode:
            return {taken: 0.0, onward: 1.0}  # taken where a warp's threads do not run together
        here = self.chance[number] or 1.0  # a branch inside of a statement that runs seldom
        if self.chance[onward] < here:
            share = self.chance[onward] / here
        elif self.chance[taken] < here:
            share = 1 - self.chance[taken] / here
        else:
            share = float(not self._is_shorter(onward, taken))
        return {taken: 1 - share, onward: share}

    def _is_shorter(self, onward: int, taken: int) -> bool:
        """Return whether the branch chooses between two ways of which the first one, ``onward``, is the shorter one."""
        if taken <= onward or len(self.after[taken - 1]) != 1:
            return False
        join = self.after[taken - 1][0][0]
        first, middle, end = self.blocks[onward][0], self.blocks[taken][0], self.blocks[join][0]
        return join > taken and middle - first < end - middle

    def _reached(self, shares: list[dict[int, float]]) -> set[int]:
        seen, left = {0}, [0]
        while left:
            for to, share in shares[left.pop()].items():
                if share and to not in seen:
                    seen.add(to)
                    left.append(to)
        return seen

    def instructions_of(self, body: frozenset[int]) -> list[int]:
        """Return the indices of all instructions in some blocks."""
        return [at for number in sorted(body) for at in range(*self.blocks[number])]

    def runs(self) -> np.ndarray:
        """Return how often each block runs."""
        count = len(self.blocks)
        matrix, entered = np.eye(count), np.zeros(count)
        entered[0] = 1
        reached = self._reached(self.share)
        for number in reached:
            for to, share in self.share[number].items():
                matrix[to, number] -= share
        return np.linalg.solve(matrix, entered)

    def per_run_of(self, text: str) -> dict[int, float]:
        """Return how often each instruction runs while the loop whose source begins with ``text`` runs once.

        Without a ``text``, while the kernel runs once.
        """
        if not text:
            times = self.runs()
            return {at: float(times[number]) for number in self._reached(self.share)
                    for at in range(*self.blocks[number])}  # fmt: skip
        edges = [edge for edge in self.bodies if self._text_of(self._frames_of(edge)) == text]
        if not edges:
            raise RuntimeError(f"{self.function.name}: the loop `{text}` is not in its machine code")
        runs = self.runs()
        edge = max(edges, key=lambda edge: (runs[edge[1]] > 0, len(self.bodies[edge])))
        if not runs[edge[1]] > 0:
            raise RuntimeError(f"{self.function.name}: its loop over the work does not run")
        counted = [number for number in self.bodies[edge] if runs[number] > 0]
        return {at: float(runs[number] / runs[edge[1]]) for number in counted for at in range(*self.blocks[number])}

    def _frames_of(self, edge: tuple[int, int]) -> tuple[Frame, ...]:
        return self._frames(self.blocks[edge[0]][1] - 1)

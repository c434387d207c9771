"""How often each instruction of a kernel runs: the flow of control through its machine code.

Trip counts are not in machine code. They come from a table by the loop's line of source: the branch
that ends a loop carries that line. A loop that the table does not have is an error. Any other branch goes on to the
next instruction, or into the longer one of two ways, unless the table of branches says how often the statement behind
it runs.

The code for what an unrolled loop leaves over counts once, so counts are rather too high where loops are unrolled.

A loop whose test stands at its end runs its code as often as it tests. Where the test stands elsewhere, the code ahead
of it runs once more than the code behind it. So does that of a loop which is entered in several places: its runs are
those of the one test that every way round passes; without such a test it is an error.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .cycles import Edge, Graph, cycles, is_acyclic, part_of, reaching
from .machine_code import Frame, Function
from .source_lines import is_ahead, is_inside, is_source, lines_of, source_of


@dataclass(frozen=True)
class Loop:
    """Runs of a loop in the source, of which the compiler puts ``unrolled`` into one of the machine code."""

    runs: float
    unrolled: int = 1


class Flow:
    """The basic blocks of a kernel with how often a warp runs each, when the kernel is entered once.

    Where the warps of a thread block take different ways, that is their mean.

    Args:
        function: the kernel.
        loops: loops by the beginning of their source.
        branches: how often statements behind a branch run when the code around them runs once, by the beginning of
            their source.
        warps: of a thread block, of which one alone gives work to tensor memory.

    Raises:
        RuntimeError: for a loop without a trip count in the table or without a test, and for code that is not
            understood.
    """

    def __init__(
        self, function: Function, loops: Mapping[str, Loop], branches: Mapping[str, float], warps: int = 1
    ) -> None:
        self.function, self.loops, self.branches, self.warps = function, loops, branches, warps
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
                conditional = bool(last.guard) or last.operands.startswith(("P", "!P", "UP", "!UP", "UR", "~UR"))
                self.after.append([(starts[target], "taken"), *(following if conditional else [])])
            elif last.name in ("EXIT", "RET"):
                is_conditional = last.guard or (last.name == "EXIT" and last.operands)
                self.after.append(following if is_conditional else [])
            elif last.name in ("BRX", "JMP", "JMX"):
                raise RuntimeError(f"{function.name}: {last.opcode} is not understood")
            else:
                self.after.append(following)
        self.chance = [self._chance(number) for number in range(len(self.blocks))]
        self.bodies: dict[Edge, frozenset[int]] = {}  # of each loop, by its last block and its first
        self.entered: set[Edge] = set()  # of loops with several entries
        self.tests: dict[Edge, tuple[int, float]] = {}  # a block, and how often it runs while the loop runs once
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
        if self._is_for_one_warp(number):
            return 1 / self.warps
        if self._is_branch(number):
            return 1.0  # the way past a statement may carry its line
        way, ahead = self._way(number)
        for text, chance in self.branches.items():
            inside, known = self._count_inside([number], text)
            begins = inside or any(is_ahead(self._frames(self.blocks[one][1] - 1), text) for one in ahead)
            if (inside and 2 * inside >= known) or (begins and self._is_mostly_inside(way, text)):
                return chance
        return 1.0

    def _way(self, number: int) -> tuple[set[int], list[int]]:
        """Return the blocks of one way of a branch until both ways meet, and the blocks that end with that branch."""
        ahead = [one for one in range(number) if len(self.after[one]) == 2 and number in dict(self.after[one])]
        others = {to for one in ahead for to, _ in self.after[one] if to != number}
        if len(others) != 1:
            return {number}, []
        return self._onward(number) - self._onward(others.pop()), ahead

    def _onward(self, number: int) -> set[int]:
        """Return a block and those behind it that are reached from it, without going back."""
        found, left = {number}, [number]
        while left:
            here = left.pop()
            following = [to for to, _ in self.after[here] if to > here and to not in found]
            found.update(following)
            left.extend(following)
        return found

    def _count_inside(self, numbers: Iterable[int], text: str) -> tuple[int, int]:
        """Return how many instructions of some blocks belong to a statement, and to any source."""
        joins = ("BSYNC", "BAR", "NOP")  # belong to what follows
        known = [frames for number in numbers for at in range(*self.blocks[number]) if (frames := self._frames(at))
                 and self.function.instructions[at].name not in joins]  # fmt: skip
        return sum(is_inside(frames, text) for frames in known), len(known)

    def _is_mostly_inside(self, numbers: Iterable[int], text: str) -> bool:
        inside, known = self._count_inside(numbers, text)
        return bool(inside) and 2 * inside >= known

    def _is_for_one_warp(self, number: int) -> bool:
        """Return whether one warp runs a block for all of a thread block: it gives work to tensor memory."""
        return any(one.name.startswith("UTC") and not one.guard
                   for one in self.function.instructions[slice(*self.blocks[number])])  # fmt: skip

    def _shares(self) -> list[dict[int, float]]:
        """Return, for each block, which share of its runs goes on to which other one."""
        shares = [self._share_of_branch(number) for number in range(len(self.blocks))]
        ways = [self._ways(number, share) for number, share in enumerate(shares)]
        graph = {number: [to for to, share in ways[number].items() if share] for number in self._reached(ways)}
        groups: dict[tuple[Frame, ...], list[Edge]] = defaultdict(list)
        for cycle in cycles(graph, 0):
            for edge in sorted(cycle.back):
                same = groups[self._frames_of(edge)]
                around = [self.bodies[one] for one in same if one in self.entered and cycle.body < self.bodies[one]]
                if around or len(cycle.entries) > 1:
                    self.entered.add(edge)
                body = cycle.body if len(cycle.entries) > 1 else reaching(graph, *edge)
                self.bodies[edge] = around[0] if around else self._with_idle_ways(body, graph)
                same.append(edge)
        sizes = {edge: len(self.instructions_of(body)) for edge, body in self.bodies.items()}
        runs = {}
        for frames, edges in groups.items():
            loop, longest = self._find(frames), max(sizes[edge] for edge in edges)
            for edge in edges:
                whole = loop.unrolled == 1 or sizes[edge] == longest
                runs[edge] = max(1.0, loop.runs / loop.unrolled) if whole else 1.0
        for edge in sorted(runs, key=lambda edge: sizes[edge]):  # those inside of others first
            self._set_runs(shares, edge, runs[edge], graph)
        return shares

    def _with_idle_ways(self, body: frozenset[int], graph: Graph) -> frozenset[int]:
        """Add the blocks that never run and lead back into a body."""
        idle = {number: [to for to, _ in after] for number, after in enumerate(self.after) if number not in graph}
        ends = {number for number, following in idle.items() if body.intersection(following)}
        return body.union(*(reaching(idle, end) for end in ends))

    def _ways(self, number: int, share: dict[int, float]) -> dict[int, float]:
        """Return the share of a block's branch, or both of its ways where it ends a loop."""
        after = [to for to, _ in self.after[number]]
        return {to: self.chance[to] for to in after} if any(self._leads_back(number, to) for to in after) else share

    def _leads_back(self, number: int, to: int) -> bool:
        """Return whether a way on from a block goes back, at once or by a block that does nothing else."""
        return to <= number or (len(self.after[to]) == 1 and self.after[to][0][0] <= number and self._is_branch(to))

    def _is_branch(self, number: int) -> bool:
        first, end = self.blocks[number]
        return end == first + 1 and self.function.jumps(first)

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
                      for inside, starts in [lines_of(file, text)] if line in inside]  # fmt: skip
            if around:
                return max(around)[1]
        return None

    def _find(self, frames: tuple[Frame, ...]) -> Loop:
        text = self._text_of(frames)
        if text is not None:
            return self.loops[text]
        where = " from ".join(f"{Path(file).name}:{line} `{source_of((file, line))}`" for file, line in frames)
        raise RuntimeError(f"{self.function.name}: the table of loops has no trip count for {where or 'a loop'}")

    def _set_runs(self, shares: list[dict[int, float]], edge: Edge, runs: float, graph: Graph) -> None:
        """Set the share of a loop's test that goes on round, so that the loop runs ``runs`` times."""
        last, first = edge
        body = self.bodies[edge]
        leaving = [to for to, _ in self.after[last] if to not in body]
        if leaving:
            self.tests[edge] = first, 1.0
            shares[last] = {first: 1 - 1 / runs, leaving[0]: 1 / runs}
            return
        inner = [one for one in self.bodies if self.bodies[one] < body]
        inside = part_of(graph, body.intersection(graph), {one for one in self.bodies if self.bodies[one] == body})
        test, staying, out = self._test(body)
        if edge in self.entered and not is_acyclic(part_of(graph, inside.keys() - {test}, inner)):
            raise RuntimeError(f"{self.function.name}: a loop has several entries, and ways round without a test")
        is_at_end = staying == first or (self._is_branch(staying) and graph[staying] == [first])
        tests = runs if is_at_end else runs + 1
        for number in reaching(inside, test) - {test}.union(*(self.bodies[one] for one in inner)):
            shares[number] = self._share_of_branch(number, runs / tests)  # asked once more than the loop runs
        asked = 1.0 if edge in self.entered else self._visits(shares, inside, first)[test]
        self.tests[edge] = (test if edge in self.entered else first), tests / runs
        on = 1 - 1 / (tests * asked)
        shares[test] = {staying: on} if out is None else {staying: on, out: 1 - on}

    def _test(self, body: frozenset[int]) -> tuple[int, int, int | None]:
        """Return the block at whose end a loop is left, the next one in the loop, and the one behind it, if any."""
        for number in sorted(body):
            leaving = [to for to, _ in self.after[number] if to not in body]
            staying = [to for to, _ in self.after[number] if to in body]
            if leaving and staying and self.chance[leaving[0]]:
                return number, staying[0], leaving[0]
        for number in sorted(body):  # a loop that a kernel ends in
            if self.function.instructions[self.blocks[number][1] - 1].name == "EXIT" and self.after[number]:
                return number, self.after[number][0][0], None
        raise RuntimeError(f"{self.function.name}: a loop without an end")

    def _share_of_branch(self, number: int, seldom: float = 1.0) -> dict[int, float]:
        """Return which share of a branch's runs leads where; ``seldom`` scales that of statements behind it."""
        after = [to for to, _ in self.after[number]]
        if len(after) < 2:
            return dict.fromkeys(after, 1.0)
        taken, onward = after
        if taken == onward:
            return {taken: 1.0}
        if ".DIV" in self.function.instructions[self.blocks[number][1] - 1].opcode:
            return {taken: 0.0, onward: 1.0}  # taken where a warp's threads do not run together
        here = self.chance[number] or 1.0  # a branch inside of a statement that runs seldom
        chance = {to: self.chance[to] if self._way(to)[0] else here for to in after}  # here: where both ways meet
        less = {to: chance[to] / here * (1.0 if self._is_for_one_warp(to) else seldom) for to in after}
        if chance[onward] < here and chance[taken] < here:  # both have the line of one that is left out
            ways = sorted(after, key=lambda to: (-chance[to], self._length(to)))
            share = float(ways[0] == onward)
        elif chance[onward] < here:
            share = less[onward]
        elif chance[taken] < here:
            share = 1 - less[taken]
        else:
            share = float(not self._is_shorter(onward, taken))
        return {taken: 1 - share, onward: share}

    def _length(self, number: int) -> int:
        return len(self.instructions_of(self._way(number)[0]))

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

    def instructions_of(self, body: Iterable[int]) -> list[int]:
        """Return the indices of all instructions in some blocks."""
        return [at for number in sorted(body) for at in range(*self.blocks[number])]

    def runs(self) -> np.ndarray:
        """Return how often each block runs."""
        return self._visits(self.share, dict.fromkeys(self._reached(self.share), range(len(self.blocks))), 0)

    def _visits(self, shares: list[dict[int, float]], graph: Graph, start: int) -> np.ndarray:
        """Return how often each block of a graph runs when its block ``start`` is entered once."""
        matrix, entered = np.eye(len(self.blocks)), np.zeros(len(self.blocks))
        entered[start] = 1
        for number, following in graph.items():
            for to, share in shares[number].items():
                if to in following:
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
        block, per_run = self.tests[edge]
        times = runs[block] / per_run
        return {at: float(runs[number] / times) for number in counted for at in range(*self.blocks[number])}

    def _frames_of(self, edge: Edge) -> tuple[Frame, ...]:
        return self._frames(self.blocks[edge[0]][1] - 1)

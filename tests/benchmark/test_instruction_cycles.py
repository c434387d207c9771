"""Loops of small flow graphs."""

from __future__ import annotations

from sne_fast.benchmark.instructions.cycles import Cycle, cycles, is_acyclic, part_of, reaching


def cycle(body: set[int], entries: set[int], *back: tuple[int, int]) -> Cycle:
    return Cycle(frozenset(body), frozenset(entries), frozenset(back))


def test_a_loop_with_one_entry_is_what_its_edge_back_closes() -> None:
    graph = {0: [1], 1: [2], 2: [1, 3], 3: []}
    assert list(cycles(graph, 0)) == [cycle({1, 2}, {1}, (2, 1))]
    assert reaching(graph, 2, 1) == {1, 2} and reaching(graph, 2) == {0, 1, 2}


def test_loops_inside_of_others_come_behind_them() -> None:
    graph = {0: [1], 1: [2], 2: [2, 3], 3: [1, 4], 4: [4, 5], 5: []}
    assert list(cycles(graph, 0)) == [
        cycle({1, 2, 3}, {1}, (3, 1)), cycle({2}, {2}, (2, 2)), cycle({4}, {4}, (4, 4))]  # fmt: skip


def test_a_loop_may_be_entered_in_its_middle() -> None:
    """As where one warp's way out of a loop's body is that way into it, too: 4 is both."""
    graph = {0: [1, 4], 1: [2], 2: [3, 5], 3: [2, 4], 4: [1], 5: []}
    outer, inner = cycles(graph, 0)
    assert outer == cycle({1, 2, 3, 4}, {1, 4}, (3, 4), (4, 1))
    assert inner == cycle({2, 3}, {2}, (3, 2))
    assert not is_acyclic(part_of(graph, outer.body, outer.back))
    assert is_acyclic(part_of(graph, outer.body - {2}))


def test_a_graph_without_a_loop_has_none() -> None:
    assert list(cycles({0: [1, 2], 1: [2], 2: []}, 0)) == []
    assert list(cycles({0: [0]}, 0)) == [cycle({0}, {0}, (0, 0))]

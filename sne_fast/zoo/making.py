"""Making of a zoo in groups of networks, several at once, with progress; an interrupted call resumes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from os import PathLike
from typing import Any

import torch
from torch import Tensor

from ..training.threads import torch_threads
from .shards import ZooWriter
from .table import Zoo

Made = tuple[Mapping[str, Tensor], Sequence[tuple[str, Mapping[str, Any]]]]
"""Stacked tensors `(K, *shape)` of networks in module order, and K pairs of name and row."""


@dataclass(frozen=True)
class Group:
    """Networks made together, and written as one shard.

    A group is made from nothing but its own fields, so that a resumed call gives the same zoo as an uninterrupted one.

    Args:
        name: of the shard.
        first: position of its first network in the zoo.
        size: number of networks.
        cost: of making it, in any unit; the costliest group starts first.
    """

    name: str
    first: int
    size: int
    cost: float


def groups_of(name: str, count: int, largest: int, first: int, cost: float) -> list[Group]:
    """Cut `count` networks into groups of at most `largest`; the first group is called `name`, others `name.NUMBER`."""
    starts = range(0, count, largest)
    return [
        Group(
            name if start == 0 else f"{name}.{start // largest}",
            first + start,
            min(largest, count - start),
            cost * min(largest, count - start),
        )
        for start in starts
    ]


def make_zoo(
    folder: str | PathLike[str],
    groups: Sequence[Group],
    work: Callable[[Group, Callable[[float], None]], Made | list[Made]],
    about: Mapping[str, Any],
    on_progress: Callable[[float], None] | None = None,
) -> Zoo:
    """Make all groups that `folder` does not hold yet, one thread per core, and return the zoo, opened from there.

    Each group is written when it is done. If an error or a signal interrupts the call, the folder keeps the finished
    groups; the same call makes the others and gives the same zoo as an uninterrupted one.

    Args:
        folder: the folder of the zoo.
        groups: all groups of the zoo.
        work: makes a group; it calls its second argument with the share of the group done, at every step. Networks of
            one group that differ in their shapes are a list of stacks, in their order.
        about: description of the zoo; an unfinished zoo of another description is refused.
        on_progress: called with the share of all work done, in [0, 1].
    """
    with ZooWriter(folder, resume=True, **about) as writer:
        left = [group for group in groups if not writer.has(group.name)]
        progress = _Progress(groups, left, on_progress)
        # Each thread has one thread of torch: the tensors are far too small to share among cores, and waiting for other
        # threads would take longer than the work, many times longer on a busy machine.
        with ThreadPoolExecutor(max_workers=torch.get_num_threads()) as pool, torch_threads(1):
            longest_first = sorted(left, key=lambda group: -group.cost)
            futures = {pool.submit(work, group, progress.of(group)): group for group in longest_first}
            unwritten = set(futures)

            def write(future: Future[Made | list[Made]]) -> None:
                unwritten.discard(future)
                made = future.result()
                _write_group(writer, futures[future], made if isinstance(made, list) else [made])

            try:
                for future in as_completed(futures):
                    write(future)
            finally:
                progress.stop.set()
                pool.shutdown(cancel_futures=True)
                # If one group failed, those that were finished beside it are not lost.
                for future in [f for f in unwritten if not f.cancelled() and f.exception() is None]:
                    write(future)
    if on_progress is not None:
        on_progress(1.0)
    return Zoo.open(folder)


def _write_group(writer: ZooWriter, group: Group, stacks: Sequence[Made]) -> None:
    """Write the stacks of a group as shards; the one of the group's name is the last, so that the group is whole."""
    first = group.first
    for k, (stacked, rows) in enumerate(stacks, 1):
        name = group.name if k == len(stacks) else f"{group.name}-{k}"
        if not writer.has(name):  # an interrupted call may have written it
            writer.add_group(name, first, stacked, rows)
        first += len(rows)


class _Progress:
    """Progress of all groups by their costs; it also tells the groups under way to stop."""

    def __init__(self, groups: Sequence[Group], left: Sequence[Group], report: Callable[[float], None] | None) -> None:
        unfinished = {group.name for group in left}
        self._done = {group.name: 0.0 if group.name in unfinished else group.cost for group in groups}
        self._total = max(sum(group.cost for group in groups), 1e-9)
        self._report = report
        self._lock = threading.Lock()
        self.stop = threading.Event()

    def of(self, group: Group) -> Callable[[float], None]:
        """Return the function that a group calls with the share of it that is done.

        Raises:
            CancelledError: by that function, after `stop` was set.
        """

        def step(share: float) -> None:
            if self.stop.is_set():
                raise CancelledError("another group failed")
            if self._report is None:
                return
            with self._lock:
                self._done[group.name] = group.cost * min(1.0, share)
                self._report(min(1.0, sum(self._done.values()) / self._total))

        return step

"""Making a zoo group by group: several groups at once, with progress, and taken up again after an interruption."""

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
"""A group's stacked tensors `(K, *shape)` in module order, and K pairs of name and row."""


@dataclass(frozen=True)
class Group:
    """Networks made together: a shard's `name`, the place of its `first` network, its `size`, and its `cost`.

    What a group becomes depends on nothing but itself, so that a make that goes on gives what an uninterrupted one
    would have given. `cost` is in any unit, for progress and for which group starts first.
    """

    name: str
    first: int
    size: int
    cost: float


def groups_of(name: str, count: int, largest: int, first: int, cost: float) -> list[Group]:
    """`count` networks as groups of at most `largest`; the first bears `name`, the others a number too."""
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
    work: Callable[[Group, Callable[[float], None]], Made],
    about: Mapping[str, Any],
    on_progress: Callable[[float], None] | None = None,
) -> Zoo:
    """Make all groups that `folder` does not hold yet, a thread per core, and return the zoo, opened from there.

    Each group is written when it is done. Interrupted, by an error or from outside, the folder keeps the finished
    groups; the same call again makes the others and gives the same zoo as an uninterrupted one.

    Args:
        work: makes one group; it calls its second argument with the share of the group done, at every step.
        about: description of the whole; a call with another one does not go on from what is there, but is refused.
        on_progress: called with the share of all work done, in [0, 1].
    """
    with ZooWriter(folder, resume=True, **about) as writer:
        left = [group for group in groups if not writer.has(group.name)]
        progress = _Progress(groups, left, on_progress)
        # Each thread with one thread of torch: the tensors are far too small to share one among cores, and threads
        # waiting for each other would take longer than the work, many times longer on a busy machine.
        with ThreadPoolExecutor(max_workers=torch.get_num_threads()) as pool, torch_threads(1):
            longest_first = sorted(left, key=lambda group: -group.cost)
            futures = {pool.submit(work, group, progress.of(group)): group for group in longest_first}
            unwritten = set(futures)

            def write(future: Future[Made]) -> None:
                unwritten.discard(future)
                stacked, rows = future.result()
                writer.add_group(futures[future].name, futures[future].first, stacked, rows)

            try:
                for future in as_completed(futures):
                    write(future)
            finally:
                progress.stop.set()
                pool.shutdown(cancel_futures=True)
                # Where one group failed, those that ended beside it are not lost.
                for future in [f for f in unwritten if not f.cancelled() and f.exception() is None]:
                    write(future)
    if on_progress is not None:
        on_progress(1.0)
    return Zoo.open(folder)


class _Progress:
    """The share of the cost done over all groups; also how groups under way are told to stop."""

    def __init__(self, groups: Sequence[Group], left: Sequence[Group], report: Callable[[float], None] | None) -> None:
        unfinished = {group.name for group in left}
        self._done = {group.name: 0.0 if group.name in unfinished else group.cost for group in groups}
        self._total = max(sum(group.cost for group in groups), 1e-9)
        self._report = report
        self._lock = threading.Lock()
        self.stop = threading.Event()

    def of(self, group: Group) -> Callable[[float], None]:
        def step(share: float) -> None:
            if self.stop.is_set():
                raise CancelledError("another group failed")
            if self._report is None:
                return
            with self._lock:
                self._done[group.name] = group.cost * min(1.0, share)
                self._report(min(1.0, sum(self._done.values()) / self._total))

        return step

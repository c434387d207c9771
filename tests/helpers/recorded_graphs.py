"""What stands for CUDA graphs where there is no GPU."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


class Recorder:
    """Stands for CUDA graphs: what it records reads the same memory at every replay, as theirs does."""

    def __init__(self) -> None:
        self.ran, self.recorded, self.replayed = 0, 0, 0

    def run(self, work: Callable[[], None]) -> None:
        self.ran += 1
        work()

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        self.recorded += 1

        def replay() -> None:
            self.replayed += 1
            work()

        return replay

    def later(self, numbers: Tensor) -> Callable[[], list[float]]:
        copy = numbers.clone()
        return copy.tolist

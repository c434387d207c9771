"""The networks of `sne-fast train`: packed in memory where they fit, else read from disk when a step needs them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..data.batch import WeightBatch
from ..data.packing import pack
from ..free_memory import shown_bytes, total_bytes
from ..nn.predictor import Predictor
from ..symmetry import Symmetry
from ..training.recipes import TrainingRecipe
from ..zoo.dataset import ZooDataset, pack_options
from ..zoo.shards import ShardSource
from ..zoo.table import FileSource, Zoo

BYTES_PER_WEIGHT = 13
"""Memory that a packed zoo takes: its tensors as they are read, the batch, its pointers, and the parts of the split."""
BYTES_PER_NETWORK = 4096


class TrainNetworks:
    """The networks of a zoo with their targets, of which a training, a validation and a test take parts.

    Args:
        zoo: the networks.
        targets: of each.
        recipe: says how they are packed.
        in_memory: pack all of them now, and select from the batch.
        max_memory: bytes that they may take.
        workers: processes that read ahead, where they are not in memory.

    Attributes:
        batch: all networks, or None where they are not in memory.
        weights: number of all weights.
    """

    def __init__(
        self, zoo: Zoo, targets: Tensor, recipe: TrainingRecipe, *, in_memory: bool, max_memory: float, workers: int = 0
    ) -> None:
        self.zoo, self.targets, self.recipe, self.workers = zoo, targets, recipe, workers
        self.batch = self._pack(zoo) if in_memory else None
        self.weights = int(zoo.sizes.sum()) if self.batch is None else self.batch.num_weights
        if not in_memory and isinstance(zoo.source, ShardSource):
            zoo.source.mapped_bytes = min(zoo.source.mapped_bytes, int(max_memory / 4))

    def part(self, rows: Sequence[int], predictor: Predictor) -> tuple[Any, Tensor]:
        """Return some networks, as a batch or as a stream packed for a predictor, and their targets."""
        targets = self.targets[list(rows)]
        if self.batch is not None:
            return self.batch[list(rows)], targets
        return ZooDataset(self.zoo[list(rows)], targets, pack_options(predictor), workers=self.workers), targets

    def kinds(self, symmetries: Sequence[Symmetry]) -> tuple[WeightBatch, list[Symmetry]]:
        """Return networks among which are all names, shapes and symmetries of the zoo, and the symmetry of each."""
        if self.batch is not None:
            return self.batch, list(symmetries)
        found: dict[Any, int] = {}
        sharded = isinstance(self.zoo.source, ShardSource)
        for i, shard in enumerate(self.zoo.shards if symmetries else []):
            shapes = shard if sharded else tuple((k, t.shape) for k, t in self.zoo.state_dict(i).items())
            found.setdefault((shapes, id(symmetries[i])), i)
        chosen = list(found.values()) or [0]
        return self._pack(self.zoo[chosen]), [symmetries[i] for i in chosen] if symmetries else []

    def _pack(self, zoo: Zoo) -> WeightBatch:
        # As the predictor packs, which is made with the preparation, and that may need the networks.
        recipe = self.recipe
        batch = pack(zoo, chunk_size=recipe.chunk_size, chunking=recipe.chunking, scale=recipe.scale)  # type: ignore[arg-type]
        return batch.detach()


def why_streamed(zoo: Zoo, max_memory: float | None) -> str | None:
    """Return the sentence that says why the networks of a zoo are read from disk; None if they fit into memory.

    What they take is known from the index of a zoo, and estimated from the sizes of files otherwise.

    Args:
        zoo: the networks.
        max_memory: bytes that they may take; None is half of the machine's memory.
    """
    if "weights" in zoo.columns or not isinstance(zoo.source, FileSource):
        weights = int(zoo.sizes.sum())
    else:
        weights = sum(file.stat().st_size for file in set(zoo.source.files)) // 2  # at least two bytes each
    needed = BYTES_PER_WEIGHT * weights + BYTES_PER_NETWORK * len(zoo)
    limit = memory_limit(max_memory)
    if needed <= limit:
        return None
    whose = "half of this machine's memory" if max_memory is None else "--max-memory"
    return (
        f"Networks are read from disk in every epoch: all of them would take about {shown_bytes(needed)} of memory, "
        f"{whose} is {shown_bytes(limit)}"
    )


def memory_limit(max_memory: float | None) -> float:
    """Return the bytes that networks may take."""
    return total_bytes() / 2 if max_memory is None else max_memory

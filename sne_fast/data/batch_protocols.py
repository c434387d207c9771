"""Rules for PyTorch's own walkers over a `WeightBatch`: loaders join batches, pytrees take them apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.utils import _pytree
from torch.utils.data._utils.collate import default_collate_fn_map

from .batch_checks import PACKED_BY, PER_NETWORK, POINTERS, TENSORS

HOSTS = tuple(f"{field}_host" for field in POINTERS)
LEAVES = (*TENSORS, *HOSTS, "chunk_positions", "kernels")
SETTINGS = (*PACKED_BY, "prepared")


class _Context:
    """Fields of a batch that are no tensors. Names are not compared: a program takes batches of any networks.

    Args:
        settings: values of `SETTINGS`, and whether the statistics are among the leaves.
        labels: values of `PER_NETWORK`.
    """

    def __init__(self, settings: Sequence[Any], labels: Sequence[Any]) -> None:
        *packed_by, prepared, statistics = settings
        self.settings, self.labels = (*packed_by, tuple(prepared), statistics), tuple(labels)

    @property
    def leaves(self) -> tuple[str, ...]:
        """Names of the leaves."""
        return (*LEAVES, "statistics") if self.settings[-1] else LEAVES

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Context) and self.settings == other.settings

    def __hash__(self) -> int:
        return hash(self.settings)

    def __repr__(self) -> str:
        return repr(self.settings)


def register(batch_type: type, join: Callable[[Sequence[Any]], Any]) -> None:
    """Make `default_collate` join batches by `join`, and batches nodes of PyTorch's pytrees."""

    def collate(batches: Sequence[Any], *, collate_fn_map: Any = None) -> Any:
        return join(batches)

    def flatten(batch: Any) -> tuple[list[Any], _Context]:
        settings, labels = ([getattr(batch, field) for field in fields] for fields in (SETTINGS, PER_NETWORK))
        context = _Context([*settings, batch.statistics is not None], labels)
        return [getattr(batch, field) for field in context.leaves], context

    def flatten_with_keys(batch: Any) -> tuple[list[tuple[Any, Any]], _Context]:
        leaves, context = flatten(batch)
        # No attribute keys: the guards of torch.export mistake `chunk_ptr` for the start of `chunk_ptr_host`.
        return [(_pytree.MappingKey(field), leaf) for field, leaf in zip(context.leaves, leaves, strict=True)], context

    def unflatten(leaves: Any, context: _Context) -> Any:
        batch: Any = object.__new__(batch_type)
        fields = {"statistics": None, **dict(zip(context.leaves, leaves, strict=True))}
        for field in (*HOSTS, "kernels"):  # a walker that moves all tensors leaves these where they belong
            leaf = fields[field]
            if isinstance(leaf, Tensor) and leaf.device.type not in ("cpu", "meta"):
                fields[field] = leaf.cpu()
        fields.update(zip(SETTINGS, context.settings[:-1], strict=True))
        fields.update(zip(PER_NETWORK, context.labels, strict=True))
        for field, value in fields.items():
            object.__setattr__(batch, field, value)
        return batch

    default_collate_fn_map[batch_type] = collate
    _pytree.register_pytree_node(
        batch_type,
        flatten,
        unflatten,
        serialized_type_name="sne_fast.WeightBatch",
        to_dumpable_context=lambda context: list(context.settings),
        from_dumpable_context=lambda settings: _Context(settings, [()] * len(PER_NETWORK)),
        flatten_with_keys_fn=flatten_with_keys,
    )

"""Encoding of many networks: a manifest of what there is, units of equal work, and a dataset that says what is done.

Nothing here needs an engine: a unit is encoded by any process that is given it, and writes a file of its own, so that
the files that exist are the list of what is done.
"""

from typing import TYPE_CHECKING

from ..lazy import attach

if TYPE_CHECKING:
    from .dataset import EmbeddingDataset, collect, dataset_folder, dataset_options
    from .manifests import manifest
    from .running import Work, embed_units
    from .units import Unit, cut_for, embed_unit, plan
else:
    __getattr__, __dir__ = attach(
        __name__,
        {
            ".dataset": ["EmbeddingDataset", "collect", "dataset_folder", "dataset_options"],
            ".manifests": ["manifest"],
            ".running": ["Work", "embed_units"],
            ".units": ["Unit", "cut_for", "embed_unit", "plan"],
        },
    )

__all__ = [
    "EmbeddingDataset", "Unit", "Work", "collect", "cut_for", "dataset_folder", "dataset_options", "embed_unit",
    "embed_units", "manifest", "plan",
]  # fmt: skip

"""Workers that die while they encode; other processes import them from here."""

from __future__ import annotations

import os
from typing import Any

from sne_fast.embedding import Unit
from sne_fast.embedding.running import _embed

LARGE = 5000
"""Weights of a unit at which a worker dies."""


def dies_on_the_first_call(*job: Any) -> Any:
    """Die if the file that `DIES_ONCE` names is not there yet, and make it."""
    try:
        os.close(os.open(os.environ["DIES_ONCE"], os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return _embed(*job)
    os._exit(9)


def dies_on_large_networks(model: str, device: str, options: dict[str, Any], unit: Unit) -> Any:
    if unit.weights > LARGE:
        os._exit(9)
    return _embed(model, device, options, unit)

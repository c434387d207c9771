"""Folders whose networks are named by a list in them: pipelines of diffusers, and distributed checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from .errors import CheckpointError, shown
from .folders import component_folders

__all__ = ["ChosenComponent", "chosen_component"]


class ChosenComponent(NamedTuple):
    """The folder of a pipeline's network, the rest of the key that chose it, and what is left out beside it."""

    folder: Path
    key: str | None
    left_out: dict[str, str]


def chosen_component(folder: Path, key: str | None) -> ChosenComponent | None:
    """Return the network of a pipeline that a key chooses, or its only one; None for a folder that is no pipeline.

    Raises:
        CheckpointError: several networks and no key, another key, a list that is damaged.
    """
    components = component_folders(folder)
    if components is None:
        return None
    names = [component.name for component in components]
    listed = ", ".join(names[:12])
    if not names:
        raise CheckpointError(f"{folder}: holds a pipeline of diffusers without weights; fetch its networks too")
    name, _, rest = (key or "").partition(".")
    if key is None and len(names) == 1:
        name = names[0]
    elif key is None:
        raise CheckpointError(
            f"{folder}: holds a pipeline of diffusers with {len(names)} networks, {listed}; give the path of one, "
            f"{components[0]}, or choose with load_state_dict(path, key={names[0]!r})"
        )
    elif name not in names:
        raise CheckpointError(f"{folder}: its pipeline has no network {shown(name)}; there are {listed}")
    if not (folder / name).is_dir():
        raise CheckpointError(f"{folder}: its network {name!r} is missing; fetch it into {folder}")
    left_out = dict.fromkeys((other for other in names if other != name), "other network of the pipeline")
    return ChosenComponent(folder / name, rest or None, left_out)

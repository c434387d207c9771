"""Types of the networks that can be packed, for annotations."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from os import PathLike
from typing import Any, TypeAlias

from torch import nn

from .checkpoints import Checkpoint

Network: TypeAlias = nn.Module | Mapping[str, Any] | str | PathLike[str] | Checkpoint
"""One network: a module, a state_dict, the path of a checkpoint, or a checkpoint that was read."""
Networks: TypeAlias = Network | Iterable[Network]
"""One network or several: any iterable of networks, such as a list or a zoo."""

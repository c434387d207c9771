"""Types of the networks that can be packed, for annotations."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from os import PathLike
from typing import Any, TypeAlias

from torch import nn

Network: TypeAlias = nn.Module | Mapping[str, Any] | str | PathLike[str]
"""One network: a module, a state_dict, or the path of a checkpoint."""
Networks: TypeAlias = Network | Iterable[Network]
"""One network or several: any iterable of networks, such as a list or a zoo."""

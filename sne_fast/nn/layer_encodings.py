"""Encodings of layers, which may be computed apart, on other machines or days, and joined to those of networks."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..atomic_files import replacing
from ..data.readers.errors import CheckpointError
from ..data.readers.lazy_tensors import read_all
from ..data.readers.safetensors_files import open_safetensors

__all__ = ["LayerEncodings"]

_TENSORS = ("vectors", "levels", "tensors", "pooled", "halves")
_NAME = "sne_fast.layer_name."


@dataclass(frozen=True)
class LayerEncodings:
    """Layers as stages 1 to 3 of an encoder leave them; `SNE.encode_layers` makes them and `SNE.join` joins them.

    Args:
        vectors: `(L, h)` floating, one vector per layer.
        levels: `(L,)` int64, depth of each layer in its network.
        tensors: `(L,)` int64, number of tensors in each layer.
        pooled: `(L, 2h)`, the mean of `tensor_statistics.to_pool` over the tensors of each layer; None for an encoder
            without statistics.
        halves: `(2, L, h)`, the vectors by each half of the chunks where `max_chunks` left chunks out, equal to
            `vectors` for layers of which none was; None if all chunks were encoded.
        names: of the layers, or () if they are not known.

    Raises:
        ValueError: shapes or dtypes that do not fit together.

    Example:
        >>> encoder = sne_fast.SNE(hidden_dim=32)
        >>> batch = encoder.pack([torch.nn.Linear(4, 3)])
        >>> encoder.encode_layers(batch).vectors.shape
        torch.Size([1, 32])
    """

    vectors: Tensor
    levels: Tensor
    tensors: Tensor
    pooled: Tensor | None = None
    halves: Tensor | None = None
    names: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        if self.vectors.ndim != 2:
            raise ValueError(f"LayerEncodings: vectors must have shape (L, h), got {tuple(self.vectors.shape)}")
        layers, width = self.vectors.shape
        wanted = {
            "levels": (layers,),
            "tensors": (layers,),
            "pooled": (layers, 2 * width),
            "halves": (2, layers, width),
        }
        for name, shape in wanted.items():
            got = getattr(self, name)
            if got is not None and tuple(got.shape) != shape:
                raise ValueError(f"LayerEncodings: {name} must have shape {shape}, got {tuple(got.shape)}")
        for name in _TENSORS:
            got = getattr(self, name)
            integers = name in ("levels", "tensors")
            if got is not None and not (got.dtype == torch.int64 if integers else got.is_floating_point()):
                raise ValueError(
                    f"LayerEncodings: {name} must be {'int64' if integers else 'floating'}, got {got.dtype}"
                )
        if len(self.names) not in (0, layers):
            raise ValueError(f"LayerEncodings: names must be {layers}, one per layer, got {len(self.names)}")

    def __len__(self) -> int:
        """Return the number of layers L."""
        return self.vectors.shape[0]

    @property
    def estimated(self) -> bool:
        """Whether chunks were left out, so that what is joined is an estimate."""
        return self.halves is not None

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> LayerEncodings:
        """Move the encodings to a device, or convert their floating tensors to a dtype."""
        changed: dict[str, Any] = {}
        for name in _TENSORS:
            tensor = getattr(self, name)
            if tensor is not None:
                changed[name] = tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)
        return dataclasses.replace(self, **changed)

    @classmethod
    def cat(cls, encodings: Sequence[LayerEncodings]) -> LayerEncodings:
        """Concatenate encodings of layers in order; names are kept where all have them.

        Raises:
            ValueError: none, or encodings of which only some have statistics, or of different widths.
        """
        parts = list(encodings)
        if not parts:
            raise ValueError("LayerEncodings.cat: encodings must be at least one, got none")
        widths = {part.vectors.shape[1] for part in parts}
        if len(widths) > 1 or len({part.pooled is None for part in parts}) > 1:
            raise ValueError(
                f"LayerEncodings.cat: all must come from one encoder, got widths {sorted(widths)}, with statistics "
                f"{[part.pooled is not None for part in parts]}"
            )
        if len(parts) == 1:
            return parts[0]
        pooled = [part.pooled for part in parts if part.pooled is not None]
        estimated = any(part.estimated for part in parts)
        halves = [p.vectors.expand(2, -1, -1) if p.halves is None else p.halves for p in parts] if estimated else []
        named = all(part.names or not len(part) for part in parts)
        return cls(
            torch.cat([part.vectors for part in parts]),
            torch.cat([part.levels for part in parts]),
            torch.cat([part.tensors for part in parts]),
            torch.cat(pooled) if pooled else None,
            torch.cat(halves, 1) if halves else None,
            tuple(name for part in parts for name in part.names) if named else (),
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the encodings to a file of safetensors, all or nothing."""
        held = {name: getattr(self, name) for name in _TENSORS if getattr(self, name) is not None}
        metadata = {f"{_NAME}{i}": name for i, name in enumerate(self.names)}
        with replacing(Path(os.fsdecode(path))) as temporary:
            save_file({k: t.detach().cpu().contiguous() for k, t in held.items()}, temporary, metadata=metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> LayerEncodings:
        """Read encodings that `save` has written, to the CPU.

        Raises:
            CheckpointError: a file that is missing, damaged or none of these.
        """
        file = Path(os.fsdecode(path))
        found, metadata = open_safetensors(file)
        if not {"vectors", "levels", "tensors"} <= found.keys() <= set(_TENSORS):
            raise CheckpointError(f"{file}: must hold encodings of layers, got the tensors {', '.join(sorted(found))}")
        held = read_all(found)
        try:
            names = {int(key.removeprefix(_NAME)): name for key, name in metadata.items() if key.startswith(_NAME)}
            return cls(**held, names=tuple(names[i] for i in sorted(names)))
        except ValueError as error:
            raise CheckpointError(f"{file}: is damaged: {error}") from error

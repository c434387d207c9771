"""What the configuration beside a quantised checkpoint says and its tensors do not."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ...regular_files import read_json
from .beside import beside
from .errors import CheckpointError, Unreachable, reading

__all__ = ["NOTHING_SAID", "Quantisation", "quantisation_beside"]

FILES = ("config.json", "quantize_config.json", "quant_config.json")


class Quantisation(NamedTuple):
    """How tensors of a checkpoint are quantised.

    Attributes:
        gptq_second: whether zero points of GPTQ are stored as they are, and not less 1.
        mlx: bits and group size of MLX by the name of the layer, and under "" for all others.
    """

    gptq_second: bool = False
    mlx: Mapping[str, tuple[int, int]] = {}


NOTHING_SAID = Quantisation()


def quantisation_beside(file: Path) -> Quantisation:
    """Return what the configurations in the folder of a file say; one that is damaged says nothing.

    Known are `checkpoint_format` of GPTQ, and `quantization` of MLX with its exceptions by layer.
    """
    found = NOTHING_SAID
    for config in beside(file, FILES):
        try:
            with reading(config):
                said = read_json(config, dict, nonfinite=True)
        except Unreachable:
            raise
        except (CheckpointError, ValueError):
            continue
        gptq = said.get("quantization_config", said if config.name != "config.json" else None)
        if isinstance(gptq, dict) and gptq.get("checkpoint_format") == "gptq_v2":
            found = found._replace(gptq_second=True)
        mlx = said.get("quantization")
        if isinstance(mlx, dict) and not found.mlx:
            found = found._replace(mlx=dict(_mlx_forms(mlx)))
    return found


def _mlx_forms(said: dict[str, Any]) -> list[tuple[str, tuple[int, int]]]:
    entries = [("", said), *((name, own) for name, own in said.items() if isinstance(own, dict))]
    numbers = [(name, own.get("bits"), own.get("group_size")) for name, own in entries]
    return [(name, (b, g)) for name, b, g in numbers if type(b) is int and type(g) is int and b > 0 and g > 0]

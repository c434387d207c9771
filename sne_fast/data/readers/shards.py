"""Checkpoints in several files: an index that says which tensor is where, or files that count themselves."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

from ...regular_files import read_json
from .beside import beside
from .errors import CheckpointError, Unreachable, reading, shown

__all__ = [
    "Index",
    "counts_itself",
    "has_usual_index",
    "index_beside",
    "is_rank",
    "read_index",
    "refuse_rank",
    "shards_named",
    "sibling_shards",
]

_MAX_INDEX = 256 * 2**20
_MAX_SHARDS = 100_000
_COUNTED = re.compile(r"(?P<stem>.*?)(?P<number>\d+)(?P<of>[-_.]of[-_.])(?P<count>\d+)(?P<rest>(\D.*)?)", re.DOTALL)
_USUAL = (
    "model.safetensors.index.json",
    "pytorch_model.bin.index.json",
    "diffusion_pytorch_model.safetensors.index.json",
    "diffusion_pytorch_model.bin.index.json",
)
# Files of model parallelism, of which each holds a part of every tensor.
_RANK = re.compile(r"(?P<stem>(?:.*[_.-])?mp_rank_|consolidated\.)(?P<number>\d+)(?P<rest>(\D.*)?)", re.DOTALL)


class Index(NamedTuple):
    """An index of shards: the names of tensors by shard, and its metadata."""

    shards: dict[str, list[str]]
    metadata: dict[str, Any]


def read_index(file: Path, *, complete: bool = True) -> Index:
    """Read an index, whose shards lie in its folder.

    Args:
        file: the index.
        complete: whether to refuse an index of which a shard is missing.

    Raises:
        CheckpointError: no index, one without tensors, a shard that is missing or outside the folder.
    """
    with reading(file):
        try:
            content = read_json(file, dict, max_bytes=_MAX_INDEX, nonfinite=True)
        except ValueError as error:
            raise CheckpointError(f"{file}: is damaged or no index of shards: {_after(error, file)}") from error
    weight_map, metadata = content.get("weight_map"), content.get("metadata") or {}
    if not isinstance(weight_map, dict) or not isinstance(metadata, dict):
        raise CheckpointError(f"{file}: is damaged or no index of shards: it must map tensors to files in weight_map")
    shards: dict[str, list[str]] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str):
            raise CheckpointError(f"{file}: is damaged or no index of shards: weight_map must map names to files")
        shards.setdefault(shard, []).append(name)
    if not shards:
        raise CheckpointError(f"{file}: holds no tensors")
    for shard in shards:
        # By its letters, not resolved: the Hub's cache is made of links that leave the folder.
        parts = re.split(r"[/\\]", shard)
        if ".." in parts or parts[0] == "" or ":" in parts[0] or "\0" in shard:
            raise CheckpointError(f"{file}: refused, its shard {shown(shard)} is not a file inside the index's folder")
    missing = [shard for shard in shards if not (file.parent / shard).exists()]
    if missing and complete:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(f"{file}: its shard {missing[0]}{more} is missing; fetch it into {file.parent}")
    return Index(shards, metadata)


def shards_named(index: Path) -> set[str]:
    """Return the files that an index names, none for one that cannot be read."""
    try:
        return set(read_index(index, complete=False).shards)
    except Unreachable:
        raise
    except CheckpointError:
        return set()


def _after(error: ValueError, file: Path) -> str:
    return str(error).removeprefix(f"{file}: ").partition("\n")[0][:200]


def index_beside(shard: Path) -> Path | None:
    """Return the index beside a file of which it is a part: by its count, or because an index of a usual name says so.

    A file that counts itself is one such as `model-00001-of-00002.safetensors`.
    """
    match = _COUNTED.fullmatch(shard.name)
    if match is not None:
        stem, rest = match["stem"].rstrip("-_."), match["rest"]
        if found := beside(shard, [f"{stem}{rest}.index.json"]):
            return found[0]
    return next((index for index in beside(shard, _USUAL) if shard.name in shards_named(index)), None)


def counts_itself(name: str) -> bool:
    """Return whether a file is one of several by its name, such as `model-00001-of-00002.bin`."""
    return _COUNTED.fullmatch(name) is not None


def has_usual_index(folder: Path) -> bool:
    """Return whether a folder has an index of a usual name."""
    return any((folder / name).is_file() for name in _USUAL)


def is_rank(name: str) -> bool:
    """Return whether a file or folder is one of model parallelism by its name."""
    return _RANK.fullmatch(name) is not None


def sibling_shards(shard: Path) -> list[Path] | None:
    """Return all files of a checkpoint of which this is one by its name, None for a name that counts nothing.

    Raises:
        CheckpointError: some of them are missing; the message names them.
    """
    match = _COUNTED.fullmatch(shard.name)
    if match is None or int(match["count"]) < 2:
        return None
    count, width = int(match["count"]), len(match["number"])
    if count > _MAX_SHARDS:
        raise CheckpointError(f"{shard}: is one of {count} parts by its name, which is more than any checkpoint has")

    def part(number: int) -> Path:
        name = f"{match['stem']}{number:0{width}}{match['of']}{match['count']}{match['rest']}"
        return shard.parent / name

    first = 0 if int(match["number"]) == 0 or part(0).exists() else 1
    parts = [part(first + i) for i in range(count)]
    missing = [file.name for file in parts if not file.exists()]
    if missing or shard not in parts:
        listed = ", ".join(missing[:4]) + (f" and {len(missing) - 4} more" if len(missing) > 4 else "")
        raise CheckpointError(
            f"{shard}: is one of {count} parts of a checkpoint, of which {listed or 'another number'} "
            f"{'are' if len(missing) > 1 else 'is'} missing; fetch all of them into {shard.parent}"
        )
    return parts


def refuse_rank(file: Path) -> None:
    """Refuse a file that holds a part of every tensor, as model parallelism saves one per process.

    Raises:
        CheckpointError: it is one of several by the names beside it, or not the first.
    """
    for named in (file, file.parent):
        match = _RANK.fullmatch(named.name)
        if match is None:
            continue
        stem, rest, width = match["stem"], match["rest"], len(match["number"])
        first, second = (named.parent / f"{stem}{number:0{width}}{rest}" for number in (0, 1))
        if int(match["number"]) > 0 or second.exists():
            beside = second if int(match["number"]) == 0 else first
            there = "lies beside it" if beside.exists() else "is missing"
            raise CheckpointError(
                f"{file}: is the part of one process of a model-parallel checkpoint ({beside.name} {there}); "
                f"merge the parts into one file first"
            )

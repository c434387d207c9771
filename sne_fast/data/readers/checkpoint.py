"""A checkpoint, whichever files it is made of: its tensors, opened or read, and what was left out."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from ..layer_order import natural_key
from ..remote.paths import place
from ..tied_names import with_tied_names
from .adapter_configs import adapter_scales, scales_in_metadata
from .chosen_weights import choose_weights
from .content_tree import arrays_as_tensors
from .contents import Contents
from .distributed_folders import distributed_folder, open_distributed
from .errors import CheckpointError, reading, shown, shown_list
from .folders import array_files, chosen_file, sentence_transformer_parts
from .formats import Format, format_of
from .lazy_tensors import LazyTensor, OpenFile, read_all
from .numpy_files import read_npy_files
from .other_formats import OTHER_FORMATS
from .pipelines import chosen_component
from .quantisation_configs import NOTHING_SAID, Quantisation, quantisation_beside
from .safetensors_files import open_safetensors
from .script_programs import Script, script_weights
from .shards import index_beside, read_index, refuse_rank, sibling_shards
from .stored import open_tensors
from .tied_by_config import with_ties_of_config
from .torch_files import read_content, reading_torch

__all__ = ["ORDER_KEY", "Checkpoint", "OpenCheckpoint", "open_checkpoint", "read_checkpoint"]

ORDER_KEY = "sne_fast.order"


Entries = Mapping[str, Tensor | LazyTensor]
T = TypeVar("T")


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a checkpoint.

    Attributes:
        tensors: by name, in the order of the module where the file keeps it, else in natural order of the names.
        keeps_order: whether the order of `tensors` is that of the module.
        left_out: what else the file or folder holds, by path in the file or by file name, with the reason why it is
            not part of the weights: objects, optimiser states, averages of the weights, other files.
        key: where in the file the tensors are, names joined by dots; "" at the top.
        adapter_scales: of adapters whose configuration lies beside them, by the name of the adapted module: what the
            update is multiplied by, and its rank.
        quantisation: what a configuration beside them says of quantised tensors.
        kinds: ids of the kinds of layers by name, where a module that was rebuilt says them.
    """

    tensors: dict[str, Tensor]
    keeps_order: bool
    left_out: dict[str, str] = field(default_factory=dict)
    key: str = ""
    adapter_scales: dict[str, tuple[float, int]] = field(default_factory=dict)
    quantisation: Quantisation = NOTHING_SAID
    kinds: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class OpenCheckpoint:
    """A checkpoint of which the headers were read, and the tensors where they cannot be read one by one.

    The fields are those of `Checkpoint`.
    """

    tensors: dict[str, Tensor | LazyTensor]
    keeps_order: bool
    left_out: dict[str, str] = field(default_factory=dict)
    key: str = ""
    adapter_scales: dict[str, tuple[float, int]] = field(default_factory=dict)
    quantisation: Quantisation = NOTHING_SAID

    def read(self) -> Checkpoint:
        """Read all tensors into memory; raises CheckpointError as `read_checkpoint`."""
        return Checkpoint(**{**vars(self), "tensors": read_all(self.tensors)})


def read_checkpoint(path: str | os.PathLike[str], key: str | None = None) -> Checkpoint:
    """Read a checkpoint of any form that `load_state_dict` reads, and say what was left out.

    Args:
        path: a file, or a folder of one checkpoint, or the URL of one.
        key: the place of the weights in a pickled file that has several, names joined by dots; in the folder of a
            diffusers pipeline the name of a network.

    Raises:
        CheckpointError: as `load_state_dict`.
    """
    return open_checkpoint(path, key).read()


def open_checkpoint(path: str | os.PathLike[str], key: str | None = None) -> OpenCheckpoint:
    """Read the headers of a checkpoint; its tensors are read when they are asked for, where its format allows it.

    Files stay open as long as tensors of theirs can be read.

    Args:
        path: a file, or a folder of one checkpoint, or the URL of one.
        key: as for `read_checkpoint`.

    Raises:
        CheckpointError: as `load_state_dict`.
    """
    with reading(Path(os.fsdecode(path))):
        file = place(path)
    try:
        with reading(file):
            distributed = distributed_folder(file)
            if distributed is not None:
                return _open_distributed(distributed, key)
            return _open_folder(file, key) if file.is_dir() else _open_configured(file, key)
    except RecursionError:
        raise CheckpointError(f"{file}: refused, its values are nested too deeply") from None
    except ValueError as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{str(file)!r}: cannot be read: {error}") from error  # a path that no system can name


def _open_distributed(folder: Path, key: str | None) -> OpenCheckpoint:
    tensors, weights = open_distributed(folder, key)
    return OpenCheckpoint(in_order(tensors, None, folder), False, weights.left_out, weights.path)


def _open_folder(folder: Path, key: str | None) -> OpenCheckpoint:
    component = chosen_component(folder, key)
    if component is not None:
        found = _open_folder(component.folder, component.key)
        return replace(found, left_out=found.left_out | component.left_out)
    parts = sentence_transformer_parts(folder)
    if parts is None and (arrays := array_files(folder)):
        return _of_contents(read_npy_files(folder, arrays), folder)
    if parts is None:
        file, left_out = chosen_file(folder)
        found = _open_configured(file, key)
        return replace(found, left_out=found.left_out | left_out)
    read = [(part.number, _open_configured(part.file, key)) for part in parts]
    if len(read) == 1:
        return read[0][1]
    if len({number for number, _ in read}) != len(read):
        raise CheckpointError(f"{folder}: two of its modules have the same number in modules.json")
    tensors: dict[str, Tensor | LazyTensor] = {}
    skipped: dict[str, str] = {}
    for number, found in read:
        tensors.update({f"{number}.{name}": tensor for name, tensor in found.tensors.items()})
        skipped.update({f"{number}.{name}": reason for name, reason in found.left_out.items()})
    return OpenCheckpoint(tensors, all(found.keeps_order for _, found in read), skipped)


def _open_configured(file: Path, key: str | None) -> OpenCheckpoint:
    return replace(_open_file(file, key), quantisation=quantisation_beside(file))


def _open_file(file: Path, key: str | None) -> OpenCheckpoint:
    found = _open_whole(file, key)
    return replace(found, tensors=with_ties_of_config(file.parent, found.tensors))


def _open_whole(file: Path, key: str | None) -> OpenCheckpoint:
    kind = format_of(file)
    if kind == "index":
        return _open_index(file, key)
    if index := index_beside(file):
        return _open_index(index, key)
    refuse_rank(file)
    if shards := sibling_shards(file):
        return _joined([(shard, _open_one(shard, key)) for shard in shards], file)
    found = _open_one(file, key, kind)
    return replace(found, adapter_scales=found.adapter_scales | adapter_scales(file, found.tensors))


def _open_one(file: Path, key: str | None, kind: Format | None = None) -> OpenCheckpoint:
    kind = kind or format_of(file)
    if kind == "torch":
        return _open_torch(file, key)
    if kind == "index":
        raise CheckpointError(f"{file}: is JSON, and no file of tensors")
    if key is not None:
        raise CheckpointError(f"{file}: key= chooses among what a pickled file holds; a file of {kind} is flat")
    if kind in OTHER_FORMATS:
        return _of_contents(OTHER_FORMATS[kind](file), file)
    tensors, metadata = open_safetensors(file)
    if not tensors:
        raise CheckpointError(f"{file}: holds no tensors")
    order = metadata.get(ORDER_KEY)
    scales = scales_in_metadata(metadata, tensors, file)
    tied = in_order(with_tied_names(tensors, metadata), order, file)
    return OpenCheckpoint(dict(tied), order is not None, adapter_scales=scales)


def _of_contents(found: Contents, file: Path) -> OpenCheckpoint:
    if not found.tensors:
        held = f" but {shown_list(found.left_out, 4)}" if found.left_out else ""
        raise CheckpointError(f"{file}: holds no weights{held}")
    tensors: Entries = found.tensors if found.keeps_order else in_order(found.tensors, None, file)
    return OpenCheckpoint(dict(tensors), found.keeps_order, found.left_out)


def _open_torch(file: Path, key: str | None) -> OpenCheckpoint:
    with reading_torch(file):
        held = OpenFile(file)
        content = read_content(held.opened)
        ranks = content.get("mp_world_size") if isinstance(content, dict) else None
        if isinstance(ranks, int) and ranks > 1:
            raise CheckpointError(
                f"is the part of one of {shown(ranks)} processes of a model-parallel checkpoint; merge the parts first"
            )
        if isinstance(content, Script):
            weights = script_weights(content, key)
        else:
            weights = choose_weights(arrays_as_tensors(content), key)
        tensors = open_tensors(weights.tensors, held, partial(reading_torch, file))
    return OpenCheckpoint(tensors, True, weights.left_out, weights.path)


def _open_index(file: Path, key: str | None) -> OpenCheckpoint:
    index = read_index(file)
    shards = sorted(index.shards, key=natural_key)
    found = _joined(
        [(file.parent / shard, _open_one(file.parent / shard, key)) for shard in shards], file, index.shards
    )
    order = index.metadata.get(ORDER_KEY)
    if found.keeps_order and order is None:
        return found
    return OpenCheckpoint(in_order(found.tensors, order, file), order is not None, found.left_out)


def _joined(
    read: list[tuple[Path, OpenCheckpoint]], named: Path, expected: Mapping[str, list[str]] | None = None
) -> OpenCheckpoint:
    """Return the tensors of all shards as one checkpoint."""
    tensors: dict[str, Tensor | LazyTensor] = {}
    left_out: dict[str, str] = {}
    for file, found in read:
        if expected is not None:
            wanted = set(expected[file.relative_to(named.parent).as_posix()])
            lacking = [name for name in wanted if name not in found.tensors]
            if lacking:
                raise CheckpointError(f"{file}: lacks the tensor {shown(min(lacking))} that the index looks for in it")
            extra = [name for name in found.tensors if name not in wanted]
            if extra:
                raise CheckpointError(
                    f"{file}: holds {shown_list(extra, 4)}, which the index {named.name} does not name"
                )
        twice = [name for name in found.tensors if name in tensors]
        if twice:
            raise CheckpointError(
                f"{file}: holds {shown_list(twice, 4)}, which another part of the checkpoint holds too"
            )
        tensors.update(found.tensors)
        left_out.update(found.left_out)
    if all(found.keeps_order for _, found in read):
        return OpenCheckpoint(tensors, all(".safetensors" not in file.name for file, _ in read), left_out)
    return OpenCheckpoint(in_order(tensors, None, named), False, left_out)


def in_order(tensors: Mapping[str, T], order: Any, file: Path) -> dict[str, T]:
    """Return tensors in the order that metadata give, else in natural order of their names."""
    if order is None:
        names = sorted(tensors, key=natural_key)
    else:
        try:
            names = json.loads(order) if isinstance(order, str) else order
            fits = isinstance(names, list) and sorted(names) == sorted(tensors)
        except (ValueError, TypeError, RecursionError):
            fits = False
        if not fits:
            raise CheckpointError(
                f"{file}: its metadata {ORDER_KEY!r} must be a JSON list of the names of its {len(tensors)} tensors; "
                f"write the file again with save_state_dict"
            )
    return {name: tensors[name] for name in names}

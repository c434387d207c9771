"""Checkpoints read without running code from them, and written so that the order of tensors survives."""

from __future__ import annotations

import json
import os
import pickle
import pickletools
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..atomic_files import replacing
from .layer_order import natural_key
from .pickles import RefusedArray, load_plain

__all__ = ["ORDER_KEY", "CheckpointError", "find_state_dict", "load_state_dict", "save_state_dict"]

ORDER_KEY = "sne_fast.order"
NESTED = ("state_dict", "model", "model_state_dict")
PICKLED = (".pt", ".pth", ".bin", ".ckpt")
INDEX = ".safetensors.index.json"
_READABLE = f".safetensors, {INDEX}, {', '.join(PICKLED)}, or a folder holding one"


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, refused, or holds no weights; the message names the file."""


def load_state_dict(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Load the tensors of a checkpoint by name, in the order of the module they came from where the file knows it.

    Never runs code from the file. Tensors of large files are mapped, not read, until they are used.

    Args:
        path: `.safetensors`: in the order of its metadata `sne_fast.order` (a JSON list of names), else in natural
            order of the names (`layers.2` before `layers.10`), for the format sorts them;
            `.safetensors.index.json`: the same over its shards, from the index's metadata;
            `.pt/.pth/.bin/.ckpt`: `torch.load(weights_only=True)`, whose state_dict may be nested under "state_dict",
            "model" or "model_state_dict", the first of these that is there; a folder: its `model.safetensors`, else its
            only index, else its only safetensors file, else its only pickled one.

    Returns:
        A dict of CPU tensors.

    Raises:
        CheckpointError: no such file, another extension, a truncated or damaged file, a pickle that holds anything but
            plain data, a shard that is missing, lacks a tensor or lies outside the folder, no tensors.

    Example:
        >>> save_state_dict(torch.nn.Linear(4, 3).state_dict(), "linear.safetensors")
        >>> list(load_state_dict("linear.safetensors"))
        ['weight', 'bias']
    """
    return load_with_order(path)[0]


def load_with_order(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], bool]:
    """Load the tensors of a checkpoint as `load_state_dict` does, and whether the file knows their order of definition.

    Raises:
        CheckpointError: as `load_state_dict`.
    """
    file = Path(os.fsdecode(path))
    if file.is_dir():
        file = _file_in(file)
    if not file.name.endswith((".safetensors", INDEX, *PICKLED)):
        raise CheckpointError(f"{file}: cannot tell what it is by its name; readable are {_READABLE}")
    if not file.is_file():
        raise CheckpointError(f"{file}: there is no such file")
    if file.name.endswith(INDEX):
        return _load_sharded(file)
    if file.suffix == ".safetensors":
        tensors, metadata = _load_safetensors(file)
        if not tensors:
            raise CheckpointError(f"{file}: holds no tensors")
        return _in_order(tensors, metadata.get(ORDER_KEY), file)
    return load_pickled(file), True


def save_state_dict(
    state_dict: Mapping[str, Tensor], path: str | os.PathLike[str], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors as safetensors with their order in the metadata, all or nothing; the same tensors give one file.

    Args:
        state_dict: tensors by name, of any dtype that safetensors has; tied ones are written once per name.
        path: the file, replaced if it is there; a failure leaves it as it was.
        metadata: further strings to store.

    Raises:
        TypeError: an entry that is no tensor, metadata that is not strings.
        ValueError: no tensors.
        CheckpointError: the file cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    file = Path(os.fsdecode(path))
    tensors: dict[str, Tensor] = {}
    storages = set()
    for name, tensor in state_dict.items():
        if not isinstance(tensor, Tensor) or not isinstance(name, str):
            raise TypeError(f"save_state_dict: {name!r} must name a tensor, got {type(tensor).__name__}")
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        tensors[name] = tensor.clone() if storage in storages else tensor  # safetensors refuses shared memory
        storages.add(storage)
    if not tensors:
        raise ValueError("save_state_dict: state_dict must hold at least one tensor, got none")
    strings = {ORDER_KEY: json.dumps(list(tensors)), **(metadata or {})}
    if not all(isinstance(text, str) for item in strings.items() for text in item):
        raise TypeError(f"save_state_dict: metadata must map strings to strings, got {metadata!r}")
    try:
        with replacing(file) as temporary:
            save_file(tensors, temporary, metadata=strings)
            _order_header(temporary)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file}: cannot be written: {error}") from error


def _order_header(file: Path) -> None:
    """Sort the metadata in the header of a safetensors file, which the library writes in another order every time."""
    with open(file, "rb+") as opened:
        size = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        if len(text) > size:
            raise ValueError(f"save_state_dict: the header of {file} has grown from {size} to {len(text)} bytes")
        opened.seek(8)
        opened.write(text.ljust(size))


def find_state_dict(checkpoint: Mapping[Any, Any]) -> Mapping[Any, Any]:
    """Return the state_dict nested under "state_dict", "model" or "model_state_dict", else the mapping itself."""
    for _ in range(4):  # a pickle may nest a mapping in itself
        inner = next((checkpoint[key] for key in NESTED if isinstance(checkpoint.get(key), Mapping)), None)
        if inner is None:
            break
        checkpoint = inner
    return checkpoint


def _file_in(folder: Path) -> Path:
    if (folder / "model.safetensors").is_file():
        return folder / "model.safetensors"
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_file())
    for endings in ((INDEX,), (".safetensors",), PICKLED):
        found = [name for name in names if name.endswith(endings)]
        if len(found) == 1:
            return folder / found[0]
        if found:
            raise CheckpointError(f"{folder}: holds several checkpoints, {', '.join(found[:8])}; give the path of one")
    held = ", ".join(names[:8]) or "no files"
    raise CheckpointError(f"{folder}: holds no checkpoint ({_READABLE.rpartition(', or')[0]}) but {held}")


def _in_order(tensors: dict[str, Tensor], order: Any, file: Path) -> tuple[dict[str, Tensor], bool]:
    if order is None:
        names = sorted(tensors, key=natural_key)
    else:
        try:
            names = json.loads(order) if isinstance(order, str) else order
            fits = isinstance(names, list) and sorted(names) == sorted(tensors)
        except (ValueError, TypeError):
            fits = False
        if not fits:
            raise CheckpointError(
                f"{file}: its metadata {ORDER_KEY!r} must be a JSON list of the names of its {len(tensors)} tensors; "
                f"write the file again with save_state_dict"
            )
    return {name: tensors[name] for name in names}, order is not None


def _load_safetensors(file: Path, names: list[str] | None = None) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            held = opened.keys()
            for name in names or ():
                if name not in held:
                    raise CheckpointError(f"{file}: lacks the tensor {name!r} that the index looks for in it")
            return {name: opened.get_tensor(name) for name in names or held}, opened.metadata() or {}
    except CheckpointError:
        raise
    except (SafetensorError, OSError, RuntimeError, ValueError, KeyError) as error:
        raise CheckpointError(f"{file}: is damaged or no safetensors file: {error}; fetch or write it again") from error


def _load_sharded(index: Path) -> tuple[dict[str, Tensor], bool]:
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
        weight_map = content["weight_map"]
        metadata = content.get("metadata") or {}
        shards: dict[str, list[str]] = {}
        for name, shard in weight_map.items():
            shards.setdefault(shard, []).append(name)
        if not all(isinstance(shard, str) for shard in shards) or not isinstance(metadata, dict):
            raise TypeError("weight_map must map names to files")
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{index}: is damaged or no safetensors index: {error!r}") from error
    if not shards:
        raise CheckpointError(f"{index}: holds no tensors")
    tensors: dict[str, Tensor] = {}
    for shard, names in shards.items():
        # By its letters, not resolved: the Hub's cache is made of links that leave the folder.
        parts = re.split(r"[/\\]", shard)
        if ".." in parts or parts[0] == "" or ":" in parts[0] or not shard.endswith(".safetensors"):
            raise CheckpointError(
                f"{index}: refused, its shard {shard!r} is not a .safetensors file inside the index's folder"
            )
        file = index.parent / shard
        if not file.is_file():
            raise CheckpointError(f"{index}: its shard {shard} is missing; fetch it into {index.parent}")
        tensors.update(_load_safetensors(file, names)[0])
    return _in_order(tensors, metadata.get(ORDER_KEY), index)


def load_pickled(file: Path) -> dict[str, Tensor]:
    """Load the tensors of a pickled checkpoint, as `load_state_dict` does."""
    return tensors_of(read_pickled(file), file)


def read_pickled(file: Path, *, arrays: bool = False) -> Any:
    """Return all that a pickled checkpoint holds, without running code of it.

    Args:
        file: the checkpoint.
        arrays: whether it may hold numpy's arrays and numbers besides tensors, for `pickles.as_array`.

    Raises:
        CheckpointError: a file that is damaged, or holds anything but tensors and plain data.
    """
    try:
        with open(file, "rb") as opened:
            zipped = opened.read(4) == b"PK\x03\x04"
        if zipped:
            with zipfile.ZipFile(file) as archive:
                names = archive.namelist()
            if any(name.endswith("/constants.pkl") for name in names):
                raise CheckpointError(
                    f"{file}: refused, it is a TorchScript program and not weights; save its state_dict()"
                )
        return load_plain(file, mmap=zipped, arrays=arrays)
    except CheckpointError:
        raise
    except RefusedArray as error:
        raise CheckpointError(f"{file}: refused, {error}") from error
    except pickle.UnpicklingError as error:
        if not zipped and not _is_whole_pickle(file):
            raise CheckpointError(f"{file}: is damaged or no checkpoint of torch; fetch or write it again") from error
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        held = f"code or objects ({found.group(1)}) besides tensors" if found else "more than tensors"
        raise CheckpointError(
            f"{file}: refused, it holds {held}, and a pickle's code would run on loading; "
            f"save the model's state_dict() alone, best as safetensors"
        ) from error
    except Exception as error:  # whatever a damaged file makes the reader do
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise CheckpointError(f"{file}: is damaged or no checkpoint of torch: {reason}") from error


def tensors_of(content: Any, file: Path) -> dict[str, Tensor]:
    """Return the tensors of what a pickled checkpoint holds, at the top or nested under one of the known names."""
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{file}: must hold a state_dict, got {type(content).__name__}; save state_dict()")
    state_dict = find_state_dict(content)
    tensors = {key: value for key, value in state_dict.items() if isinstance(value, Tensor)}
    nested = [key for key, value in state_dict.items() if isinstance(value, Mapping)]
    if tensors and nested:  # some of its weights could be in there
        raise CheckpointError(
            f"{file}: holds tensors and, under {nested[0]!r}, further entries; save the model's state_dict() alone"
        )
    if not tensors:
        held = ", ".join(repr(key) for key in list(state_dict)[:8]) or "nothing"
        optimiser = ("state" in state_dict and "param_groups" in state_dict) or set(content) & {
            "optimizer",
            "optimiser",
        }
        what = "only an optimiser's state" if optimiser else f"no tensors at the top or under {', '.join(NESTED)}"
        raise CheckpointError(f"{file}: holds {what} ({held}); save the model's state_dict()")
    return tensors


def _is_whole_pickle(file: Path) -> bool:
    """Return whether the file is a pickle to its end, judged without running it; damage is reported otherwise."""
    with open(file, "rb") as opened:
        try:
            first = [argument for _, argument, _ in pickletools.genops(opened)]
            # torch's old format: its magic number, then protocol, machine and content as further pickles
            for _ in range(3 if torch.serialization.MAGIC_NUMBER in first else 0):
                for _ in pickletools.genops(opened):
                    pass
        except ValueError:
            return False
    return True

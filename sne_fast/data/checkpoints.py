"""Checkpoints read without running code from them, and written so that the order of tensors survives."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..atomic_files import replacing
from .readers.checkpoint import ORDER_KEY, Checkpoint, OpenCheckpoint, open_checkpoint, read_checkpoint
from .readers.chosen_weights import NoWeights, choose_weights
from .readers.errors import CheckpointError
from .tied_names import identity_of

__all__ = [
    "ORDER_KEY",
    "Checkpoint",
    "CheckpointError",
    "OpenCheckpoint",
    "find_state_dict",
    "load_state_dict",
    "open_checkpoint",
    "read_checkpoint",
    "save_state_dict",
]


def load_state_dict(path: str | os.PathLike[str], key: str | None = None) -> dict[str, Tensor]:
    """Load the tensors of a checkpoint by name, in the order of the module they came from where the file knows it.

    Never runs code from the file. Tensors are read into memory, so the file may change or go afterwards. What a file is
    is told by its first bytes and not by its name. `read_checkpoint` does the same and says what was left out.

    Args:
        path: one of

            - a file of safetensors: in the order of its metadata `sne_fast.order` (a JSON list of names), else in
              natural order of the names (`layers.2` before `layers.10`), for the format sorts them; tensors that
              `safetensors.torch.save_model` wrote under one of their names have the others too;
            - a file of `torch.save`, or a pickle of tensors or, without any, of arrays of numpy. Objects in it are not
              made. The weights are the one container of tensors in it that is no optimiser's state, whatever it is
              called and however deep it is; a module that was saved whole counts as its state_dict. A moving average
              beside the weights is left out;
            - a file of ONNX, GGUF, Keras (HDF5), Flax (msgpack), TFLite or numpy, with the library that its extra
              installs: weights as torch lays them out, quantised ones as the numbers they stand for;
            - an index of shards (`model.safetensors.index.json`, `pytorch_model.bin.index.json`), or one of shards that
              count themselves (`model-00001-of-00002.safetensors`): all shards;
            - a folder: its `model.safetensors`, else its only checkpoint, else its `.npy` files as one; of a
              sentence-transformers model the weights
              of all modules, each under its number if there are several; of a diffusers pipeline the network that `key`
              names, or its only one; of PEFT the adapter;
            - the URL of any of these, such as `hf://user/name@revision` or `s3://bucket/folder`, read by ranges; needs
              the extra `remote`.
        key: where the weights are in a pickled file that has several places, names joined by dots ("generator",
            "model.encoder"), also the start of names of tensors; all tensors below are taken, for "" all of the file.

    Returns:
        A dict of CPU tensors in memory of their own; those that shared memory when they were saved share it.

    Raises:
        CheckpointError: no such file, no regular one, another format, a truncated or damaged file, no tensors, tensors
            in several places, tensors larger than what is stored of them, a shard that is missing, lacks a tensor, has
            one that the index does not name or lies outside the folder.

    Example:
        >>> save_state_dict(torch.nn.Linear(4, 3).state_dict(), "linear.safetensors")
        >>> list(load_state_dict("linear.safetensors"))
        ['weight', 'bias']
    """
    return read_checkpoint(path, key).tensors


def save_state_dict(
    state_dict: Mapping[str, Tensor], path: str | os.PathLike[str], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors as safetensors with their order in the metadata, all or nothing; the same tensors give one file.

    Args:
        state_dict: tensors by name, of any dtype that safetensors has; tied ones are written once, and their
            other names stand in the metadata, as `safetensors.torch.save_model` has it.
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
    tied: dict[str, str] = {}
    first: dict[object, str] = {}
    storages = set()
    for name, tensor in state_dict.items():
        if not isinstance(tensor, Tensor) or not isinstance(name, str):
            raise TypeError(f"save_state_dict: {name!r} must name a tensor, got {type(tensor).__name__}")
        identity = identity_of(tensor)
        if identity in first and name not in {ORDER_KEY, *(metadata or {})}:
            tied[name] = first[identity]
            continue
        first.setdefault(identity, name)
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        tensors[name] = tensor.clone() if storage in storages else tensor  # safetensors refuses shared memory
        storages.add(storage)
    if not tensors:
        raise ValueError("save_state_dict: state_dict must hold at least one tensor, got none")
    strings = {**tied, ORDER_KEY: json.dumps(list(state_dict)), **(metadata or {})}
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
    """Return the mapping of names to tensors in a checkpoint, at any depth; a mapping without tensors as it is.

    Raises:
        CheckpointError: tensors in several places; without a file's name.
    """
    if checkpoint and all(isinstance(value, Tensor) for value in checkpoint.values()):
        return checkpoint
    try:
        holder = choose_weights(checkpoint, remedy="give one of them").holder
    except NoWeights:
        return checkpoint
    return holder if isinstance(holder, Mapping) else checkpoint

"""Folders that `save_pretrained` of transformers wrote, read as the modules that they were saved from.

Saving drops tied names, and renames, joins and splits weights where published files differ from the library's modules.
The file then has other names than the module, which order, kinds and buffers are told by. `transformers` undoes this.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..extras import require
from ..regular_files import read_json
from .readers.checkpoint import Checkpoint, read_checkpoint
from .readers.errors import CheckpointError, reading, shown, shown_list
from .tensor_types import kind_of_module
from .weight_entries import entries_of_modules

__all__ = ["read_transformers_folder"]

_REMEDY = "read it as it is, with read_checkpoint"
# Entries by which a configuration would have other code run, from elsewhere or in place of the library's.
_LEFT_OUT = re.compile(
    r"auto_map|fusion_config|distributed_config|transformers_weights|_?(attn|experts)_implementation(_\w+)?"
    r"|use_kernels|kernel_config|custom_pipelines|_name_or_path|base_model_tp_plan"
)
_COUNT = re.compile(r".*(layer|block|depth|expert|stage|loop|repeat|stack).*", re.DOTALL)
_SIZE = re.compile(r"size|dim|hidden_(?!layers)|width|token|id(x|s)?$|vocab|norm|intermediate|length|index")
_LOCK = threading.Lock()


def read_transformers_folder(path: str | os.PathLike[str]) -> Checkpoint:
    """Read a folder with `config.json` as the module of `transformers` that it was saved from.

    The class that the configuration names is built without values, its weights are converted from those of the folder
    as the library does on loading, and the result has the names, the order of definition, the ties and the kinds of
    that module. No code of the folder runs, nothing is fetched, and values are not rounded. Needs the extra
    `transformers`; weights are held twice in memory while they are converted.

    Args:
        path: a folder with `config.json` and weights that `read_checkpoint` reads.

    Returns:
        A checkpoint that `sne_fast.pack` takes. What the class has no place for is in `left_out`.

    Raises:
        ModuleNotFoundError: transformers is not installed.
        CheckpointError: as `read_checkpoint`; no configuration, one of a class that transformers does not have, weights
            that are quantised, lacking or of other shapes than the class has.

    Example:
        >>> batch = sne_fast.pack([read_transformers_folder("model")])  # doctest: +SKIP
    """
    require(
        "transformers", extra="transformers", why="rebuilding a folder of transformers", otherwise=f", or {_REMEDY}"
    )
    folder = Path(os.fsdecode(path))
    written = _configuration(folder)
    found = read_checkpoint(folder)
    _check_counts(written, len(found.tensors), folder)
    try:
        with _LOCK, _offline(), torch.random.fork_rng(devices=[]), torch.no_grad():
            cls, config = _class_and_config(written, folder)
            model, info = _loaded(cls, config, found.tensors)
    except CheckpointError:
        raise
    except Exception as error:  # the library's own, of configurations and weights that do not fit each other
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"{folder}: cannot be rebuilt by transformers: {type(error).__name__}: {reason}; {_REMEDY}"
        ) from error
    modules = list(model.named_modules(remove_duplicate=False))
    entries = entries_of_modules(modules, str(folder))
    # The library marks what it loaded or tied.
    unset = {name for name, tensor in entries.weights.items() if not getattr(tensor, "_is_hf_initialized", False)}
    lacking = sorted(unset | (entries.weights.keys() & set(info["missing_keys"])))
    if lacking:
        raise CheckpointError(f"{folder}: lacks {shown_list(lacking, 4)}, which {cls.__name__} has; {_REMEDY}")
    left_out = {
        **found.left_out,
        **dict.fromkeys(sorted(info["unexpected_keys"]), f"no weight of {cls.__name__}"),
        **dict(entries.skipped),
    }
    kinds = {name: kind for name, module in modules if (kind := kind_of_module(module)) is not None}
    return Checkpoint(entries.weights, True, left_out, found.key, kinds=kinds)


def _configuration(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    if not file.is_file():
        raise CheckpointError(f"{folder}: holds no config.json, which says what to rebuild; {_REMEDY}")
    with reading(file):
        written = read_json(file, dict, nonfinite=True)
    if "quantization_config" in written or "compression_config" in written:
        raise CheckpointError(f"{folder}: holds quantised weights, which are not rebuilt; {_REMEDY}")
    cleaned: dict[str, Any] = _cleaned(written)
    return cleaned


def _cleaned(value: Any) -> Any:
    if isinstance(value, Mapping):
        if list(value) == ["__float__"] and value["__float__"] in ("Infinity", "-Infinity", "NaN"):
            return float(value["__float__"])
        return {key: _cleaned(inner) for key, inner in value.items() if not _LEFT_OUT.fullmatch(key)}
    return [_cleaned(inner) for inner in value] if isinstance(value, list) else value


def _check_counts(value: Any, tensors: int, folder: Path, name: str = "") -> None:
    """Refuse a configuration of more layers than there are tensors, which would take for ever to build."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            _check_counts(inner, tensors, folder, key)
    elif isinstance(value, list):
        for inner in value:
            _check_counts(inner, tensors, folder, name)
    elif isinstance(value, int) and value > max(1024, tensors) and _COUNT.fullmatch(name) and not _SIZE.search(name):
        raise CheckpointError(f"{folder}: its config.json has {shown(name)} {value}, more than it has tensors")


def _class_and_config(written: dict[str, Any], folder: Path) -> tuple[Any, Any]:
    """Return the class of transformers that a configuration names, and the configuration."""
    import transformers

    names, model_type = written.get("architectures"), written.get("model_type")
    name = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""
    cls = getattr(transformers, name, None) if name.isidentifier() else None
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)) or cls.config_class is None:
        raise CheckpointError(
            f"{folder}: is of the class {shown(name)}, which transformers {transformers.__version__} does not have; "
            f"{_REMEDY}"
        )
    config_class = cls.config_class
    if model_type != config_class.model_type and isinstance(model_type, str):
        config_class = transformers.CONFIG_MAPPING[model_type]
    return cls, config_class.from_dict(written)


def _loaded(cls: Any, config: Any, tensors: Mapping[str, Tensor]) -> tuple[nn.Module, dict[str, Any]]:
    """Return a model with these weights, in their widest dtype so that none is rounded, and what did not fit."""
    dtypes = {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()}
    if any(dtype.itemsize == 1 for dtype in dtypes):
        raise ValueError("float8 weights are not rebuilt")
    widest = next(iter(dtypes)) if len(dtypes) == 1 else torch.float64 if torch.float64 in dtypes else torch.float32
    # What is lacking is refused, so nothing needs initial values, and some classes overwrite rows of tables with zeros.
    # All keys without a place are wanted, those too that the library expects there.
    changed = {"initialize_weights": _nothing, "_adjust_missing_and_unexpected_keys": _nothing}
    plain = type(cls.__name__, (cls,), {**changed, "__module__": cls.__module__})
    return plain.from_pretrained(  # type: ignore[attr-defined, no-any-return]
        None,
        config=config,
        state_dict=dict(tensors),
        dtype=widest,
        local_files_only=True,
        trust_remote_code=False,
        output_loading_info=True,
    )


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Take the place of a method."""


@contextmanager
def _offline() -> Iterator[None]:
    """Keep transformers from the network, and its messages and bars from the terminal."""
    import huggingface_hub.constants as hub
    from transformers.utils import logging

    messages: Any = logging
    before, level, bars = hub.HF_HUB_OFFLINE, messages.get_verbosity(), messages.is_progress_bar_enabled()
    try:
        hub.HF_HUB_OFFLINE = True
        messages.set_verbosity_error()
        messages.disable_progress_bar()
        yield
    finally:
        hub.HF_HUB_OFFLINE = before
        messages.set_verbosity(level)
        if bars:
            messages.enable_progress_bar()

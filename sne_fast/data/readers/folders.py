"""Folders of checkpoints: which of their files are the weights; models of sentence-transformers and diffusers."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from ...regular_files import read_json
from ..layer_order import natural_key
from .adapter_configs import ADAPTER_FILE
from .beside import files_in
from .errors import CheckpointError, Unreachable, reading, shown
from .formats import READABLE, SAVED_MODEL
from .shards import counts_itself, shards_named, sibling_shards

__all__ = [
    "METADATA",
    "EmptyFolder",
    "Part",
    "array_files",
    "chosen_file",
    "component_folders",
    "independent_files",
    "is_model_folder",
    "sentence_transformer_parts",
]

_OTHER_ENDINGS = (".onnx", ".gguf", ".h5", ".weights.h5", ".hdf5", ".keras", ".msgpack", ".tflite", ".npz")
_ENDINGS = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pth.tar", ".pt.tar", *_OTHER_ENDINGS)
_ARRAYS = (".npz", ".npy")  # which are weights where there are no others
_INDEX = re.compile(r".*\.index(\..*)?\.json")
# Files beside weights that trainers write. They are no weights, whatever they are called.
_NO_WEIGHTS = re.compile(
    r"training_args\..*|(.*[_.-])?(optimi[sz]er|optim|scheduler|scaler|rng_state|optim_states)([_.-].*)?|"
    r"random_states?([_.-].*)?|.*optim_states\..*|preprocess\w*\..*|vocab\w*\..*|tokenizer\w*\..*"
)
# Names of one model in several formats.
_STANDARD = ("model", "pytorch_model", "diffusion_pytorch_model", "tf_model", "flax_model", "diffusion_flax_model")
_MODULES = "modules.json"
_PIPELINE = "model_index.json"
METADATA = ".metadata"  # of torch.distributed.checkpoint
_MOST_FOLDERS = 200
_COMPONENT = re.compile(r"[A-Za-z0-9_-]+")
# Classes of a pipeline's components that prepare inputs or outputs and have no weights.
_WEIGHTLESS_COMPONENT = re.compile(r"Scheduler|Tokenizer|Processor|FeatureExtractor|Guider")
# Modules of sentence-transformers that have no weights.
_WEIGHTLESS = ("Pooling", "Normalize", "Dropout", "BoW")


class EmptyFolder(CheckpointError):
    """A folder without files of weights."""


class Part(NamedTuple):
    """A module of a sentence-transformers model: its number, and the file of its weights."""

    number: str
    file: Path


def chosen_file(folder: Path) -> tuple[Path, dict[str, str]]:
    """Return the file of a folder that holds its weights, and the other files that look like weights, with the reason.

    Raises:
        CheckpointError: no file, several, or one part of several.
    """
    with reading(folder):
        names = sorted(files_in(folder))
    lower = {name: name.lower() for name in names}
    weights = _weights_among(names)
    left_out = {
        name: "no weights by its name" for name in names if lower[name].endswith(_ENDINGS) and name not in weights
    }
    adapters = [name for name in weights if ADAPTER_FILE.fullmatch(name)]
    indices = [name for name in names if _INDEX.fullmatch(lower[name])]
    groups = _groups(folder, [name for name in weights if name not in adapters], indices)
    if not groups and adapters:
        groups, adapters = adapters, []
    if not groups and "saved_model.pb" in names:
        raise CheckpointError(f"{folder}: {SAVED_MODEL}")
    if not groups:
        held = ", ".join(names[:8]) or "no files"
        inside = _folders_of_checkpoints(folder)
        more = f"; give the path of a folder in it, as {', '.join(inside)}" if inside else ""
        raise EmptyFolder(f"{folder}: holds no checkpoint ({READABLE}) but {held}{more}")
    chosen, others = _best(folder, groups)
    if adapters:
        others = [*others, *adapters]
    if others and (adapters or not _same_model(chosen, others)):
        raise CheckpointError(
            f"{folder}: holds several checkpoints, {', '.join(sorted([chosen, *others])[:8])}; give the path of one"
        )
    return folder / chosen, left_out | dict.fromkeys(others, f"the same model as {chosen} by its name")


def _folders_of_checkpoints(folder: Path) -> list[str]:
    """Return the first folders inside one in which there are files that look like weights."""
    found: list[str] = []
    with suppress(OSError):  # a folder that may not be looked into
        for place in sorted(folder.iterdir())[:_MOST_FOLDERS]:
            if len(found) < 4 and place.is_dir():
                names = [entry.name.lower() for entry in place.iterdir()]
                known = (_PIPELINE, METADATA)
                if any(n in known or (n.endswith(_ENDINGS) and not _NO_WEIGHTS.fullmatch(n)) for n in names):
                    found.append(place.name)
    return found


def is_model_folder(folder: Path, file: Path) -> bool:
    """Return whether a folder is that of one model, by what lies beside its weights, or by the name of their file."""
    beside = any((folder / name).is_file() for name in ("config.json", _MODULES))
    known = _INDEX.fullmatch(file.name.lower()) is not None or ADAPTER_FILE.fullmatch(file.name) is not None
    return beside or known or _stem(file.name) in _STANDARD


def array_files(folder: Path) -> list[Path]:
    """Return the `.npy` files of a folder that has no other files of weights, in natural order of their names."""
    with reading(folder):
        names = sorted(files_in(folder), key=natural_key)
    if any(_INDEX.fullmatch(name.lower()) for name in names) or _weights_among(names):
        return []
    return [folder / name for name in names if name.lower().endswith(".npy")]


def _weights_among(names: list[str]) -> list[str]:
    """Return the files that are weights by their names; archives of numpy only where there are no others."""
    found = [name for name in names if name.lower().endswith(_ENDINGS) and not _NO_WEIGHTS.fullmatch(name.lower())]
    return [name for name in found if not name.lower().endswith(_ARRAYS)] or found


def independent_files(folder: Path) -> list[Path] | None:
    """Return the checkpoints of a folder where each file is a network of its own, in natural order of their names.

    Of a diffusers pipeline with several networks they are the folders of these.

    None for a folder that is one checkpoint, and wherever files may belong together: beside an index or a
    configuration, shards that count themselves, adapters, and one name in several formats.
    """
    try:
        components = component_folders(folder)
        if components is not None:
            return components if len(components) > 1 else None
        chosen_file(folder)
    except Unreachable:
        raise
    except CheckpointError:
        pass
    else:
        return None
    with reading(folder):
        names = sorted(files_in(folder), key=natural_key)
    if any(_INDEX.fullmatch(name.lower()) or name in ("config.json", _MODULES) for name in names):
        return None
    weights = _weights_among(names)
    together = any(ADAPTER_FILE.fullmatch(name.lower()) or counts_itself(name) for name in weights)
    if len(weights) < 2 or together or len({_stem(name) for name in weights}) < len(weights):
        return None
    return [folder / name for name in weights]


def _groups(folder: Path, weights: list[str], indices: list[str]) -> list[str]:
    """Return one file for each checkpoint: an index, the first of counted files without one, or the file itself."""
    found, covered = [], set()
    for name in indices:
        found.append(name)
        stem = name.lower().partition(".")[0]
        covered |= {
            other for other in weights if re.match(rf"{re.escape(stem)}[-_.].*\d+[-_.]of[-_.]\d+", other.lower())
        }
        covered |= shards_named(folder / name)
    for name in weights:
        if name in covered:
            continue
        parts = sibling_shards(folder / name)
        covered |= {part.name for part in parts or ()}
        found.append(name)
    return found


def _best(folder: Path, groups: list[str]) -> tuple[str, list[str]]:
    """Return the checkpoint to read if all are of one model.

    Safetensors come before files of torch, those before other formats, and whole files before shards.
    """

    def rank(name: str) -> tuple[bool, bool, bool, bool]:
        other = name.lower().endswith(_OTHER_ENDINGS)
        return ".safetensors" not in name, other, _INDEX.fullmatch(name) is not None, _stem(name) not in _STANDARD

    ordered = sorted(groups, key=rank)
    if "model.safetensors" in groups:
        ordered.sort(key=lambda name: name != "model.safetensors")
    return ordered[0], ordered[1:]


def _stem(name: str) -> str:
    """Return what a file's name says of the model: without format, index, count of shards and variant of dtype."""
    name = re.sub(r"\.index(\..*)?\.json$", "", name)
    name = re.sub(r"[-_.]?\d+[-_.]of[-_.]\d+", "", name)
    for ending in sorted(_ENDINGS, key=len, reverse=True):
        name = name.removesuffix(ending)
    return re.sub(r"\.(fp16|bf16|fp32)$", "", name)


def _same_model(chosen: str, others: list[str]) -> bool:
    """Return whether all files are one model by their names; a `model.safetensors` stands for its folder."""
    if chosen in ("model.safetensors", "model.safetensors.index.json"):
        return not any(re.fullmatch(r"model_\d+", _stem(name)) for name in others)
    stems = {_stem(name) for name in [chosen, *others]}
    return len(stems) == 1 or stems <= set(_STANDARD)


def component_folders(folder: Path) -> list[Path] | None:
    """Return the folders of a pipeline's networks, in the order of its list; None for a folder that is no pipeline.

    Components without weights, such as schedulers and tokenizers, are not among them; networks that are missing are.

    Raises:
        CheckpointError: a list that is damaged.
    """
    listing = folder / _PIPELINE
    if not listing.exists():
        return None
    with reading(listing):
        entries = read_json(listing, dict)
    found = []
    for name, entry in entries.items():
        if not isinstance(entry, list) or len(entry) != 2 or not all(isinstance(part, str) for part in entry):
            continue  # settings, and components that this pipeline goes without
        if not _COMPONENT.fullmatch(name):
            raise CheckpointError(f"{listing}: refused, its component {shown(name)} is no name of a folder in it")
        place = folder / name
        if _has_weights(place) if place.is_dir() else not _WEIGHTLESS_COMPONENT.search(entry[1]):
            found.append(place)
    return found


def _has_weights(folder: Path) -> bool:
    try:
        chosen_file(folder)
    except EmptyFolder:
        return False
    except Unreachable:
        raise
    except CheckpointError:  # which is said where the network is read
        pass
    return True


def sentence_transformer_parts(folder: Path) -> list[Part] | None:
    """Return the files of all modules of a sentence-transformers model that have weights, None for another folder.

    Raises:
        CheckpointError: a list of modules that is damaged, or a module whose weights are missing.
    """
    listing = folder / _MODULES
    if not listing.exists():
        return None
    with reading(listing):
        modules = read_json(listing, list)
    parts: list[Part] = []
    for module in modules:
        entries = [module.get(key) for key in ("path", "type")] if isinstance(module, dict) else [None]
        if not all(isinstance(entry, str) for entry in entries):
            raise CheckpointError(f"{listing}: must list modules by path and type")
        path, kind = map(str, entries)
        steps = re.split(r"[/\\]", path)
        if ".." in steps or (path and steps[0] == "") or ":" in path or "\0" in path:
            raise CheckpointError(f"{listing}: refused, its module {shown(path)} lies outside the folder")
        place = folder / path
        if kind.rpartition(".")[2] in _WEIGHTLESS:
            continue
        if not place.is_dir():
            raise CheckpointError(f"{folder}: its module {shown(path)} is missing; fetch it into {folder}")
        try:
            parts.append(Part(str(module.get("idx", len(parts))), chosen_file(place)[0]))
        except CheckpointError as error:
            raise CheckpointError(f"{folder}: its module {shown(path)} ({kind}) has no weights: {error}") from error
    if not parts:
        raise CheckpointError(f"{folder}: holds a model of sentence-transformers without weights")
    return parts

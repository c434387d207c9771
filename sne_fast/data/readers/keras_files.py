"""Files of Keras: `.keras` archives, `.weights.h5` of Keras 3, and HDF5 files of Keras 2, TF-Keras and transformers."""

from __future__ import annotations

import io
import json
import math
import re
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any, cast

import numpy as np

from ...regular_files import open_regular, parse_json
from ..layer_order import natural_key
from .contents import Contents, array_tensor, lazy_array, need, reading_format
from .errors import shown
from .hdf5_heaps import check_heaps
from .keras_configs import classes, configured_name, keys_of_layers, listed, places
from .keras_layouts import Variable, layer_class, parameters, variable_names

__all__ = ["read_hdf5", "read_keras"]

_MAX_DEPTH = 48
_MOST_DATASETS = 200_000
_MOST_RATIO = 1100  # deflate makes at most 1032 bytes out of one
_MAX_CONFIG = 64 * 2**20
_WEIGHTS = "model.weights.h5"
_TRANSFORMERS = "_._"  # stands in names of transformers for the dot before a number
_BESIDE = {"optimizer": "an optimiser's state", "optimizer_weights": "an optimiser's state",
           "metrics": "metrics of the training", "compile_metrics": "metrics of the training",
           "loss_tracker": "metrics of the training"}  # fmt: skip


def read_hdf5(file: Path) -> Contents:
    """Return the weights of an HDF5 file: of Keras, or without its marks all its arrays as they are stored.

    Layers whose order the file tells have their place in front of their names, so that their names keep it.

    Raises:
        CheckpointError: `h5py` is missing, the file is damaged or refers to other files.
    """
    need(file, "an HDF5 file", "h5py", extra="keras")
    return _Reader(file, partial(open_regular, file), "HDF5 file").read(None)


def read_keras(file: Path) -> Contents:
    """Return the weights of a `.keras` archive, as `read_hdf5` those of the HDF5 file in it.

    Raises:
        CheckpointError: as `read_hdf5`.
    """
    need(file, "a file of Keras", "h5py", extra="keras")
    with reading_format(file, "file of Keras"), open_regular(file) as opened, zipfile.ZipFile(opened) as archive:
        config = None
        if "config.json" in archive.namelist() and archive.getinfo("config.json").file_size < _MAX_CONFIG:
            config = _json(archive.read("config.json").decode())
    return _Reader(file, partial(_inside, file), "file of Keras").read(config)


@contextmanager
def _inside(file: Path) -> Iterator[IO[bytes]]:
    """Open the HDF5 file in an archive, where it is stored as it is."""
    with open_regular(file) as opened, zipfile.ZipFile(opened) as archive:
        entry = archive.getinfo(_WEIGHTS)
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
            if entry.flag_bits & 1 or entry.file_size > _MOST_RATIO * max(entry.compress_size, 1):
                raise ValueError(f"its entry {_WEIGHTS} is encrypted or larger than it can be")
            yield io.BytesIO(archive.read(entry))
            return
        opened.seek(entry.header_offset + 26)
        lengths = struct.unpack("<HH", opened.read(4))
        yield cast(IO[bytes], _Window(opened, entry.header_offset + 30 + sum(lengths), entry.file_size))


class _Window(io.RawIOBase):
    """A part of a file as a file of its own."""

    def __init__(self, opened: IO[bytes], start: int, size: int) -> None:
        self._opened, self._start, self._size, self._place = opened, start, size, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._place = offset + (0, self._place, self._size)[whence]
        return self._place

    def readinto(self, buffer: Any) -> int:
        count = max(min(len(buffer), self._size - self._place), 0)
        self._opened.seek(self._start + self._place)
        held = self._opened.read(count)
        buffer[: len(held)] = held
        self._place += len(held)
        return len(held)


def _json(text: Any) -> dict[str, Any] | None:
    """Return an object of JSON, None for anything else."""
    try:
        found = parse_json(text.decode() if isinstance(text, bytes) else str(text), "a config", dict, max_depth=128)
    except (ValueError, json.JSONDecodeError):
        return None
    return dict(found)


class _Reader:
    def __init__(self, file: Path, opening: Callable[[], Any], what: str) -> None:
        self.file, self.opening, self.what = file, opening, what
        self.found = Contents(keeps_order=True)
        self.count = 0

    def read(self, config: dict[str, Any] | None) -> Contents:
        import h5py

        with reading_format(self.file, self.what), self.opening() as opened:
            check_heaps(opened)
        with reading_format(self.file, self.what), self.opening() as opened, h5py.File(opened, "r") as root:
            held = root["model_weights"] if "model_weights" in self._groups(root) else root
            if "layer_names" in held.attrs or "layer_names0" in held.attrs:
                self._layers(held, _json(next(iter(_attribute(root, "model_config")), None)) or config)
                for name in self._groups(root):
                    if held is not root and name != "model_weights":
                        self.found.left_out[name] = _BESIDE.get(name, "beside the weights of the model")
            elif self._numbered(root, 0):
                self._trackable(root, config or {}, [], "", 0)
            else:
                self.found.keeps_order = False
                self._arrays(root, [], 0)
        return self.found

    # ---------------------------------------------------------------------------------------------- what HDF5 holds

    def _members(self, group: Any) -> dict[str, Any]:
        """Return what a group holds itself; links to other places and files are left out."""
        import h5py

        found = {}
        for name in group:
            link = group.get(name, getlink=True)
            if isinstance(link, h5py.HardLink):
                found[name] = group[name]
            else:
                self.found.left_out[f"{group.name}/{name}".lstrip("/")] = "a link to another place"
        return found

    def _groups(self, group: Any) -> dict[str, Any]:
        import h5py

        return {name: value for name, value in self._members(group).items() if isinstance(value, h5py.Group)}

    def _datasets(self, group: Any) -> dict[str, Any]:
        import h5py

        return {name: value for name, value in self._members(group).items() if isinstance(value, h5py.Dataset)}

    def _variable(self, name: str, dataset: Any) -> Variable | None:
        """Return a dataset of numbers, checked against the bytes that are stored of it; None for one of others."""
        place = dataset.name.lstrip("/")
        self.count += 1
        if self.count > _MOST_DATASETS:
            raise ValueError(f"it has more than {_MOST_DATASETS:,} arrays")
        if dataset.shape is None or dataset.dtype.kind not in "biufcV" or dataset.dtype.hasobject:
            self.found.left_out[place] = f"no array of numbers ({dataset.dtype})"
            return None
        stored = dataset.id.get_storage_size()
        ratio = 1 if dataset.chunks is None else _MOST_RATIO
        if dataset.is_virtual or dataset.external or dataset.size * dataset.dtype.itemsize > ratio * stored:
            raise ValueError(f"its array {shown(place)} has fewer bytes in the file than its shape takes")
        if dataset.dtype.kind == "V" and not _is_bfloat16(dataset.dtype):
            self.found.left_out[place] = f"no array of numbers ({dataset.dtype})"
            return None
        return Variable(name, tuple(dataset.shape), partial(self._values, dataset.name))

    def _values(self, place: str) -> np.ndarray[Any, Any]:
        import h5py

        with self.opening() as opened, h5py.File(opened, "r") as root:
            held = np.asarray(root[place][()])
        return _wide(held) if held.dtype.kind == "V" else held

    def _add(self, path: Sequence[str], kind: str, datasets: Sequence[tuple[str, Any]]) -> None:
        variables = [v for name, dataset in datasets if (v := self._variable(name, dataset)) is not None]
        dtypes = {name: _dtype(dataset) for name, dataset in datasets}
        widest = next(iter(dtypes.values()), None)
        for layer, parameter in parameters(path, kind, variables):
            dtype = dtypes.get(parameter.name, widest)
            assert dtype is not None
            name = f"{layer}.{parameter.name}" if layer else parameter.name
            damage = partial(reading_format, self.file, self.what)
            self.found.add(name, lazy_array(parameter.shape, dtype, parameter.values, None, damage))

    # -------------------------------------------------------------------------------------- Keras 2: layers by name

    def _layers(self, held: Any, config: dict[str, Any] | None) -> None:
        names = [name for name in _texts(held, "layer_names") if not re.fullmatch(r"input(_layer)?(_\d+)?", name)]
        groups = self._groups(held)
        kinds = dict(classes(config, 0))
        order = dict(places(config, 0))
        found = [(i, name, _texts(groups[name], "weight_names")) for i, name in enumerate(names) if name in groups]
        numbered = len(found) > 1 and not any(_TRANSFORMERS in weight for _, _, ws in found for weight in ws)
        for i, name, weights in found:
            layers: dict[tuple[str, ...], list[tuple[str, Any]]] = {}
            for weight in weights:
                parts = re.sub(r":\d+$", "", weight).replace(_TRANSFORMERS, "/").split("/")
                inner = parts[:-1]
                # TensorFlow puts a number behind a name that it has seen before.
                own = [j for j, part in enumerate(inner) if re.fullmatch(rf"{re.escape(name)}(_\d+)?", part)]
                if own:
                    inner = inner[own[-1] + 1 :]
                elif len(weights) == 1 or name.startswith(("top_level", "_")):
                    inner = inner[-1:]
                dataset = self._at(groups[name], weight)
                layers.setdefault(tuple(inner), []).append((_own(parts[-1], name), dataset))
            for inner_path, datasets in layers.items():
                last = inner_path[-1] if inner_path else name
                kind = layer_class(kinds.get(last, ""), kinds.get(name, "") if not inner_path else "", last)
                path = [*([str(order.get(name, i))] if numbered else []), name]
                for part in inner_path:
                    path += [str(order[part]), part] if numbered and part in order else [part]
                self._add(path, kind, _named(kind, datasets))

    def _at(self, group: Any, place: str) -> Any:
        """Return the dataset at a place below a group, with no link on the way."""
        for part in place.split("/"):
            members = self._members(group)
            if part not in members:
                raise ValueError(f"it lacks the array {shown(place)} that it lists")
            group = members[part]
        if not hasattr(group, "dtype"):
            raise ValueError(f"it has a group where it lists the array {shown(place)}")
        return group

    # ------------------------------------------------------------------------------- Keras 3: variables by number

    def _numbered(self, group: Any, depth: int) -> bool:
        """Return whether a group has variables as Keras 3 writes them, at any depth."""
        if depth > _MAX_DEPTH:
            raise ValueError("its groups are nested too deeply")
        groups = self._groups(group)
        return "vars" in groups or any(self._numbered(inner, depth + 1) for inner in groups.values())

    def _trackable(self, group: Any, layer: Mapping[str, Any], path: list[str], key: str, depth: int) -> None:
        """Add the variables of a layer or model, then those of what it holds.

        Args:
            group: its group.
            layer: its class and config, where the archive has them.
            path: names that lead to it.
            key: its name in the group that holds it.
            depth: of the group.
        """
        if depth > _MAX_DEPTH:
            raise ValueError("its groups are nested too deeply")
        groups = self._groups(group)
        config = layer.get("config") if isinstance(layer.get("config"), dict) else {}
        assert isinstance(config, dict)
        if "vars" in groups:
            held = self._datasets(groups["vars"])
            datasets = [held[name] for name in sorted(held, key=natural_key)]
            kind = layer_class(str(layer.get("class_name", "")), _name_of(group), key)
            names = variable_names(kind, [dataset.shape or () for dataset in datasets], config)
            if key.startswith("seed_generator") or "seed_generator" in _name_of(group):
                self.found.left_out.update({d.name.lstrip("/"): "a random state" for d in datasets})
            else:
                self._add(path, kind, list(zip(names, datasets, strict=True)))
        for name in sorted(groups, key=natural_key):
            if name in _BESIDE and depth == 0:
                self.found.left_out[name] = _BESIDE[name]
            elif name in ("layers", "_layers"):
                self._list(groups[name], config, path, depth + 1)
            elif name != "vars":
                inner = config.get("layer")
                self._trackable(groups[name], inner if isinstance(inner, dict) else {}, [*path, name], name, depth + 1)

    def _list(self, group: Any, config: Mapping[str, Any], path: list[str], depth: int) -> None:
        """Add the layers of a model, in the order of its config."""
        entries = config.get("layers")
        layers = listed(entries)
        by_name = {configured_name(entry): (i, entry) for i, entry in enumerate(layers)}
        inside = self._groups(group)
        by_class = keys_of_layers(entries)
        known = {
            name: by_name.get(_name_of(inner) or by_class.get(name, "")) or by_name.get(name)
            for name, inner in inside.items()
        }
        ordered = sorted(inside, key=lambda name: (known[name][0] if known[name] else len(layers), natural_key(name)))  # type: ignore[index]
        if not layers and len(inside) > 1:
            self.found.keeps_order = False
        for name in ordered:
            place, called = known[name], _name_of(inside[name]) or by_class.get(name) or name
            if place is None:
                self._trackable(inside[name], {}, [*path, called], name, depth + 1)
            else:
                self._trackable(inside[name], place[1], [*path, str(place[0]), called], name, depth + 1)

    # ------------------------------------------------------------------------------------------------ other HDF5

    def _arrays(self, group: Any, path: list[str], depth: int) -> None:
        if depth > _MAX_DEPTH:
            raise ValueError("its groups are nested too deeply")
        for name, dataset in self._datasets(group).items():
            variable = self._variable(name, dataset)
            if variable is not None:
                damage = partial(reading_format, self.file, self.what)
                full = ".".join([*path, name])
                self.found.add(full, lazy_array(variable.shape, _dtype(dataset), variable.values, None, damage))
        for name, inner in self._groups(group).items():
            self._arrays(inner, [*path, name], depth + 1)


def _texts(group: Any, name: str) -> list[str]:
    """Return a list of texts among a group's attributes; a long one is in several of them."""
    parts = [name] if name in group.attrs else []
    while not parts or (parts[0] != name and f"{name}{len(parts)}" in group.attrs):
        if f"{name}{len(parts)}" not in group.attrs:
            break
        parts.append(f"{name}{len(parts)}")
    return [text for part in parts for text in _attribute(group, part)]


def _attribute(group: Any, name: str) -> list[str]:
    """Return the texts of an attribute; none where it has others, over some of which HDF5 loops for ever."""
    import h5py

    if name not in group.attrs:
        return []
    held = group.attrs.get_id(name)
    if not isinstance(held.get_type(), h5py.h5t.TypeStringID) or math.prod(held.shape or (0,)) > _MOST_DATASETS:
        return []
    values = np.asarray(group.attrs[name]).reshape(-1).tolist()
    return [value.decode() if isinstance(value, bytes) else str(value) for value in values]


def _name_of(group: Any) -> str:
    """Return the name of a layer that Keras 3 writes beside its variables."""
    variables = group.get("vars")
    return next(iter(_attribute(variables, "name")), "") if variables is not None else ""


def _own(name: str, layer: str) -> str:
    """Return a variable's own name; Keras 1 has that of the layer in front."""
    own = re.sub(rf"^{re.escape(layer)}_", "", name)
    return own if own in ("W", "b", "gamma", "beta", "running_mean", "running_std") else name


def _named(kind: str, datasets: list[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """Return the variables of a layer; Keras 3 calls the kernel of a depthwise convolution as any other."""
    depthwise = kind.startswith("depthwise")
    return [("depthwise_kernel" if depthwise and name == "kernel" else name, held) for name, held in datasets]


def _is_bfloat16(dtype: Any) -> bool:
    return bool(dtype.itemsize == 2 and not dtype.names)


def _wide(held: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return bfloat16, which HDF5 keeps as two bytes without a meaning, as float32."""
    return (held.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def _dtype(dataset: Any) -> Any:
    dtype = np.dtype(np.float32) if dataset.dtype.kind == "V" else dataset.dtype
    return array_tensor(np.empty(0, dtype if dtype.kind in "biufc" else np.float32)).dtype

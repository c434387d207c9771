"""Loaders of implicit neural representations (INRs) as the authors of DWSNets and NFN published them.

DWSNets (Navon et al. 2023, arXiv 2301.12780), after https://github.com/AvivNavon/DWSNets (experiments/mnist,
experiments/ssl, nn/inr.py): a SIREN per file, `mnist_png_training_2_23089/checkpoints/model_final.pth` (label 2, image
23089), named by a JSON of splits, `{"train": {"path": [...], "label": [...]}, "val": ..., "test": ...}`. The sine
waves of its self-supervised task: `{"train": [paths], ...}`, and in each file besides the weights `coef` (a, b) with
y = a sin(b x), and the points `x`, `y` it was fitted to. Networks: 2-32-32-1 (1-32-32-1), sin(30 .), output + 0.5.

NFN (Zhou et al. 2023, arXiv 2302.14040), after https://github.com/AllanYangZhou/nfn (experiments/data_utils.py,
siren_utils.py): `<prefix>_<label>s/net<image>.pth`; splits are ranges of the image's number, [0, 45000), [45000,
50000), [50000, ...) for MNIST. Networks: 2-32-32-1 (CIFAR: -3), sin(30 .), images in [-1, 1].
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence, Set
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.checkpoints import CheckpointError, load_state_dict
from ..data.layer_order import natural_key
from ..data.pickles import RefusedArray, as_array, load_plain
from ..data.readers.chosen_weights import choose_weights
from ..regular_files import FileError, read_json
from .csv_table import one_type
from .sirens import pixel_grid, siren_of
from .table import FileSource, Zoo

SPLITS = ("train", "val", "test")
_IMAGE_FOLDER = re.compile(r"_(train[a-z]*|test[a-z]*)_([A-Za-z0-9]+)_(\d+)$")  # split, label, number
_NFN_FILE = re.compile(r"net(\d+)\.pth$")
_MOST_COEFFICIENTS = 100  # a sine wave has two; iterating over a tensor of the file without a limit could take for ever
_MOST_BYTES = 2**28  # of a JSON of splits
_LONGEST_PATH = 4096
_FORM = "must map splits to paths and labels, or to paths"
Images = Tensor | np.ndarray | Callable[[Mapping[str, Any]], Tensor]


def load_dwsnets(
    splits: str | PathLike[str], *, root: str | PathLike[str] | None = None, splits_to_take: Sequence[str] = SPLITS
) -> Zoo:
    """Read INRs in the layout of DWSNets: images (with labels) or sine waves (with two coefficients).

    Args:
        splits: the JSON file of splits; or a folder, whose files `*_png_*/**/*.pth` are read, with label and split
            (train or test) from their names.
        root: the folder of the networks, by default that of the JSON. A relative path is one below it; since the JSON
            has the paths of the machine that wrote it, of each the longest end that exists below `root` is taken.
        splits_to_take: names of the splits in the JSON to read.

    Returns:
        A zoo whose rows hold `split` and, for images, `label` and `image` (its number); for sine waves `coef_0`
        (amplitude) and `coef_1` (frequency), for which every file is read once.

    Raises:
        FileNotFoundError: no such JSON or folder, no networks in it, or a missing network that the JSON names, also
            where a file of the same name lies elsewhere below `root`.
        FileError: a JSON that is damaged or of another form.
        CheckpointError: a file that holds more than tensors, numbers and numpy arrays, a path outside `root`.

    Example:
        >>> zoo = load_dwsnets("dataset/mnist_splits.json", root="dataset/mnist-inrs")
        >>> verify(zoo, range(10), images=lambda row: mnist[row["split"] == "test"][row["image"]]) < 0.01
        True
    """
    splits = Path(splits)
    if splits.is_dir():
        return _dwsnets_folder(splits)
    if not splits.exists():
        raise FileNotFoundError(f"{splits}: there is no such file or folder")
    content = read_json(splits, dict, max_bytes=_MOST_BYTES)
    taken = [name for name in splits_to_take if name in content]
    listed = [(name, path, label) for name in taken for path, label in _listed(content[name], name, splits)]
    if not listed:
        raise FileNotFoundError(f"{splits}: names no networks in the splits {', '.join(splits_to_take)}")
    base = Path(root) if root is not None else splits.parent
    files = _find_all([p for _, p, _ in listed], base, splits, elsewhere=root is not None)
    columns: dict[str, list[Any]] = {"name": _names(files), "split": [name for name, _, _ in listed]}
    if any(label is not None for _, _, label in listed):
        columns["label"] = one_type([_number(label) for _, _, label in listed])
        columns["image"] = [int(match.group(3)) if (match := _matched(file)) else None for file in files]
        targets = ["label"]
    else:
        coefficients = [_coefficients(file) for file in files]
        for file, found in zip(files, coefficients, strict=True):
            if len(found) != len(coefficients[0]):
                raise CheckpointError(
                    f"{file}: its coef has {len(found)} numbers, that of others {len(coefficients[0])}"
                )
        columns.update({f"coef_{k}": [c[k] for c in coefficients] for k in range(len(coefficients[0]))})
        targets = [name for name in columns if name.startswith("coef_")]
    return _zoo("dwsnets", columns, files, read_inr, targets, base)


def _listed(part: Any, name: str, splits: Path) -> list[tuple[str, Any]]:
    """Return the paths of a split of the JSON with their labels, None where it has none."""
    paths, labels = (part.get("path"), part.get("label")) if isinstance(part, dict) else (part, None)
    if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
        raise FileError(f"{splits}: {_FORM}; the paths of {name!r} are no list of strings")
    if not isinstance(part, dict):
        return [(path, None) for path in paths]
    if not isinstance(labels, list) or len(labels) != len(paths):
        raise FileError(f"{splits}: {_FORM}; {name!r} does not have one label per path")
    odd = next((label for label in labels if not isinstance(label, str | int | float | None)), None)
    if odd is not None:
        raise FileError(f"{splits}: the labels of {name!r} must be numbers or text, one is a {type(odd).__name__}")
    return list(zip(paths, labels, strict=True))


def load_nfn(
    folder: str | PathLike[str],
    prefix: str = "randinit_smaller",
    split_points: tuple[int, int] | None = (45_000, 50_000),
) -> Zoo:
    """Read INRs in the layout of NFN: `<prefix>_<label>s/net<image>.pth`.

    Args:
        folder: the folder of the sets of networks.
        prefix: the set to read, such as `randinit_smaller` or `randinit_smaller_aug0`.
        split_points: image numbers where "val" and "test" begin; None leaves the column `split` out. They are (45000,
            50000) for MNIST and FashionMNIST, where training and test images are numbered consecutively.

    Returns:
        A zoo whose rows hold `label`, `image` and `split`.

    Raises:
        FileNotFoundError: no such folder, or no networks of that prefix.

    Example:
        >>> load_nfn("siren_mnist_wts").column("label").tolist()
        [0.0, 1.0, 2.0]
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: there is no such folder")
    found = []
    for file in folder.glob(f"{prefix}_*s/*.pth"):
        label = re.fullmatch(re.escape(prefix) + r"_(\d+)s", file.parent.name)
        image = _NFN_FILE.match(file.name)
        if label and image:
            found.append((int(image.group(1)), int(label.group(1)), file))
    if not found:
        there = sorted({entry.name for entry in folder.iterdir() if entry.is_dir()})[:8]
        raise FileNotFoundError(
            f"{folder}: holds no {prefix}_<label>s/net<image>.pth, but {', '.join(there) or 'nothing'}"
        )
    found.sort(key=lambda entry: entry[:2])
    files = [file for _, _, file in found]
    columns: dict[str, list[Any]] = {
        "name": _names(files),
        "label": [label for _, label, _ in found],
        "image": [image for image, _, _ in found],
    }
    if split_points is not None:
        columns["split"] = [SPLITS[sum(image >= point for point in split_points)] for image, _, _ in found]
    return _zoo("nfn", columns, files, read_inr, ["label"], folder)


def read_inr(file: Path) -> dict[str, Tensor]:
    """Read the weights and biases of an INR, without the points that some files hold besides."""
    content = _extras(file)
    return {
        key: value.clone()
        for key, value in content.items()
        if isinstance(value, Tensor) and isinstance(key, str) and key.rpartition(".")[2] in ("weight", "bias")
    }


def _extras(file: Path) -> Mapping[str, Any]:
    """Read a checkpoint with numpy arrays and plain values beside the tensors, without running any code of it."""
    if file.suffix == ".safetensors" or not file.is_file():
        return load_state_dict(file)
    content = load_plain(file, arrays=True)
    if isinstance(content, Mapping) and any(isinstance(value, Tensor) for value in content.values()):
        return content
    try:
        return choose_weights(content).tensors
    except CheckpointError as error:
        raise CheckpointError(f"{file}: {error}") from error


def _coefficients(file: Path) -> list[float]:
    found = _extras(file).get("coef")
    if found is None:
        raise ValueError(f"{file}: holds no coef, the label of a sine wave; splits without labels list sine waves")
    try:
        found = as_array(found)
        if not isinstance(found, list | tuple | np.ndarray | Tensor) or not 1 <= len(found) <= _MOST_COEFFICIENTS:
            raise TypeError(f"got {type(found).__name__}")
        if any(isinstance(c, str | bytes | bytearray) for c in found):
            raise TypeError("got text")
        return [float(c) for c in found]
    except (RefusedArray, TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise CheckpointError(f"{file}: its coef must be a few numbers, the label of a sine wave, {error}") from error


def _dwsnets_folder(folder: Path) -> Zoo:
    found = [(file, match) for file in folder.glob("*_png_*/**/*.pth") if (match := _matched(file))]
    if not found:
        raise FileNotFoundError(f"{folder}: holds no <data>_png_<training or testing>_<label>_<image>/**/*.pth")
    found.sort(key=lambda entry: natural_key(str(entry[0])))
    files = [file for file, _ in found]
    columns: dict[str, list[Any]] = {
        "name": _names(files),
        "split": ["train" if match.group(1).startswith("train") else "test" for _, match in found],
        "label": one_type([_number(match.group(2)) for _, match in found]),
        "image": [int(match.group(3)) for _, match in found],
    }
    return _zoo("dwsnets", columns, files, read_inr, ["label"], folder)


def _number(label: Any) -> Any:
    return int(label) if isinstance(label, str) and label.isdecimal() and len(label) < 19 else label


def _matched(file: Path) -> re.Match[str] | None:
    return next((match for part in reversed(file.parts[:-1]) if (match := _IMAGE_FOLDER.search(part))), None)


def _find_all(paths: Sequence[str], base: Path, splits: Path, elsewhere: bool) -> list[Path]:
    """Return the files below `base` that paths of perhaps another machine name.

    Paths are compared by their letters and not resolved, since folders of networks may be made of links.

    Args:
        paths: as the JSON has them.
        base: the folder of the networks.
        splits: the JSON, for messages.
        elsewhere: whether the user has said that the networks lie in `base`, wherever the paths lead.
    """
    folders = {Path(os.path.abspath(base)), Path(os.path.realpath(base))}
    found = [_find(path, base, folders, splits, elsewhere) for path in paths]
    starts = {start for _, start in found}
    meant: dict[Path, tuple[str, str]] = {}
    for path, (file, start) in zip(paths, found, strict=True):
        # `base` stands for one folder of the other machine: what is missing there is not looked for farther down.
        if any(start[:k] in starts for k in range(len(start))):
            raise FileNotFoundError(
                f"{splits} names {_shown(path)}, which is missing where its other networks lie; {file} is another place"
            )
        one = os.path.normpath(path) if start else str(file)
        other, as_written = meant.setdefault(file, (one, path))
        if one != other:
            raise FileNotFoundError(
                f"{splits} names {_shown(as_written)} and {_shown(path)}, for which there is only one file, {file}"
            )
    return [file for file, _ in found]


def _find(path: str, base: Path, folders: Set[Path], splits: Path, elsewhere: bool) -> tuple[Path, tuple[str, ...]]:
    """Return the file below `base` with the longest end of the path, and the start of the path that was left out.

    `folders` holds the absolute names of `base`: a path that begins with one has no other machine's start.
    """
    normal = Path(os.path.normpath(path))
    parts = normal.parts
    missing = f"{splits} names {_shown(path)}, which is missing, also below {base}; give root="
    outside = f"{splits}: refused, it names {_shown(path)}, which lies outside {base}; give root="
    if "\0" in path or len(path) > _LONGEST_PATH:  # some versions of normpath end at a NUL character
        raise FileNotFoundError(missing)
    if ".." in parts:
        raise CheckpointError(outside)
    if normal.anchor:
        for folder in folders:
            if normal.is_relative_to(folder):
                if os.path.isfile(normal):
                    return base / normal.relative_to(folder), ()
                raise FileNotFoundError(missing)
        if not elsewhere and os.path.isfile(normal):
            raise CheckpointError(outside)
    for k in range(1 if normal.anchor else 0, len(parts)):
        file = base.joinpath(*parts[k:])
        if os.path.isfile(file):
            return file, parts[:k]
    if normal.anchor and os.path.isfile(normal):
        raise CheckpointError(outside)
    raise FileNotFoundError(missing)


def _shown(path: str) -> str:
    return path if path.isprintable() else repr(path)


def _names(files: Sequence[Path]) -> list[str]:
    """Return names of files, each with as many of its folders as it takes to tell the files apart."""
    for depth in range(1, 6):
        names = ["-".join(file.with_suffix("").parts[-depth:]) for file in files]
        if len(set(names)) == len(files):
            return names
    return [f"{i:06d}" for i in range(len(files))]


def _zoo(
    source: str, columns: dict[str, list[Any]], files: list[Path], reader: Any, targets: list[str], folder: Path
) -> Zoo:
    columns["architecture"] = ["siren"] * len(files)
    about = {"source": source, "targets": targets, "hyperparameters": []}
    return Zoo(columns, FileSource(files, reader), about, folder)


@torch.no_grad()
def verify(
    zoo: Zoo, networks: Sequence[int], *, images: Images | None = None, omega: float = 30.0
) -> list[tuple[float, str]]:
    """Return the mean squared error between the output of each network and the image or sine it was fitted to.

    Args:
        zoo: of `load_dwsnets` or `load_nfn`.
        networks: positions of the networks.
        images: `(n, c, h, w)`, one per network of the zoo, or a function of the row that returns `(c, h, w)`, in the
            range that the networks were fitted to: [0, 1] for DWSNets, [-1, 1] for NFN. Sine waves need none; they are
            compared with `coef_0 sin(coef_1 x)` on [-pi, pi).
        omega: factor inside every sine.

    Raises:
        ValueError: INRs of images without `images`.
    """
    dwsnets = zoo.about["source"] == "dwsnets"
    found = []
    for i in networks:
        row = zoo.rows[i]
        siren = siren_of(zoo.state_dict(i), omega, 0.5 if dwsnets else 0.0)
        if "coef_0" in row:
            x = torch.arange(-torch.pi, torch.pi, torch.pi / 1000)[:, None]
            error = siren(x) - row["coef_0"] * (row["coef_1"] * x).sin()
        else:
            if images is None:
                raise ValueError("verify: INRs of images need images=, (n, c, h, w) or a function of the row")
            image = torch.as_tensor(images(row) if callable(images) else images[i]).float()
            image = image if image.ndim == 3 else image[None]
            error = siren(pixel_grid(image.shape[1], image.shape[2], x_first=dwsnets)) - image.flatten(1).t()
        mean = error.square().mean().item()
        found.append((mean if mean == mean else float("inf"), str(row["name"])))
    return found

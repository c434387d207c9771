"""Loader of the Small CNN Zoo of Unterthiner et al. 2020, "Predicting Neural Network Accuracy from Weights".

The paper is arXiv 2002.11448; the layout is described in the README and notebook of
https://github.com/google-research/google-research/tree/master/dnn_predict_accuracy. Each data set (cifar10,
fashion_mnist, mnist, svhn_cropped) is a folder of

- `weights.npy` `(N, 4970)` float32: nine checkpoints of each of 30,000 networks. Every layer's bias stands before its
  kernel; convolution kernels are height x width x in x out, dense ones in x out, as in Keras;
- `metrics.csv.gz`: a row for each row of the matrix: `step` (epochs 0, 1, 2, 3, 20, 40, 60, 80, 86; 86 is final),
  `test_accuracy`, `test_loss`, `train_accuracy`, `train_loss`, `config.*`, `modeldir`;
- `layout.csv`: `varname` ("sequential/conv2d/kernel:0"), `start_idx`, `end_idx`, `shape` ("(3, 3, 1, 16)").
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..regular_files import FileError, check_regular
from .architectures import unterthiner_cnn
from .csv_table import read_csv
from .rebuilding import accuracy, check_images, compare
from .table import Zoo

TARGETS = ("test_accuracy", "test_loss", "train_accuracy", "train_loss")
FINAL_STEP = 86
_OWN = ("name", "architecture", "weights")  # columns that the loader adds
_SHAPE = re.compile(r"\(\s*\d{1,9}\s*(,\s*\d{1,9}\s*)*,?\s*\)", re.ASCII)


class UnterthinerSource:
    """Source that reads networks out of `weights.npy`, which is mapped, so that only the rows asked for are read."""

    def __init__(
        self, file: Path, rows: Sequence[int], layout: Sequence[tuple[str, int, int, tuple[int, ...]]]
    ) -> None:
        self.file = file
        self.rows = list(rows)
        self.layout = list(layout)
        self._weights: np.ndarray | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_weights": None}

    @property
    def weights(self) -> np.ndarray:
        """The mapped matrix `(N, 4970)`."""
        if self._weights is None:
            self._weights = _map_matrix(self.file)
        return self._weights

    def read(self, i: int) -> dict[str, Tensor]:
        """Return the state_dict of a network, that of `architectures.unterthiner_cnn`, in module order."""
        flat = torch.from_numpy(np.array(self.weights[self.rows[i]], dtype=np.float32))
        found = {name: to_torch(name, flat[start:end].view(shape)) for name, start, end, shape in self.layout}
        return {name: found[name] for name in sorted(found, key=_module_order)}


def _map_matrix(file: Path) -> np.ndarray:
    """Map a `.npy` file that holds a matrix of floating-point numbers.

    Raises:
        FileError: it is damaged, holds something else or is no regular file.
        OSError: it is missing or cannot be read.
    """
    check_regular(file)
    try:
        found = np.load(file, mmap_mode="r", allow_pickle=False)
    except OSError:
        raise
    except Exception as error:  # numpy parses the header by Python's own parser, which raises errors of many kinds
        raise FileError(f"{file}: is damaged or no matrix of numbers: {error}") from error
    if not isinstance(found, np.ndarray) or found.ndim != 2 or found.dtype.kind != "f":
        raise FileError(f"{file}: is no matrix of floating-point numbers")
    return found


def to_torch(name: str, tensor: Tensor) -> Tensor:
    """Turn a Keras tensor into torch's layout: `(h, w, in, out)` to `(out, in, h, w)`, `(in, out)` to `(out, in)`."""
    if name.endswith("weight"):
        tensor = tensor.permute(3, 2, 0, 1) if tensor.ndim == 4 else tensor.t()
    return tensor.contiguous()


def _module_order(name: str) -> tuple[int, int]:
    layer, _, own = name.partition(".")
    return (3 if layer == "dense" else int(layer.removeprefix("conv")), own == "bias")


def load_unterthiner(folder: str | PathLike[str], *, step: int | None = FINAL_STEP, invalid: str = "drop") -> Zoo:
    """Read the Small CNN Zoo of one data set as it was published; each network is turned into torch's layout.

    Args:
        folder: the folder of `weights.npy`, `metrics.csv.gz` (or `metrics.csv`) and `layout.csv`.
        step: the checkpoint of each network to read: 86 is the final one; None reads all nine.
        invalid: treatment of rows with a weight or one of the four metrics that is not finite: "drop" leaves them out,
            with a warning, and counts them in `zoo.about["dropped"]`; "raise" refuses them; "keep" keeps them.

    Returns:
        A zoo whose rows hold the columns of the metrics, with architecture "unterthiner". `zoo.save(folder)` writes
        it in this package's form.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: damaged files or such that do not fit each other, no valid row of that step, or an invalid one with
            `invalid="raise"`.

    Example:
        >>> zoo = load_unterthiner("svhn_cropped")
        >>> verify(zoo, range(10), images=svhn_test, labels=svhn_labels) < 0.01  # (n, 1, 32, 32) in [-1, 1], grey
        True
    """
    if invalid not in ("drop", "raise", "keep"):
        raise ValueError(f"load_unterthiner: invalid must be 'drop', 'raise' or 'keep', got {invalid!r}")
    folder = Path(folder)
    metrics_file = folder / "metrics.csv.gz" if (folder / "metrics.csv.gz").exists() else folder / "metrics.csv"
    if not metrics_file.exists():
        raise FileNotFoundError(f"{folder}: holds no metrics.csv.gz")
    metrics = read_csv(metrics_file, text=("modeldir",))
    layout = _read_layout(folder / "layout.csv")
    if not (folder / "weights.npy").exists():
        raise FileNotFoundError(f"{folder}: holds no weights.npy")
    source = UnterthinerSource(folder / "weights.npy", [], layout)
    shape = source.weights.shape
    missing = {"step", *TARGETS} - set(metrics)
    if missing:
        raise ValueError(f"{metrics_file}: lacks the column(s) {', '.join(sorted(missing))}")
    for column in ("step", *TARGETS):
        text = next((value for value in metrics[column] if isinstance(value, str)), None)
        if text is not None:
            raise FileError(f"{metrics_file}: the column {column} must hold numbers, but is text such as {text!r:.40}")
    expected = (len(metrics["step"]), max(end for _, _, end, _ in layout))
    if shape != expected:
        raise ValueError(
            f"{folder / 'weights.npy'}: must be of shape {expected} by its metrics and layout, got {shape}"
        )
    kinds = set(metrics.get("config.dnn_architecture", ["cnn"]))
    if kinds != {"cnn"}:
        raise ValueError(
            f"{metrics_file}: only networks of architecture 'cnn' are known, got {sorted(map(str, kinds))}"
        )

    rows = [i for i, at in enumerate(metrics["step"]) if step is None or at == step]
    if not rows:
        raise ValueError(f"{metrics_file}: has no row with step {step}; it has {_several(metrics['step'])}")
    bad = set() if invalid == "keep" else _invalid(source.weights, metrics, rows)
    if bad and invalid == "raise":
        raise ValueError(
            f"{folder}: row {min(bad)} and {len(bad) - 1} more hold weights or metrics that are not finite"
        )
    if len(bad) == len(rows):
        raise ValueError(f"{folder}: none of its {len(rows)} networks is finite")
    if bad:
        warnings.warn(f"{folder}: {len(bad)} of {len(rows)} networks are not finite and left out", stacklevel=2)
    source.rows = [i for i in rows if i not in bad]
    columns: dict[str, list[Any]] = {
        "name": [f"network-{i:06d}" for i in source.rows],
        "architecture": ["unterthiner"] * len(source.rows),
        **{name: [v[i] for i in source.rows] for name, v in metrics.items() if name not in _OWN},
    }
    columns["weights"] = [expected[1]] * len(source.rows)
    about = {
        "source": "unterthiner",
        "targets": list(TARGETS),
        "hyperparameters": [name for name in metrics if name.startswith("config.")],
        "step": step,
        "dropped": len(bad),
        "channels": next(shape[2] for name, _, _, shape in layout if name == "conv0.weight"),
    }
    return Zoo(columns, source, about, folder)


def _read_layout(file: Path) -> list[tuple[str, int, int, tuple[int, ...]]]:
    """Return for each tensor its name in the torch module, its first and last column, and its Keras shape."""
    table = read_csv(file, text=("varname", "shape"))
    missing = {"varname", "start_idx", "end_idx", "shape"} - set(table)
    if missing:
        raise ValueError(f"{file}: lacks the column(s) {', '.join(sorted(missing))}")
    found: list[tuple[str, int, int, tuple[int, ...]]] = []
    layers: list[str] = []
    for varname, start, end, text in zip(
        *(table[key] for key in ("varname", "start_idx", "end_idx", "shape")), strict=True
    ):
        layer, _, own = str(varname).rpartition("/")
        role = {"kernel:0": "weight", "bias:0": "bias"}.get(own)
        if not _SHAPE.fullmatch(text):
            raise FileError(f"{file}: the shape of {varname:.80} must be a tuple, got {text!r:.40}")
        shape = tuple(int(n) for n in re.findall(r"\d+", text))
        if layer not in layers:
            layers.append(layer)
        k = layers.index(layer)
        dimensions = 1 if role == "bias" else 2 if k == 3 else 4
        cut = type(start) is int and type(end) is int and start >= 0 and end - start == math.prod(shape)
        if role is None or not cut or len(shape) != dimensions:
            raise FileError(f"{file}: cannot read {varname:.80}, columns {start} to {end} of shape {shape}")
        found.append((f"{'dense' if k == 3 else f'conv{k}'}.{role}", start, end, shape))
    if len(layers) != 4 or len({name for name, *_ in found}) != 8 or len(found) != 8:
        raise FileError(f"{file}: must describe three convolutions and a dense layer, got {', '.join(layers):.200}")
    return found


def _several(values: Sequence[Any]) -> str:
    """Return the different values of a column as text, a few of them."""
    found = sorted(set(values), key=lambda value: (value is None, value or 0))
    return f"{found[:20]}" + ("" if len(found) <= 20 else f" and {len(found) - 20} more")


def _invalid(weights: np.ndarray, metrics: Mapping[str, list[Any]], rows: Sequence[int]) -> set[int]:
    bad = {i for i in rows if any(metrics[target][i] is None for target in TARGETS)}
    for k in range(0, len(rows), 4096):
        part = np.asarray(rows[k : k + 4096])
        finite = np.isfinite(weights[part]).all(axis=1)
        bad.update(part[~finite].tolist())
    return bad


def verify(
    zoo: Zoo, networks: Sequence[int], *, images: Tensor | None = None, labels: Tensor | None = None
) -> list[tuple[float, str]]:
    """Compare the accuracy on the test images with the column `test_accuracy`.

    Args:
        zoo: of `load_unterthiner`.
        networks: positions of the networks.
        images: the test images of the data set `(n, 1, h, w)` float32, with colours averaged to grey and values in
            [-1, 1], as the networks saw them.
        labels: `(n,)` int64.

    Returns:
        Pairs of difference and name of the network.

    Raises:
        ValueError: no images or labels.
    """
    given, truth = check_images("unterthiner", images, labels, "(n, 1, h, w)")

    def build(row: Mapping[str, Any]) -> nn.Module:
        return unterthiner_cnn(row.get("config.activation") or "relu", channels=zoo.about.get("channels", 1))

    return compare(
        zoo, networks, build=build, measure=lambda module, row: accuracy(module, given, truth), column="test_accuracy"
    )

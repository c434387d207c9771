"""Loader of the model zoos of Schürholt et al. 2022, "Model Zoos: A Dataset of Diverse Populations", arXiv 2209.14764.

Layout of the raw zips, after https://github.com/ModelZoos/ModelZooDataset (checkpoints_to_datasets/dataset_base.py,
model_definitions) and https://github.com/HSG-AIML/NeurIPS_2021-Weight_Space_Learning: per network a folder of Ray Tune,

- `checkpoint_000050/checkpoints` (or `checkpoint_50/checkpoints`): the state_dict after that epoch, a file without
  extension; beside it the optimiser's state;
- `result.json`: a JSON object per line and epoch: `training_iteration`, `train_acc`, `train_loss`, `test_acc`,
  `test_loss`, `config`. Zoos that tested before training have a line for epoch 0, so line k is epoch k; others
  begin with epoch 1. `training_iteration` tells;
- `params.json`: the configuration, such as `model::type` (CNN, CNN2, CNN3), `model::nlin`, `optim::lr`, `seed`.

The `.pt` files beside the zips are pickled objects of the authors' classes; they are refused and never loaded.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data.checkpoints import load_state_dict
from ..regular_files import FileError, parse_json, read_json, read_text
from .architectures import ACTIVATIONS
from .checkpoint_folder import refuse_dataset
from .csv_table import one_type
from .rebuilding import accuracy, check_images, compare
from .table import FileSource, Zoo

METRICS = ("train_acc", "train_loss", "test_acc", "test_loss")
TARGETS = (*METRICS, "ggap")
_CHECKPOINT = re.compile(r"checkpoint_(\d+)$")
_ADVICE = "download the zip of the raw zoo and give the folder that holds its networks"


def load_schuerholt(
    folder: str | PathLike[str], *, epochs: int | str | Iterable[int] = "last", invalid: str = "drop"
) -> Zoo:
    """Read a raw model zoo of Schürholt et al. as it was published, a folder of Ray Tune runs.

    Args:
        folder: a folder with one folder per network, directly or one level down.
        epochs: the checkpoints of each network to read: "last", "all", one epoch or several.
        invalid: treatment of checkpoints with weights that are not finite, or without a line in `result.json`. "drop"
            leaves them out, with a warning, and counts them in `zoo.about["dropped"]`; "raise" refuses them; both read
            every checkpoint once. "keep" keeps them unread, with None for what is not known.

    Returns:
        A zoo whose rows hold `epoch`, the four metrics (None where the authors wrote -999 for "not measured"), `ggap`
        (train_acc - test_acc), and the configuration as `config.*`; architecture is "schuerholt-" and the type.

    Raises:
        FileNotFoundError: no such folder, no networks in it, or none with such an epoch.
        FileError: a damaged `result.json` or `params.json`, or lines that cannot be assigned to epochs.
        CheckpointError: `folder` is one of the pickled `.pt` data sets, or a checkpoint holds more than tensors.

    Example:
        >>> zoo = load_schuerholt("tune_zoo_mnist_uniform", epochs=50)
        >>> verify(zoo, range(5), images=mnist_test, labels=mnist_labels) < 0.01  # (n, 1, 28, 28), standardised
        True
    """
    if invalid not in ("drop", "raise", "keep"):
        raise ValueError(f"load_schuerholt: invalid must be 'drop', 'raise' or 'keep', got {invalid!r}")
    folder = Path(folder)
    if folder.is_file():
        raise refuse_dataset(folder, _ADVICE)
    runs = _runs(folder)
    if isinstance(epochs, str) and epochs not in ("last", "all"):
        raise ValueError(f"load_schuerholt: epochs must be 'last', 'all' or integers, got {epochs!r}")
    wanted = set() if isinstance(epochs, str) else {epochs} if isinstance(epochs, int) else set(epochs)

    rows: list[dict[str, Any]] = []
    files: list[Path] = []
    dropped, offsets = 0, set()
    for run in runs:
        there = _checkpoints(run)
        lines, offset = _results(run, max(there, default=0))
        offsets.add(offset)
        config = _config(run, lines)
        chosen = sorted(there)
        if epochs != "all":
            chosen = chosen[-1:] if epochs == "last" else [epoch for epoch in chosen if epoch in wanted]
        for epoch in chosen:
            reason = _why_invalid(there[epoch], epoch in lines) if invalid != "keep" else ""
            if reason and invalid == "raise":
                raise ValueError(f"{there[epoch]}: {reason}")
            if reason:
                dropped += 1
                continue
            files.append(there[epoch])
            rows.append(
                {"name": f"{run.name}-epoch{epoch:03d}", "epoch": epoch, **_metrics(lines.get(epoch, {})), **config}
            )
    if not rows:
        raise FileNotFoundError(f"{folder}: none of its {len(runs)} networks has a usable checkpoint of epoch {epochs}")
    if dropped:
        warnings.warn(f"{folder}: {dropped} checkpoints are not finite or without results and left out", stacklevel=2)
    names = list(dict.fromkeys(key for row in rows for key in row))
    columns = {key: one_type([row.get(key) for row in rows]) for key in names}
    columns["architecture"] = [f"schuerholt-{row.get('config.model::type', 'unknown')}" for row in rows]
    about = {
        "source": "schuerholt",
        "targets": list(TARGETS),
        "hyperparameters": [key for key in names if key.startswith("config.")],
        "dropped": dropped,
        "epoch_offset": sorted(offsets),
    }
    return Zoo(columns, FileSource(files), about, folder)


def _runs(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: there is no such folder")
    for pattern in ("*/result.json", "*/*/result.json"):
        found = sorted(file.parent for file in folder.glob(pattern))
        if found:
            return found
    pickled = sorted(folder.glob("*.pt"))
    if pickled:
        raise refuse_dataset(pickled[0], _ADVICE)
    raise FileNotFoundError(f"{folder}: holds no networks, which are folders with a result.json")


def _checkpoints(run: Path) -> dict[int, Path]:
    found = {}
    for entry in run.iterdir():
        match = _CHECKPOINT.match(entry.name)
        if match and (entry / "checkpoints").is_file():
            found[int(match.group(1))] = entry / "checkpoints"
    return found


def _results(run: Path, last_epoch: int) -> tuple[dict[int, dict[str, Any]], int]:
    """Return the lines of `result.json` by epoch, and the epoch of the first line."""
    file = run / "result.json"
    lines: list[dict[str, Any]] = []
    for number, text in enumerate(read_text(file).split("\n"), 1):
        if text.strip():
            try:
                lines.append(parse_json(text, "", dict, nonfinite=True))
            except FileError as error:
                raise FileError(f"{file}: line {number} is no JSON object{error}") from error
    if all("training_iteration" in line for line in lines):
        by_epoch = {}
        for line in lines:  # of a resumed run, the later line counts
            epoch = line["training_iteration"]
            if type(epoch) is not int:
                raise FileError(f"{file}: its training_iteration must be an integer, one is {epoch!r:.40}")
            by_epoch[epoch] = line
        return by_epoch, min(by_epoch, default=1)
    offset = last_epoch - len(lines) + 1
    if offset not in (0, 1):
        raise FileError(
            f"{file}: its {len(lines)} lines do not name their epochs (training_iteration) and their "
            f"number fits neither 0 nor 1 as the first, the last checkpoint being of epoch {last_epoch}"
        )
    return {k + offset: line for k, line in enumerate(lines)}, offset


def _config(run: Path, lines: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    if (run / "params.json").exists():
        config = read_json(run / "params.json", dict, nonfinite=True)
    else:
        config = next((line["config"] for line in lines.values() if "config" in line), {})
        if not isinstance(config, dict):
            raise FileError(f"{run / 'result.json'}: its config must be a JSON object, is {config!r:.40}")
    plain = (bool, int, float, str, type(None))
    return {f"config.{key}": value if isinstance(value, plain) else json.dumps(value) for key, value in config.items()}


def _metrics(line: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key in METRICS:
        value = line.get(key)
        known = isinstance(value, (int, float)) and value != -999 and abs(value) < float("inf")
        found[key] = float(value) if known else None  # type: ignore[arg-type]
    train, test = found["train_acc"], found["test_acc"]
    found["ggap"] = None if train is None or test is None else train - test
    return found


def _why_invalid(file: Path, has_line: bool) -> str:
    if not has_line:
        return "result.json has no line for this epoch"
    finite = all(bool(t.isfinite().all()) for t in load_state_dict(file).values() if t.is_floating_point())
    return "" if finite else "holds weights that are not finite"


class SchuerholtCNN(nn.Module):
    """CNN of the zoos, of `model::type` CNN or CNN2 for images of 28 x 28, or CNN3 for images of 32 x 32.

    Layers, pooling, activations and dropout are numbered together in one `module_list`, so that the names of tensors
    depend on whether there is dropout.

    Raises:
        ValueError: an unknown type or activation.
    """

    def __init__(self, kind: str, channels: int, activation: str, dropout: bool) -> None:
        super().__init__()
        if kind not in _CONVOLUTIONS or activation not in ACTIVATIONS:
            raise ValueError(
                f"verify: cannot rebuild a network of type {kind!r} with activation {activation!r}; known are "
                f"{', '.join(_CONVOLUTIONS)} with {', '.join(ACTIVATIONS)}; give build=, measure= and column="
            )
        always_dropout = kind == "CNN3"
        drop = [nn.Dropout(0.0)] if dropout or always_dropout else []
        layers: list[nn.Module] = []
        before = channels
        *convolutions, flat = _CONVOLUTIONS[kind]
        for k, (width, kernel) in enumerate(convolutions):
            pooled = k < 2 or always_dropout
            layers += [nn.Conv2d(before, width, kernel), *([nn.MaxPool2d(2, 2)] if pooled else [])]
            layers += [ACTIVATIONS[activation](), *(drop if pooled else [])]
            before = width
        layers += [nn.Flatten(), nn.Linear(flat[0], 20), ACTIVATIONS[activation](), *drop, nn.Linear(20, flat[1])]
        self.module_list = nn.ModuleList(layers)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits `(n, 10)` of images `(n, channels, h, w)`."""
        for layer in self.module_list:
            images = layer(images)
        return images


_CONVOLUTIONS = {
    "CNN": ((8, 5), (6, 5), (4, 2), (36, 10)),
    "CNN2": ((6, 5), (9, 5), (6, 2), (54, 10)),
    "CNN3": ((16, 3), (32, 3), (15, 3), (60, 10)),
}
"""Type -> width and kernel of its three convolutions; then the size of the flattened map, and classes."""


def verify(
    zoo: Zoo, networks: Sequence[int], *, images: Tensor | None = None, labels: Tensor | None = None
) -> list[tuple[float, str]]:
    """Compare the accuracy on the test images with the column `test_acc`.

    Args:
        zoo: of `load_schuerholt`.
        networks: positions of the networks.
        images: the test images `(n, channels, h, w)` float32, standardised as in `dataset.pt` of the zoo.
        labels: `(n,)` int64.

    Returns:
        Pairs of difference and name of the network.

    Raises:
        ValueError: no images or labels, or a network of unknown architecture.
    """
    given, truth = check_images("schuerholt", images, labels, "(n, channels, h, w)")

    def build(row: Mapping[str, Any]) -> nn.Module:
        return SchuerholtCNN(
            str(row.get("config.model::type")),
            given.shape[1],
            str(row.get("config.model::nlin")),
            bool(row.get("config.model::dropout")),
        )

    def measure(module: torch.nn.Module, row: Mapping[str, Any]) -> float:
        return accuracy(module, given, truth)

    return compare(zoo, networks, build=build, measure=measure, column="test_acc")
